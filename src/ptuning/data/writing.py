"""Writing rows: JSON lines, CSV or Parquet, in constant memory, columns and types as they were."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from .parquet import batches
from .rows import Row, in_blocks
from .sources import SEPARATORS, is_parquet, stream_examples
from .values import is_missing, plain

_ROWS, _BYTES = 10_000, 16 * 2**20
"""Of a Parquet row group, whichever is reached first."""
Rereadable = Callable[[], Iterator[Row]]


def json_line(row: Row) -> bytes:
    """A row as a line of JSON; half a surrogate pair as its escape, which JSON has for it."""
    return _json(row).encode("utf-8", "backslashreplace") + b"\n"


def convert(
    path: Path,
    kind: str,
    data: str,
    form: Mapping[str, Any],
    added: Path,
    names: Sequence[str],
    columns: Sequence[str],
) -> None:
    """The rows of `data` with further columns as CSV, TSV or Parquet.

    Args:
        path: of the new file.
        kind: its ending.
        data: what `stream_examples` reads.
        form: the fields of a `FileForm`.
        added: JSON lines, one for each row, that have the further columns.
        names: of the further columns.
        columns: all columns in their order, the further ones behind.
    """

    def further() -> Iterator[Row]:
        with open(added, "rb") as file:
            for line in file:
                row = json.loads(line)
                yield {name: row[name] for name in names if name in row}

    def rows() -> Iterator[Row]:
        pairs = zip(stream_examples(data, **form), further(), strict=False)
        return ({**row, **more} for row, more in pairs)

    if kind in SEPARATORS:
        write_separated(path, rows(), columns, SEPARATORS[kind])
    elif is_parquet(data):
        _add_columns(path, Path(data), further(), names)
    else:
        write_parquet(path, rows, columns)


def write_separated(
    path: Path, rows: Iterable[Row], columns: Sequence[str], separator: str
) -> None:
    """Rows as CSV or TSV: a missing value is empty, and lists, dicts and truths are JSON."""
    special = re.compile(f'[{re.escape(separator)}"\r\n]')
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        for cells in chain([columns], ([_cell(row.get(name)) for name in columns] for row in rows)):
            file.write(_record(cells, separator, special))


def _record(cells: Sequence[str], separator: str, special: re.Pattern[str]) -> str:
    """A line of separated values; cells with something `special` in them are quoted.

    The csv module of Python 3.11 leaves a carriage return unquoted where lines end otherwise, and
    readers, ours too, end the row there.
    """
    if list(cells) == [""]:
        return '""\n'  # an empty line would be no row
    quoted = ('"' + c.replace('"', '""') + '"' if special.search(c) else c for c in cells)
    return separator.join(quoted) + "\n"


def write_parquet(path: Path, rows: Rereadable, columns: Sequence[str]) -> None:
    """Rows as Parquet.

    Args:
        path: of the file.
        rows: gives the rows; they are read twice, since a later one may change a column's type.
        columns: in their order; one whose values have no common type becomes text.
    """
    import pyarrow as pa

    kinds: dict[str, Any] = dict.fromkeys(columns, pa.null())
    exact: set[str] = set()
    for some in in_blocks(rows(), _ROWS):
        for name in columns:
            values = [row.get(name) for row in some]
            kinds[name] = _common(kinds[name], values)
            if any(map(_beyond_floats, values)):
                exact.add(name)
    kinds = {
        name: None if kind is None or _cannot_hold(kind, name in exact) else kind
        for name, kind in kinds.items()
    }
    texts = pa.string()
    schema = pa.schema([(_clean(n), texts if kind is None else kind) for n, kind in kinds.items()])
    tables = (
        pa.table(
            [
                pa.array(_for_arrow([row.get(name) for row in some], kinds[name]), schema.types[i])
                for i, name in enumerate(columns)
            ],
            schema=schema,
        )
        for some in in_blocks(rows(), _ROWS)
    )
    write_tables(path, schema, tables)


def write_tables(path: Path, schema: Any, tables: Iterable[Any]) -> None:
    """Tables of pyarrow as one Parquet file."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    with ParquetWriter(path, schema) as writer:
        waiting: list[Any] = []
        for table in tables:
            waiting.append(table)
            rows, size = sum(t.num_rows for t in waiting), sum(t.nbytes for t in waiting)
            if rows >= _ROWS or size >= _BYTES:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def _common(kind: Any, values: list[Any]) -> Any:
    """The type of a column's values so far and these; None where they have none in common."""
    import pyarrow as pa

    if kind is None:
        return None
    try:
        found = pa.array(_for_arrow(values, kind)).type
        both = [pa.schema([("", kind)]), pa.schema([("", found)])]
        return pa.unify_schemas(both, promote_options="permissive").types[0]
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return None


def _cannot_hold(kind: Any, exact: bool) -> bool:
    """Parquet has no struct of nothing, and floats have not all whole numbers."""
    import pyarrow as pa

    inner = [kind.field(i).type for i in range(kind.num_fields)]
    empty = pa.types.is_struct(kind) and not inner
    return (
        empty
        or (exact and pa.types.is_floating(kind))
        or any(_cannot_hold(one, exact) for one in inner)
    )


def _beyond_floats(value: Any) -> bool:
    """There is a whole number in it that a float does not hold."""
    if isinstance(value, dict | list | tuple):
        return any(map(_beyond_floats, value.values() if isinstance(value, dict) else value))
    value = plain(value)
    return isinstance(value, int) and abs(value) > 2**53


def _for_arrow(values: list[Any], kind: Any) -> list[Any]:
    if kind is None:
        return [None if is_missing(value) else _cell(value) for value in values]
    return [_clean(value) for value in values]


def _clean(value: Any) -> Any:
    """Text that can be encoded, also deep inside."""
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_clean(str(key)): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    return plain(value)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_json)
    except ValueError:  # a number that JSON does not have
        return json.dumps(
            finite(value),
            ensure_ascii=False,
            allow_nan=False,
            default=lambda inner: finite(_as_json(inner)),
        )


def finite(value: Any) -> Any:
    """A value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    value = plain(value)
    if isinstance(value, str):
        return _clean(value)
    if is_missing(value):
        return ""
    if isinstance(value, bool | dict | list | tuple):
        return _clean(_json(value))
    return str(_as_json(value))


def _as_json(value: Any) -> Any:
    value = plain(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _add_columns(path: Path, data: Path, added: Iterator[Row], names: Sequence[str]) -> None:
    """The tables of a Parquet file with further columns; the others stay bit for bit."""
    import pyarrow as pa
    from pyarrow.parquet import read_schema

    schema = read_schema(data)
    kinds = [pa.string(), pa.float64(), None][: len(names)]

    def tables() -> Iterator[Any]:
        for batch in batches(data, exact=True):
            rows = list(islice(added, batch.num_rows))
            table = pa.Table.from_batches([batch])
            for name, kind in zip(names, kinds, strict=True):
                values = [row.get(name) for row in rows]
                table = table.append_column(name, pa.array(values, kind))
            yield table

    made = tables()
    first = next(made)
    fields = [first.schema.field(name) for name in names]
    whole = pa.schema([*schema, *fields], metadata=schema.metadata)
    write_tables(path, whole, chain([first], made))
