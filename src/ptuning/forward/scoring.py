"""Accuracy and loss of one prompt (or manual template) on answered examples, by teacher forcing.

One forward per batch: greedy decoding gives the whole answer exactly where each answer token is the
most likely one after those before it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..rendering.render import Rendered, Renderer
from .engine import Engine


def score(
    engine: Engine,
    renderer: Renderer,
    examples: list[Rendered],
    first_id: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[float, float]:
    """Fraction answered right, and mean loss per answer token (or per label).

    The arguments are those of `sums`.
    """
    right, loss = sums(engine, renderer, examples, first_id, batch_size, autocast)
    return right / len(examples), loss / sum(example.weight for example in examples)


@torch.no_grad()
def sums(
    engine: Engine,
    renderer: Renderer,
    examples: list[Rendered],
    first_id: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[float, float]:
    """How many examples are answered right, and the sum of their losses.

    Args:
        engine: its model has the prompt attached and is in eval mode.
        renderer: that made `examples`.
        examples: rendered with their answers.
        first_id: id of the prompt's first virtual token; 0 for a manual template.
        batch_size: examples per forward.
        autocast: accelerate's mixed precision.
    """
    device = engine.base.device
    words = torch.tensor(renderer.owner, device=device) if renderer.compares else None
    batches = [
        engine.batch([(examples[i], 0) for i in chunk], [first_id])
        for chunk in engine.chunks(examples, batch_size)
    ]
    sums = torch.zeros(2, dtype=torch.float64)
    with engine.sharing(batches, autocast):
        for batch in batches:
            with autocast():
                losses, right = engine.losses_and_right(batch, words)
            sums += torch.stack([right.sum().double(), losses.sum().double()]).cpu()
    return float(sums[0]), float(sums[1])
