"""Losses of many answers in bounded memory: the vocabulary for some positions at a time.

    plain     head(hidden) for all R x K positions at once, kept for the gradient
    here      for each chunk: head -> loss and d loss / d hidden -> the chunk's logits are dropped

The model runs as ever, but its output head sees some rows' first position only; what the head was
given is taken down and goes through it chunk by chunk. What the model does behind its head (a
scale, a soft cap, a bias) is done likewise, and held against the model's own logits of the first
positions at each call: a model that does anything else takes the plain path, `plain.answer_logits`.
Long answers are many, and so are label words of several tokens: a row for each. Those of one token
`label_words` scores instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..rendering.collate import IGNORED, Batch
from . import divergence
from .label_scores import Words, losses_of_labels, training_losses
from .label_words import label_word_scores
from .output_head import compared, frozen_head, logits_of, seeing
from .plain import (
    Shortener,
    answer_outputs,
    example_losses,
    examples_right,
)
from .plain import word_scores as plain_word_scores
from .vocabulary import vocabulary_logits

LARGEST = 2**24
"""Logits of more numbers than this are never there at once."""
LARGEST_OF_WORDS = 2**26
"""The same for label words: as long as they are few a CUDA graph may hold them."""
POSITIONS = 256
"""Of one chunk: enough for the head to run as fast as with all."""
COMPARED = 32
"""Rows whose first position is held against the model's own logits: label words have thousands."""
_SCALE = 2.0**10  # keeps small gradients of half precision; a power of two changes no other bit


@dataclass(frozen=True)
class _Unread:
    """Hidden states ``(R, K, width)`` before the head, and what makes logits of such."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


def losses(
    model: nn.Module, batch: Batch, words: Words | None, shortener: Shortener | None = None
) -> Tensor:
    """The loss ``(N,)`` of each example, as `plain.example_losses` gives it.

    Args:
        model: the base model; the chunks serve it where it is frozen.
        batch: its inputs.
        words: that label comparison compares, else None.
        shortener: as for `plain.answer_logits`.
    """
    if batch.labels is not None and words is not None:
        scores = word_scores(model, batch, len(words), shortener)
        return training_losses(scores, batch.labels, words, batch.member, batch.taught)
    read = _read(model, batch, shortener, LARGEST)
    if isinstance(read, Tensor):
        return example_losses(read, batch, None)
    return _by_position(read, batch)[0].sum(1)


@torch.no_grad()
def losses_and_right(
    model: nn.Module, batch: Batch, words: Words | None, shortener: Shortener | None = None
) -> tuple[Tensor, Tensor]:
    """`losses`, and as `plain.examples_right` says which examples ``(N,)`` are answered right."""
    if batch.labels is not None and words is not None:
        scores = word_scores(model, batch, len(words), shortener)
        return losses_of_labels(scores, batch.labels, words, batch.member, batch.taught)
    read = _read(model, batch, shortener, LARGEST)
    if isinstance(read, Tensor):
        return example_losses(read, batch, None), examples_right(read, batch, None)
    nll, right = _by_position(read, batch)
    return nll.sum(1), right.all(1)


def word_scores(
    model: nn.Module, batch: Batch, words: int, shortener: Shortener | None = None
) -> Tensor:
    """`label_word_scores` for words of any number of tokens, in bounded memory where some have
    several; the arguments are those there."""
    if batch.label_ids is not None:
        return label_word_scores(model, batch, words, shortener)
    read = _read(model, batch, shortener, LARGEST_OF_WORDS)
    if isinstance(read, Tensor):
        return plain_word_scores(read, batch, words)
    untaught = replace(batch, taught=None, likely=None)  # a lesson is of labels, not of tokens
    return -_by_position(read, untaught)[0].sum(1).view(-1, words)


def _by_position(unread: _Unread, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and rightness ``(R, K)`` of each answer token; 0 and True where there is none."""
    answers, lesson = batch.answers, [t for t in (batch.taught, batch.likely) if t is not None]
    (asked,) = (answers.flatten() != IGNORED).nonzero(as_tuple=True)
    hidden, wanted = unread.hidden.flatten(0, 1)[asked], answers.flatten()[asked]
    lesson = [tensor.flatten(0, 1)[asked] for tensor in lesson]
    nll, right = _Chunks.apply(hidden, wanted, lesson, unread.head)
    every_nll = nll.new_zeros(answers.numel()).index_put((asked,), nll)
    every_right = torch.ones_like(answers, dtype=torch.bool).flatten().index_put((asked,), right)
    return every_nll.view_as(answers), every_right.view_as(answers)


class _Chunks(torch.autograd.Function):
    """Hidden states ``(P, width)``, answers ``(P,)``, a teacher's lesson (two of ``(P, k)``) or
    nothing, and head -> losses and rightness ``(P,)``.

    A position's loss depends on its own hidden state alone, so that its gradient can be made at
    once, up to the factor that comes in `backward`.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        answers: Tensor,
        lesson: list[Tensor],
        head: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        wanted = context.needs_input_grad[0]
        parts = []
        for start in range(0, len(hidden), POSITIONS):
            chosen = slice(start, start + POSITIONS)
            answer, said = answers[chosen], [tensor[chosen] for tensor in lesson]
            with torch.set_grad_enabled(wanted):
                part = hidden[chosen].detach().requires_grad_(wanted)
                logits = head(part)
                if said:
                    nll = divergence.of_tokens(logits, *said)
                else:
                    nll = F.cross_entropy(logits.float(), answer, reduction="none")
                gradient = part.new_zeros(0)
                if wanted:
                    (gradient,) = torch.autograd.grad(nll.sum() * _SCALE, part)
            right = logits.detach().argmax(-1) == answer
            parts.append((nll.detach(), right, gradient.float() / _SCALE))
            del logits, nll, gradient  # before the next chunk's
        losses, right, gradients = (torch.cat(column) for column in zip(*parts, strict=True))
        context.save_for_backward(gradients)
        context.mark_non_differentiable(right)
        context.dtype = hidden.dtype
        return losses, right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, of_losses: Tensor, of_right: Tensor) -> tuple[Any, ...]:
        (gradients,) = context.saved_tensors
        return (of_losses.unsqueeze(1) * gradients).to(context.dtype), None, None, None


def _read(
    model: nn.Module, batch: Batch, shortener: Shortener | None, largest: int
) -> Tensor | _Unread:
    """Logits where they are at most `largest` numbers, else what is before the head."""
    head = frozen_head(model)
    if head is None or not _are_many(batch, head, largest):
        return vocabulary_logits(model, batch, shortener)
    with seeing(head, slice(0, 1), slice(0, COMPARED)) as hidden:
        logits, rows = answer_outputs(model, batch, shortener)
    if not hidden:  # a compiled model takes no notice of hooks
        return rows(logits)
    finished = partial(logits_of, model, head)
    if compared(model, finished(hidden[-1][:COMPARED, :1]), logits):
        return _Unread(rows(hidden[-1]), finished)
    return vocabulary_logits(model, batch, shortener)


def reads_in_chunks(model: nn.Module, batch: Batch, padded: float) -> bool:
    """`losses` of the batch, with so many times its rows, looks at values where it compares no
    label words of one token; no CUDA graph can hold that."""
    head = frozen_head(model)
    if head is None or batch.label_ids is not None:
        return False
    largest = LARGEST if batch.labels is None else LARGEST_OF_WORDS
    return _are_many(batch, head, largest / padded)


def _are_many(batch: Batch, head: nn.Module, largest: float) -> bool:
    return batch.answers.numel() * getattr(head, "out_features", 0) > largest
