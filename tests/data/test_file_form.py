"""What a file does not say of itself is given: encoding, names of columns, separator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptuning.data import read_examples
from ptuning.errors import DataError

TABLE = "neutral;café, naïve\npositive;Gewinn – endlich\n"
ROWS = [
    {"kind": "neutral", "text": "café, naïve"},
    {"kind": "positive", "text": "Gewinn – endlich"},
]


def put(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("columns", ["kind,text", " kind , text", ["kind", "text"]])
@pytest.mark.parametrize("separator", [None, ";"])
def test_a_file_without_a_header_gets_names(
    tmp_path: Path, columns: Any, separator: str | None
) -> None:
    path = put(tmp_path, "a.csv", TABLE.encode())
    assert read_examples(path, separator, columns=columns) == ROWS


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.tab"])
def test_a_named_encoding_is_used(tmp_path: Path, encoding: str, name: str) -> None:
    path = put(tmp_path, name, TABLE.encode(encoding))
    assert read_examples(path, encoding=encoding, columns="kind,text") == ROWS


@pytest.mark.parametrize("array", [False, True])
def test_json_has_an_encoding_too(tmp_path: Path, array: bool) -> None:
    text = json.dumps(ROWS, ensure_ascii=False) if array else ""
    text = text or "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    path = put(tmp_path, "a.jsonl", text.encode("cp1252"))
    assert read_examples(path, encoding="cp1252", columns="not,asked") == ROWS


def test_a_byte_order_mark_is_believed_first(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", b"\xef\xbb\xbf" + "a\né\n".encode())
    assert read_examples(path, encoding="cp1252") == [{"a": "é"}]


def test_other_encodings_are_told_how_to_be_read(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", b"a\none\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"line 3: no valid UTF-8; .*--encoding cp1252"):
        read_examples(path)
    assert read_examples(path, encoding="latin-1")[1] == {"a": "café"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_an_encoding_that_needs_a_byte_order_mark_is_refused_where_there_is_none(
    tmp_path: Path, encoding: str
) -> None:
    path = put(tmp_path, "a.csv", b"text,team\nA card,billing\n")
    with pytest.raises(DataError, match=rf"line 1: no valid {encoding.upper()}; save the file as"):
        read_examples(path, encoding=encoding)


def test_each_line_of_a_plain_text_may_be_a_text(tmp_path: Path) -> None:
    path = put(tmp_path, "a.txt", b'He said "no", and left\r\n\r\na\tb;c\n')
    assert read_examples(path, columns="text") == [
        {"text": 'He said "no", and left'},
        {"text": "a\tb;c"},
    ]


def test_a_plain_text_may_be_a_table(tmp_path: Path) -> None:
    path = put(tmp_path, "a.txt", b"id\ttext\n1\tone, two\n")
    assert read_examples(path) == [{"id": "1", "text": "one, two"}]


def test_a_lone_line_is_told_to_be_taken_for_a_header(tmp_path: Path) -> None:
    path = put(tmp_path, "a.txt", b"France Paris\n")
    with pytest.raises(
        DataError, match=r"holds no example but a header \(France Paris\).*columns="
    ):
        read_examples(path)
    assert read_examples(path, columns="text") == [{"text": "France Paris"}]


def test_names_that_the_file_has_itself_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", b"\xef\xbb\xbfkind;text\n" + TABLE.encode())
    message = r"line 1 is a header with the names that are given \(kind, text\); leave them out"
    with pytest.raises(DataError, match=message):
        read_examples(path, columns="kind,text")
    assert read_examples(path) == ROWS


def test_other_than_so_many_cells_are_told(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", b"1,2,3\n")
    with pytest.raises(
        DataError, match=r"line 1: 3 cells, and names are given for 2 \(a, b\); quote"
    ):
        read_examples(path, columns="a,b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoding": "utf-9"}, "the encoding is 'utf-9', which Python does not know; give one"),
        ({"encoding": "rot13"}, "the encoding is 'rot13'"),
        ({"encoding": 8}, "the encoding is 8"),
        ({"columns": ""}, "the columns are ''; give each a name"),
        ({"columns": "a,,b"}, "the columns are 'a,,b'; give each a name"),
        ({"columns": ["a", 1]}, "give each a name"),
        ({"columns": "a, a"}, "the columns are 'a', 'a'; give each a name of its own"),
        ({"separator": "ab"}, "the separator is 'ab'; give one character"),
    ],
)
def test_what_can_be_no_form_of_a_file_is_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(put(tmp_path, "a.csv", b"a,b\n1,2\n"), **given)
