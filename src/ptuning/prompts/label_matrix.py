"""A label matrix: which words it compares, and its numbers (`forward.label_scores`).

It belongs to its words: labels that say the same ones in another order get it reordered, labels
with other words cannot have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import torch
from torch import Tensor

from ..errors import InputError, briefly

Labels = Mapping[str, Sequence[str]]


@dataclass(frozen=True, eq=False)
class LabelMatrix:
    """What each label word's score gets of the others'.

    Attributes:
        words: all label words, in the order of the rows.
        numbers: ``(words, words)`` float32.

    Raises:
        InputError: they are not of so many words.
    """

    words: tuple[str, ...]
    numbers: Tensor

    def __post_init__(self) -> None:
        numbers, count = self.numbers, len(self.words)
        shape = tuple(numbers.shape) if isinstance(numbers, Tensor) else type(numbers).__name__
        if shape != (count, count) or not count:
            raise InputError(
                f"a label matrix' numbers are {shape}, for {count} words; expected a tensor with a "
                "row and a column for each word"
            )

    @classmethod
    def trained(cls, numbers: Tensor | None, labels: Labels) -> Self | None:
        """Of these labels' words; None without numbers."""
        return None if numbers is None else cls(_words(labels), numbers)

    def of(self, labels: Labels) -> Tensor:
        """The numbers ``(words, words)`` in the order of these labels' words.

        Raises:
            InputError: they have other words.
        """
        words = _words(labels)
        if words == self.words:
            return self.numbers
        if sorted(words) != sorted(self.words):
            other = sorted({*words} ^ {*self.words})
            raise InputError(
                f"label_matrix is of the words {briefly(list(self.words))}, and the labels have "
                f"{briefly(list(words))} (not in both: {briefly(other)}); give its words again, or "
                "take label_matrix out (None) and train again"
            )
        old, new = (sorted(range(len(each)), key=each.__getitem__) for each in (self.words, words))
        order = torch.empty(len(words), dtype=torch.long)
        order[new] = torch.tensor(old)
        order = order.to(self.numbers.device)
        return self.numbers[order][:, order]


def check_matrix(matrix: LabelMatrix | None, labels: Labels) -> None:
    """Refuse what is no label matrix of these labels' words.

    Raises:
        InputError: says what came.
    """
    if matrix is None:
        return
    if not isinstance(matrix, LabelMatrix):
        raise InputError(
            f"label_matrix is {briefly(matrix)}; expected a LabelMatrix, as trained prompts have "
            "it, or None"
        )
    matrix.of(labels)


def _words(labels: Labels) -> tuple[str, ...]:
    return tuple(chain.from_iterable(labels.values()))
