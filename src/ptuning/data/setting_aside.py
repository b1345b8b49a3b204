"""Examples set aside to choose with, as the answers are shared out among all."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..errors import DataError
from .columns import are_labels
from .rows import Row
from .values import text_of

SHARE, MOST = 0.2, 500
"""What is set aside where nobody says how much."""
_FEWEST = 10


def usual_share(count: int) -> float:
    """The share of `count` examples that is set aside where nobody says how much: a fifth, of very
    many 500, and nothing of fewer than ten."""
    return 0.0 if count < _FEWEST else min(SHARE, round(MOST / count, 6))


def set_aside(
    rows: Sequence[Row], answer: str, share: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Cut examples in two, both in their order: those to train on, and a share to choose with.

    Each label gives its share, and never its last example; free answers are drawn from as a whole.

    Args:
        rows: column -> value.
        answer: the answer's column.
        share: of all examples, 0 to 1.
        seed: which ones they are.

    Raises:
        DataError: the share is none, or leaves nothing to train on or to choose with.
    """
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not (number and 0 <= share < 1):
        raise DataError(f"the share to set aside is {share!r}; give a part of 1, such as 0.2")
    rows = list(rows)
    if share == 0:
        return rows, []
    count = round(share * len(rows))
    groups: dict[str, list[int]] = {}
    answers = [text_of(answer, row.get(answer)).strip() for row in rows]
    labels = are_labels(answers)
    for index, text in enumerate(answers):
        groups.setdefault(text if labels else "", []).append(index)
    chosen = _chosen(list(groups.values()), count, random.Random(seed))
    if not chosen:
        raise DataError(
            f"a share of {share} of {len(rows)} examples sets none aside; give a larger one, or "
            "more examples"
        )
    training = [row for index, row in enumerate(rows) if index not in chosen]
    return training, [rows[index] for index in sorted(chosen)]


def _chosen(groups: list[list[int]], count: int, draw: random.Random) -> set[int]:
    """`count` examples, of each group its share: rounded down, then where most is missing."""
    total = sum(map(len, groups))
    exact = [count * len(group) / total for group in groups]
    takes = [min(int(part), len(group) - 1) for part, group in zip(exact, groups, strict=True)]
    by_need = sorted(range(len(groups)), key=lambda n: takes[n] - exact[n])
    for n in by_need:
        if sum(takes) < count and takes[n] < len(groups[n]) - 1:
            takes[n] += 1
    parts = zip(groups, takes, strict=True)
    return {index for group, take in parts for index in draw.sample(group, take)}
