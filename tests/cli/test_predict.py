"""``ptuning predict``: what it checks first, writes on the way, and goes on with."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch

from ptuning import Prompt, read_examples
from ptuning.cli import console

from ..scaffold import Run
from .test_commands import assert_one_line

NAMES = ["France", "Italy", "Spain", "Austria"]
ROWS = [{"country": NAMES[n % 4] + " and" * (n % 3), "number": n} for n in range(100)]
KINDS = {
    ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    ".csv": lambda path: pandas.read_csv(path).to_dict("records"),
    ".parquet": lambda path: pyarrow.parquet.read_table(path).to_pylist(),
}
Predict = Callable[..., tuple[int, str, str]]


@pytest.fixture
def predict(
    run: Run, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Predict:
    """Predict `rows.jsonl` with a prompt of random vectors, 4 rows a batch."""
    monkeypatch.chdir(tmp_path)
    prompt = Prompt("[P*2] {country}? [MASK]", verbalizer={"yes": "Paris", "no": "Rome"})
    prompt.vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    prompt.save("prompt")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def call(output: str | None, *more: Any, data: str = "rows.jsonl") -> tuple[int, str, str]:
        to = [] if output is None else ["--output", output]
        fixed = ["--data", data, "--model", model_folder, "--batch-size", 4]
        return run("predict", "prompt", *fixed, *to, *more)

    return call


@pytest.fixture
def stopped_behind(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Sets behind which row a prediction is interrupted; None: behind none."""
    from ptuning.data.partial import Partial

    add = Partial.add

    def stop(behind: int | None) -> None:
        seen = [0]

        def counted(self: Partial, rows: Any) -> None:
            add(self, rows)
            seen[0] += len(rows)
            if behind is not None and seen[0] >= behind:
                raise KeyboardInterrupt

        monkeypatch.setattr(Partial, "add", counted)

    return stop


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_ending_says_the_kind_and_a_stopped_run_ends_as_a_whole_one(
    predict: Predict, stopped_behind: Callable[[int | None], None], kind: str
) -> None:
    whole, stopped = Path(f"whole{kind}"), Path(f"stopped{kind}")
    code, out, err = predict(str(whole))
    assert (code, out) == (0, "") and "100 predictions in" in err
    stopped_behind(40)
    code, _, err = predict(str(stopped))
    assert code == 130 and "--resume" in err and "Traceback" not in err
    assert not stopped.exists()
    (left,) = Path().glob(f"stopped{kind}.*.partial")
    assert 40 <= len(left.read_text().splitlines()) < 100
    stopped_behind(None)
    code, _, err = predict(str(stopped))
    assert code == 2
    assert_one_line(err, "--resume", "--overwrite")
    assert predict(str(stopped), "--resume")[0] == 0
    assert not list(Path().glob("*.partial*"))
    expected, got = KINDS[kind](whole), KINDS[kind](stopped)
    assert [list(row) for row in got] == [
        ["country", "number", "prediction", "probability", "probabilities"]
    ] * 100
    for row, a, b in zip(ROWS, expected, got, strict=True):
        assert row.items() <= a.items() and row.items() <= b.items()
        assert a["prediction"] == b["prediction"]
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_answers_never_stand_beside_rows_that_came_into_the_data_meanwhile(
    predict: Predict, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from ptuning.data.partial import Partial

    add, text = Partial.add, Path("rows.jsonl").read_text()

    def changing(self: Partial, rows: Any) -> None:
        add(self, rows)
        Path("rows.jsonl").write_text(json.dumps({"country": "Oslo", "number": -1}) + "\n" + text)

    monkeypatch.setattr(Partial, "add", changing)
    code, _, err = predict(f"out{kind}")
    assert code == 2
    assert_one_line(err, "is not row 1 of the data", "changed since", "--overwrite")
    assert not Path(f"out{kind}").exists()
    Path("rows.jsonl").write_text(text)  # nothing that was answered is lost
    assert predict(f"out{kind}", "--resume")[0] == 0
    assert [row["number"] for row in KINDS[kind](Path(f"out{kind}"))] == list(range(100))


def test_a_run_with_another_prompt_or_option_does_not_go_on_with_it(
    predict: Predict, stopped_behind: Callable[[int | None], None]
) -> None:
    stopped_behind(40)
    predict("out.jsonl")
    stopped_behind(None)
    code, _, err = predict("out.jsonl", "--resume", "--answer-tokens", "3")
    assert code == 2
    assert_one_line(err, "another prompt, model or option")
    code, _, err = predict("out.jsonl", "--resume", data="other.jsonl")
    assert code == 2
    Path("other.jsonl").write_text('{"country": "Oslo", "number": 0}\n')
    code, _, err = predict("out.jsonl", "--resume", data="other.jsonl")
    assert code == 2
    assert_one_line(err, "has changed since")
    assert predict("out.jsonl", "--overwrite")[0] == 0
    assert len(read_examples("out.jsonl")) == 100 and not list(Path().glob("*.partial"))


@pytest.mark.parametrize("changed", ["bias", "another member", "vectors", "model", "batch size"])
def test_a_run_goes_on_with_the_same_prompt_alone_in_batches_of_any_size(
    predict: Predict,
    stopped_behind: Callable[[int | None], None],
    model_folder: Path,
    changed: str,
) -> None:
    one, other = Prompt.load("prompt"), Prompt.load("prompt")
    other.vectors = one.trained_vectors() + 1
    one.others = (other,)
    one.save("prompt")
    stopped_behind(40)
    predict("out.jsonl")
    stopped_behind(None)
    if changed == "batch size":
        assert predict("out.jsonl", "--resume", "--batch-size", 7)[0] == 0
        assert len(read_examples("out.jsonl")) == 100
        return
    if changed == "bias":
        one.label_bias = {"yes": 1.0, "no": 0.0}
    elif changed == "another member":
        other.vectors = other.vectors + 1
    elif changed == "vectors":
        one.vectors = one.trained_vectors() + 1
    one.save("prompt")
    model = ("--model", shutil.copytree(model_folder, "other")) if changed == "model" else ()
    code, _, err = predict("out.jsonl", "--resume", *model)
    assert code == 2
    assert_one_line(err, "another prompt, model or option")


def test_a_run_that_was_stopped_before_its_first_answer_has_nothing_to_go_on_with(
    predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("ptuning.data.partial.Partial.take_up", Mock(side_effect=KeyboardInterrupt))
        code, _, err = predict("out.csv")
    assert code == 130 and "begin again" in err.splitlines()[-1] and "--resume" not in err
    assert predict("out.csv")[0] == 0


def test_there_is_nothing_to_resume_where_nothing_was_interrupted(predict: Predict) -> None:
    for output in ("out.jsonl", "typo/out.csv"):
        code, _, err = predict(output, "--resume")
        assert code == 2
        assert_one_line(err, "nothing to resume")
    assert not Path("typo").exists()


@pytest.mark.parametrize("column", ["prediction", "probability", "probabilities"])
def test_a_column_of_the_datas_own_is_never_overwritten(predict: Predict, column: str) -> None:
    Path("own.jsonl").write_text(json.dumps({"country": "France", column: "MINE"}) + "\n")
    code, out, err = predict(None, data="own.jsonl")
    assert code == 2 and not out
    assert_one_line(err, repr(column), "rename")


@pytest.mark.parametrize(
    ("content", "output", "parts"),
    [
        ('{"x": 1}\n', "out.jsonl", ["example 1", "'country'"]),
        ('{"country": "a"}\n{"country": ["a"]}\n', "out.jsonl", ["example 2", "holds a list"]),
        ('{"country": "a"}\n{"country"\n', "out.jsonl", ["line 2", "malformed JSON"]),
        ('{"country": "a"}\n', "out.txt", [".jsonl, .csv, .tsv or .parquet"]),
        ('{"country": "a"}\n', "folder", ["is a folder"]),
        ('{"country": "a"}\n', "rows.jsonl/out.csv", ["cannot write to"]),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    predict: Predict, monkeypatch: pytest.MonkeyPatch, content: str, output: str, parts: list[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("ptuning.backbone.load.load_model", never)
    Path("folder").mkdir()
    Path("bad.jsonl").write_text(content)
    code, out, err = predict(output, data="bad.jsonl")
    assert code in (1, 2) and not out
    assert_one_line(err, *parts)
    assert not list(Path().glob("out*"))


def test_free_answers_have_no_column_of_probabilities_and_leave_the_datas_own(
    predict: Predict,
) -> None:
    prompt = Prompt("[P*2] {country}? [MASK]", answer_tokens=2)
    prompt.vectors = torch.zeros(2, 32)
    prompt.save("prompt")
    Path("odd.csv").write_text("country,probabilities\nFrance,high\n")
    code, _, err = predict("out.csv", data="odd.csv")
    assert code == 0, err
    (row,) = read_examples("out.csv")
    assert list(row) == ["country", "probabilities", "prediction", "probability"]
    assert row["probabilities"] == "high"


def test_half_a_surrogate_pair_in_another_column_costs_nothing(predict: Predict) -> None:
    Path("odd.jsonl").write_text('{"country": "France", "note": "\\ud800", "x": NaN}\n')
    for output in ("out.jsonl", None):
        code, out, err = predict(output, data="odd.jsonl")
        assert code == 0, err
        line = out if output is None else Path(output).read_text()
        row = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert (row["note"], row["x"]) == ("\ud800", None) and "prediction" in row


def test_what_is_printed_is_what_a_file_has(predict: Predict) -> None:
    values = {"b": [b"a\xff"], "l": [[1.0, float("nan")]], "country": ["\u202eFrance"]}
    pyarrow.parquet.write_table(pyarrow.table(values), "in.parquet")
    printed = predict(None, data="in.parquet")[1]
    assert predict("out.jsonl", data="in.parquet")[0] == 0
    row = json.loads(printed)
    assert row == json.loads(Path("out.jsonl").read_text()) and row["b"] == "a\\xff"


def test_rows_are_printed_and_written_to_pipes(predict: Predict) -> None:
    code, out, err = predict(None)
    assert code == 0, err
    assert [json.loads(line)["number"] for line in out.splitlines()] == list(range(100))
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    code, _, err = predict(f"/dev/fd/{writing}")
    assert code == 0, err
    os.close(writing)
    with open(reading) as file:
        assert [json.loads(line)["number"] for line in file] == list(range(100))


def test_candidates_mean_the_same_in_every_encoding_and_packing(predict: Predict) -> None:
    words = ["Paris", "Rome", "Oslo"]
    contents = {"plain": "\n".join(words).encode()}
    contents["mark"] = b"\xef\xbb\xbf" + "\r\n".join(words).encode()
    contents["old"] = "\r".join(words).encode()
    contents["utf-16"] = "\n".join(words).encode("utf-16")
    contents["packed"] = gzip.compress(contents["plain"])
    said = {}
    for name, content in contents.items():
        Path(name).write_bytes(content)
        code, said[name], err = predict(None, "--candidates", name)
        assert code == 0, err
    assert set(json.loads(said["plain"].splitlines()[0])["probabilities"]) == set(words)
    assert all(out == said["plain"] for out in said.values())


@pytest.mark.usefixtures("on_cpu")
def test_where_there_is_no_terminal_progress_is_told_in_lines(
    predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_SILENCE", -1)
    code, _, err = predict("out.jsonl")
    assert code == 0 and "32 of 100 rows, about" in err


def test_a_separator_may_be_given_by_name(predict: Predict) -> None:
    Path("a.csv").write_text("country\tx\nFrance\t1\n")
    for separator in ("tab", "\t", "\\t"):
        code, out, err = predict(None, "--separator", separator, data="a.csv")
        assert code == 0 and json.loads(out)["country"] == "France", err


def test_a_file_is_read_as_it_is_said_to_be_written(predict: Predict) -> None:
    Path("a.csv").write_bytes("Frânce|été\nItaly|x\n".encode("cp1252"))
    form = ("--encoding", "cp1252", "--columns", "country,x", "--separator", "|")
    code, _, err = predict("out.csv", *form, data="a.csv")
    assert code == 0, err
    assert [(row["country"], row["x"]) for row in read_examples("out.csv")] == [
        ("Frânce", "été"),
        ("Italy", "x"),
    ]


def test_evaluate_takes_the_answers_column_and_finds_mistakes_first(
    run: Run,
    predict: Predict,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("labelled.csv").write_text("country;truth\nFrance;yes\nItaly;no\n")
    command = ["evaluate", "prompt", "--data", "labelled.csv", "--model", model_folder]
    code, out, err = run(*command, "--answer", "truth", "--json")
    assert code == 0 and json.loads(out)["examples"] == 2, err

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("ptuning.backbone.load.load_model", never)
    code, _, err = run(*command)
    assert code == 2
    assert_one_line(err, "evaluation example 1", "--answer")
    Path("labelled.csv").write_text("country;truth\nFrance;perhaps\n")
    code, _, err = run(*command, "--answer", "truth")
    assert code == 2
    assert_one_line(err, "'perhaps' is none of the prompt's labels")
