"""Attention as our forwards compute it: the numbers of transformers' own, sooner.

    plain       [K K K | V V V] copied for each query head, attention
    in groups   attention over K and V as they are

In grouped-query models several query heads read the same keys and values. Where there is a mask,
transformers repeats these for each head; on a CPU PyTorch's attention reads them as they are, to
the same numbers. Behind known keys and values (`prefix_store`), long against the queries, the
copies and their gradients were a sixth of a training step.

On a CPU the gradient of short rows in bfloat16 takes PyTorch's attention 4 to 9 times as long as in
float32 (8 rows of 20: 6.7 and 1.4 ms on a processor with AMX), so there it is computed in float32.

Layers look their attention up by name, here ``sdpa``; for the time of our forwards that name stands
for `attention`, which in threads that do not ask for it is the plain path, transformers' own. A
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
from ..backbone.traits import groups_queries, looks_attention_up
from ..backbone.upstream import is_compiled
from ..threads import CHANGING

_LONG = 2**16
"""Queries x keys of a row: from 256 x 256 on both formats take as long."""

_forwards = 0
_theirs: Any = sdpa_attention_forward
"""What the name stands for while no forward is ours."""
_here = threading.local()


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """The model's layers use `attention` meanwhile, in this thread, if that is of use: on a CPU."""
    if is_compiled(model) or not looks_attention_up(model) or device_of(model).type != "cpu":
        yield
        return
    with _ours():
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
    with _ours():
        yield True


@contextmanager
def _ours() -> Iterator[None]:
    before, _here.ours = _asked_for(), True
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _here.ours = before


def _asked_for() -> bool:
    # A layer is compiled for us alone, and compilers do not know threads.
    return torch.compiler.is_compiling() or getattr(_here, "ours", False)


def _count(change: int) -> None:
    """The first forward brings our attention, the last what was there: threads may overlap."""
    global _forwards, _theirs
    with CHANGING:
        if not _forwards:
            _theirs = AttentionInterface()["sdpa"]
        _forwards += change
        AttentionInterface.register("sdpa", attention if _forwards else _theirs)


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
    others |= {"dropout": dropout, "scaling": scaling}
    special = any(others.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if not _asked_for() or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    before = query.dtype
    if _slow_backwards(query, key):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    alike = query.shape[1] == key.shape[1] or query.shape[2] == 1
    if attention_mask is None or alike:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return output.to(before), None
    output = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous().to(before), None


def _slow_backwards(query: Tensor, key: Tensor) -> bool:
    """On a CPU, in half precision, and not yet so long that float32 takes longer."""
    if not (query.requires_grad and torch.is_grad_enabled()) or query.device.type != "cpu":
        return False
    return query.dtype.itemsize < 4 and query.shape[2] * key.shape[2] <= _LONG
