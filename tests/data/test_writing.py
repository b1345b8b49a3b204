from __future__ import annotations

import csv
import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow
import pyarrow.parquet
import pytest

from ptuning.data import read_examples, writing
from ptuning.data.partial import Output, Partial, begun, refused
from ptuning.data.rows import Row
from ptuning.data.writing import SEPARATORS, convert, json_line, write_parquet, write_separated
from ptuning.errors import DataError, InputError, PtuningError
from ptuning.places import held

ROWS: list[dict[str, Any]] = [
    {"text": 'one, "two"\nthree', "n": 1, "b": True, "x": None, "l": ["a"], "m": 1},
    {"text": "é\u2028", "n": 2, "b": False, "x": 1.5, "l": [], "m": "two", "late": {"k": "v"}},
]
ADDED = [{"prediction": "yes", "p": 0.25}, {"prediction": "no\n", "p": 0.5}]
COLUMNS = ["text", "n", "b", "x", "l", "m", "late", "prediction", "p"]


def converted(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    data, added = folder / "data.jsonl", folder / "added"
    data.write_bytes(b"".join(map(json_line, rows)))
    added.write_bytes(b"".join(map(json_line, ADDED)))
    path = folder / f"out{kind}"
    convert(path, kind, str(data), {}, added, ["prediction", "p"], COLUMNS)
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_separated_values_have_every_column_and_json_where_there_is_no_text(
    tmp_path: Path, kind: str
) -> None:
    assert read_examples(converted(tmp_path, kind)) == [
        {"text": 'one, "two"\nthree', "n": "1", "b": "true", "x": "", "l": '["a"]', "m": "1",
         "late": "", "prediction": "yes", "p": "0.25"},
        {"text": "é\u2028", "n": "2", "b": "false", "x": "1.5", "l": "[]", "m": "two",
         "late": '{"k": "v"}', "prediction": "no\n", "p": "0.5"},
    ]  # fmt: skip


def test_json_in_a_cell_has_null_for_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    rows: list[Row] = [{"l": [1, float("nan"), {"x": float("inf")}]}, {"l": "text"}]
    write_separated(tmp_path / "out.csv", rows, ["l"], ",")
    write_parquet(tmp_path / "out.parquet", lambda: iter(rows), ["l"])
    for name in ("out.csv", "out.parquet"):
        assert read_examples(tmp_path / name)[0]["l"] == '[1, null, {"x": null}]'


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_separated_values_are_read_back_whatever_their_texts_hold(
    tmp_path: Path, kind: str
) -> None:
    texts = [
        "a\rb",
        "a\r",
        "\r",
        "a\nb",
        "a\r\nb",
        "a,b\tc",
        'say "hi"',
        " a ",
        "",
        '"',
        "a\x0bb\u2028",
    ]
    rows: list[Row] = [{"text": text, "prediction": text[::-1]} for text in texts]
    path = tmp_path / f"out{kind}"
    write_separated(path, rows, ["text", "prediction"], SEPARATORS[kind])
    assert read_examples(path) == rows
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file, delimiter=SEPARATORS[kind])) == rows
    alone = [{"text": text} for text in texts]
    write_separated(path, alone, ["text"], SEPARATORS[kind])
    assert read_examples(path) == alone


def test_parquet_keeps_types_and_writes_as_text_what_has_none_in_common(tmp_path: Path) -> None:
    path = converted(tmp_path, ".parquet")
    schema = pyarrow.parquet.read_schema(path)
    assert schema.names == COLUMNS
    types = {name: str(schema.field(name).type) for name in ("n", "b", "x", "m", "p")}
    assert types == {"n": "int64", "b": "bool", "x": "double", "m": "string", "p": "double"}
    first, second = read_examples(path)
    assert first == {**ROWS[0], "m": "1", "late": None, **ADDED[0]}
    assert second == {**ROWS[1], **ADDED[1]}


def test_a_type_that_comes_late_is_that_of_the_column(tmp_path: Path) -> None:
    rows = [{"a": None, "big": 1}] * 1500 + [{"a": 2.5, "big": 10**30}]
    data, added = tmp_path / "data.jsonl", tmp_path / "added"
    data.write_bytes(b"".join(map(json_line, rows)))
    added.write_bytes(b"{}\n" * len(rows))
    convert(tmp_path / "out.parquet", ".parquet", str(data), {}, added, [], ["a", "big"])
    read = read_examples(tmp_path / "out.parquet")
    assert len(read) == 1501 and read[-1] == {"a": 2.5, "big": str(10**30)}
    assert read[0] == {"a": None, "big": "1"}


def test_parquet_from_parquet_keeps_every_type_of_its_own(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "day": pyarrow.array([1, 2], pyarrow.date32()),
            "price": pyarrow.array(["1.10", "2.20"]).cast(pyarrow.decimal128(10, 2)),
            "small": pyarrow.array([1, 2], pyarrow.int8()),
            "word": pyarrow.array(["a", "a"]).dictionary_encode(),
            "list": [["x"], []],
            "view": pyarrow.array(["a", None], pyarrow.string_view()),
            "views": pyarrow.array([["a"], None], pyarrow.list_(pyarrow.string_view())),
        },
        metadata={"pandas": '{"index_columns": ["day"]}'},
    )
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    added = tmp_path / "added"
    more = [{**row, "probabilities": {"a": 0.5, "b": 0.5}} for row in ADDED]
    added.write_bytes(b"".join(map(json_line, more)))
    names = ["prediction", "p", "probabilities"]
    args = str(tmp_path / "in.parquet"), None, added, names, [*table.column_names, *names]
    convert(tmp_path / "out.parquet", ".parquet", *args)
    written = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert written.select(table.column_names).equals(table)
    assert written.schema.metadata == table.schema.metadata
    assert written.select(names).to_pylist() == more


def test_what_no_encoding_has_is_escaped(tmp_path: Path) -> None:
    line = json_line({"a": "x\ud800", "n": float("nan"), "i": float("inf")})
    assert line == b'{"a": "x\\ud800", "n": null, "i": null}\n'
    assert json.loads(line)["a"] == "x\ud800"
    odd = [{"text": "half \ud800 é"}, {"text": "", "l": ["\udfff"]}]
    for kind in (".csv", ".parquet"):
        assert read_examples(converted(tmp_path, kind, odd))[0]["text"] == "half \\ud800 é"
    named: list[Row] = [{"\ud800": {"\udfff": 1}}]
    write_parquet(tmp_path / "names.parquet", lambda: iter(named), ["\ud800"])
    assert read_examples(tmp_path / "names.parquet") == [{"\\ud800": {"\\udfff": 1}}]
    write_separated(tmp_path / "names.csv", named, ["\ud800"], ",")
    assert read_examples(tmp_path / "names.csv") == [{"\\ud800": '{"\\udfff": 1}'}]


def test_what_is_missing_is_nothing_in_every_kind(tmp_path: Path) -> None:
    rows: list[Row] = [{"a": [1], "b": 1.5}, {"a": "x", "b": float("nan")}, {"a": None, "b": None}]
    write_parquet(tmp_path / "out.parquet", lambda: iter(rows), ["a", "b"])
    read = read_examples(tmp_path / "out.parquet")
    assert [row["a"] for row in read] == ["[1]", "x", None]
    write_separated(tmp_path / "out.csv", rows, ["a", "b"], ",")
    assert [list(row.values()) for row in read_examples(tmp_path / "out.csv")] == [
        ["[1]", "1.5"], ["x", ""], ["", ""],
    ]  # fmt: skip


def test_parquet_from_parquet_has_the_same_columns_where_no_probability_is_known_at_first(
    tmp_path: Path,
) -> None:
    added: list[Row] = [{"prediction": "yes", "p": None if n < 90 else 0.5} for n in range(100)]
    (tmp_path / "added").write_bytes(b"".join(map(json_line, added)))
    pyarrow.parquet.write_table(pyarrow.table({"n": range(100)}), tmp_path / "in.parquet")
    args = str(tmp_path / "in.parquet"), None, tmp_path / "added", ["prediction", "p"]
    convert(tmp_path / "out.parquet", ".parquet", *args, ["n", "prediction", "p"])
    written = read_examples(tmp_path / "out.parquet")
    assert written == [{"n": n, **row} for n, row in enumerate(added)]


@pytest.mark.parametrize("name", ["out", "out.txt", "out.jsonl.gz", "folder", "folder.csv"])
def test_an_output_of_no_known_kind_is_refused(tmp_path: Path, name: str) -> None:
    if "folder" in name:
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"is a folder; give a file|unknown ending"):
        Output(tmp_path / name)


def test_a_run_that_never_wrote_a_row_leaves_nothing(tmp_path: Path) -> None:
    output = Output(tmp_path / "new" / "out.csv")
    with pytest.raises(ZeroDivisionError), begun(output, {}, resume=False, anew=False):
        raise ZeroDivisionError
    assert list((tmp_path / "new").iterdir()) == []


ANSWERED = [{**row, **added} for row, added in zip(ROWS, ADDED, strict=True)]


def interrupted(output: Output, settings: dict[str, Any], rows: list[Any] = ANSWERED) -> None:
    with suppress(ZeroDivisionError), begun(output, settings, False, False) as partial:
        partial.add(rows)
        raise ZeroDivisionError


def test_only_the_same_run_goes_on_and_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    output = Output(tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="nothing to resume"), begun(output, {}, True, False):
        pass
    interrupted(output, {"prompt": 1})
    with pytest.raises(InputError, match="--resume"), begun(output, {"prompt": 1}, False, False):
        pass
    with pytest.raises(InputError, match="another prompt"), begun(output, {"p": 2}, True, False):
        pass
    with pytest.raises(DataError, match=r"row 2 of .* is not row 2"):  # noqa: SIM117
        with begun(output, {"prompt": 1}, True, False) as partial:
            partial.take_up(iter([ROWS[0], {"text": "other"}]), "prediction")
    with begun(output, {"prompt": 1}, True, False) as partial:
        rows = iter([*ROWS, *ROWS])
        assert partial.take_up(rows, "prediction") == 2
        partial.add(ANSWERED)
        with pytest.raises(InputError, match="another run"):  # noqa: SIM117
            with begun(output, {"prompt": 1}, True, False):
                pass
        partial.finish(lambda path: None)
    assert read_examples(tmp_path / "out.jsonl") == [*ANSWERED, *ANSWERED]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(InputError, match="exists"), begun(output, {}, False, False):
        pass


def test_of_two_runs_that_begin_at_the_same_moment_only_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(tmp_path / "out.jsonl")

    def late(path: Path, **how: bool) -> Any:
        monkeypatch.undo()
        path.unlink()  # as a run does that finds it before it is held
        path.write_bytes(b"")
        return held(path, **how)

    monkeypatch.setattr("ptuning.data.partial.held", late)
    with pytest.raises(InputError, match="another run is writing"):  # noqa: SIM117
        with begun(output, {}, False, False):
            pass


def test_a_run_that_was_killed_before_its_first_row_is_begun_anew_unasked(tmp_path: Path) -> None:
    output = Output(tmp_path / "out.jsonl")
    output.partial({"prompt": 1}).touch()
    with begun(output, {"prompt": 2}, False, False) as partial:
        partial.add(ROWS)
        partial.finish(lambda path: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_beginning_again_leaves_the_rows_of_a_run_that_is_still_writing(tmp_path: Path) -> None:
    output = Output(tmp_path / "out.jsonl")
    with begun(output, {"prompt": 1}, False, False) as partial:
        partial.add(ROWS)
        with pytest.raises(InputError, match="another run is writing"):  # noqa: SIM117
            with begun(output, {"prompt": 2}, False, True):
                pass
        partial.finish(lambda path: None)
    assert read_examples(tmp_path / "out.jsonl") == ROWS


def test_rows_stay_where_the_output_cannot_be_made_of_them(tmp_path: Path) -> None:
    output = Output(tmp_path / "OUT.CSV")

    def fails(path: Path) -> None:
        path.write_text("half")
        raise DataError("no")

    with begun(output, {}, False, False) as partial:
        partial.add(ROWS)
        with pytest.raises(DataError):
            partial.finish(fails)
    assert list(tmp_path.iterdir()) == [output.partial({})]
    assert partial.path.read_bytes() == b"".join(map(json_line, ROWS))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_output_is_on_the_disk_before_it_takes_the_place_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def made(path: Path) -> None:
        path.write_text("text\na\n")

    on_disk: list[tuple[int, int]] = []
    real = os.fsync

    def sync(descriptor: int) -> None:
        real(descriptor)
        told = os.fstat(descriptor)
        on_disk.append((told.st_ino, told.st_size))

    monkeypatch.setattr(os, "fsync", sync)
    output = Output(tmp_path / f"out.{kind}")
    with begun(output, {}, False, False) as partial:
        partial.add(ROWS)
        partial.finish(made)
    told = output.path.stat()
    assert (told.st_ino, told.st_size) in on_disk


def test_what_the_system_takes_in_pieces_is_written_whole(tmp_path: Path) -> None:
    taken: list[bytes] = []

    def write(some: memoryview) -> int:
        taken.append(bytes(some[:7]))
        return len(taken[-1])

    Partial(Output(tmp_path / "out.jsonl"), tmp_path / "x", Mock(write=write)).add(ROWS)
    assert b"".join(taken) == b"".join(map(json_line, ROWS))


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_line_that_was_cut_off_is_answered_again(tmp_path: Path, cut: int) -> None:
    output = Output(tmp_path / "out.jsonl")
    interrupted(output, {})
    (partial_file,) = output.partials()
    partial_file.write_bytes(partial_file.read_bytes()[:-cut])
    with begun(output, {}, True, False) as partial:
        rows = iter(ROWS)
        assert partial.take_up(rows, "prediction") == 1
        assert list(rows) == ROWS[1:]
        partial.add(ANSWERED[1:])
        partial.finish(lambda path: None)
    assert read_examples(tmp_path / "out.jsonl") == ANSWERED


@pytest.mark.parametrize("now", [{"t": "a", "n": 1}, {"t": "a"}, {}, {"t": "a", "n": 12, "m": 0}])
def test_a_row_that_begins_as_one_that_is_done_is_another(
    tmp_path: Path, now: dict[str, Any]
) -> None:
    output = Output(tmp_path / "out.jsonl")
    interrupted(output, {}, [{"t": "a", "n": 12, "prediction": "x"}])
    with begun(output, {}, True, False) as partial:
        assert partial.take_up(iter([{"t": "a", "n": 12}]), "prediction") == 1
    with pytest.raises(DataError, match="which has changed since"):  # noqa: SIM117
        with begun(output, {}, True, False) as partial:
            partial.take_up(iter([now]), "prediction")


def test_long_names_links_and_modes_are_kept(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 249 + ".jsonl")
    target.write_text("before")
    target.chmod(0o600)
    (tmp_path / "link.jsonl").symlink_to(target)
    output = Output(tmp_path / "link.jsonl")
    with begun(output, {}, False, True) as partial:
        partial.add(ROWS)
        assert target.read_text() == "before"
        partial.finish(lambda path: None)
    assert (tmp_path / "link.jsonl").is_symlink() and read_examples(target) == ROWS
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_place_where_nothing_can_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = Output(tmp_path / "file" / "out.jsonl")
    with pytest.raises(PtuningError, match="cannot write to"), begun(output, {}, False, False):
        pass


@pytest.mark.parametrize(
    "rows",
    [
        [{"k": {}}, {"k": {}}],
        [{"k": {"inner": {}}}],
        [{"k": [{}]}],
        [{"k": 2**60 + 1}] * 10_000 + [{"k": 0.5}],
        [{"k": 0.5}] * 10_000 + [{"k": 2**60 + 1}],
        [{"k": [2**60 + 1]}, {"k": [0.5]}],
        [{"k": [2**60 + 1]}] * 10_000 + [{"k": [0.5]}],
    ],
)
def test_what_parquet_has_no_type_for_becomes_text(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_parquet(tmp_path / "a.parquet", lambda: iter(rows), ["k"])
    read = read_examples(tmp_path / "a.parquet")
    texts = [row["k"] if isinstance(row["k"], str) else json.dumps(row["k"]) for row in rows]
    assert [row["k"] for row in read] == texts


@pytest.mark.parametrize(
    ("rows", "size", "groups"),
    [(1000, 25_000, [30, 30, 30, 10]), (20, 10**6, [20] * 5), (1000, 10**6, [100])],
)
def test_a_row_group_has_some_rows_or_some_bytes_whichever_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, size: int, groups: list[int]
) -> None:
    monkeypatch.setattr(writing, "_ROWS", rows)
    monkeypatch.setattr(writing, "_BYTES", size)
    table = pyarrow.table({"text": ["x" * 1000] * 10})  # some 10,000 bytes
    writing.write_tables(tmp_path / "a.parquet", table.schema, [table] * 10)
    told = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").metadata
    assert [told.row_group(n).num_rows for n in range(told.num_row_groups)] == groups


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "; choose another place, or free space there"),
        (errno.EACCES, "; choose another place"),
    ],
)
def test_to_free_space_is_advised_where_there_is_none(number: int, said: str) -> None:
    with pytest.raises(PtuningError) as caught, refused(Path("out.csv")):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"cannot write to out.csv: {os.strerror(number)}{said}"
