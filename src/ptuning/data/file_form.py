"""How a text file of rows is written, where the file itself does not say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError
from .rows import listed

_BY_NAME = {"tab": "\t", "\\t": "\t"}


@dataclass
class FileForm:
    """What a person knows of a file: it is taken as true.

    Args:
        separator: between the cells of a CSV file, such as ``;`` or tab; by default found in its
            first lines.
        encoding: of a text file, such as ``cp1252`` (Windows) or ``utf-16-le``; by default UTF-8,
            or what a byte-order mark says.
        columns: names of a CSV file's columns where it has no header, its first line being an
            example; a text has commas between them.

    Raises:
        DataError: no separator, encoding or names.
    """

    separator: str | None = None
    encoding: str | None = None
    columns: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        separator = self.separator
        if isinstance(separator, str):
            separator = _BY_NAME.get(separator, separator)
        single = isinstance(separator, str) and len(separator) == 1
        if separator is not None and (not single or separator in '"\r\n'):
            raise DataError(f"the separator is {separator!r}; give one character, such as ';'")
        self.separator = separator
        if self.encoding is not None:
            _check_encoding(self.encoding)
        if self.columns is not None:
            self.columns = _names(self.columns)


def _check_encoding(name: object) -> None:
    try:
        "".encode(name)  # type: ignore[arg-type]
    except (LookupError, TypeError, ValueError):
        raise DataError(
            f"the encoding is {name!r}, which Python does not know; give one such as utf-8, cp1252 "
            "or utf-16"
        ) from None


def _names(given: Sequence[str] | str) -> list[str]:
    names = given.split(",") if isinstance(given, str) else list(given)
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"the columns are {given!r}; give each a name, such as label,text")
    names = [name.strip() for name in names]
    if len(set(names)) < len(names):
        raise DataError(f"the columns are {listed(map(repr, names))}; give each a name of its own")
    return names
