"""Class labels of Hugging Face data sets: numbers that stand for names, from 0 on; -1 for none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..errors import DataError
from .rows import Row
from .values import plain

Names = Mapping[str, Sequence[str]]


def names_beside(metadata: Mapping[bytes, bytes] | None) -> Names:
    """The columns of class labels, with their names, that a file of `datasets` tells beside its
    schema; none where it tells nothing, or something else."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found = {column: kind["names"] for column, kind in features.items() if "names" in kind}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    return {
        column: names
        for column, names in found.items()
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
    }


def with_names(row: Row, names: Names) -> Row:
    """A row whose class labels are their names, and None where there is none.

    Raises:
        DataError: a class label has no name.
    """
    for column, of_column in names.items():
        number = plain(row.get(column))
        if isinstance(number, int | float) and number == number // 1:
            row[column] = _name(column, of_column, int(number))
    return row


def _name(column: str, names: Sequence[str], number: int) -> str | None:
    if number < 0:
        return None
    if number >= len(names):
        raise DataError(
            f"the column {column!r} holds the class label {number}, and the data set names "
            f"{len(names)} classes, counted from 0; correct the one or the other"
        )
    return str(names[number])
