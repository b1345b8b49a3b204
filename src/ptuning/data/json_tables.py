"""One JSON object that is a whole table, as pandas, Python and web services write one.

columns   {"text": {"0": "good", "1": "bad"}, …}             DataFrame.to_json()
index     {"0": {"text": "good", …}, …}                      orient="index"
split     {"columns": ["text", …], "data": [["good", …], …]} orient="split"
data      {"data": [{"text": "good", …}, …]}                 orient="table", and many services
lists     {"text": ["good", "bad"], …}                       a dict of columns
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .rows import Row, unique_names

_BESIDE = {"schema", "index", "columns"}
"""What pandas writes beside ``data``."""
_PLACE = re.compile(r"-?\d[-+.:\dTZ]*")
"""An index of pandas: a number, or a time."""


def table_rows(table: Mapping[str, Any]) -> list[Row] | None:
    """The rows of such an object; None if it is a row itself.

    Raises:
        DataError: two columns have one name.
    """
    cells = list(table.values())
    data = table.get("data")
    known = data or len(_BESIDE & table.keys()) > 0  # of no rows the names beside them tell
    if known and isinstance(data, list) and not any(map(_is_nested, _others(table))):
        return _listed(table.get("columns"), data)
    if not cells or not all(map(_is_nested, cells)):
        return None
    if all(isinstance(cell, dict) for cell in cells):
        return _of_objects(table)
    lengths = {len(cell) for cell in cells}
    if not all(map(_is_plain_list, cells)) or len(lengths) > 1 or min(lengths) < 2:
        return None
    return [dict(zip(table, row, strict=True)) for row in zip(*cells, strict=True)]


def _listed(columns: Any, data: list[Any]) -> list[Row] | None:
    """Rows that stand as objects, or as lists with the columns' names beside them."""
    if all(isinstance(row, dict) for row in data):
        return data
    if not isinstance(columns, list):
        return None
    names = [str(name) for name in columns]
    if not all(isinstance(row, list) and len(row) == len(names) for row in data):
        return None
    unique_names(names, "the table")
    return [dict(zip(names, row, strict=True)) for row in data]


def _of_objects(table: Mapping[str, Mapping[str, Any]]) -> list[Row] | None:
    """Columns by the rows' places, or rows by their places."""
    first = next(iter(table.values()))
    if not first or any(cells.keys() != first.keys() for cells in table.values()):
        return None
    if all(map(_PLACE.fullmatch, first)):
        return [{name: cells[place] for name, cells in table.items()} for place in first]
    if all(map(_PLACE.fullmatch, table)):
        return [dict(row) for row in table.values()]
    return None


def _others(table: Mapping[str, Any]) -> list[Any]:
    return [cell for name, cell in table.items() if name not in _BESIDE | {"data"}]


def _is_nested(cell: Any) -> bool:
    return isinstance(cell, dict | list)


def _is_plain_list(cell: Any) -> bool:
    return isinstance(cell, list) and not any(map(_is_nested, cell))
