"""What a row is, and what its columns must be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import DataError

Row = dict[str, Any]
"""One example: column -> value."""


def unique_names(names: Sequence[str], where: str) -> None:
    """Refuse a table in which two columns have one name."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise DataError(f"{where} has the column {twice!r} twice; rename one of the two")


def named(names: Iterable[Any]) -> str:
    """Column names for a message, of very many the first."""
    texts = [brief(str(name), 60) for name in names]
    more = f", and {len(texts) - 20} more" if len(texts) > 20 else ""
    return ", ".join(texts[:20]) + more


def brief(text: str, most: int = 200) -> str:
    """A text for a message, cut where it is long."""
    return text if len(text) <= most else f"{text[:most]}…"
