"""Examples set aside to choose with, as the answers are shared out among all."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import DataError
from .columns import are_labels
from .rows import Row
from .values import is_number, text_of

SHARE, MOST = 0.2, 500
"""What is set aside where nobody says how much."""
_FEWEST = 10


def usual_share(count: int) -> float:
    """The share of `count` examples that is set aside where nobody says how much: a fifth, of very
    many 500, and nothing of fewer than ten."""
    return 0.0 if count < _FEWEST else min(SHARE, round(MOST / count, 6))


def set_aside(
    rows: Sequence[Row], read: Iterable[str], answer: str | None, share: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Cut examples in two, both in their order: those to train on, and a share to choose with.

    Each label gives its share, and never its last example; free answers are drawn from as a whole.
    Examples that say the same stay together where there are others: what is trained on would look
    as if it were known.

    Args:
        rows: column -> value.
        read: the columns of what is asked.
        answer: the answer's column; None for texts without answers.
        share: of all examples, from 0 to below 1.
        seed: which ones they are.

    Raises:
        DataError: the share is none, or leaves nothing to train on or to choose with.
    """
    if not (is_number(share) and 0 <= share < 1):
        raise DataError(f"the share to set aside is {share!r}; give a part of 1, such as 0.2")
    rows = list(rows)
    if share == 0:
        return rows, []
    count = round(share * len(rows))
    answers = ["" if answer is None else text_of(answer, row.get(answer)).strip() for row in rows]
    labels = are_labels(answers)
    groups: dict[str, list[list[int]]] = {}
    for copies in alike(rows, read, answers):
        groups.setdefault(answers[copies[0]] if labels else "", []).append(copies)
    chosen = _chosen(list(groups.values()), count, random.Random(seed))
    if not chosen:
        raise DataError(
            f"a share of {share} of {len(rows)} examples sets none aside; give a larger one, or "
            "more examples"
        )
    training = [row for index, row in enumerate(rows) if index not in chosen]
    return training, [rows[index] for index in sorted(chosen)]


def alike(
    rows: Sequence[Mapping[str, Any]], read: Iterable[str], answers: Sequence[str]
) -> list[list[int]]:
    """The numbers of the rows that say the same: what is asked, and its answer."""
    read = tuple(read)
    found: dict[tuple[str, ...], list[int]] = {}
    for index, (row, right) in enumerate(zip(rows, answers, strict=True)):
        said = (right, *(text_of(name, row.get(name)) for name in read))
        found.setdefault(said, []).append(index)
    return list(found.values())


def _chosen(groups: list[list[list[int]]], count: int, draw: random.Random) -> set[int]:
    """`count` examples, of each group its share: rounded down, then where most is missing; fewer
    where examples that say the same are too many for it. Of a group where all are, single ones."""
    sizes = [sum(map(len, group)) for group in groups]
    exact = [count * size / sum(sizes) for size in sizes]
    takes = [min(int(part), size - 1) for part, size in zip(exact, sizes, strict=True)]
    by_need = sorted(range(len(groups)), key=lambda n: takes[n] - exact[n])
    for n in by_need:
        if sum(takes) < count and takes[n] < sizes[n] - 1:
            takes[n] += 1
    chosen: set[int] = set()
    for group, take in zip(groups, takes, strict=True):
        if take and min(map(len, group)) > take:
            group = [[index] for copies in group for index in copies]
        while fitting := [copies for copies in group if len(copies) <= take]:
            for copies in draw.sample(fitting, min(take, len(fitting))):
                if len(copies) <= take:
                    chosen.update(copies)
                    take -= len(copies)
            group = [copies for copies in fitting if copies[0] not in chosen]
    return chosen
