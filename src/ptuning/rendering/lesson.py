"""What a teacher says to one example, in place of the example's own answer.

The teacher is a model that has read more (`inference.distillation`); whoever trains by its lessons
learns its whole distribution, not its answer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Lesson:
    """One answer of a teacher, and how likely it finds what it might have said.

    Attributes:
        answer: the label, or the text of a free answer.
        shares: numpy's float32 ``(labels,)``, in the verbalizer's order and adding up to 1; of a
            free answer ``(K, k)``, at each of its tokens the probabilities of the k likeliest.
        tokens: K ids of a free answer, its end included.
        likely: numpy's int64 ``(K, k)``: of which tokens the `shares` are; None for labels.
    """

    answer: str
    shares: Any = field(repr=False)
    tokens: tuple[int, ...] = ()
    likely: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Lessons:
    """A teacher's lessons for the rows of a training.

    Attributes:
        about: facts of the teacher, kept with the prompt and compared on resume.
        training: one for each training example.
        dev: one for each dev example.
    """

    about: dict[str, Any]
    training: Sequence[Lesson]
    dev: Sequence[Lesson]
