"""Rows of separated values (CSV, TSV), as the csv module reads them with ``strict=True``.

The csv module itself has one limit of a cell's length for the whole process, too low for passages
and not to be changed under other threads; and it reports a quote that never closes at the file's
end. So records are cut here; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..errors import DataError, briefly, counted, excerpt, warn
from .file_form import FileForm
from .rows import Row, listed
from .text import LONGEST_CELL, lines

_OTHERS = (";", "\t", "|")
_QUOTE = '"'
_SAYS = re.compile(r'"?sep=([^"\r\n])"?[\r\n]*', re.IGNORECASE)
"""A first line that names the separator, for Excel."""


def separated_rows(path: Path, usual: str, form: FileForm) -> Iterator[Row]:
    """Rows of a file with a header, or with columns that are named; all cells text.

    Args:
        path: of the file.
        usual: the separator that its ending promises.
        form: what is known of it. Without a separator it is what a line ``sep=;`` at the top says,
            else found (`_found`).

    Raises:
        DataError: malformed, with the line.
    """
    says = _SAYS.fullmatch(next(lines(path, "", form.encoding), ""))
    separator = form.separator or (says[1] if says else _found(path, usual, form))
    cut = records(path, separator, form.encoding)
    if says:
        next(cut)
    number, header = (0, list(form.columns)) if form.columns else next(cut, (0, []))
    _check_names(path, number, header)
    # Spreadsheets end in columns without a name; a table of pandas has its index in front.
    unnamed = [at for at, name in enumerate(header) if at and not name.strip()]
    names = [name for at, name in enumerate(header) if at not in unnamed]
    told, at_header = False, number
    for number, cells in cut:
        if form.columns and cells == header:
            raise DataError(
                f"{path} line {number} is a header with the names that are given "
                f"({listed(header)}); leave them out (columns=, --columns)"
            )
        if len(cells) != len(header):
            named = "names are given for" if form.columns else "the header has"
            raise DataError(
                f"{path} line {number}: {counted(len(cells), 'cell')}, and {named} "
                f"{len(header)} ({listed(header)}); quote cells that hold a {separator!r}, or "
                f"name the separator{_if_a_title(at_header, names)}"
            )
        for at in reversed(unnamed):
            lost = cells.pop(at)
            if lost.strip() and not told:
                told = True
                warn(
                    f"{path} line {number}: {briefly(lost)} stands in a column without a name and "
                    f"is left out{_if_a_title(at_header, names)}"
                )
        yield dict(zip(names, cells, strict=True))
    if header and number == at_header and not form.columns:
        raise DataError(
            f"{path} holds no example but a header ({listed(header)}); give at least one, or, if "
            "that line is one, name the columns (columns=, --columns)"
        )


def _if_a_title(number: int, names: list[str]) -> str:
    """What to do where that may be what the header's line holds: spreadsheets are exported so."""
    if not number or len(names) > 1:
        return ""
    return f"; if line {number} is a title, delete what stands above the header"


def _check_names(path: Path, number: int, header: list[str]) -> None:
    there = [name for name in header if name.strip()]
    twice = [excerpt(name) for at, name in enumerate(there) if name in there[:at]]
    if twice or (header and not there):
        wrong = f"{twice[0]!r} stands twice" if twice else "none has one"
        raise DataError(
            f"{path} line {number}: column names must be there and differ, and {wrong} "
            f"({listed(header)}); correct the header"
        )


def records(
    path: Path, separator: str, encoding: str | None = None
) -> Iterator[tuple[int, list[str]]]:
    """The cells of each record, with the number of its last line; empty lines are none.

    Raises:
        DataError: malformed, with the line.
    """
    source = enumerate(lines(path, "", encoding), 1)
    for number, line in source:
        text = line.rstrip("\r\n")
        if not text:
            continue
        if _QUOTE not in text:
            cells = text.split(separator)
        else:
            number, cells = _quoted(path, separator, number, line, source)
        if len(line) > LONGEST_CELL and max(map(len, cells)) > LONGEST_CELL:
            raise DataError(f"{path} line {number}: {_too_long()}")
        yield number, cells


def _quoted(
    path: Path, separator: str, number: int, line: str, source: Iterator[tuple[int, str]]
) -> tuple[int, list[str]]:
    """The cells of a record in which quotes stand; it may go on over several lines."""
    cells, at = [], 0
    while True:
        if not line.startswith(_QUOTE, at):
            end = line.find(separator, at)
            if end < 0:
                cells.append(line[at:].rstrip("\r\n"))
                return number, cells
            cells.append(line[at:end])
            at = end + 1
            continue
        opened, parts, length, at = number, [], 0, at + 1
        while True:
            end = line.find(_QUOTE, at)
            part = line[at:] if end < 0 else line[at:end]
            parts.append(part)
            length += len(part)
            if length > LONGEST_CELL:
                raise DataError(f"{path} line {opened}: {_too_long()}; is its quote closed?")
            if end < 0:
                number, line = next(source, (0, ""))
                if not line:
                    raise DataError(
                        f"{path} line {opened}: malformed CSV (the quote that opens here is never "
                        "closed)"
                    )
                at = 0
            elif line.startswith(_QUOTE, end + 1):
                parts.append(_QUOTE)
                at = end + 2
            else:
                at = end + 1
                break
        cells.append("".join(parts))
        rest = line[at : at + 2]
        if rest in ("", "\n", "\r", "\r\n"):
            return number, cells
        if rest[0] != separator:
            raise DataError(
                f"{path} line {number}: malformed CSV ({separator!r} expected after a closing "
                f"quote, and {rest[0]!r} stands there)"
            )
        at += 1


def _too_long() -> str:
    return f"a cell is longer than {LONGEST_CELL:,} characters"


def _found(path: Path, usual: str, form: FileForm) -> str:
    """The separator that cuts header and first record alike into several named cells, or the first
    two records into as many as there are names."""
    for separator in (usual, *_OTHERS):
        try:
            first = [cells for _, cells in islice(records(path, separator, form.encoding), 2)]
        except DataError:
            continue  # not with this one
        header = form.columns or (first[0] if first else [])
        named = list(header)
        while named and not named[-1].strip():  # spreadsheets end in such columns
            named.pop()
        if (
            len(named) > 1
            and all(name.strip() for name in named[1:])
            and all(len(cells) == len(header) for cells in first)
        ):
            return separator
    return usual
