"""Rows of a Parquet file, a few at a time, and its columns' types."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import DataError
from .class_labels import names_beside, with_names
from .rows import Row, unique_names
from .text import LONGEST_CELL, Swelling

_AT_ONCE = 64
_SMALL = 2**20


def parquet_rows(path: Path) -> Iterator[Row]:
    """Rows with the types that the file gives them; class labels of `datasets` are their names.

    Raises:
        DataError: it is no Parquet, is damaged, or has a column twice; a class label has no name.
    """
    for batch in batches(path):
        names = names_beside(batch.schema.metadata)
        for row in _guarded(path, batch.to_pylist):
            yield with_names(row, names)


def batches(path: Path, exact: bool = False) -> Iterator[Any]:
    """The file's record batches, of few rows each.

    Args:
        path: of the file.
        exact: with the types that the file gives them, for one whose rows were read before; else
            text may be dictionaries.

    Raises:
        DataError: as `parquet_rows`.
    """
    file = _guarded(path, lambda: _open(path, exact))
    unique_names(file.schema_arrow.names, str(path))
    swelling = Swelling(path)
    # A batch of two groups would have two dictionaries, which what is nested cannot.
    reading = chain.from_iterable(
        file.iter_batches(batch_size=_AT_ONCE, row_groups=[group])
        for group in range(file.num_row_groups)
    )
    while (batch := _guarded(path, lambda: next(reading, None))) is not None:
        sizes = map(partial(_size, path), batch.columns)
        swelling.add(_guarded(path, partial(sum, sizes)))
        yield batch


def _open(path: Path, exact: bool) -> Any:
    """The file; of a small one text is read as dictionaries, unless types are to be `exact`.

    A few bytes may stand for a gigabyte, as a long text that is the same in every row; as a
    dictionary it takes its true size until it is known how much it would be. (What the file says
    of its single columns is not asked: damage there ends the process, as of pyarrow 26.)
    """
    from pyarrow.parquet import ParquetFile

    # A buffer, since without one a row group's column is read as a whole.
    options: Any = {"buffer_size": 2**20}
    file = ParquetFile(path, **options)
    data, swelling = file.metadata, Swelling(path)
    for number in range(data.num_row_groups):
        group = data.row_group(number)
        swelling.add(max(group.total_byte_size, 16 * group.num_rows * group.num_columns))
    if exact or path.stat().st_size > _SMALL:
        return file
    columns = [file.schema.column(number) for number in range(len(file.schema))]
    names = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    return ParquetFile(path, read_dictionary=names, **options)


def _size(path: Path, column: Any) -> int:
    """Bytes of a column's values.

    Raises:
        DataError: one of them is too long.
    """
    import pyarrow.compute as pc

    lengths = _lengths(column)
    if lengths is not None and (pc.max(lengths).as_py() or 0) > LONGEST_CELL:
        raise DataError(f"{path}: a cell is longer than {LONGEST_CELL:,} characters")
    return _bytes(column)


def _bytes(column: Any) -> int:
    """Of its values, also inside of others; a dictionary counts as what it stands for, and not once
    more in each batch."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_struct(kind):
        return sum(map(_bytes, column.flatten()))
    if pa.types.is_map(kind):
        return _bytes(column.keys) + _bytes(column.items)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return 8 * len(column) + _bytes(column.flatten())
    lengths = _lengths(column)
    return int(column.nbytes if lengths is None else pc.sum(lengths).as_py() or 0)


def _lengths(column: Any) -> Any:
    """Of each text in bytes; None where there are no texts."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        kind, values = column.type.value_type, column.dictionary
    else:
        kind, values = column.type, column
    binary = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string)
    if not any(is_kind(kind) for is_kind in (*binary, pa.types.is_large_binary)):
        return None
    lengths = pc.binary_length(values)
    return lengths.take(column.indices) if pa.types.is_dictionary(column.type) else lengths


def _guarded(path: Path, read: Any) -> Any:
    try:
        return read()
    except DataError:
        raise
    except Exception as error:  # pyarrow's own kinds
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as Parquet: {reason}") from error
