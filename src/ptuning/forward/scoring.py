"""Accuracy and loss of one prompt (or manual template) on answered examples, by teacher forcing.

One forward per batch: greedy decoding gives the whole answer exactly where each answer token is the
most likely one after those before it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..backbone.base_model import counts_columns
from ..errors import InputError
from ..rendering.collate import Batch, collate
from ..rendering.render import Rendered, Renderer
from .chunked import losses_and_right
from .plain import Prefix
from .shared_prefix import first_of, share_heads


def score(
    model: nn.Module,
    renderer: Renderer,
    examples: list[Rendered],
    first_id: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    prefix: Prefix | None = None,
) -> tuple[float, float]:
    """Fraction answered right, and mean loss per answer token (or per label).

    The arguments are those of `sums`.
    """
    right, loss = sums(model, renderer, examples, first_id, batch_size, autocast, prefix)
    return right / len(examples), loss / sum(example.weight for example in examples)


@torch.no_grad()
def sums(
    model: nn.Module,
    renderer: Renderer,
    examples: list[Rendered],
    first_id: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    prefix: Prefix | None = None,
) -> tuple[float, float]:
    """How many examples are answered right, and the sum of their losses.

    Args:
        model: with the prompt attached, in eval mode.
        renderer: that made `examples`.
        examples: rendered with their answers.
        first_id: id of the prompt's first virtual token; 0 for a manual template.
        batch_size: examples per forward.
        autocast: accelerate's mixed precision.
        prefix: keeps what does not depend on the prompt, or None: then nothing is shared.
    """
    device = model_device(model)
    owner = torch.tensor(renderer.owner, device=device) if renderer.compares else None
    right = loss = 0.0
    by_length = sorted(examples, key=lambda e: len(e.sequences[0].ids))
    chunks = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    batches = [batch_for(model, renderer, c, [first_id] * len(c)).to(device) for c in chunks]
    with autocast():
        heads = share_heads(model, batches) if prefix is not None else None
    for batch in batches:
        with autocast():
            losses, hits = losses_and_right(model, batch, owner, first_of(heads, prefix))
        right += float(hits.sum())
        loss += float(losses.sum())
    return right, loss


def batch_for(
    model: nn.Module, renderer: Renderer, examples: list[Rendered], first_ids: list[int]
) -> Batch:
    """`collate` with the padding and decoder ids of a model.

    Raises:
        InputError: the model cannot tell padding from text.
    """
    pad = renderer.tokenizer.pad_token_id
    pad = pad if isinstance(pad, int) else 0
    start = getattr(model.config, "decoder_start_token_id", None)
    batch = collate(
        examples,
        renderer.kind,
        first_ids,
        pad_id=pad,
        decoder_start_id=start if isinstance(start, int) else pad,
    )
    if batch.kind == "causal" and len(set(batch.lengths)) > 1 and counts_columns(model):
        raise InputError(
            f"{type(model).__name__} counts padding as positions, so that rows of unlike length "
            "would change each other: give batch_size=1 and one prompt"
        )
    return batch


def model_device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device
