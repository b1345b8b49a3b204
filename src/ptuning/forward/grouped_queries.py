"""Grouped-query attention behind a mask, without a copy of keys and values for every query head.

In grouped-query models several query heads read the same keys and values. Where there is a mask,
transformers repeats these for each head; on a CPU PyTorch's attention reads them as they are, to
the same numbers. With kept keys and values (`prefix_store`), long against the queries, the copies
and their gradients were a sixth of a training step.

    plain     [K K K | V V V] copied for each query head, attention
    here      attention over K and V in groups

The model's configuration names the attention that its layers look up; ours stands there for the
time of a forward. The plain path is transformers' ``sdpa``; a test holds the two together.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_PLAIN, _GROUPED = "sdpa", "sdpa_grouped_queries"
_ASKS = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)")


@contextmanager
def grouped_queries(model: nn.Module) -> Iterator[None]:
    """The model's layers read keys and values in groups meanwhile, if that is of use.

    Threads that use the model meanwhile may get either attention: the numbers are the same.
    """
    config = _config(model)
    if config is None or config._attn_implementation != _PLAIN:
        yield
        return
    config._attn_implementation = _GROUPED
    try:
        yield
    finally:
        config._attn_implementation = _PLAIN


def plain_or_grouped(name: str | None) -> bool:
    """The attention of that name is PyTorch's, which takes any mask."""
    return name in (_PLAIN, _GROUPED)


def _config(model: nn.Module) -> Any:
    """The configuration that the layers look in; None where repeated keys and values stay."""
    config: Any = getattr(model, "config", None)
    compiled = hasattr(model, "_orig_mod")
    if config is None or compiled or _device(model) != "cpu":
        return None
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    groups = getattr(text, "num_key_value_heads", None) or heads
    if groups == heads or not all(
        map(_only_looks_up, {type(m).__module__ for m in model.modules()})
    ):
        return None
    return text


def _device(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "")


@cache
def _only_looks_up(module: str) -> bool:
    """That code never compares the attention's name: then another name is nothing to it."""
    try:
        return not _ASKS.search(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError):  # code without a file
        return False


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As ``sdpa_attention_forward``: ``(R, heads, S, width)`` and ``(R, groups, T, width)`` twice
    to ``(R, S, heads, width)``."""
    asked = any(others.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if attention_mask is None or asked or query.shape[1] == key.shape[1] or query.shape[2] == 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    made = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return made.transpose(1, 2).contiguous(), None


AttentionInterface.register(_GROUPED, _attention)
AttentionMaskInterface.register(_GROUPED, sdpa_mask)
