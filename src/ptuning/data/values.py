"""What a cell says: its text, or that it is missing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

from ..errors import DataError, a_kind, excerpt


def plain(value: Any) -> Any:
    """A scalar of numpy, torch or the like as Python's own; everything else as it is."""
    if type(value) in (str, int, float):  # not numpy's, some of which are subclasses
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        kind = getattr(getattr(value, "dtype", None), "kind", "")
        unit = {"M": "datetime64[us]", "m": "timedelta64[us]"}.get(kind)
        bare = unit and isinstance(value.item(), int)  # what numpy makes of nanoseconds
        return (value.astype(unit) if bare else value).item()
    return value


def is_number(value: Any) -> TypeGuard[int | float]:
    """A number, whole or not; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_missing(value: Any) -> bool:
    """None, NaN, and what pandas puts where nothing is."""
    if isinstance(value, Iterable):  # text, and what is not one thing
        return False
    if value is None or type(value).__name__ == "NAType":  # pandas.NA equals nothing
        return True
    try:
        return bool(value != value)
    except (TypeError, ValueError, ArithmeticError):
        return False


def text_of(column: str, value: Any) -> str:
    """The text of a cell; nothing for a missing one.

    Raises:
        DataError: names the column; the value is no text and no single thing that has one.
    """
    value = plain(value)
    if isinstance(value, str):
        text = value
    elif is_missing(value):
        return ""
    else:
        text = _written(column, value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the column {column!r} holds half a surrogate pair; repair its text: {_begin(text)}"
        ) from None
    return text


def _written(column: str, value: Any) -> str:
    if isinstance(value, Iterable):  # lists, dicts, sets, bytes, arrays
        raise DataError(
            f"the column {column!r} holds {a_kind(value)} where one text is expected: "
            f"{_begin(value)}; put the text that is meant into a column of its own"
        )
    try:
        infinite = math.isinf(value)
    except (TypeError, ValueError, OverflowError):
        infinite = False
    if infinite:
        raise DataError(
            f"the column {column!r} holds a number beyond what floats can hold ({value}); write "
            "it as text if that is what the model shall see"
        )
    is_number = isinstance(value, int | float | complex)
    writes: Any = type(value).__str__
    if writes is object.__str__ and not is_number:
        raise DataError(
            f"the column {column!r} holds {a_kind(value)}, which has no text of its own; "
            "give text or a number"
        )
    try:
        return str(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        raise DataError(
            f"the column {column!r} holds a number of more than 4300 digits; write it as text"
        ) from None


def _begin(value: Any) -> str:
    try:
        return excerpt(" ".join(repr(value).split()), most=60)
    except Exception:  # whatever another's repr raises, this message must not
        return "…"
