"""What a model's output head is given, taken down while the model runs, and logits made of it.

    plain     the model's own logits: head(hidden), and what it does behind that
    here      the same of some positions or words; in half precision the products are float32

Logits of 16 to 32 are an eighth apart in bfloat16: likely words tie, and probabilities jump. Who
makes logits here (`chunked`, `label_words`, `vocabulary`) runs the model with a head that sees
less, and holds the result against the model's own logits; a model that does anything else with
what its head gives keeps these.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeGuard
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..backbone.traits import finished_logits, output_head, vocabulary_bias
from ..backbone.upstream import is_offloaded

_LIKELY = 64
"""Words of a position whose products are float32 where there is no product for all of them: torch
has none on a CPU that multiplies half precision and does not round to it."""
_other: WeakSet[nn.Module] = WeakSet()


@contextmanager
def seeing(head: nn.Module, positions: slice, rows: slice = slice(None)) -> Iterator[list[Tensor]]:
    """The head sees some positions of some rows only; gives what it would have seen: a list that
    gets the hidden states ``(R, T, width)`` of each call. The last one is the batch's: keys and
    values of prefixes may be computed before it, by a model that has no body without a head.

    The hook serves this thread's call alone, so other threads may use the model meanwhile.
    """
    caller = threading.get_ident()
    inputs: list[Tensor] = []

    def take(module: nn.Module, args: Any) -> Any:
        if threading.get_ident() != caller:
            return None
        inputs.append(args[0])
        return (args[0][rows, positions], *args[1:])

    handle = head.register_forward_pre_hook(take)
    try:
        yield inputs
    finally:
        handle.remove()


def frozen_head(model: nn.Module) -> nn.Module | None:
    """The head, if nobody trains it, and the model's logits are made of it as here as far as is
    known."""
    head = output_head(model)
    if head is None or model in _other:
        return None
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())
    return None if trained else head


def frozen_matrix(model: nn.Module) -> nn.Linear | None:
    """`frozen_head`, if it is a matrix of this process."""
    head = frozen_head(model)
    return head if _is_matrix(head) else None


def _is_matrix(head: nn.Module | None) -> TypeGuard[nn.Linear]:
    if type(head) is not nn.Linear or is_offloaded(head):
        return False
    # Other kinds of parameters are quantized (torchao's) or lie in several processes.
    return type(head.weight) is nn.Parameter and not head.weight.is_meta


def leave(model: nn.Module) -> None:
    """Its logits are made in another way, or nobody can see what its head is given."""
    _other.add(model)


@torch.no_grad()
def compared(model: nn.Module, ours: Tensor, own: Tensor) -> bool:
    """Whether logits made here are the model's own, up to the rounding of its head and of sums in
    another order; if they are not, that is remembered.

    Of the words that `ours` has, and no others: a model may rule some of the vocabulary out.
    """
    tolerance = max(1e-4, 8 * torch.finfo(own.dtype).eps)
    # A member may have gone astray, in both; the model's alone are words that it rules out.
    finite = torch.isfinite(own) | torch.isfinite(ours)
    largest = ours.masked_fill(~torch.isfinite(ours), 0).abs().max() if ours.numel() else 0.0
    allowed = tolerance * max(1.0, float(largest))  # not of `own`: what is ruled out is huge there
    same = ours.shape == own.shape and bool(((ours - own).abs() <= allowed)[finite].all())
    if not same:
        leave(model)
    return same


def logits_of(model: nn.Module, head: nn.Module, hidden: Tensor) -> Tensor:
    """Logits ``(…, vocabulary)`` of hidden states ``(…, width)``, float32 in half precision."""
    logits = finished_logits(model, _product(head, hidden))
    bias = vocabulary_bias(model)
    return logits if bias is None else logits + bias


def logits_of_words(model: nn.Module, head: nn.Linear, hidden: Tensor, words: Tensor) -> Tensor:
    """Logits ``(N, W)`` of the words ``(N, W)`` alone, of hidden states ``(N, width)``; without a
    `vocabulary_bias`."""
    products = _of_words(head.weight[words], hidden)
    if head.bias is not None:
        products = products + head.bias[words]
    return finished_logits(model, products)


def is_half(head: nn.Linear) -> bool:
    """Its products would be rounded to half precision."""
    return head.weight.is_floating_point() and head.weight.dtype.itemsize == 2


def _product(head: nn.Module, hidden: Tensor) -> Tensor:
    """What the head makes of hidden states ``(…, width)``: ``(…, vocabulary)``."""
    if not _is_matrix(head) or not is_half(head):
        made: Tensor = head(hidden)
        return made
    found: Tensor = _Unrounded.apply(hidden, head.weight)
    return found if head.bias is None else found + head.bias


class _Unrounded(torch.autograd.Function):
    """Hidden states ``(…, width)`` times a frozen weight ``(vocabulary, width)`` of half precision:
    float32; on a CPU those of each position's likeliest words are not rounded before. The gradient
    is the plain product's."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(weight)
        context.dtype = hidden.dtype
        flat = hidden.flatten(0, -2).to(weight.dtype)
        if _multiplies_unrounded(weight.device, weight.dtype):
            found = torch.mm(flat, weight.T, out_dtype=torch.float32)
        else:
            found = (flat @ weight.T).float()
            likely = found.topk(min(_LIKELY, len(weight)), dim=1, sorted=False).indices
            found.scatter_(1, likely, _of_words(weight[likely], flat))
        return found.view(*hidden.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = context.saved_tensors
        return (gradient.to(weight.dtype) @ weight).to(context.dtype), None


@cache
def _multiplies_unrounded(device: torch.device, dtype: torch.dtype) -> bool:
    """torch has a product of half precision that gives float32 there."""
    if device.type != "cuda":
        return False
    few = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return torch.mm(few, few, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


def _of_words(weights: Tensor, hidden: Tensor) -> Tensor:
    """Products ``(N, W)`` of each position's own words ``(N, W, width)``."""
    with torch.autocast(hidden.device.type, enabled=False):  # which would round them again
        return (_single(weights) @ _single(hidden).unsqueeze(-1)).squeeze(-1)


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize == 2 else tensor
