"""Reading examples: JSONL, CSV, TSV, Parquet, or a data set of the hub.

JSONL and CSV are read here and not through ``datasets``: its readers guess types (the text
"2020-01-01" becomes a date, "NA" nothing), which would change what the template shows the model,
and their errors name no line. Hub data sets have types of their own and go through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import DataError, InputError, excerpt, unreadable
from ..places import named
from .file_form import FileForm
from .hub import hub_rows
from .json_rows import json_rows
from .parquet import parquet_rows
from .rows import Row
from .separated import separated_rows
from .text import PACKED, lines

SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".json", ".ndjson")
KINDS = (*JSON_LINES, *SEPARATORS, ".parquet")
_PLAIN = {".txt": "\t", ".tab": "\t"}
"""Endings that promise less: a table, with tabs if nothing else is found in it."""


def read_examples(
    source: str | Path,
    separator: str | None = None,
    encoding: str | None = None,
    columns: Sequence[str] | str | None = None,
) -> list[Row]:
    """All examples of a file or a hub data set, column -> value.

    Args:
        source: a path that ends in ``.jsonl``, ``.json`` (lines, one array, or one object that is
            the table), ``.csv``, ``.tsv`` or ``.parquet``, or a table in a ``.txt``; the text kinds
            also packed (``.csv.gz``, ``.bz2``, ``.xz``, ``.zst``); or a hub data set as
            ``NAME[,CONFIG][:SPLIT]`` (split ``train`` by default).
        separator: of a CSV file's cells; by default found in its first lines.
        encoding: of a text file; by default UTF-8, or what a byte-order mark says.
        columns: names of a CSV file's columns where it has no header. One name for a ``.txt``
            means that each line is a text.

    Raises:
        DataError: missing, empty, malformed (with the line), or of an unknown kind.
    """
    return list(stream_examples(source, separator, encoding, columns))


def stream_examples(
    source: str | Path,
    separator: str | None = None,
    encoding: str | None = None,
    columns: Sequence[str] | str | None = None,
) -> Iterator[Row]:
    """The same rows one after the other, in memory that does not grow with the file.

    Raises:
        DataError: as `read_examples`, when the fault is reached.
    """
    row = None
    for row in _rows(source, FileForm(separator, encoding, columns)):
        yield row
    if row is None:
        raise DataError(f"{source} holds no example; give a file with at least one")


def is_parquet(source: str | Path) -> bool:
    """A source whose columns have types of Parquet."""
    return Path(source).suffix.lower() == ".parquet"


def _rows(source: str | Path, form: FileForm) -> Iterator[Row]:
    try:
        path = named(source)
    except InputError as error:
        raise DataError(f"data: {error}") from None
    kind = _kind(path)
    try:
        exists, is_file, is_folder = path.exists(), path.is_file(), path.is_dir()
    except OSError as error:
        raise DataError(unreadable(f"data file {excerpt(str(source))}", error)) from None
    if kind not in (*KINDS, *_PLAIN) and not exists:
        return hub_rows(str(source))
    if not is_file:
        problem = "is a folder" if is_folder else "does not exist"
        if exists and not is_folder:
            problem = "is no regular file"
        raise DataError(
            f"data file {excerpt(str(source))} {problem}; give a JSONL, CSV or Parquet file"
        )
    if is_parquet(path):
        return parquet_rows(path)
    if kind in JSON_LINES:
        return json_rows(path, form.encoding)
    if kind in _PLAIN and form.columns and len(form.columns) == 1:
        texts = (line.rstrip("\r\n") for line in lines(path, "", form.encoding))
        return ({form.columns[0]: text} for text in texts if text)
    if usual := (SEPARATORS | _PLAIN).get(kind):
        return separated_rows(path, usual, form)
    raise DataError(
        f"{path} has an unknown kind; expected .jsonl, .json, .csv, .tsv, .txt or .parquet (a text "
        f"file may be packed: {', '.join(PACKED)})"
    )


def _kind(path: Path) -> str:
    """The ending that says how rows are written, without one for how the file is packed."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix
