"""One JSON object that is a whole table is read as its rows; a row of lists stays a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from ptuning.data import read_examples
from ptuning.errors import DataError

ROWS = [{"text": "a joy", "n": 1}, {"text": "naïve", "n": 2}, {"text": "dull", "n": 3}]
FRAME = pandas.DataFrame(ROWS)


def read(folder: Path, text: str, name: str = "a.json") -> list[dict[str, Any]]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_examples(path)


@pytest.mark.parametrize("orient", ["columns", "index", "split", "records"])
def test_what_pandas_writes_is_read(tmp_path: Path, orient: Any) -> None:
    assert read(tmp_path, FRAME.to_json(orient=orient)) == ROWS
    shuffled = FRAME.iloc[[2, 0]].to_json(orient=orient)
    assert read(tmp_path, shuffled) == [ROWS[2], ROWS[0]]
    assert read(tmp_path, FRAME.to_json(orient=orient, indent=2)) == ROWS


@pytest.mark.parametrize("count", [1, 3])
def test_objects_with_an_indent_are_read(tmp_path: Path, count: int) -> None:
    """As `json.dump(…, indent=1)` and jq write them."""
    text = "\n".join(json.dumps(row, indent=1) for row in ROWS[:count])
    assert read(tmp_path, text, "a.jsonl") == ROWS[:count]
    assert read(tmp_path, f"\n\n{text}\n\n") == ROWS[:count]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n "a": 1,\n "b" 2\n}', r"line 3: malformed JSON \(Expecting ':'"),
        ('{\n "a": 1,\n "b": 2\n', "line 4: malformed JSON"),
        ('{\n "a": 1\n}\n{\n "a": 1,\n "a": 2\n}', "the key 'a' stands twice"),
        ('{\n "a": 1\n}\n7\n', "object 2: int where an object"),
        ('{"a": 1\n{"a": 2}', "line 1: malformed JSON .the line ends before the object"),
    ],
)
def test_faults_of_objects_with_an_indent_name_their_place(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, text)


@pytest.mark.parametrize("orient", ["columns", "index"])
@pytest.mark.parametrize(
    "index",
    [[-1, 0, 1], [0.5, 1.0, 1e7], pandas.date_range("2020-01-01", periods=3, tz="UTC")],
    ids=["negative", "fractions", "times"],
)
def test_an_index_may_be_any_numbers_or_times(tmp_path: Path, orient: Any, index: Any) -> None:
    frame = FRAME.set_index(pandas.Index(index))
    assert read(tmp_path, frame.to_json(orient=orient, date_format="iso")) == ROWS


@pytest.mark.parametrize("orient", ["split", "table"])
def test_a_table_without_rows_holds_no_example(tmp_path: Path, orient: Any) -> None:
    with pytest.raises(DataError, match="holds no example"):
        read(tmp_path, FRAME.iloc[:0].to_json(orient=orient))


def test_a_table_with_its_schema_keeps_the_index_as_a_column(tmp_path: Path) -> None:
    read_rows = read(tmp_path, FRAME.to_json(orient="table"))
    assert read_rows == [{"index": number, **row} for number, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    "table",
    [
        {"text": ["a joy", "naïve", "dull"], "n": [1, 2, 3]},
        {"data": ROWS},
        {"version": "1.0", "data": ROWS},
    ],
)
def test_what_programs_write_is_read(tmp_path: Path, table: Any) -> None:
    assert read(tmp_path, json.dumps(table) + "\n\n") == ROWS


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"data": "text", "label": "x"},
        {"data": [1, 2], "label": "x"},
        {"data": ROWS, "options": ["a", "b"]},
        {"data": [[1, 2]], "columns": ["a", "b", "c"]},
        {"text": "a joy", "tags": ["x", "y"]},
        {"tokens": ["a", "joy"], "tags": ["x"]},
        {"tokens": ["joy"], "tags": ["x"]},
        {"a": {"x": 1}, "b": {"y": 2}},
        {"a": {"x": 1}, "b": {"x": 2}},
        {"a": {}, "b": {}},
        {},
    ],
)
def test_a_row_of_lists_or_objects_stays_one(tmp_path: Path, row: Any) -> None:
    assert read(tmp_path, json.dumps(row)) == [row]


@pytest.mark.parametrize("table", [{"a": {"0": 1, "1": 2}}, {"a": [1, 2]}, {"data": [{"a": 1}]}])
def test_objects_of_which_there_are_several_are_rows(tmp_path: Path, table: Any) -> None:
    """Only one that is alone in its file is a table."""
    assert read(tmp_path, f"{json.dumps(table)}\n" * 2, "a.jsonl") == [table, table]


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the table has the column 'a' twice"):
        read(tmp_path, '{"columns": ["a", "a"], "index": [0], "data": [[1, 2]]}')


def test_cells_have_the_limit_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptuning.data.json_rows.LONGEST_CELL", 100)
    with pytest.raises(DataError, match=r"a\.json row 2: the column 'text' holds more than 100"):
        read(tmp_path, json.dumps({"text": ["short", "x" * 101]}))
