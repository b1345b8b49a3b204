"""Grouped-query attention behind a mask, without a copy of keys and values for every query head.

In grouped-query models several query heads read the same keys and values. Where there is a mask,
transformers repeats these for each head; on a CPU PyTorch's attention reads them as they are, to
the same numbers. Behind known keys and values (`prefix_store`), long against the queries, the
copies and their gradients were a sixth of a training step.

    plain     [K K K | V V V] copied for each query head, attention
    here      attention over K and V in groups

Layers look their attention up by name, here ``sdpa``; for the time of our forwards that name stands
for `attention`, which in threads that do not ask for groups is the plain path, transformers' own. A
test holds the two together.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..backbone.base_model import device_of
from ..backbone.traits import groups_queries
from ..backbone.upstream import is_compiled
from ..threads import CHANGING

_forwards = 0
_here = threading.local()


@contextmanager
def grouped_queries(model: nn.Module) -> Iterator[None]:
    """The model's layers read keys and values in groups meanwhile, in this thread, if that is of
    use."""
    if is_compiled(model) or not groups_queries(model) or device_of(model).type != "cpu":
        yield
        return
    with _in_groups():
        yield


@contextmanager
def grouped_on_gpu(model: nn.Module) -> Iterator[bool]:
    """The same on a GPU, for cuDNN's attention, if the model and the GPU are such that it serves.

    It takes seconds to get ready for each new shape, so it is for shapes that come again and again.

    Returns:
        whether it is so.
    """
    device, config = device_of(model), getattr(model, "config", None)
    if device.type != "cuda" or config is None or not groups_queries(model):
        yield False
        return
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    half = getattr(model, "dtype", None) in (torch.bfloat16, torch.float16)
    if not half or width > 128 or width % 8 or torch.cuda.get_device_capability(device) < (9, 0):
        yield False
        return
    with _in_groups():
        yield True


@contextmanager
def _in_groups() -> Iterator[None]:
    before, _here.grouped = _grouped(), True
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _here.grouped = before


def _grouped() -> bool:
    # A layer is compiled for us alone, and compilers do not know threads.
    return torch.compiler.is_compiling() or getattr(_here, "grouped", False)


def _count(change: int) -> None:
    """The first forward brings our attention, the last takes it away: threads may overlap."""
    global _forwards
    with CHANGING:
        _forwards += change
        AttentionInterface.register("sdpa", attention if _forwards else sdpa_attention_forward)


def attention(
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
    alike = query.shape[1] == key.shape[1] or query.shape[2] == 1
    if not _grouped() or attention_mask is None or asked or alike:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    output = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None
