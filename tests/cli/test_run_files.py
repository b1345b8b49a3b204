from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ptuning
from ptuning import InputError
from ptuning.cli import run_files


def read(path: Path, text: str | bytes) -> dict[str, Any]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    names = ("model", "template", "labels", "chat", "epochs", "max_length", "population_grid")
    params = [SimpleNamespace(name=name, is_flag=name == "chat") for name in names]
    command = SimpleNamespace(params=params)
    context: Any = SimpleNamespace(command=command, default_map=None)
    run_files.use_config(context, path)
    return context.default_map


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("labels: {yes: Yes, no: No}", {"yes": ["Yes"], "no": ["No"]}),
        ("labels:\n  true: True\n  false: False", {"true": ["True"], "false": ["False"]}),
        ("labels: {1: good, 0: [bad, poor]}", {"1": ["good"], "0": ["bad", "poor"]}),
        ("labels: yes=Yes,no=No|Nope", {"yes": ["Yes"], "no": ["No", "Nope"]}),
        ("labels: yes = Yes , no= No | Nope ", {"yes": ["Yes"], "no": ["No", "Nope"]}),
    ],
)
def test_labels_are_text_as_it_stands_there(
    text: str, labels: dict[str, list[str]], tmp_path: Path
) -> None:
    assert run_files.parse_labels(read(tmp_path / "run.yaml", text)["labels"]) == labels


def test_a_byte_order_mark_is_no_part_of_the_first_option(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbfmodel: 2020-01-01\nchat: true\nepochs: 3"
    expected = {"model": "2020-01-01", "chat": True, "epochs": "3"}
    assert read(tmp_path / "run.yaml", text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "true_label",
        "False or not? {x} [MASK]",
        "wait\x85{x}",
        "a\u2028b",
        "yes",
        "010",
        " a\n b ",
        "~",
    ],
)
def test_text_is_read_as_it_was_written(text: str, tmp_path: Path) -> None:
    settings = {"template": text, "labels": {text: [text], "no": ["No"]}, "chat": True}
    (tmp_path / "run.yaml").write_bytes(run_files.as_yaml(settings))
    assert run_files.read(tmp_path / "run.yaml") == settings


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("model: &a x\ntemplate: *a", "an alias"),
        ("model: " + "[" * 20_000 + "]" * 20_000, "more than 20 levels"),
        ("model: [" + "a," * 110_000 + "]", "100,000 values"),
        ("model: a\nmodel: b", "'model' stands there twice"),
        ("labels: {a: b, a: c}", "'a' stands there twice"),
        ("max-length: 1\nmax_length: 2", "'max_length' stands there twice"),
        ("? [a]\n: b", "a key that is a list"),
        ("- a", "must be a list of 'option: value' lines"),
        ("", "must be a list of 'option: value' lines"),
        ('model: "\\uD800"', "surrogates not allowed"),
        ("model: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        (b"\xc3(", "line 1: no valid UTF-8"),
        (b"template: '" + b"a" * 4_000_000 + b"'", "more than 1,000,000 bytes"),
        ("depth: 3", "unknown option 'depth'"),
    ],
)
def test_a_run_file_that_is_none_is_one_error(
    text: str | bytes, fault: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=fault):
        read(tmp_path / "run.yaml", text)


def test_lists_are_what_would_be_typed(tmp_path: Path) -> None:
    text = "template: [a, b]\npopulation_grid: [seed=1, encoder=mlp]\nmodel: [m, 1e-3]"
    expected = {"template": "a|b", "population_grid": "seed=1 encoder=mlp", "model": "m,1e-3"}
    assert read(tmp_path / "run.yaml", text) == expected


def test_labels_of_any_script_stay_readable_in_a_repeated_runs_file(tmp_path: Path) -> None:
    labels = {"账单": ["账"], "😀": ["happy"]}
    given = run_files._as_option("labels", labels)
    again = run_files.as_yaml({"labels": given}).decode()
    assert "账单" in again and "😀" in again
    assert run_files.parse_labels(read(tmp_path / "run.yaml", again)["labels"]) == labels


def test_many_labels_are_not_many_levels(tmp_path: Path) -> None:
    settings = {"labels": {f"label {n}": ["a", "b"] for n in range(100)}}
    (tmp_path / "run.yaml").write_bytes(run_files.as_yaml(settings))
    assert run_files.read(tmp_path / "run.yaml") == settings


@pytest.mark.parametrize("text", ["=Yes,no=No", "yes,no=No", ""])
def test_a_part_without_a_label_or_words_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="is not LABEL=WORD"):
        run_files.parse_labels(text)


def test_a_label_given_twice_is_an_error() -> None:
    with pytest.raises(InputError, match=r"'yes' stands there twice; .* separated by"):
        run_files.parse_labels("yes=Yes,yes=Sure")


@pytest.mark.parametrize("text", ["010", "1_0", "0x10", "1:30", "1.10", "1e-3", ".inf", "yes"])
def test_what_looks_like_a_number_is_what_it_would_be_on_the_command_line(
    text: str, tmp_path: Path
) -> None:
    assert read(tmp_path / "run.yaml", f"model: {text}")["model"] == text


def test_true_is_no_number(run: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("epochs: true")
    options = ["--model", "m", "--data", "d.csv", "--output", tmp_path / "out"]
    code, out, err = run("train", *options, "--config", tmp_path / "run.yaml")
    assert (code, out) == (2, "") and "Invalid value for '--epochs'" in " ".join(err.split())


def test_the_home_folder_is_meant_where_no_shell_has_written_it(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "b"}\n')
    (tmp_path / "run.yaml").write_text("model: m\ndata: ~/a.jsonl\noutput: ~/out\n")
    typed = ("--model", "m", "--data", "~/a.jsonl", "--output=~/out")
    for given in (typed, ("--config=~/run.yaml",)):
        code, _, err = run("train", *given)
        assert code == 2 and f"--output {tmp_path / 'out'} is not empty" in err, err
    assert ptuning.read_examples("~/a.jsonl") == [{"text": "a", "label": "b"}]
    assert not list((tmp_path / "here").iterdir())
