"""Rendered examples -> one padded batch. Padding never changes a row's result.

Causal inputs are padded on the left, ``[pad pad v v text]``, so that every row's answer ends at the
last position; the encoders' inputs are padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from ..devices import sent
from .layout import Sequence
from .lesson import Lesson
from .render import Rendered

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch; N examples, R >= N rows, K answer positions.

    Attributes:
        kind: of the model, as `kinds.kind_of` says.
        input_ids: ``(R, T)``, virtual ids included.
        attention_mask: ``(R, T)``.
        slots: ``(R,)`` position of the answer's first token (masked models).
        answers: ``(R, K)`` answer ids, -100 where there is none; aligned right for causal models.
        example: ``(R,)`` the example that each row belongs to.
        member: ``(N,)`` the population member that each example belongs to.
        label_ids: ``(N, W)`` ids of single-token label words, or None.
        labels: ``(N,)`` index of the right label, or None where the whole vocabulary counts.
        decoder_input_ids: ``(R, K)`` for seq2seq models.
        taught: a teacher's shares, or None: of the labels ``(N, labels)``, else of the tokens
            `likely` ``(R, K, k)``, 0 where there is no answer.
        likely: ``(R, K, k)`` the ids of a teacher's likeliest tokens, or None.
        lengths: of each row, without padding.
        prefixes: each row's ids in front of its first virtual token, without the last of all, which
            predicts: the frozen prefix.
        openings: each row's ids in front of its first field, virtual ones included, without the
            last of all: what rows of one prompt share.
        origin: of a batch that was moved to a device the one on the CPU; what is changed of one
            is to be changed before it moves.
    """

    kind: str
    input_ids: Tensor
    attention_mask: Tensor
    slots: Tensor
    answers: Tensor
    example: Tensor
    member: Tensor
    label_ids: Tensor | None = None
    labels: Tensor | None = None
    decoder_input_ids: Tensor | None = None
    taught: Tensor | None = None
    likely: Tensor | None = None
    lengths: tuple[int, ...] = ()
    prefixes: tuple[tuple[int, ...], ...] = ()
    openings: tuple[tuple[int, ...], ...] = ()
    origin: Batch | None = None

    @property
    def here(self) -> Batch:
        """The inputs on the CPU: who looks at their values does not wait for the device."""
        on_cpu = self.input_ids.device.type == "cpu"
        return self if on_cpu or self.origin is None else self.origin

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: sent(value, device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, origin=self.here, **moved)


def collate(
    examples: Rows[Rendered],
    kind: str,
    first_ids: Rows[int],
    *,
    pad_id: int = 0,
    decoder_start_id: int = 0,
) -> Batch:
    """Pad rendered examples to one batch.

    Args:
        examples: all prepared for label comparison, or none.
        kind: of the model, as `kinds.kind_of` says.
        first_ids: for each example the first attached id of its prompt.
        pad_id: any valid id; padded positions are masked. A row that has no token reads this one.
        decoder_start_id: seq2seq models' first decoder id.
    """
    single = all(example.label_ids for example in examples)
    if not single:  # the words of some examples have several tokens: a row for each word of all
        examples = [_by_word(example) for example in examples]
    rows = [(s, n) for n, example in enumerate(examples) for s in example.sequences]
    sequences = [s for s, _ in rows]
    inputs = [_input_ids(s, kind, first_ids[n], pad_id) for s, n in rows]
    left = kind == "causal"
    answers = _pad([s.answer for s in sequences], IGNORED, left)
    batch = Batch(
        kind=kind,
        input_ids=_pad(inputs, pad_id, left),
        attention_mask=_pad([numpy.ones_like(ids) for ids in inputs], 0, left),
        slots=torch.tensor([s.slot for s in sequences]),
        answers=answers,
        example=torch.tensor([n for _, n in rows]),
        member=torch.zeros(len(examples), dtype=torch.long),
        lengths=tuple(map(len, inputs)),
        prefixes=tuple(s.ids[: s.plain_prefix] for s in sequences),
        openings=tuple(
            tuple(ids[: s.opening].tolist()) for s, ids in zip(sequences, inputs, strict=True)
        ),
    )
    if kind == "seq2seq":
        start = torch.full_like(answers[:, :1], decoder_start_id)
        shifted = torch.cat([start, answers[:, :-1]], dim=1).clamp(min=0)
        batch = replace(batch, decoder_input_ids=shifted)
    if single:
        batch = replace(batch, label_ids=torch.tensor([e.label_ids for e in examples]))
    if all(e.compares and e.label is not None for e in examples):
        batch = replace(batch, labels=torch.tensor([e.label for e in examples]))
    if all(e.lesson is not None for e in examples):
        batch = _with_lessons(batch, [e.lesson for e in examples if e.lesson is not None])
    return batch


def longest_suffix(batch: Batch) -> int:
    """Columns from the first virtual token on, or from the last token on, of the longest row."""
    return max(n - len(p) for n, p in zip(batch.lengths, batch.prefixes, strict=True))


def _by_word(example: Rendered) -> Rendered:
    """The same example with a sequence for each label word."""
    if not example.label_ids:
        return example
    alike = example.sequences[0]
    words = tuple(replace(alike, answer=(word,)) for word in example.label_ids)
    return replace(example, sequences=words, label_ids=())


def _with_lessons(batch: Batch, lessons: Rows[Lesson]) -> Batch:
    if lessons[0].likely is None:
        shares = numpy.stack([lesson.shares for lesson in lessons])
        return replace(batch, taught=torch.from_numpy(shares))
    places = (*batch.answers.shape, max(lesson.likely.shape[1] for lesson in lessons))
    shares, likely = numpy.zeros(places, numpy.float32), numpy.zeros(places, numpy.int64)
    for row, lesson in enumerate(lessons):
        count, most = lesson.likely.shape
        start = places[1] - count if batch.kind == "causal" else 0
        shares[row, start : start + count, :most] = lesson.shares
        likely[row, start : start + count, :most] = lesson.likely
    return replace(batch, taught=torch.from_numpy(shares), likely=torch.from_numpy(likely))


def _input_ids(sequence: Sequence, kind: str, first_id: int, pad_id: int) -> Any:
    numbers = sequence.numbers
    ids = numpy.where(numbers < 0, first_id - 1 - numbers, numbers)
    if not len(ids):  # what a model makes of nothing would depend on the rows beside it
        ids = numpy.array([pad_id], dtype=numpy.int64)
    more = sequence.answer[:-1] if kind == "causal" else ()
    return numpy.concatenate([ids, numpy.array(more, dtype=numpy.int64)]) if more else ids


def _pad(rows: Rows[Any], value: int, left: bool) -> Tensor:
    width = max(1, max(map(len, rows)))
    padded = numpy.full((len(rows), width), value, dtype=numpy.int64)
    for row, numbers in zip(padded, rows, strict=True):
        row[width - len(numbers) if left else 0 :][: len(numbers)] = numbers
    return torch.from_numpy(padded)
