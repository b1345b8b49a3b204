"""How far two ways to compute a step may be apart: what is faster rounds otherwise, and no more."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..backbone.eight_bits import frozen_format

Outputs = tuple[Tensor, Tensor]
"""Losses ``(members,)`` and the table's gradient."""
_EXACT, _HALF = 1e-3, 0.1
"""Of float32, and of half precision, which rounds differently in the kernels of another shape."""
_MOVES, _MOVES_IN_HALF = 8.0, 3.0
"""How much further than losses gradients move. In eight bits one moves by half of its norm where
what is quantized moves by a thousandth (SmolLM2), three to five times as far as in bfloat16, and
the loss by a twentieth; in bfloat16 by 0.14 where rows stand in other places."""


def tolerance_of(model: nn.Module, accelerator: Accelerator) -> float:
    """How far losses and gradient may be off, as a share of their norm.

    Args:
        model: the base model.
        accelerator: its mixed precision counts.
    """
    return _EXACT if _is_exact(model) and accelerator.mixed_precision == "no" else _HALF


def distance_of(model: nn.Module, expected: Outputs, got: Outputs) -> float:
    """How far losses and gradient are from what is expected, the larger of the two; of a gradient
    that is not exact a part."""
    (losses, gradient), (got_losses, got_gradient) = expected, got
    moves = _MOVES if frozen_format(model) else 1.0 if _is_exact(model) else _MOVES_IN_HALF
    # A loss near zero is made of logits whose rounding is not near zero.
    return max(_distance(losses, got_losses, 0.1), _distance(gradient, got_gradient, 1e-12) / moves)


def _is_exact(model: nn.Module) -> bool:
    return getattr(model, "dtype", None) == torch.float32 and not frozen_format(model)


def _distance(expected: Tensor, got: Tensor, least: float) -> float:
    """Norm of the difference over the norm of what is expected, or `least` where that is less."""
    wanted = expected.detach().float()
    return float((got.detach().float() - wanted).norm() / wanted.norm().clamp(min=least))


def cause_of(error: Exception) -> str:
    """A line of what broke a faster way; the end of a capture fails too."""
    while error.__context__ is not None and isinstance(error.__context__, Exception):
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]
