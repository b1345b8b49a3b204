from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow
import pytest

from ptuning.data import read_examples, text
from ptuning.data.text import lines, read_text
from ptuning.errors import DataError

CONTENT = "country,capital\nFrance,Paris\nCôte d'Ivoire,Yamoussoukro\n"
ROWS = [
    {"country": "France", "capital": "Paris"},
    {"country": "Côte d'Ivoire", "capital": "Yamoussoukro"},
]


def zstandard(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard}


@pytest.mark.parametrize("packing", list(PACKERS))
@pytest.mark.parametrize("named", [True, False])
def test_packed_files_are_read_whatever_they_are_called(
    tmp_path: Path, packing: str, named: bool
) -> None:
    path = tmp_path / (f"a.csv.{packing}" if named else "a.csv")
    path.write_bytes(PACKERS[packing](CONTENT.encode()))
    assert read_examples(path) == ROWS


@pytest.mark.parametrize("packing", list(PACKERS))
def test_a_packed_file_in_two_parts_is_read_whole(tmp_path: Path, packing: str) -> None:
    half = len(CONTENT) // 2
    parts = [PACKERS[packing](part.encode()) for part in (CONTENT[:half], CONTENT[half:])]
    (tmp_path / "a.csv").write_bytes(b"".join(parts))
    assert read_examples(tmp_path / "a.csv") == ROWS


@pytest.mark.parametrize("packing", list(PACKERS))
@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_a_damaged_packed_file_is_one_error(tmp_path: Path, packing: str, damage: str) -> None:
    content = bytearray(PACKERS[packing]((CONTENT * 50).encode()))
    if damage == "cut off":
        del content[-len(content) // 3 :]
    else:
        content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.csv"):
        read_examples(tmp_path / "a.csv")


def test_a_small_file_that_unpacks_to_something_huge_is_refused_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_PLENTY", 10_000)
    content = "text\n" + "word\n" * 1_000_000
    (tmp_path / "a.csv.bz2").write_bytes(bz2.compress(content.encode()))
    with pytest.raises(DataError, match="small and holds more than"):
        read_examples(tmp_path / "a.csv.bz2")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str) -> None:
    marked = "\ufeff" + CONTENT if encoding == "utf-16-le" else CONTENT
    (tmp_path / "a.csv").write_bytes(marked.encode(encoding))
    assert read_examples(tmp_path / "a.csv") == ROWS


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_without_a_mark_utf16_is_refused_as_such(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENT.encode(encoding))
    with pytest.raises(DataError, match=r"as UTF-16 without a byte-order mark .* save .* UTF-8"):
        read_examples(tmp_path / name)


def test_utf16_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("a\nb\nc\n".encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"a\.csv line \d: no valid UTF-16"):
        read_examples(tmp_path / "a.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_alike_and_only_there(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.txt").write_bytes(f"one{end}two\u2028three\x85four{end}last".encode())
    assert list(lines(tmp_path / "a.txt")) == ["one\n", "two\u2028three\x85four\n", "last"]


def test_a_line_or_text_that_is_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "LONGEST_ROW", 100)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * 200 + '"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 2 is longer"):
        read_examples(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="longer than 50"):
        read_text(tmp_path / "a.jsonl", 50)


def test_a_bad_byte_far_behind_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a\n" + b"word\n" * 50_000 + b"caf\xe9\n")
    with pytest.raises(DataError, match=r"line 50002: no valid UTF-8"):
        read_examples(tmp_path / "a.csv")
