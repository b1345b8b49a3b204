"""Reading examples: JSONL, CSV, TSV, Parquet, or a data set of the hub.

JSONL and CSV are read here and not through ``datasets``: its readers guess types (the text
"2020-01-01" becomes a date, "NA" nothing), which would change what the template shows the model,
and their errors name no line. Parquet and hub data sets have types of their own and go through it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DataError

Row = dict[str, Any]
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_examples(source: str | Path) -> list[Row]:
    """All examples of a file or a hub data set, column -> value.

    Args:
        source: a path that ends in ``.jsonl``, ``.json`` (lines or one array), ``.csv``, ``.tsv``
            or ``.parquet``; or a hub data set as ``NAME[,CONFIG][:SPLIT]`` (split ``train`` by
            default).

    Raises:
        DataError: missing, empty, malformed (with the line), or of an unknown kind.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet") or path.exists():
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise DataError(f"data file {source} {problem}; give a JSONL, CSV or Parquet file")
        rows = _read_file(path, suffix)
    else:
        rows = _read_hub(str(source))
    if not rows:
        raise DataError(f"{source} holds no example; give a file with at least one")
    return rows


def _read_file(path: Path, suffix: str) -> list[Row]:
    if suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(path).read().to_pylist()
        except Exception as error:  # pyarrow's own kinds
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path} line {line}: no valid UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if suffix in _SEPARATORS:
        return list(_csv_rows(path, text, _SEPARATORS[suffix]))
    if suffix in (".jsonl", ".json"):
        return list(_json_rows(path, text))
    raise DataError(f"{path} has an unknown kind; expected .jsonl, .json, .csv, .tsv or .parquet")


def _csv_rows(path: Path, text: str, separator: str) -> Iterator[Row]:
    lines = io.StringIO(text, newline="")  # str.splitlines would also split at U+2028
    reader = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] = []
    limit = csv.field_size_limit(len(text) + 1)
    try:
        for cells in reader:
            if not cells:
                continue
            if not header:
                header = cells
                if len(set(header)) < len(header) or not all(name.strip() for name in header):
                    raise DataError(
                        f"{path} line {reader.line_num}: column names must be there and differ: "
                        f"{header}"
                    )
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path} line {reader.line_num}: {len(cells)} cells, and the header has "
                    f"{len(header)} ({', '.join(header)}); quote cells that hold a '{separator}'"
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: malformed CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    if text.lstrip().startswith("["):
        yield from _json_array(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _object(path, number, _parse(path, line, number))


def _json_array(path: Path, text: str) -> Iterator[Row]:
    for number, value in enumerate(_parse(path, text, 1), 1):
        yield _object(path, number, value, "element")


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = line + getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", error)
        raise DataError(
            f"{path} line {at}: malformed JSON ({reason}); each line must be one JSON object"
        ) from error


def _object(path: Path, number: int, value: Any, unit: str = "line") -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{path} {unit} {number}: {type(value).__name__} where an object with the columns is "
            'expected, such as {"country": "France", "capital": "Paris"}'
        )
    return value


def _read_hub(source: str) -> list[Row]:
    import datasets

    name, _, split = source.partition(":")
    name, _, config = name.partition(",")
    try:
        data = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub's and datasets' many kinds
        raise DataError(
            f"{source} is no file here and no data set of the hub ({type(error).__name__}); give a "
            ".jsonl, .csv or .parquet file, or NAME[,CONFIG][:SPLIT]"
        ) from error
    names = {
        column: feature for column, feature in data.features.items() if hasattr(feature, "int2str")
    }
    return [
        {key: names[key].int2str(v) if key in names and v is not None and v >= 0 else v
         for key, v in row.items()}
        for row in data
    ]  # fmt: skip
