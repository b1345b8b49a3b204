"""What rows have in common, wherever they come from."""

from __future__ import annotations

from types import MappingProxyType

from ptuning.data.rows import in_blocks


def test_blocks_are_smaller_where_rows_are_long() -> None:
    rows = [{"x": "a" * size} for size in (1, 2, 3, 4, 8, 12, 1)]
    sizes = [[len(row["x"]) for row in block] for block in in_blocks(iter(rows), 3, 11)]
    assert sizes == [[1, 2, 3], [4, 8], [12], [1]]
    assert list(in_blocks([], 3)) == []


def test_rows_of_any_mapping_count_with_what_is_in_them() -> None:
    rows = [MappingProxyType({"x": ["a" * 4, {"b": "c" * 4}]}) for _ in range(3)]
    assert [len(block) for block in in_blocks(rows, 9, 11)] == [2, 1]
