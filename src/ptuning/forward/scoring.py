"""Accuracy and loss of prompts (or manual templates) on answered examples, by teacher forcing.

One forward per batch: greedy decoding gives the whole answer exactly where each answer token is the
most likely one after those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy
import torch
from torch import Tensor

from ..backbone.lookups import input_embedding
from ..rendering.collate import IGNORED, Batch
from ..rendering.render import Rendered, Renderer
from . import divergence
from .engine import Engine
from .label_scores import Words, by_label, losses_of_labels, matrices_of, mixed
from .plain import answer_nll
from .together import biased, first_rows, mean_log_probabilities

_LARGEST = 2**27
"""Logits of a batch whose members answer together: all are there at once, unlike `chunked`'s."""


def score(
    engine: Engine,
    renderer: Renderer,
    examples: list[Rendered],
    first_id: int,
    batch_size: int | None,
) -> tuple[float, float]:
    """Fraction answered right, and mean loss per answer token (or per label).

    Args:
        engine: its model has the prompt attached and is in eval mode.
        renderer: that made `examples`.
        examples: rendered with their answers.
        first_id: id of the prompt's first virtual token; 0 for a manual template.
        batch_size: examples per forward (`batching.chunks_by_length`).
    """
    if renderer.compares and (renderer.bias is not None or renderer.matrix is not None):
        return score_together(engine, [renderer], [examples], [first_id], batch_size)
    batches = (
        engine.batch([(examples[i], 0) for i in chunk], [first_id])
        for chunk in engine.chunks(examples, batch_size)
    )
    words = Words.of(renderer.owner) if renderer.compares else None
    ((right, loss),) = sums(engine, batches, 1, words).tolist()
    return right / len(examples), loss / sum(example.weight for example in examples)


@torch.no_grad()
def sums(
    engine: Engine,
    batches: Iterable[Batch],
    members: int,
    words: Words | None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """How many examples are answered right, and the sum of their losses: for each member
    ``(members, 2)`` in float64, on the CPU.

    Args:
        engine: its model has the prompts attached and is in eval mode.
        batches: of answered examples, on the model's device; they are made as they are needed.
        members: how many prompts the examples are of (`Batch.member`).
        words: that label comparison compares, else None.
        autocast: accelerate's mixed precision.
    """
    total = torch.zeros(members, 2, dtype=torch.float64)
    for some in engine.some_at_once(batches):
        found = []
        with engine.sharing(some, autocast):
            for batch in some:
                with autocast():
                    losses, right = engine.losses_and_right(batch, words)
                found.append(torch.stack([right.to(losses.dtype), losses], dim=1))
        # One look at the device for all of them.
        member, figures = torch.cat([batch.member for batch in some]).cpu(), torch.cat(found).cpu()
        total.index_add_(0, member, figures.double())
    return total


@torch.no_grad()
def score_together(
    engine: Engine,
    renderers: Sequence[Renderer],
    examples: Sequence[list[Rendered]],
    first_ids: Sequence[int],
    batch_size: int | None,
) -> tuple[float, float]:
    """As `score`, of the members of an ensemble, which answer together (`together`).

    Where a teacher was asked the loss is against what it says, as each member's is.

    Args:
        engine: its model has all members attached and is in eval mode.
        renderers: of the members.
        examples: of each member the same rows, rendered with their answers.
        first_ids: of each member the id of its first virtual token.
        batch_size: rows of a forward, all members counted.
    """
    if renderers[0].compares:
        found = label_log_probabilities(engine, renderers, examples, first_ids, batch_size)
        right = torch.tensor([example.label for example in examples[0]])
        shares = [example.lesson.shares for example in examples[0] if example.lesson is not None]
        taught = torch.from_numpy(numpy.stack(shares)) if shares else None
        losses, hits = losses_of_labels(
            found, right, Words.of(range(found.shape[1])), taught=taught
        )
        return float(hits.double().mean()), float(losses.double().mean())
    total = torch.zeros(2, dtype=torch.float64)
    most = _LARGEST // input_embedding(engine.base.model).num_embeddings
    for batch, sizes, _ in batches_together(engine, examples, first_ids, batch_size, most):
        means = mean_log_probabilities(engine.logits(batch), sizes)
        first = first_rows(sizes)
        answers = batch.answers[first].to(means.device)
        hits = ((means.argmax(-1) == answers) | (answers == IGNORED)).all(1)
        if batch.taught is not None and batch.likely is not None:
            lesson = (told[first].to(means.device) for told in (batch.taught, batch.likely))
            losses = divergence.of_tokens(means, *lesson).sum(1)
        else:
            losses = answer_nll(means, answers).sum(1)
        total += torch.stack([hits.sum(), losses.sum()]).cpu()  # MPS has no float64
    weight = sum(example.weight for example in examples[0])
    return float(total[0]) / len(examples[0]), float(total[1]) / weight


@torch.no_grad()
def label_log_probabilities(
    engine: Engine,
    renderers: Sequence[Renderer],
    examples: Sequence[list[Rendered]],
    first_ids: Sequence[int],
    batch_size: int | None,
) -> Tensor:
    """The labels' log-probabilities ``(N, labels)``, on the CPU; of several members together.

    The arguments are those of `score_together`; one member is as good as several, and the examples
    need no answers.
    """
    renderer = renderers[0]
    words, matrices = Words.of(renderer.owner), matrices_of([r.matrix for r in renderers])
    found = torch.zeros(len(examples[0]), len(renderer.labels), dtype=torch.float32)
    for batch, sizes, chunk in batches_together(engine, examples, first_ids, batch_size):
        scores = engine.word_scores(batch, len(words)).cpu()
        if matrices is not None:  # the members' rows of an example stand together
            scores = mixed(scores, matrices.repeat(len(chunk), 1, 1))
        scores = by_label(scores, words.owner)
        found[chunk] = biased(mean_log_probabilities(scores, sizes), renderer.bias)
    return found


def batches_together(
    engine: Engine,
    examples: Sequence[list[Rendered]],
    first_ids: Sequence[int],
    batch_size: int | None,
    positions: int | None = None,
) -> Iterator[tuple[Batch, list[int], list[int]]]:
    """Batches in which the members' rows of an example stand together; how many of each; which
    examples; with at most so many `positions` of answers, or one example's."""
    members = range(len(examples))
    chunks = engine.chunks(examples[0], batch_size, len(members))
    if positions is not None:
        each = positions // len(members)
        chunks = (some for chunk in chunks for some in _with_few(examples[0], chunk, each))
    with engine.one_document(examples):
        for chunk in chunks:
            rows = [(examples[member][i], member) for i in chunk for member in members]
            yield engine.prediction_batch(rows, first_ids), [len(members)] * len(chunk), chunk


def _with_few(examples: list[Rendered], chunk: list[int], positions: int) -> Iterator[list[int]]:
    """Some of the examples of a chunk at a time: as many as times the longest answer are few."""
    some: list[int] = []
    longest = 0
    for index in chunk:
        own = len(examples[index].sequences[0].answer)
        if some and (len(some) + 1) * max(longest, own) > positions:
            yield some
            some, longest = [], 0
        some.append(index)
        longest = max(longest, own)
    if some:
        yield some
