"""Rows of data sets: the hub's, and any of the ``datasets`` library."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..errors import DataError, excerpt
from .class_labels import with_names
from .rows import Row

_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


def hub_rows(source: str) -> Iterator[Row]:
    """Rows of a data set of the hub, ``NAME[,CONFIG][:SPLIT]``.

    Raises:
        DataError: there is none of that name, or it cannot be reached.
    """
    import datasets.packaged_modules

    name, _, split = source.partition(":")
    name, _, config = name.partition(",")
    if not _HUB_NAME.fullmatch(name) or len(source) > 200:
        raise DataError(
            f"{excerpt(source)} is no file here and no name of a data set of the hub; give a "
            ".jsonl, .csv or .parquet file, or NAME[,CONFIG][:SPLIT]"
        )
    # datasets takes the name of one of its readers as: the files of that kind that lie about here.
    readers = list(datasets.packaged_modules.__path__)
    if name.lower() in {module.name for module in pkgutil.iter_modules(readers)}:
        raise DataError(
            f"{name} is no file here and names a kind of file, no data set of the hub; give the "
            f"file itself, such as rows.{name}"
        )
    try:
        data: Any = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub's and datasets' many kinds
        raise DataError(
            f"{source} is no file here and no data set of the hub ({type(error).__name__}); give a "
            ".jsonl, .csv or .parquet file, or NAME[,CONFIG][:SPLIT]"
        ) from error
    return dataset_rows(data)


def dataset_rows(data: Any) -> Iterator[Row]:
    """Rows of a `datasets.Dataset`; class labels are their names, and none where there is none.

    What it is set to give (tensors, frames) does not count, but for a transform of the user's own:
    that may leave columns out, and put anything into those that it gives. Images, sounds and the
    like stay as they are stored: they are no text, and take memory and libraries to be decoded.

    Raises:
        DataError: a class label has no name.
    """
    if getattr(data, "format", {}).get("type") != "custom":
        data = data.with_format(None)
        for column, kind in (data.features or {}).items():
            if getattr(kind, "decode", False) and type(kind).__name__ != "Json":  # which is plain
                data = data.cast_column(column, replace(kind, decode=False))
    features = data.features or {}
    names = {column: kind.names for column, kind in features.items() if hasattr(kind, "int2str")}
    for row in map(dict, data):
        yield with_names(row, names)
