"""One prompt's vectors as the start of another's, whose template has other numbers of them.

A prompt that was trained on another task is a good start (Vu et al. 2022, SPoT, arXiv 2110.07904).
Group by group, where the templates have as many groups of virtual tokens, each new token begins at
the old one that stands at the same part of its group's length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .task import Task


def resampled(vectors: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Vectors ``(sum(after), width)`` from others ``(sum(before), width)``.

    Args:
        vectors: of the old prompt.
        before: virtual tokens in each group of its template.
        after: of the new one's; another number of groups is taken for one group.
    """
    if len(before) != len(after):
        before, after = [sum(before)], [sum(after)]
    chosen, first = [], 0
    for old, new in zip(before, after, strict=True):
        chosen += [first + ((2 * place + 1) * old) // (2 * new) for place in range(new)]
        first += old
    return vectors[torch.tensor(chosen)]


def groups_of(task: Task, count: int) -> list[int]:
    """How many of `count` virtual tokens stand in each group of a template; one group where the
    words of some are not tokens yet."""
    groups = [group.count for group in task.parsed.virtual] if task.template is not None else []
    return groups if sum(groups) == count else [count]
