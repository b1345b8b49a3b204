"""Rows as people have them: one function takes every common kind of table.

as_rows([{"text": "good"}])          as_rows(frame)            pandas, polars, pyarrow
as_rows({"text": ["good", "bad"]})   as_rows(data_set)         datasets, with class names
as_rows(row for row in source)       as_rows("rows.csv")       whatever `read_examples` reads
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import DataError, a_kind, excerpt
from .class_labels import names_beside, with_names
from .hub import dataset_rows
from .rows import Row, unique_names
from .sources import stream_examples

Rows = Iterable[Any] | Path
"""What `as_rows` takes."""
_WORD = re.compile(r"[\w-]+")
"""Text that was meant as a row, more likely than the name of a data set."""


def as_rows(source: Rows) -> list[Row]:
    """The rows of a table, whatever holds them.

    Args:
        source: an iterable of rows (column -> value), a dict of columns, a data frame, a table of
            pyarrow, a `datasets.Dataset` (its class labels become their names), or a file.

    Raises:
        DataError: it is no table, or a row is none.

    Example:
        >>> as_rows({"country": ["France", "Italy"], "capital": ["Paris", "Rome"]})[1]
        {'country': 'Italy', 'capital': 'Rome'}
    """
    return list(_rows_of(source))


def optional_rows(source: Rows | None) -> list[Row]:
    """The rows of a table that need not be there: None has none, as a `Trainer`'s
    ``eval_dataset``."""
    return [] if source is None else as_rows(source)


def _rows_of(source: Any) -> Iterator[Row]:
    if isinstance(source, str) and _WORD.fullmatch(source) and not Path(source).exists():
        raise DataError(  # the hub would be asked for long where it cannot be reached
            f"rows are expected, and {excerpt(repr(source), most=60)} came, which is no file here; "
            "give a list of rows, such as [{'country': 'France'}], or of a data set of the hub "
            f"ptuning.read_examples({excerpt(repr(source), most=60)})"
        )
    if isinstance(source, str | PathLike):
        return stream_examples(source)  # type: ignore[arg-type]
    columns = getattr(source, "columns", None)
    if columns is not None and hasattr(source, "to_dict"):
        names = [str(name) for name in columns]
        unique_names(names, "the data frame")
        if hasattr(source, "to_dicts"):  # polars
            return iter(source.to_dicts())
        return iter(source.set_axis(names, axis="columns").to_dict("records"))
    if hasattr(source, "features") and hasattr(source, "map"):
        return dataset_rows(source)
    if hasattr(source, "to_pylist") and hasattr(source, "column_names"):  # pyarrow
        unique_names(source.column_names, "the table")
        labels = names_beside(source.schema.metadata)
        return (with_names(row, labels) for row in source.to_pylist())
    if isinstance(source, Mapping):
        return _from_columns(source)
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise DataError(
            f"rows are expected, such as [{{'country': 'France'}}], and {a_kind(source)} "
            "came; give a list of rows, a dict of columns, a data frame or a data set"
        )
    return _each(source)


def _each(source: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(source, 1):
        if type(row) is not dict:
            if not (isinstance(row, Mapping) or hasattr(row, "keys")):
                raise DataError(
                    f"row {number} is {a_kind(row)}; each row must be column -> value, "
                    "such as {'country': 'France'}"
                )
            row = {name: row[name] for name in row.keys()}  # noqa: SIM118  (sqlite3.Row)
        if not all(isinstance(name, str) for name in row):
            if None in row:  # what csv.DictReader makes of a row that is longer than the header
                raise DataError(f"row {number} has more cells than there are columns")
            unique_names([str(name) for name in row], f"row {number}")
            row = {str(name): value for name, value in row.items()}
        yield row


def _from_columns(source: Mapping[Any, Any]) -> Iterator[Row]:
    unique_names([str(name) for name in source], "the dict of columns")
    columns: dict[str, Sequence[Any]] = {}
    for name, values in source.items():
        if hasattr(values, "features"):
            raise DataError(
                f"this holds several data sets ({', '.join(map(str, source))}); give one of them"
            )
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
            raise DataError(
                f"the column {str(name)!r} is {a_kind(values)}, and a dict of columns "
                "needs a list for each; put a single row into a list: [{...}]"
            )
        columns[str(name)] = list(values)
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(f"the columns are not equally long: {told}")
    return (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))
