from __future__ import annotations

import csv
import datetime
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ptuning.data import read_examples
from ptuning.errors import DataError

ODD = {
    "date": "2020-01-01",
    "none": "NA",
    "number": "01",
    "float": "1e5",
    "truth": "true",
    "empty": "",
    "spaces": "  two  ",
    "quotes": 'she said "yes", twice',
    "lines": "one\ntwo\n\nthree",
    "separators": "a,b\tc;d",
    "unicode": "naïve 東京 😀 e\u0301",
    "paragraph": "one\u2028two\u2029three\x85four\x0cfive\x1csix",
    "brackets": "[P] {x} [MASK]",
}
PLAIN = dict.fromkeys(ODD, "x")
quick = settings(deadline=None, max_examples=100)


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_text(
    rows: list[dict[str, str]], separator: str = ",", end: str = "\r\n", quote: Any = 0
) -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(
        stream, list(rows[0]), delimiter=separator, lineterminator=end, quoting=quote
    )
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def json_lines(rows: list[Any], *, ascii_only: bool = False) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)


def message(source: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(source)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
def test_json_lines_are_read_as_written(tmp_path: Path, name: str) -> None:
    rows = [ODD, PLAIN]
    assert read_examples(put(tmp_path, name, json_lines(rows))) == rows
    assert read_examples(put(tmp_path, name, json_lines(rows, ascii_only=True))) == rows


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_is_read_as_written(tmp_path: Path, indent: int | None) -> None:
    text = json.dumps([ODD, PLAIN], indent=indent, ensure_ascii=False)
    assert read_examples(put(tmp_path, "a.json", text)) == [ODD, PLAIN]
    assert read_examples(put(tmp_path, "a.jsonl", f"\n {text}\n")) == [ODD, PLAIN]


@pytest.mark.parametrize("size", range(1, 20))
def test_json_array_is_read_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("ptuning.data.json_rows._CHUNK", size)
    rows = [{"a": True, "b": None, "c": [-1.5e10, 12], "d": float("-inf"), "e": "\\ 😀\n"}, PLAIN]
    assert read_examples(put(tmp_path, "a.json", json.dumps(rows))) == rows


def test_a_row_of_an_array_that_is_longer_than_any_row_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptuning.data.json_rows._CHUNK", 50)
    monkeypatch.setattr("ptuning.data.json_rows.LONGEST_ROW", 100)
    rows = [{"a": ["word"] * 12}]
    assert read_examples(put(tmp_path, "a.json", json.dumps(rows * 9))) == rows * 9
    said = message(put(tmp_path, "b.json", json.dumps([*rows, {"a": ["word"] * 1000}], indent=0)))
    assert "b.json line 18: malformed JSON (a row of more than" in said


@pytest.mark.parametrize("text", ['{"long": "%s"}', '[{"long": "%s"}]'])
def test_a_cell_of_json_that_no_model_reads_is_refused_by_its_columns_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("ptuning.data.json_rows.LONGEST_CELL", 100)
    assert len(read_examples(put(tmp_path, "a.json", text % ("x" * 100)))) == 1
    said = message(put(tmp_path, "a.json", text % ("x" * 101)))
    assert "the column 'long' holds more than 100 characters" in said


def test_json_values_keep_their_types_and_rows_their_own_columns(tmp_path: Path) -> None:
    rows = [{"n": 1, "x": 1.5, "b": True, "l": ["a"], "o": {"k": None}}, {"other": "01"}, {"n": ""}]
    read = read_examples(put(tmp_path, "a.jsonl", json_lines(rows)))
    assert read == rows
    assert isinstance(read[0]["b"], bool)


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t"), ("a.CSV", ",")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separated_values_are_read_as_written_and_stay_text(
    tmp_path: Path, name: str, separator: str, end: str
) -> None:
    path = put(tmp_path, name, csv_text([ODD, PLAIN], separator, end))
    assert read_examples(path) == [ODD, PLAIN]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_newlines_end_a_row(tmp_path: Path, separator: str) -> None:
    text = f"text\none{separator}two\n"
    assert read_examples(put(tmp_path, "a.csv", text)) == [{"text": f"one{separator}two"}]
    assert read_examples(put(tmp_path, "a.tsv", text)) == [{"text": f"one{separator}two"}]
    rows = [{"text": f"one{separator}two"}, {"text": "three"}]
    assert read_examples(put(tmp_path, "a.jsonl", json_lines(rows))) == rows


def test_line_ends_inside_quotes_are_kept(tmp_path: Path) -> None:
    text = 'text,label\r\n"one\r\ntwo",a\r\n"three\rfour\nfive",b\r\n'
    assert read_examples(put(tmp_path, "a.csv", text)) == [
        {"text": "one\r\ntwo", "label": "a"},
        {"text": "three\rfour\nfive", "label": "b"},
    ]


def test_crlf_and_empty_lines_are_no_part_of_json_lines(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '{"a": "x"}\r\n\r\n  \n{"a": "y"}')
    assert read_examples(path) == [{"a": "x"}, {"a": "y"}]


def test_empty_lines_are_no_rows_of_csv(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", "\na,b\n\n1,2\n\n\n3,4")
    assert read_examples(path) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"a": "é"}\n'),
        ("a.json", '[{"a": "é"}]'),
        ("a.csv", "a\né\n"),
        ("a.tsv", "a\né\n"),
    ],
)
def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str, text: str) -> None:
    assert read_examples(put(tmp_path, name, b"\xef\xbb\xbf" + text.encode())) == [{"a": "é"}]


def test_long_cell_is_read_whole(tmp_path: Path) -> None:
    passage = "many words " * 20_000
    text = csv_text([{"text": passage, "label": "a"}])
    assert read_examples(put(tmp_path, "a.csv", text)) == [{"text": passage, "label": "a"}]


def test_path_may_be_text(tmp_path: Path) -> None:
    assert read_examples(str(put(tmp_path, "a.csv", "a\n1\n"))) == [{"a": "1"}]


def test_parquet_is_read_as_written(tmp_path: Path) -> None:
    rows = [
        {**ODD, "count": 1, "when": datetime.date(2020, 1, 1), "missing": None},
        {**PLAIN, "count": 2, "when": datetime.date(1999, 12, 31), "missing": "here"},
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_examples(path) == rows


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_broken_parquet_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = put(tmp_path, "broken.parquet", content)
    assert str(path) in message(path)


def test_parquet_without_rows_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "none.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), path)
    assert "holds no example" in message(path)


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ('{"a": 1}\n{"a": 2\n{"a": 3}\n', 2, "malformed JSON"),
        ('{"a": 1}\n\n\n{"a": "one\ttwo"}\n', 4, "malformed JSON"),
        ('{"a": 1}\n{"a": 2} {"a": 3}\n', 2, "malformed JSON"),
        ('{"a": "one\u2028two"}\nword\n', 2, "malformed JSON"),
        ('{"a": 1}\r\n{"a": 2}\r\n{a: 3}\r\n', 3, "malformed JSON"),
        ('{"a": 1}\n["a", 2]\n', 2, "list where an object"),
        ('{"a": 1}\n"text"\n', 2, "str where an object"),
        ("1\n", 1, "int where an object"),
        ('{"a": 1}\n{"a": ' + "[" * 100_000 + "\n", 2, "malformed JSON"),
        ('{"a": 1\n}\n', 1, "malformed JSON (the line ends before the object does)"),
    ],
)
def test_malformed_json_lines_name_the_line(
    tmp_path: Path, text: str, line: int, part: str
) -> None:
    said = message(put(tmp_path, "bad.jsonl", text))
    assert f"bad.jsonl line {line}: " in said
    assert part in said


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"a": 1},\n {"a": 2},\n {"a": }]', "line 3: malformed JSON"),
        ('[{"a": 1},\n {"a": 2},\n {"a": }]\n\n\n', "line 3: malformed JSON"),
        ('[{"a": 1}', "line 1: malformed JSON"),
        ('[\n{"a": 1},\n{"a":\nx}' + ', {"b": "c"}' * 9 + "]", "line 4: malformed JSON"),
        ('[{"a": 1}, 2]', "element 2: int where an object"),
        ('[{"a": 1}]\n{"a": 2}', "line 2: malformed JSON (something stands behind the array)"),
    ],
)
def test_malformed_json_array_names_the_place(tmp_path: Path, text: str, place: str) -> None:
    assert f"bad.json {place}" in message(put(tmp_path, "bad.json", text))


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a,b\n1,2\n3\n", 3, "1 cell, and the header has 2 (a, b)"),
        ("a,b\n1,2,3\n", 2, "3 cells, and the header has 2"),
        ("a,b\n\n\n1,2,3\n", 4, "3 cells"),
        ('a,b\n"one\ntwo\nthree",2\n3\n', 5, "1 cell"),
        ('a,b\r\n"one\r\ntwo",2\r\n3\r\n', 4, "1 cell"),
        ('a,b\n"one\u2028two",2\n3\n', 3, "1 cell"),
        ('a,b\n1,2\n"x"y,2\n', 3, "malformed CSV"),
        ('a,b\n"one\ntwo",2\n3,"4"5\n', 4, "malformed CSV"),
        ('a,b\n1,2\n3,"never closed\n', 3, "malformed CSV"),
        ("a,b,a\n1,2,3\n", 1, "must be there and differ, and 'a' stands twice (a, b, a); correct"),
        ("\n\na,a\n1,2\n", 3, "must be there and differ"),
        ('""\n1\n', 1, "must be there and differ, and none has one"),
    ],
)
def test_malformed_csv_names_the_line(tmp_path: Path, text: str, line: int, part: str) -> None:
    said = message(put(tmp_path, "bad.csv", text))
    assert f"bad.csv line {line}: " in said
    assert part in said


@pytest.mark.parametrize("line", ["sep=;\r\n", "sep=|\n", '"sep=;"\n', "SEP=\t\n", "\ufeffsep=,\n"])
def test_the_separator_that_a_table_names_for_excel(tmp_path: Path, line: str) -> None:
    by = line.lower().partition("sep=")[2][0]
    table = f"{line}a{by}b\n1{by}x: y! (z)\n"
    assert read_examples(put(tmp_path, "a.csv", table)) == [{"a": "1", "b": "x: y! (z)"}]
    assert read_examples(put(tmp_path, "b.csv", "sep=;,b\n1,2\n")) == [{"sep=;": "1", "b": "2"}]
    assert "holds no example" in message(put(tmp_path, "c.csv", line))


def test_malformed_tsv_names_its_separator(tmp_path: Path) -> None:
    assert "line 2: 3 cells" in message(put(tmp_path, "bad.tsv", "a\tb\n1\t2\t3\n"))
    assert read_examples(put(tmp_path, "a.tsv", "a\tb\n1,2\t3\n")) == [{"a": "1,2", "b": "3"}]


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.csv", "bad.tsv", "bad.json"])
def test_text_that_is_no_utf8_names_the_line(tmp_path: Path, name: str) -> None:
    said = message(put(tmp_path, name, b'{"a": 1}\n{"a": "caf\xe9"}\n'))
    assert f"{name} line 2: no valid UTF-8" in said
    said = message(put(tmp_path, name, b"\xef\xbb\xbfa\nb\n\xff"))
    assert f"{name} line 3: no valid UTF-8" in said


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.csv", "none.tsv"])
@pytest.mark.parametrize("content", [b"", b"\n \n" * 2, b"\xef\xbb\xbf"])
def test_empty_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    if name.endswith("sv"):
        content = content.replace(b" ", b"")
    assert f"{name} holds no example" in message(put(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "a,b\n"), ("a.csv", "a,b"), ("a.tsv", "a\tb\n"), ("a.json", "[]")]
)
def test_header_or_brackets_without_a_row_are_an_error(
    tmp_path: Path, name: str, text: str
) -> None:
    assert "holds no example" in message(put(tmp_path, name, text))


@pytest.mark.parametrize("name", ["no.jsonl", "no.json", "no.csv", "no.tsv", "no.parquet"])
def test_missing_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    assert f"{tmp_path / name} does not exist" in message(tmp_path / name)


@pytest.mark.parametrize("name", ["folder", "folder.csv", "folder.jsonl"])
def test_folder_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert f"{name} is a folder" in message(tmp_path / name)


@pytest.mark.parametrize("name", ["a.doc", "a.xlsx", "csv", "a.jsonl.bak"])
def test_unknown_ending_is_an_error_that_lists_the_known(tmp_path: Path, name: str) -> None:
    said = message(put(tmp_path, name, '{"a": 1}\n'))
    assert name in said
    assert ".jsonl, .json, .csv, .tsv, .txt or .parquet" in said


def test_name_of_no_file_and_no_data_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, config: str | None, *, split: str) -> None:
        asked.append((name, config, split))
        raise ConnectionError("offline")

    asked: list[tuple[str, str | None, str]] = []
    monkeypatch.setattr("datasets.load_dataset", refuse)
    assert "no data set of the hub (ConnectionError)" in message("org/none,config:validation")
    message("org/none")
    assert asked == [("org/none", "config", "validation"), ("org/none", None, "train")]


texts = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=12)
values = st.one_of(texts, st.sampled_from(list(ODD.values())))
names = st.lists(
    texts.filter(lambda name: bool(name.strip()) and "\ufeff" not in name),
    min_size=1,
    max_size=4,
    unique=True,
)


def tables(cells: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    def rows(columns: list[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
        row = st.fixed_dictionaries(dict.fromkeys(columns, cells))
        return st.lists(row, min_size=1, max_size=4)

    return names.flatmap(rows)


@quick
@given(tables(values), st.sampled_from([(".csv", ","), (".tsv", "\t")]), st.booleans())
@example([{"a": "one\u2028two"}], (".csv", ","), False)
@example([{"a": "one\r\ntwo"}], (".csv", ","), False)
@example([{"a": "one\rtwo"}], (".csv", ","), True)
@example([{"a": ""}], (".csv", ","), False)
def test_rows_written_by_csv_come_back(
    rows: list[dict[str, str]], kind: tuple[str, str], unix: bool
) -> None:
    quote = csv.QUOTE_ALL if unix else csv.QUOTE_MINIMAL
    text = csv_text(rows, kind[1], "\n" if unix else "\r\n", quote)
    with tempfile.TemporaryDirectory() as folder:
        # One column may look like several: `a;b` alone in each line.
        assert read_examples(put(Path(folder), f"a{kind[0]}", text), kind[1]) == rows


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@quick
@given(tables(json_values), st.booleans(), st.booleans())
def test_rows_written_by_json_come_back(
    rows: list[dict[str, Any]], ascii_only: bool, array: bool
) -> None:
    text = json_lines(rows, ascii_only=ascii_only)
    if array:
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=1)
    with tempfile.TemporaryDirectory() as folder:
        assert read_examples(put(Path(folder), "a.jsonl", text)) == rows


SYNTAX = st.lists(
    st.sampled_from(
        [*b'{}[]",:\n\r\t \\\x00\xff\xefa1', *"é\u2028".encode(), *b'"a":null"', *b"a,b\n"]
    ),
    max_size=60,
).map(bytes)


@quick
@given(st.one_of(st.binary(), SYNTAX), st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]))
@example(b'{"a": 1' + b"0" * 5000 + b"}", ".jsonl")
@example(b'a\n"' + b"x" * 200_000, ".csv")
@example(b"\x00\n\x00", ".csv")
@example(b"\r", ".csv")
def test_any_bytes_are_rows_or_a_data_error(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder), f"a{suffix}", content)
        try:
            rows = read_examples(path)
        except DataError:
            return
    assert rows and all(isinstance(row, dict) for row in rows)
