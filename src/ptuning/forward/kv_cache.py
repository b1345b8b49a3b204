"""Keys and values of some columns of a causal model: computing them, and a cache around them.

The cache is made anew for every forward, so what it is made of never changes. This module does not
know which columns these are (`prefix_store`, `shared_prefix`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..backbone.base_model import counts_columns, scales_with_length
from .grouped_queries import grouped_queries
from .plain import forward_parameters, positions


class _KeptLayer(DynamicLayer):
    """A cache layer around keys and values, without a copy of them."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values


def cache_of(layers: Iterable[tuple[Tensor, Tensor]]) -> Cache:
    """A new cache around keys and values ``(R, heads, tokens, head width)`` of each layer."""
    return Cache(layers=[_KeptLayer(keys, values) for keys, values in layers])


def keys_and_values(model: nn.Module, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each layer makes of rows ``(R, T)``: ``(R, heads, T, head width)``; without logits."""
    body = getattr(model, "base_model", model)
    cache = DynamicCache()  # without a configuration layers with a window keep every column
    with grouped_queries(model):
        body(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **positions(body, mask, ids.shape[1], 1),
        )
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def reads_caches(model: nn.Module) -> bool:
    """Every layer attends to keys and values that it is given, on one device.

    Recurrent layers have a state instead. Where rotary frequencies follow the length of the input,
    a prefix alone has others than within its row. Gradient checkpointing runs layers again, and
    transformers then gives them no cache.
    """
    config: Any = model.config
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"]
    attends = {"full_attention", "sliding_attention"}.issuperset(kinds)
    again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    takes = "past_key_values" in forward_parameters(model)
    if not (attends and takes) or counts_columns(model) or scales_with_length(model):
        return False
    return not (again or spread or getattr(model, "_is_stateful", False))
