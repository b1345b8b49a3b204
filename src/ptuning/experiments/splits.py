"""How examples that come as one are shared out: shuffled with seed 0, then cut 60/15/25."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def shuffled(items: Iterable[T]) -> list[T]:
    """In an order that is always the same one."""
    items = list(items)
    random.Random(0).shuffle(items)
    return items


def cut(items: Iterable[T]) -> tuple[list[T], list[T], list[T]]:
    """Train, dev and test: 60, 15 and 25 % of the shuffled items."""
    items = shuffled(items)
    first = int(0.6 * len(items))
    second = max(first + 1, int(0.75 * len(items)))  # of five, too, there is one for dev
    return items[:first], items[first:second], items[second:]
