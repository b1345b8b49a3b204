"""Keys and values of some columns of a causal model: computing them, and a cache around them.

The cache is made anew for every forward, so what it is made of never changes. This module does not
know which columns these are (`prefix_store`, `shared_prefix`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..backbone.upstream import CACHE
from ..devices import sent
from .attention import own_attention
from .kv_pool import KeyValuePool
from .norms import own_norms
from .plain import positions


class _KeptLayer(DynamicLayer):
    """A cache layer around keys and values, without a copy of them."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values


def cache_of(layers: Iterable[tuple[Tensor, Tensor]]) -> Cache:
    """A new cache around keys and values ``(R, heads, tokens, head width)`` of each layer."""
    return Cache(layers=[_KeptLayer(keys, values) for keys, values in layers])


def pooled_cache(pool: KeyValuePool, slots: Tensor) -> Cache:
    """A new cache around slots ``(R, kept)`` of a pool, each layer's read when the layer runs."""
    return Cache(layers=[PooledLayer(pool, layer, slots) for layer in range(pool.layers)])


class PooledLayer(DynamicLayer):
    """A cache layer that reads a pool's slots when its turn comes, and keeps nothing of it.

    Args:
        pool: of keys and values.
        layer: its number.
        slots: ``(R, kept)``.
    """

    def __init__(self, pool: KeyValuePool, layer: int, slots: Tensor):
        super().__init__()
        *planes, self.heads = pool.planes_of(layer)
        self.planes, self.slots = planes, slots
        size = (len(slots), self.heads, slots.shape[1], 1)
        # What the base class asks is a shape: no number of these is ever read.
        keys, values = (plane[:1, :1, None, None].expand(size) for plane in self.planes)
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What is kept and, behind it, what is new: keys and values ``(R, heads, T, width)``."""
        keys, values = self.planes
        return self._behind(keys, key_states), self._behind(values, value_states)

    def _behind(self, plane: Tensor, states: Tensor) -> Tensor:
        kept = F.embedding(self.slots, plane).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return torch.cat([kept, states], -2)


def keys_and_values(
    model: nn.Module, rows: Sequence[tuple[int, ...]], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """What each layer makes of R rows of ids, each at the right end of T columns:
    ``(R, heads, T, head width)``; without logits."""
    length = max(1, max(map(len, rows)))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    mask[:, -1] = 1  # an empty row: some column must be seen; it is never read
    ids, mask = sent(ids, device), sent(mask, device)
    body = getattr(model, "base_model", model)
    cache = DynamicCache()  # without a configuration layers with a window keep every column
    with own_attention(model), own_norms(model):
        body(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **{CACHE: cache},
            **positions(body, mask, length, 1),
        )
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
