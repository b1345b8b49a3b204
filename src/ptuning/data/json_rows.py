"""Rows of JSON: one object per line, or one array of objects, read piece by piece; or one object
that is a whole table. Objects may stand on several lines, as with an indent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError, repeated
from .json_tables import table_rows
from .rows import Row
from .text import LONGEST_CELL, LONGEST_ROW, lines, opened

_CHUNK = 2**16
_BLANK = " \t\n\r"
_GOES_ON = ("{", "[", ",", ":")
"""What a line ends with whose object is spread over several."""


def json_rows(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """Rows of a file; NaN is read as null.

    Args:
        path: of the file.
        encoding: of a file without a byte-order mark; by default UTF-8.

    Raises:
        DataError: malformed, with the line; a key stands twice in an object.
    """
    with opened(path, encoding=encoding) as stream:
        start = " "
        while start and start in _BLANK:
            start = stream.read(1)
        first = start + stream.readline(_CHUNK)
    if start == "[":
        yield from _elements(path, encoding)
        return
    spread = start == "{" and first.endswith("\n") and first.rstrip().endswith(_GOES_ON)
    rows = _spread(path, encoding) if spread else _lines(path, encoding)
    begin = list(islice(rows, 2))
    table = table_rows(*begin) if len(begin) == 1 else None
    if table is None:
        yield from chain(begin, rows)
    else:
        for number, row in enumerate(table, 1):
            yield _checked(path, f"row {number}", row)


def _lines(path: Path, encoding: str | None) -> Iterator[Row]:
    """The objects of a file that has one on each line."""
    for number, line in enumerate(lines(path, encoding=encoding), 1):
        if line.strip():
            try:
                value = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                cut = getattr(error, "pos", -1) >= len(line.rstrip())
                reason = ValueError("the line ends before the object does") if cut else error
                raise _malformed(path, number, reason) from error
            yield _row(path, f"line {number}", value, len(line))


def _spread(path: Path, encoding: str | None) -> Iterator[Row]:
    """The objects of a file in which they stand on several lines each."""
    with opened(path, encoding=encoding) as stream:
        text, number = _Pieces(path, stream), 0
        while text.next():
            number += 1
            value, length = text.value()
            yield _row(path, f"object {number}", value, length)


def _elements(path: Path, encoding: str | None) -> Iterator[Row]:
    """The elements of one array, of which no more is in memory than one and a little."""
    with opened(path, encoding=encoding) as stream:
        text = _Pieces(path, stream)
        text.drop("[")
        number = 0
        if text.next() == "]":
            text.drop("]")
        else:
            while True:
                number += 1
                value, length = text.value()
                yield _row(path, f"element {number}", value, length)
                if text.next() != ",":
                    break
                text.drop(",")
            text.drop("]")
        if text.next():
            raise text.fault("something stands behind the array")


class _Pieces:
    """JSON text that is read as far as it is needed."""

    def __init__(self, path: Path, stream: TextIO):
        self._path, self._stream = path, stream
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def next(self) -> str:
        """The next character that is no blank; nothing at the end."""
        while True:
            while self._at < len(self._text):
                character = self._text[self._at]
                if character not in _BLANK:
                    return character
                self._at += 1
            if not self._more(_CHUNK):
                return ""

    def drop(self, expected: str) -> None:
        """Go on behind a character that must come next."""
        if (character := self.next()) != expected:
            raise self.fault(f"{expected!r} expected, {character or 'the end'!r} found")
        self._at += 1

    def value(self) -> tuple[Any, int]:
        """The next value and its length."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                length = end - self._at
                self._at = end
                return value, length
            except (ValueError, RecursionError) as error:
                pending = len(self._text) - self._at
                behind = getattr(error, "pos", self._at) - self._at  # before the text is cut
                if not self._cut_off(error) or not self._more(max(_CHUNK, pending)):
                    line = self._line + self._text.count("\n", 0, self._at + behind)
                    raise _malformed(self._path, line, error) from error
                if pending > LONGEST_ROW:
                    raise self.fault(
                        f"a row of more than {LONGEST_ROW // 2**20} million characters"
                    ) from error

    def fault(self, reason: str) -> DataError:
        """An error at the place that is reached."""
        line = self._line + self._text.count("\n", 0, self._at)
        return _malformed(self._path, line, ValueError(reason))

    def _cut_off(self, error: Exception) -> bool:
        """The text may only have ended too early, so that more of it may help."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 16

    def _more(self, count: int) -> bool:
        if self._ended:
            return False
        chunk = self._stream.read(count)
        self._ended = not chunk
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = repeated(name for name, _ in pairs)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return values


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def _row(path: Path, place: str, value: Any, length: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{path} {place}: {type(value).__name__} where an object with the columns is "
            'expected, such as {"country": "France", "capital": "Paris"}'
        )
    return value if length <= LONGEST_CELL else _checked(path, place, value)


def _checked(path: Path, place: str, row: Row) -> Row:
    for name, cell in row.items():
        if isinstance(cell, str) and len(cell) > LONGEST_CELL:
            raise DataError(
                f"{path} {place}: the column {name!r} holds more than {LONGEST_CELL:,} characters"
            )
    return row


def _malformed(path: Path, line: int, error: Exception) -> DataError:
    reason = getattr(error, "msg", error)
    if isinstance(error, RecursionError):
        reason = "too many levels"
    return DataError(
        f"{path} line {line}: malformed JSON ({reason}); a row is one JSON object, on a line of "
        "its own or in one array"
    )
