"""Attention as our forwards compute it: the numbers of transformers' own, sooner.

    plain       [K K K | V V V] copied for each query head, attention
    in groups   attention over K and V as they are

In grouped-query models several query heads read the same keys and values. Where there is a mask,
transformers repeats these for each head; on a CPU PyTorch's attention reads them as they are, to
the same numbers. Behind known keys and values (`prefix_store`), long against the queries, the
copies and their gradients were a sixth of a training step.

On a CPU the gradient of short rows in bfloat16 takes PyTorch's attention 4 to 9 times as long as in
float32 (8 rows of 20: 6.7 and 1.4 ms on a processor with AMX). Two products take less than either
where the processor has AMX (`attention_products`); elsewhere it is computed in float32.

On an H100 or H200 torch's first choice in half precision since 2.11 is cuDNN's attention. It gets
ready anew for every shape, which takes as long as many steps where rows have many lengths, so it is
off for the time of our forwards, except where shapes come again and again (`grouped_on_gpu`).
Behind a mask its gradient is no number for a row that sees nothing, such as padding, if the last
tile of keys is half full (pytorch/pytorch#196678): then there are eight keys more, which nobody
sees.

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
from .attention_products import attention_in_products, products_serve

_LONG = 2**16
"""Queries x keys of a row: from 256 x 256 on both formats take as long."""

_TILE, _MORE = 128, 8
"""Keys that cuDNN's kernels read at once, and those that are added to half a tile."""

_forwards = _on_gpu = 0
_theirs: Any = sdpa_attention_forward
"""What the name stands for while no forward is ours."""
_cudnn_was_on = True
_here = threading.local()


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """The model's layers use `attention` meanwhile, in this thread, if that is of use."""
    known = device_of(model).type in ("cpu", "cuda")
    if is_compiled(model) or not looks_attention_up(model) or not known:
        yield
        return
    with _ours(on_gpu=device_of(model).type == "cuda"):
        yield


@contextmanager
def grouped_on_gpu(model: nn.Module) -> Iterator[bool]:
    """Groups of query heads are read as they are on a GPU too, by cuDNN's attention, if the model
    and the GPU are such that it serves.

    It takes seconds to get ready for each new shape, so it is for shapes that come again and again.

    Returns:
        whether it is so.
    """
    device = device_of(model)
    if device.type != "cuda" or not groups_queries(model):
        yield False
        return
    config: Any = model.config
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    half = getattr(model, "dtype", None) in (torch.bfloat16, torch.float16)
    if not half or width > 128 or width % 8 or torch.cuda.get_device_capability(device) < (9, 0):
        yield False
        return
    with _ours(grouped=True, on_gpu=True):
        yield True


@contextmanager
def _ours(on_gpu: bool, grouped: bool = False) -> Iterator[None]:
    before = _asked_for(), _reads_groups()
    _here.ours, _here.grouped = True, grouped or _reads_groups()
    _count(1, on_gpu)
    try:
        yield
    finally:
        _count(-1, on_gpu)
        _here.ours, _here.grouped = before


def _asked_for() -> bool:
    # A layer is compiled for us alone, and compilers do not know threads.
    return torch.compiler.is_compiling() or getattr(_here, "ours", False)


def _reads_groups() -> bool:
    """On a GPU, in this thread."""
    return getattr(_here, "grouped", False)


def _count(change: int, on_gpu: bool) -> None:
    """The first forward brings our attention, the last what was there: threads may overlap."""
    global _forwards, _on_gpu, _theirs, _cudnn_was_on
    with CHANGING:
        if not _forwards:
            _theirs = AttentionInterface()["sdpa"]
        _forwards += change
        AttentionInterface.register("sdpa", attention if _forwards else _theirs)
        if not on_gpu:
            return
        if not _on_gpu:
            _cudnn_was_on = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _on_gpu += change
        if not _on_gpu:
            torch.backends.cuda.enable_cudnn_sdp(_cudnn_was_on)


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
    if _needs_gradient(query) and not dropout and products_serve(query, key):
        causal = attention_mask is None and _is_causal(module, query, others.get("is_causal"))
        return attention_in_products(query, key, value, attention_mask, scaling, causal), None
    before = query.dtype
    if _slow_backwards(query, key):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    if attention_mask is not None and query.is_cuda and _spoils_gradient(query, key):
        key, value, attention_mask = _with_more(key, value, attention_mask)
    alike = query.shape[1] == key.shape[1] or query.shape[2] == 1
    if attention_mask is None or alike or not _serves_groups(query):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return output.to(before), None
    output = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous().to(before), None


def _needs_gradient(query: Tensor) -> bool:
    return query.requires_grad and torch.is_grad_enabled()


def _is_causal(module: nn.Module, query: Tensor, said: bool | None) -> bool:
    """Without a mask a query sees the keys up to its own, as transformers has it; one alone is the
    last and sees all."""
    causal = getattr(module, "is_causal", True) if said is None else said
    return query.shape[2] > 1 and bool(causal)


def _slow_backwards(query: Tensor, key: Tensor) -> bool:
    """On a CPU, in half precision, and not yet so long that float32 takes longer."""
    if query.device.type != "cpu" or not _trains_in_half(query):
        return False
    return query.shape[2] * key.shape[2] <= _LONG


def _trains_in_half(query: Tensor) -> bool:
    return query.dtype.itemsize < 4 and _needs_gradient(query)


def _serves_groups(query: Tensor) -> bool:
    """Attention reads groups of query heads as they are, sooner than copies are made."""
    if not query.is_cuda:
        return True
    return query.dtype.itemsize < 4 if torch.compiler.is_compiling() else _reads_groups()


def _spoils_gradient(query: Tensor, key: Tensor) -> bool:
    """cuDNN's may be no number (see above)."""
    return _trains_in_half(query) and key.shape[2] % _TILE == _TILE // 2


def _with_more(key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and a mask ``(…, S, T)`` with columns that nobody sees."""
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    key, value = F.pad(key, (0, 0, 0, _MORE)), F.pad(value, (0, 0, 0, _MORE))
    return key, value, F.pad(mask, (0, _MORE), value=hidden)
