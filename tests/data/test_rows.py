"""What rows have in common, wherever they come from."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from ptuning.data.columns import columns_of
from ptuning.data.rows import in_blocks, names_in
from ptuning.errors import DataError
from ptuning.prompts.prompt_settings import PromptSettings
from ptuning.rendering.example import check_rows


def test_blocks_are_smaller_where_rows_are_long() -> None:
    rows = [{"x": "a" * size} for size in (1, 2, 3, 4, 8, 12, 1)]
    sizes = [[len(row["x"]) for row in block] for block in in_blocks(iter(rows), 3, 11)]
    assert sizes == [[1, 2, 3], [4, 8], [12], [1]]
    assert list(in_blocks([], 3)) == []


def test_rows_of_any_mapping_count_with_what_is_in_them() -> None:
    rows = [MappingProxyType({"x": ["a" * 4, {"b": "c" * 4}]}) for _ in range(3)]
    assert [len(block) for block in in_blocks(rows, 9, 11)] == [2, 1]


@pytest.mark.parametrize(
    ("table", "names"), [({"data": [{"a": "x"}]}, "'data'"), ({"a": ["x"], "b": {}}, "'a', 'b'")]
)
def test_a_row_that_may_be_a_whole_table_is_told_as_one(table: dict[str, Any], names: str) -> None:
    told = f"{names}, with lists or objects only: if that is a whole table, give its rows"
    with pytest.raises(DataError, match=f"the example has {told}"):
        check_rows(PromptSettings("[P] {text} [MASK]"), [table], "test", answered=False)
    with pytest.raises(DataError, match=f"no column holds text in every row: the data has {told}"):
        columns_of([table])
    assert names_in({**table, "text": "x"}) == f"{names}, 'text'"
    assert names_in({}) == "none"
