"""Static shapes for batches: what they are padded to, and the one buffer that they are put into.

    columns    on the left, to a multiple of 8; of rows that are equally long on the right
    rows       the last one again, without an answer, to a power of two or a multiple of 8
    little work    to multiples of 32 and 16: the device would not be busy anyway, and every shape
                   costs a capture

Nothing of it changes a result. All inputs of a step lie one behind the other in a buffer of pinned
memory and go to the device in one copy. Nothing here captures or replays (`graphs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch

from ..rendering.collate import IGNORED, Batch, longest_suffix


class Grain(NamedTuple):
    """What sizes are multiples of.

    Attributes:
        rows: examples; of the fine grain fewer than that are a power of two.
        columns: of the whole input.
        suffix: columns behind a frozen prefix.
    """

    rows: int
    columns: int
    suffix: int


FINE, COARSE = Grain(8, 8, 4), Grain(16, 32, 16)
LITTLE = 1.2e11
"""Products of a forward that take an H100 less than it takes to start a small model's kernels."""
_WITHOUT_ANSWER = {"answers": IGNORED, "labels": IGNORED, "taught": 0}
"""What rows have that are there to fill the batch: no loss comes of it."""
_READ = (
    *("input_ids", "attention_mask", "answers", "member", "label_ids", "labels"),
    *("taught", "likely"),
)
"""What a causal model's step reads of a batch."""
_FRACTIONS = ("divisor", "taught")


class Shape(NamedTuple):
    """Sizes of a step's inputs; batches of one shape are served by one graph.

    Attributes:
        examples: of the static batch.
        rows: of each example.
        words: that are compared, None where answers are free.
        labelled: the right ones are known.
        lesson: sizes of what a teacher says of an example, None without one.
        full: rows are equally long, and padded on the right: nothing stands in front of them.
        answers: columns of the answer.
        columns: of the whole input.
        kept: those of them that are not computed: the frozen prefix's; 0 for none.
    """

    examples: int
    rows: int
    words: int | None
    labelled: bool
    lesson: tuple[int, ...] | None
    full: bool
    answers: int
    columns: int
    kept: int


def grain_for(batch: Batch, weights: int, kept: bool) -> Grain:
    """Coarse where even the padded batch is little work.

    Args:
        batch: of a causal model.
        weights: of the model's layers.
        kept: the batch's frozen prefix is not computed with it.
    """
    rows = rows_for(len(batch.member), COARSE) * (len(batch.input_ids) // len(batch.member))
    columns = suffix_for(batch, COARSE) if kept else columns_for(batch, COARSE)
    return COARSE if weights * rows * columns <= LITTLE else FINE


def columns_for(batch: Batch, grain: Grain) -> int:
    """Columns of the static batch that serves this one."""
    return _multiple(batch.input_ids.shape[1], grain.columns)


def rows_for(count: int, grain: Grain) -> int:
    """Examples of the static batch that serves `count`."""
    if grain is FINE and count < grain.rows:
        return 1 << (count - 1).bit_length()
    return _multiple(count, grain.rows)


def suffix_for(batch: Batch, grain: Grain) -> int:
    """Columns that are computed of it behind a frozen prefix."""
    return min(_multiple(longest_suffix(batch), grain.suffix), columns_for(batch, grain))


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def shape_of(batch: Batch, grain: Grain, kept: bool, full: bool = False) -> Shape:
    """The shape that serves a batch.

    Args:
        batch: of a causal model.
        grain: of rows and columns.
        kept: its frozen prefix is not computed with it.
        full: its rows are equally long.
    """
    examples, columns = len(batch.member), columns_for(batch, grain)
    return Shape(
        rows_for(examples, grain),
        len(batch.input_ids) // examples,
        None if batch.label_ids is None else batch.label_ids.shape[1],
        batch.labels is not None,
        None if batch.taught is None else tuple(batch.taught.shape[1:]),
        full,
        batch.answers.shape[1],
        columns,
        columns - suffix_for(batch, grain) if kept else 0,
    )


class StaticInputs:
    """The inputs of a captured step.

    Args:
        batch: one of the shape.
        shape: of them.
        members: of the population.
        device: where the step runs.

    Attributes:
        tensors: by the names of `Batch`'s fields; ``slots`` ``(R, kept)`` and ``divisor``
            ``(members,)`` besides, and of full rows the columns ``keep`` ``(K,)`` that predict the
            answer. ``divisor`` and ``taught`` are in float64.
    """

    def __init__(self, batch: Batch, shape: Shape, members: int, device: torch.device):
        self._full = shape.full
        examples = len(batch.member)
        shapes: dict[str, tuple[int, ...]] = {}
        for name in _READ:
            value = getattr(batch, name)
            if value is not None:
                rows = len(value) * shape.examples // examples
                shapes[name] = (rows, *value.shape[1:])
        rows = shapes["input_ids"][0]
        shapes["input_ids"] = shapes["attention_mask"] = (rows, shape.columns)
        if shape.kept:
            shapes["slots"] = (rows, shape.kept)
        if shape.full:
            shapes["keep"] = (shape.answers,)
        shapes["divisor"] = (members,)
        sizes = [int(numpy.prod(size)) for size in shapes.values()]
        pinned = device.type == "cuda"
        self._here = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=pinned)
        self._there = self._here.to(device, copy=True)
        self._copied = torch.cuda.Event() if pinned else None
        ends = numpy.cumsum(sizes)
        here = numpy.split(self._here.numpy(), ends[:-1])
        there = self._there.split(sizes)
        self._arrays = {
            name: part.reshape(size)
            for part, (name, size) in zip(here, shapes.items(), strict=True)
        }
        self.tensors = {
            name: part.view(size) for part, (name, size) in zip(there, shapes.items(), strict=True)
        }
        for name in _FRACTIONS:
            if name in shapes:
                self._arrays[name] = self._arrays[name].view(numpy.float64)
                self.tensors[name] = self.tensors[name].view(torch.float64)

    def fill(self, batch: Batch, divisor: Sequence[float], slots: Any) -> None:
        """Put a batch of the shape in; rows that it lacks repeat its last one, without answer.

        Args:
            batch: on the CPU.
            divisor: of each member.
            slots: numpy's ``(R, kept)``, or None.
        """
        if self._copied is not None:
            self._copied.synchronize()  # what was put in before has left
        values = {name: getattr(batch, name).numpy() for name in _READ if name in self._arrays}
        if slots is not None:
            values["slots"] = slots
        for name, value in values.items():
            array, count = self._arrays[name], len(value)
            if name in ("input_ids", "attention_mask"):
                columns, more = value.shape[1], array.shape[1] - value.shape[1]
                padding, text = (
                    (slice(columns, None), slice(columns))
                    if self._full
                    else (slice(more), slice(more, None))
                )
                array[:count, padding] = 0
                array[:count, text] = value
            else:
                array[:count] = value
            array[count:] = _WITHOUT_ANSWER.get(name, array[count - 1])
        if self._full:
            columns, answers = values["input_ids"].shape[1], values["answers"].shape[1]
            self._arrays["keep"][:] = numpy.arange(columns - answers, columns)
        self._arrays["divisor"][:] = divisor
        self._there.copy_(self._here, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
