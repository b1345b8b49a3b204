from __future__ import annotations

import csv
import datetime
import decimal
import io
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pytest
import torch

import ptuning
from ptuning.data import as_rows, read_examples
from ptuning.data.values import is_missing, plain, text_of
from ptuning.errors import DataError
from tests import tiny

ROWS = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
COLUMNS = {"text": ["good", "bad"], "label": ["yes", "no"]}


def sqlite_rows() -> Any:
    connection = sqlite3.connect(":memory:")
    connection.row_factory = sqlite3.Row
    connection.execute("create table t (text, label)")
    connection.executemany("insert into t values (?, ?)", [tuple(row.values()) for row in ROWS])
    return connection.execute("select * from t")


def class_labels() -> Any:
    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    return datasets.Dataset.from_dict({**COLUMNS, "label": [1, 0]}, features=features)


KINDS: dict[str, Callable[[], Any]] = {
    "rows": lambda: ROWS,
    "a generator": lambda: (row for row in ROWS),
    "a dict of columns": lambda: COLUMNS,
    "a dict of arrays": lambda: {name: numpy.array(column) for name, column in COLUMNS.items()},
    "a data frame": lambda: pandas.DataFrame(ROWS),
    "a frame with an index": lambda: pandas.DataFrame(ROWS, index=["x", "x"]),
    "an Arrow table": lambda: pyarrow.table(COLUMNS),
    "a record batch": lambda: pyarrow.record_batch(COLUMNS),
    "a data set": lambda: datasets.Dataset.from_list(ROWS),
    "class labels": class_labels,
    "class labels as tensors": lambda: class_labels().with_format("numpy"),
    "class labels of Arrow": lambda: class_labels().data.table,
    "a stream": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "a stream of class labels": lambda: class_labels().to_iterable_dataset(),
    "csv.DictReader": lambda: csv.DictReader(io.StringIO("text,label\ngood,yes\nbad,no\n")),
    "a database": sqlite_rows,
    "other mappings": lambda: [MappingProxyType(row) for row in ROWS],
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_whatever_holds_the_rows_they_are_the_same(kind: str) -> None:
    assert as_rows(KINDS[kind]()) == ROWS


def test_a_file_may_stand_for_its_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\ngood,yes\nbad,no\n")
    assert as_rows(tmp_path / "a.csv") == ROWS == as_rows(str(tmp_path / "a.csv"))


def test_training_predicting_and_measuring_take_every_kind() -> None:
    def made(rows: Any) -> tuple[Any, list[str], float]:
        model, tokenizer = tiny.model(), tiny.tokenizer()
        labels = {"yes": "Paris", "no": "Rome"}
        prompt = ptuning.Prompt("[P] {text} [MASK]", verbalizer=labels, encoder="none")
        ptuning.train(model, tokenizer, prompt, rows(), rows(), epochs=1)
        said = ptuning.predict(model, tokenizer, prompt, rows())
        return prompt.vectors, said, ptuning.evaluate(model, tokenizer, prompt, rows()).loss

    vectors, said, loss = made(KINDS["rows"])
    for kind in ("a generator", "a dict of columns", "a data frame", "class labels"):
        got = made(KINDS[kind])
        assert torch.equal(got[0], vectors) and got[1:] == (said, loss), kind


def test_none_is_no_dev_examples_as_a_trainers_eval_dataset() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    rows = [{"text": "France", "answer": "Paris"}]
    prompts = [ptuning.Prompt("[P] {text} [MASK]", encoder="none") for _ in range(2)]
    for prompt, dev in zip(prompts, (None, ()), strict=True):
        ptuning.train(model, tokenizer, prompt, rows, dev, epochs=1, verbose=False)
    assert torch.equal(prompts[0].trained_vectors(), prompts[1].trained_vectors())
    table = [{"text": word, "label": "ab"[n % 2]} for n, word in enumerate(("up", "on") * 4)]
    assert ptuning.Prompt.for_rows(table, dev=None).template == "[P*20] {text} [P*20] Type: [MASK]"
    with pytest.raises(DataError, match=r"rows are expected.*None came"):
        ptuning.train(model, tokenizer, prompts[0], None, verbose=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "and None came"),
        (5, "and an int came"),
        ("France", r"'France' came, .* no file here; .*ptuning.read_examples\('France'\)"),
        ({"text": "good"}, "put a single row into a list"),
        ({"text": ["a"], "label": ["b", "c"]}, "text has 1, label has 2"),
        (["good"], "row 1 is a str"),
        ([*ROWS, ("a", "b")], "row 3 is a tuple"),
        (csv.DictReader(io.StringIO("a\n1,2\n")), "row 1 has more cells"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "column 'a' twice"),
        (pyarrow.table([[1], [2]], names=["a", "a"]), "column 'a' twice"),
        ({1: ["a"], "1": ["b"]}, "the dict of columns has the column '1' twice"),
        ([{1: "a", "1": "b"}], "row 1 has the column '1' twice"),
        (datasets.DatasetDict(train=class_labels()), r"several data sets \(train"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_named(source: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        as_rows(source)


def test_a_class_label_that_is_not_known_is_missing() -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"label": [1, -1, None]}, features=features)
    assert [row["label"] for row in as_rows(data)] == ["yes", None, None]


def test_columns_that_are_numbers_are_named_by_their_text() -> None:
    assert as_rows(pandas.DataFrame([["a", "b"]])) == [{"0": "a", "1": "b"}]
    assert as_rows([{0: "a"}]) == [{"0": "a"}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", ""),
        (" a ", " a "),
        (None, ""),
        (float("nan"), ""),
        (numpy.float32("nan"), ""),
        (pandas.NA, ""),
        (pandas.NaT, ""),
        (decimal.Decimal("NaN"), ""),
        (True, "True"),
        (numpy.bool_(True), "True"),
        (numpy.int64(3), "3"),
        (torch.tensor(3), "3"),
        (1.5, "1.5"),
        (10**400, "1" + "0" * 400),
        (datetime.date(2020, 1, 2), "2020-01-02"),
        (decimal.Decimal("1.10"), "1.10"),
    ],
)
def test_the_text_of_a_value(value: Any, text: str) -> None:
    assert text_of("a", value) == text
    assert is_missing(value) == (text == "" and not isinstance(value, str))


@pytest.mark.parametrize("own", ["a", 1, 0.1, True])
def test_numpys_scalars_become_pythons_own_though_some_are_subclasses_of_them(own: Any) -> None:
    (scalar,) = numpy.array([own])
    assert type(scalar) is not type(own)
    assert type(plain(scalar)) is type(own) and plain(scalar) == own


@pytest.mark.parametrize(
    "value",
    [
        ["a"], [], ("a",), {"a": 1}, {}, {"a"}, b"a", numpy.array(["a"]), torch.zeros(2), iter("a"),
        float("inf"), -float("inf"), numpy.float32("inf"), decimal.Decimal("Infinity"), 10**5000,
        object(), "\ud800",
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_has_no_text_is_refused_by_its_columns_name(value: Any) -> None:
    with pytest.raises(DataError, match="'the column'") as caught:
        text_of("the column", value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("word", ["csv", "json", "parquet", "text", "CSV", "csv:train", "json,x"])
def test_a_word_that_names_a_kind_of_file_takes_no_file_that_lies_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for ending in ("csv", "json", "txt"):
        Path(f"private.{ending}").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="names a kind of file"):
        read_examples(word)


@pytest.mark.parametrize(
    "name", ["\ud800.csv", "a\0b.csv", "x" * 5000, "caf\udce9", "../../x", "a b"], ids=ascii
)
def test_names_that_can_be_none_are_data_errors(name: str) -> None:
    with pytest.raises(DataError) as caught:
        read_examples(name)
    assert len(str(caught.value)) < 500


def test_a_data_frame_may_have_a_column_of_any_name() -> None:
    frame = pandas.DataFrame({"features": ["a", "b"], "map": [1, 2], "label": ["x", "y"]})
    assert as_rows(frame) == frame.to_dict("records")


def test_numpys_times_read_as_dates_do() -> None:
    day = numpy.datetime64("2020-01-01T12:30")
    for unit in ("m", "ms", "ns"):
        assert text_of("day", day.astype(f"datetime64[{unit}]")) == "2020-01-01 12:30:00"
    assert text_of("day", numpy.datetime64("2020-01-01", "D")) == "2020-01-01"
    assert text_of("day", numpy.timedelta64(90, "s").astype("timedelta64[ns]")) == "0:01:30"
    assert text_of("day", numpy.datetime64("NaT", "ns")) == ""


@pytest.mark.parametrize("form", ["pandas", "arrow", "numpy", "torch"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_data_set_gives_plain_rows_whatever_it_is_set_to_give(form: str, streamed: bool) -> None:
    data = class_labels()
    source: Any = data.to_iterable_dataset() if streamed else data
    assert as_rows(source.with_format(form)) == as_rows(data)


@pytest.mark.parametrize("streamed", [False, True])
def test_images_and_sounds_of_a_data_set_are_not_decoded(streamed: bool) -> None:
    data = class_labels()
    broken = {"bytes": b"no picture, and no sound", "path": None}
    for kind in (datasets.Image(), datasets.Audio()):
        data = data.add_column(type(kind).__name__, [broken] * 2)  # type: ignore[call-arg]
        data = data.cast_column(type(kind).__name__, kind)
    source: Any = data.to_iterable_dataset() if streamed else data
    assert as_rows(source) == [{**row, "Image": broken, "Audio": broken} for row in ROWS]
    assert source.features["Image"] == datasets.Image()  # the user's own stays as it was


def test_values_of_a_data_set_that_are_kept_as_json_are_decoded() -> None:
    data = datasets.Dataset.from_dict(
        {"text": ["good", 2]},
        features=datasets.Features({"text": datasets.Json()}),
    )
    assert as_rows(data) == [{"text": "good"}, {"text": 2}]


def test_a_transform_of_the_user_s_own_is_kept() -> None:
    def shout(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**rows, "text": [text.upper() for text in rows["text"]]}

    rows = as_rows(class_labels().with_transform(shout))
    assert [row["text"] for row in rows] == [text.upper() for text in COLUMNS["text"]]


def test_a_transform_may_leave_class_labels_out_or_give_something_else() -> None:
    data = class_labels()
    alone = data.with_transform(lambda rows: {"text": rows["text"]})
    assert as_rows(alone) == [{"text": text} for text in COLUMNS["text"]]
    listed = data.with_transform(lambda rows: {"label": [[number] for number in rows["label"]]})
    assert [row["label"] for row in as_rows(listed)] == [[1], [0]]
    floats = data.with_transform(lambda rows: {"label": [float(n) for n in rows["label"]]})
    assert [row["label"] for row in as_rows(floats)] == ["yes", "no"]
    other = data.with_transform(lambda rows: {"label": [number + 1 for number in rows["label"]]})
    with pytest.raises(DataError, match=r"'label' holds the class label 2, and .* names 2 classes"):
        as_rows(other)
