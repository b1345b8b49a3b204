"""Norms of a frozen model whose gradient takes fewer passes, on a CPU.

    y   = w x r,  r = 1 / sqrt(mean(x²) + ε)         (RMSNorm, arXiv 1910.07467)
    dx  = r (g w - x r mean(g w x r))

    plain   the gradient of each operation of transformers' module by itself
    here    the same y, to the bit; dx at once: 0.55 of the time of both, and 0.4 in float32

A norm is served so once its module has been seen to give the same, and for the time of our forwards
that need gradients (`own_forwards`); elsewhere it stays its own. A test holds the two together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..backbone.base_model import device_of
from ..threads import CHANGING
from .own_forwards import own_forwards

_ROWS = 3
"""Of numbers that a module is tried with."""
_NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far the gradient may be from the module's, as a share of it; other formats stay plain."""

_here = threading.local()
_alike: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()


@contextmanager
def own_norms(model: nn.Module) -> Iterator[None]:
    """The model's norms are ours meanwhile, in this thread, if that is of use."""
    off = getattr(_here, "off", False) or not torch.is_grad_enabled()
    if off or torch.is_autocast_enabled("cpu") or device_of(model).type != "cpu":
        yield
        return
    with own_forwards({norm: partial(_forward, norm) for norm in _served(model)}):
        yield


@contextmanager
def plain_norms() -> Iterator[None]:
    """Norms stay their own meanwhile, in this thread: what is compiled makes its own of them."""
    before = getattr(_here, "off", False)
    _here.off = True
    try:
        yield
    finally:
        _here.off = before


def _served(model: nn.Module) -> list[nn.Module]:
    """The model's norms that are alike; looked for once."""
    with CHANGING:  # before anybody's are there
        if model not in _alike:
            _alike[model] = [module for module in model.modules() if _is_alike(module)]
        return _alike[model]


def _is_alike(module: nn.Module) -> bool:
    """A norm of one frozen weight that gives what ours gives."""
    if not type(module).__name__.endswith("RMSNorm") or "forward" in vars(module):
        return False
    named = dict(module.named_parameters())
    weight = named.get("weight")
    if len(named) != 1 or weight is None or weight.dim() != 1 or weight.dtype not in _NEAR:
        return False
    if (epsilon := _epsilon(module)) is None:
        return False
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(_ROWS, len(weight), generator=draw).to(weight.dtype) for _ in range(2))
    frozen = weight.detach()
    try:
        theirs, expected = _tried(module.forward, x, g)
        ours, got = _tried(lambda x: _Norm.apply(x, frozen, epsilon), x, g)
    except (RuntimeError, TypeError, ValueError):  # a norm of another kind
        return False
    off = (got - expected).float().norm() / expected.float().norm()
    return torch.equal(theirs, ours) and bool(off <= _NEAR[weight.dtype])


def _tried(run: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _forward(module: Any, hidden: Tensor) -> Tensor:
    weight: Tensor = module.weight
    fits = hidden.requires_grad and not weight.requires_grad and hidden.dtype == weight.dtype
    if not (fits and torch.is_grad_enabled()):
        plain: Tensor = type(module).forward(module, hidden)
        return plain
    return _Norm.apply(hidden, weight, _epsilon(module))


class _Norm(torch.autograd.Function):
    """As the module's docstring has it, over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """``(…, width)`` to the same."""
        exact = x.float()
        scale = (exact.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt_()
        normed = (exact * scale).to(x.dtype)
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Of x alone."""
        normed, scale, weight = ctx.saved_tensors
        asked = gradient * weight
        along = (asked * normed).sum(-1, keepdim=True, dtype=torch.float32) / -len(weight)
        found = torch.addcmul(asked, normed, along.to(normed.dtype))
        return found.mul_(scale.to(normed.dtype)), None, None
