from __future__ import annotations

import csv
import io
import tempfile
import threading
import warnings
from pathlib import Path

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptuning.data import read_examples, separated
from ptuning.data.separated import records
from ptuning.errors import DataError

ROWS = [{"text": "good; or not", "label": "yes"}, {"text": 'so "so"', "label": "no"}]


@settings(deadline=None, max_examples=400)
@given(st.text(st.sampled_from('a"",;\n\r\t é\u2028'), max_size=40), st.sampled_from(",;\t"))
def test_records_are_cut_as_the_csv_module_cuts_them(text: str, separator: str) -> None:
    expected: list[list[str]] | None
    try:
        plain = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        expected = [cells for cells in plain if cells]
    except csv.Error:
        expected = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        path.write_bytes(text.encode())
        try:
            cut = [cells for _, cells in records(path, separator)]
        except DataError:
            cut = None
    assert cut == expected


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_found_in_the_header(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "a.csv"
    pandas.DataFrame(ROWS).to_csv(path, sep=separator, index=False)
    assert read_examples(path) == ROWS
    assert read_examples(path, separator) == ROWS


@pytest.mark.parametrize(
    "text",
    ["text\na;b\nc;d\n", "a;b\nwhole\n", "one;,two\nx;,y\n", "a;;b\n1;2;3\n", "text\n1\t2\n"],
)
def test_a_header_that_another_separator_does_not_cut_stays_whole(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "a.csv").write_text(text)
    header = text.split("\n")[0].split(",")
    assert list(read_examples(tmp_path / "a.csv")[0]) == header


@pytest.mark.parametrize("separator", ["", ";;", '"', "\n"])
def test_what_can_be_no_separator_is_refused(tmp_path: Path, separator: str) -> None:
    (tmp_path / "a.csv").write_text("a\nb\n")
    with pytest.raises(DataError, match="one character"):
        read_examples(tmp_path / "a.csv", separator)


def test_columns_without_a_name_are_left_out_and_what_stands_there_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('v1,v2,,, \nham,"Go on, then",,,\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_examples(path) == [{"v1": "ham", "v2": "Go on, then"}]
    path.write_text("v1,,v2\nham,,one\nspam,more,two\nham,still more,three\n")
    with pytest.warns(
        UserWarning, match="line 3: 'more' stands in a column without a name"
    ) as said:
        rows = read_examples(path)
    assert len(said) == 1 and [*rows[1].values()] == ["spam", "two"]


def test_a_title_above_the_header_is_told_of(tmp_path: Path) -> None:
    path, remedy = tmp_path / "a.csv", "if line 1 is a title, delete what stands above the header"
    path.write_text("Tickets\n2026-11-30\n\ntext,label\nlost,card\n")
    with pytest.raises(DataError, match=f"line 4: 2 cells, and the header has 1 .*{remedy}"):
        read_examples(path)
    path.write_text("Tickets,\n2026-11-30,\ntext,label\nlost,card\n")
    with pytest.warns(UserWarning, match=f"'label' stands in a column without a name.*{remedy}"):
        read_examples(path)
    path.write_text("lost,card\n")
    with pytest.raises(DataError, match="names are given for 1") as said:
        read_examples(path, columns="text")
    assert "is a title" not in str(said.value)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_found_where_columns_without_a_name_end_the_header(
    tmp_path: Path, separator: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label,, \nfine,yes,,\n,,,\n".replace(",", separator))
    assert read_examples(path) == [{"text": "fine", "label": "yes"}, {"text": "", "label": ""}]


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_data_frames_index_stays_a_column_without_a_name(tmp_path: Path, separator: str) -> None:
    pandas.DataFrame(ROWS).to_csv(tmp_path / "a.csv", sep=separator)
    expected = [{"": str(number), **row} for number, row in enumerate(ROWS)]
    assert read_examples(tmp_path / "a.csv") == expected


def test_a_quote_that_never_closes_is_reported_where_it_opens(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n1,2\n"3\n4","5\n' + "6,7\n" * 99)
    with pytest.raises(DataError, match=r"line 4: malformed CSV \(the quote that opens here"):
        read_examples(tmp_path / "a.csv")


def test_a_cell_that_is_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(separated, "LONGEST_CELL", 1000)
    for cell in ("x" * 1001, '"' + "x\n" * 501 + '"'):
        (tmp_path / "a.csv").write_text(f"a\nb\n{cell}\n")
        with pytest.raises(DataError, match=r"a\.csv line 3: a cell is longer than 1,000"):
            read_examples(tmp_path / "a.csv")


def test_a_long_row_of_shorter_cells_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(separated, "LONGEST_CELL", 1000)
    long = "x" * 1000
    (tmp_path / "a.csv").write_text(f'a,b\n{long},"{long}"\n{long},{long}\n')
    assert read_examples(tmp_path / "a.csv") == [{"a": long, "b": long}] * 2


def test_the_csv_modules_own_limit_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n" + "x,y\n" * 20_000 + "x" * 200_000 + ",y\n")
    before, seen = csv.field_size_limit(), set()
    reading = threading.Thread(target=read_examples, args=(tmp_path / "a.csv",))
    reading.start()
    while reading.is_alive():
        seen.add(csv.field_size_limit())
    assert seen <= {before}
