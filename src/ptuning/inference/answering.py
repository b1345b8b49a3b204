"""Questions to prompts and their answers, mixed in batches.

Labels are compared, free answers are written token by token (at the masks in a masked model). The
numbers of a comparison are on their way from the device while the next batch is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backbone.kinds import ModelKind
from ..devices import fetched
from ..errors import InputError, PtuningError
from ..forward.engine import Engine
from ..forward.label_scores import by_label, mixed
from ..forward.together import biased, first_rows, mean_log_probabilities
from ..rendering.collate import Batch
from ..rendering.render import Rendered, Renderer


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        answer: a label of the verbalizer, a candidate, or free text.
        probability: of the label among the labels, or of the free answer's tokens.
        probabilities: label -> probability; empty for free answers.
    """

    answer: str
    probability: float
    probabilities: dict[str, float] = field(default_factory=dict)


_T = TypeVar("_T")
Watch = Callable[[int, float], bool]
Later = Callable[[], list[Prediction]]
"""Waits for the answers, if the device still computes them."""


@dataclass(frozen=True)
class Reading:
    """One row as one prompt has it.

    Attributes:
        renderer: the prompt's, on the engine's model.
        example: rendered by it, without an answer.
        first_id: of the prompt's first virtual token; 0 for a manual task.
    """

    renderer: Renderer
    example: Rendered
    first_id: int = 0


@dataclass(frozen=True)
class Question(Reading):
    """One row for one task: how a prompt reads it, or the first member of an ensemble.

    Attributes:
        limit: longest free answer in tokens; by default the task's.
        watch: is shown each token of a free answer as it comes, with its log-probability, and says
            whether it is enough.
        others: how the further members of an ensemble read the row.
    """

    limit: int | None = None
    watch: Watch | None = None
    others: tuple[Reading, ...] = ()

    @classmethod
    def of(cls, readings: Iterable[Reading], **more: Any) -> Question:
        """One row as all read it who answer together."""
        first, *others = readings
        return cls(**vars(first), others=tuple(others), **more)

    @property
    def most(self) -> int | None:
        """The longest free answer in tokens."""
        return self.limit or self.renderer.task.answer_tokens

    @property
    def readings(self) -> list[Reading]:
        """Of all who answer together."""
        return [self, *self.others]


@torch.no_grad()
def answers(
    engine: Engine, questions: Sequence[Question], batch_size: int | None = None
) -> Iterator[tuple[int, Prediction]]:
    """Questions of any tasks, mixed in batches: number of the question and its answer.

    They come as they are known: label comparisons first, then free answers.

    Args:
        engine: its model is in eval mode and has the prompts attached.
        questions: each has the answer that it would have alone.
        batch_size: rows per forward (`batching.chunks_by_length`).

    Raises:
        InputError: a free answer without a limit.
    """
    groups: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        words = len(question.renderer.owner) if question.renderer.compares else 0
        masks = question.most if not words and engine.base.kind is ModelKind.MASKED else None
        groups.setdefault((not words, words, masks or 0), []).append(number)
    for key in sorted(groups):
        numbers = groups[key]
        members = max(len(questions[n].readings) for n in numbers)
        chunks = engine.chunks([questions[n].example for n in numbers], batch_size, members)
        asked = ([numbers[i] for i in chunk] for chunk in chunks)
        batches = ((some, in_one_batch(engine, [questions[n] for n in some])) for some in asked)
        for some, later in one_ahead(batches):
            yield from zip(some, later(), strict=True)


def one_ahead(begun: Iterable[_T]) -> Iterator[_T]:
    """What was begun, each when the next one is begun too: the device need not wait while somebody
    reads."""
    waiting: list[_T] = []
    for one in begun:
        waiting.append(one)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def in_one_batch(engine: Engine, questions: list[Question]) -> Later:
    """The answers to questions that compare as many words each, or none; the device is asked for
    them now.

    Raises:
        PtuningError: numbers are not finite; when the answers are asked for.
    """
    readings = [reading for question in questions for reading in question.readings]
    rows = [(reading.example, row) for row, reading in enumerate(readings)]
    batch = engine.prediction_batch(rows, [reading.first_id for reading in readings])
    if questions[0].renderer.compares:
        scores = fetched(engine.word_scores(batch, len(questions[0].renderer.owner)))
        return lambda: _checked(engine, _compared(questions, scores()))
    decoded = _decode(engine, questions, batch)
    return lambda: _checked(engine, decoded)


def _checked(engine: Engine, predictions: list[Prediction]) -> list[Prediction]:
    if any(math.isnan(prediction.probability) for prediction in predictions):
        dtype = str(engine.base.model.dtype).removeprefix("torch.")
        raise PtuningError(
            f"the model ({dtype}) answers with numbers that are not finite (NaN): its weights are "
            "damaged, or what it computes is too large for its precision; load it in another one "
            "(--dtype float32 or bfloat16)"
        )
    return predictions


def _watching(
    watches: list[Watch | None], limits: list[int], ends: list[set[int]]
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """For `continue_greedily`: each row ends at its own limit, at one of the ends that it does not
    share with all the others, or where its watch says so."""
    if len(set(limits)) == 1 and not any(watches) and not any(ends):
        return None
    left, done = [*limits], torch.zeros(len(limits), dtype=torch.bool)

    def watch(ids: Tensor, scores: Tensor) -> Tensor:
        for row, (token, score) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True)):
            if not done[row]:
                left[row] -= 1
                watch_of_row = watches[row]
                enough = watch_of_row is not None and watch_of_row(token, score)
                done[row] = enough or not left[row] or token in ends[row]
        return done.to(ids.device)

    return watch


def _compared(questions: list[Question], scores: Tensor) -> list[Prediction]:
    """The most likely label of each question; those of one task together.

    Args:
        questions: that compare as many words each.
        scores: ``(R, words)`` of all their readings, on the CPU.
    """
    sizes = [len(question.readings) for question in questions]
    first = first_rows(sizes)
    scores = _mixed([reading for question in questions for reading in question.readings], scores)
    of_task: dict[int, list[int]] = {}
    for number, question in enumerate(questions):
        of_task.setdefault(id(question.renderer), []).append(number)
    predictions = [Prediction("", 0.0)] * len(questions)
    for numbers in of_task.values():
        renderer = questions[numbers[0]].renderer
        rows = [row for n in numbers for row in range(first[n], first[n] + sizes[n])]
        of_members = by_label(scores[rows], torch.tensor(renderer.owner))
        means = mean_log_probabilities(of_members, [sizes[n] for n in numbers])
        labels = list(renderer.labels)
        found = biased(means, renderer.bias).double().exp().tolist()
        for number, shares in zip(numbers, found, strict=True):
            best = max(range(len(shares)), key=shares.__getitem__)
            probabilities = dict(zip(labels, shares, strict=True))
            predictions[number] = Prediction(labels[best], shares[best], probabilities)
    return predictions


def _mixed(readings: list[Reading], scores: Tensor) -> Tensor:
    """The scores ``(R, words)`` of readings by the label matrices of their prompts."""
    by_matrix: dict[int, list[int]] = {}
    for row, reading in enumerate(readings):
        if reading.renderer.matrix is not None:
            by_matrix.setdefault(id(reading.renderer), []).append(row)
    for rows in by_matrix.values():
        matrix = readings[rows[0]].renderer.matrix
        assert matrix is not None
        scores = scores.float().index_copy(0, torch.tensor(rows), mixed(scores[rows], matrix))
    return scores


def _decode(engine: Engine, questions: list[Question], batch: Batch) -> list[Prediction]:
    """The most likely text of each question: at the masks, or token by token."""
    limits, sizes = [q.most for q in questions], [len(q.readings) for q in questions]
    if engine.base.kind is ModelKind.MASKED:
        empty = batch.answers.new_zeros(len(batch.input_ids), limits[0] or 1)
        best = mean_log_probabilities(engine.logits(replace(batch, answers=empty)), sizes).max(-1)
        return _texts(engine.base.tokenizer, best.indices, best.values)
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits):
        raise InputError(
            "how long may a free answer be? Give answer_tokens (--answer-tokens N), or candidates"
        )
    ends = [set(engine.ends(question.renderer.task)) for question in questions]
    shared = set.intersection(*ends)
    own = [of_row - shared for of_row in ends]
    watching = _watching([question.watch for question in questions], known, own)
    ids, scores = engine.continue_greedily(batch, max(known), sorted(shared), watching, sizes)
    rows = zip(ids.tolist(), known, ends, strict=True)
    cut = [_up_to(of_row, row[:limit]) for row, limit, of_row in rows]
    return _texts(engine.base.tokenizer, cut, scores)


def _up_to(ends: set[int], ids: list[int]) -> list[int]:
    return list(takewhile(lambda token: token not in ends, ids))


def read_back(tokenizer: Any, text: str) -> str:
    """A free answer as it is read when the model gives it: not every tokenizer reads its own tokens
    back as they were written."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _texts(tokenizer: Any, ids: Tensor | list[list[int]], scores: Tensor) -> list[Prediction]:
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    probabilities = scores.sum(1).exp().tolist()
    return [
        Prediction(text.strip(), probability)
        for text, probability in zip(texts, probabilities, strict=True)
    ]
