"""What a row is, and what its columns must be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ..errors import DataError, excerpt, repeated

Row = dict[str, Any]
"""One example: column -> value."""
AnyRow = TypeVar("AnyRow", bound=Mapping[str, Any])


def in_blocks(rows: Iterable[AnyRow], most: int, size: int = 4 * 2**20) -> Iterator[list[AnyRow]]:
    """Rows in blocks of at most `most`, smaller ones where `size` characters are reached."""
    block: list[AnyRow] = []
    room = size
    for row in rows:
        block.append(row)
        room -= _size(row)
        if len(block) == most or room <= 0:
            yield block
            block, room = [], size
    if block:
        yield block


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_size(name) + _size(inner) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return 8


def unique_names(names: Sequence[str], where: str) -> None:
    """Refuse a table in which two columns have one name.

    Raises:
        DataError: names the column.
    """
    if len(set(names)) < len(names):
        raise DataError(f"{where} has the column {repeated(names)!r} twice; rename one of the two")


def listed(names: Iterable[Any]) -> str:
    """Names of columns or labels for a message, of very many the first."""
    texts = [excerpt(str(name), most=60) for name in names]
    more = f", and {len(texts) - 20} more" if len(texts) > 20 else ""
    return ", ".join(texts[:20]) + more


def names_in(row: Mapping[str, Any]) -> str:
    """The columns of a row for a message, which says so where the row may be a whole table, as
    ``{"data": [...]}`` and pandas' ``to_json()`` write one."""
    names = listed(map(repr, row)) or "none"
    if row and all(isinstance(cell, list | Mapping) for cell in row.values()):
        return f"{names}, with lists or objects only: if that is a whole table, give its rows"
    return names
