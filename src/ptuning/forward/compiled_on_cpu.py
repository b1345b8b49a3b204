"""The frozen model's repeated layer compiled for plain steps on a CPU.

    plain     each layer's operations one by one
    here      the layer as torch.compile makes it, forward and backward, where it is given what
              comes again and again: several rows of several columns, a mask, known columns or none

All else runs plainly, since the layer would be compiled anew for it. Before a layer runs compiled
it is held against itself, once behind known columns and once without; what differs, or cannot be
compiled, runs plainly from then on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..backbone.upstream import sizes_apart
from ..errors import in_one_line
from .compiled import DYNAMIC, OneLayer
from .norms import plain_norms
from .own_forwards import own_forwards

_OFF = {torch.float32: (1e-4, 1e-4)}
_OFF_IN_HALF = (0.02, 0.05)
"""How far what a layer gives, and its gradient, may be from the plain one's, as a share of it."""


class LayersOnCpu:
    """A model's repeated layers, compiled when they first run.

    Args:
        layers: frozen.

    Attributes:
        fault: why they run plainly from now on, or None.
        ran: how many ran compiled.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self.fault: str | None = None
        self.ran = 0
        forwards = dict.fromkeys(type(layer).forward for layer in layers)
        self._compiled = {plain: torch.compile(plain, dynamic=DYNAMIC) for plain in forwards}
        self._agreed: set[tuple[int, bool]] = set()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The layers run compiled meanwhile, in this thread."""
        layers = enumerate(self.layers)
        forwards = {layer: partial(self._forward, number, layer) for number, layer in layers}
        with own_forwards(forwards), plain_norms(), sizes_apart():
            yield

    def _forward(self, number: int, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain: Callable[..., Any] = type(layer).forward
        if self.fault is None and torch.is_grad_enabled():
            named = _by_name(plain, args, kwargs)
            if _comes_again(args, named, number):
                try:
                    return self._run(number, layer, args[0], named)
                except Exception as error:  # whatever a compiler cannot do, or has not got
                    self.fault = in_one_line(error)
        return plain(layer, *args, **kwargs)

    def _run(self, number: int, layer: nn.Module, hidden: Tensor, named: dict[str, Any]) -> Any:
        """The layer compiled, held against the plain one where it has not been yet.

        Raises:
            ArithmeticError: it gives something else.
        """
        plain = type(layer).forward
        compiled = partial(self._compiled[plain], layer)
        known = any(isinstance(value, Cache) for value in named.values())
        if (number, known) not in self._agreed:
            expected = _tried(partial(plain, layer), hidden, _given(named, number))
            _check(expected, _tried(compiled, hidden, _given(named, number)))
            self._agreed.add((number, known))
        output = compiled(hidden, **_given(named, number, itself=True))
        self.ran += 1
        return output


def _by_name(
    plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All of a layer's arguments but itself and the first by their names."""
    names = list(inspect.signature(plain).parameters)[2:]
    return {**dict(zip(names, args[1:], strict=False)), **kwargs}


def _comes_again(args: tuple[Any, ...], named: Mapping[str, Any], number: int) -> bool:
    """What a layer is given is of the kind that it is compiled for: rows ``(R, T, width)``, R and T
    above 1, with gradients and a mask, behind known columns or without a cache."""
    hidden = args[0] if args else None
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or 1 in hidden.shape[:2]:
        return False
    if not hidden.requires_grad or named.get("attention_mask") is None:
        return False
    cache = next((value for value in named.values() if isinstance(value, Cache)), None)
    if cache is None:
        return True
    layers: list[Any] = cache.layers
    return number < len(layers) and layers[number].get_seq_length() > 1


def _given(named: Mapping[str, Any], number: int, itself: bool = False) -> dict[str, Any]:
    """A layer's arguments as it is compiled for them: its own part of a cache, or a copy of that,
    and a mask that is no part of another tensor, to which compilers would hold."""
    given = dict(named)
    for name, value in named.items():
        if isinstance(value, Cache):
            layer = value.layers[number]
            given[name] = OneLayer(layer if itself else copy(layer))
    given["attention_mask"] = named["attention_mask"].clone()
    return given


def _tried(run: Callable[..., Any], hidden: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a layer gives, and the gradient ``(R, T, width)`` of its input."""
    hidden = hidden.detach().requires_grad_()
    output = run(hidden, **given)
    output = output[0] if isinstance(output, tuple) else output
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=draw).to(output.dtype)
    return output.detach(), torch.autograd.grad(output, hidden, weights)[0]


def _check(expected: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor]) -> None:
    for wanted, found, most in zip(
        expected, got, _OFF.get(expected[0].dtype, _OFF_IN_HALF), strict=True
    ):
        off = float((found.float() - wanted.float()).norm() / wanted.float().norm())
        if not off <= most:
            raise ArithmeticError(f"a layer is off by {off:.1e}")
