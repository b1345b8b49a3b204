"""The command line as people meet it: results, files, and one line for each mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from ptuning import Prompt
from ptuning.cli import main
from ptuning.training import checkpoint

from .. import tiny
from ..scaffold import Run

ROWS = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Austria", "Vienna")] * 2
TEMPLATE = "[P*3] {country} [P] [MASK]"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with data files."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"country": a, "capital": b, "label": n % 2 == 0, "id": n})
             for n, (a, b) in enumerate(ROWS)]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    csv_lines = ["country,capital"] + [f"{a},{b}" for a, b in ROWS[:4]]
    (tmp_path / "dev.csv").write_text("\n".join(csv_lines) + "\n")
    return tmp_path


@pytest.fixture
def run(here: Path, run: Run) -> Run:
    """Commands run in that folder."""
    return run


@pytest.fixture
def train(run: Run, model_folder: Path) -> Run:
    """Train with good settings; keyword arguments change or remove (None) options."""

    def call(*flags: str, **options: Any) -> tuple[int, str, str]:
        chosen = {
            "model": model_folder,
            "data": "train.jsonl",
            "template": TEMPLATE,
            "answer": "capital",
            "output": "out",
            "epochs": 2,
            "batch_size": 4,
            **options,
        }
        pairs = [(f"--{k.replace('_', '-')}", v) for k, v in chosen.items() if v is not None]
        return run("train", *(part for pair in pairs for part in pair), *flags)

    return call


def assert_one_line(stderr: str, *parts: str) -> None:
    """One line, begun by ``error:``, with each part in it and no traceback."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert lines[-1] == errors[0], stderr
    assert "Traceback" not in stderr
    for part in parts:
        assert part in errors[0], f"{part!r} is not in: {errors[0]}"


def test_train_writes_prompt_settings_result_and_curve(train: Run, here: Path) -> None:
    code, out, err = train(dev="dev.csv")
    assert code == 0, err
    assert "4 virtual tokens saved in out" in out
    assert {p.name for p in (here / "out").iterdir()} == {
        "prompt.json", "prompt.safetensors", "README.md", "run.yaml", "result.json", "curve.png",
    }  # fmt: skip
    settings = yaml.safe_load((here / "out/run.yaml").read_text())
    assert settings["epochs"] == 2 and settings["learning_rate"] is None
    result = json.loads((here / "out/result.json").read_text())
    assert [r["epoch"] for r in result["history"]] == [1, 2] and "torch" in result["versions"]
    assert (here / "out/curve.png").read_bytes().startswith(b"\x89PNG")
    assert err.count("epoch ") >= 2


def test_a_run_file_repeats_the_run_and_given_options_come_first(
    train: Run, run: Run, here: Path
) -> None:
    train(encoder="lstm", seed=5)
    code, _, err = run("train", "--config", "out/run.yaml", "--output", "again")
    assert code == 0, err
    first, again = Prompt.load("out"), Prompt.load("again")
    assert torch.equal(first.trained_vectors(), again.trained_vectors())
    run("train", "--config", "out/run.yaml", "--output", "other", "--seed", "6")
    assert not torch.equal(Prompt.load("other").trained_vectors(), first.trained_vectors())


def test_a_repeated_run_replaces_nothing_unasked_and_has_the_whole_grid(
    train: Run, run: Run
) -> None:
    grid = ("--population-grid", "encoder=mlp,none", "learning_rate=1e-3,1e-2")
    code, _, err = train("--overwrite", *grid)
    assert code == 0, err
    code, _, err = run("train", "--config", "out/run.yaml")
    assert code == 2
    assert_one_line(err, "out holds a saved prompt")
    code, _, err = run("train", "--config", "out/run.yaml", "--output", "again")
    assert code == 0, err
    names = [
        [
            member["name"]
            for member in json.loads(Path(f"{folder}/result.json").read_text())["members"]
        ]
        for folder in ("out", "again")
    ]
    assert names[0] == names[1] and len(names[0]) == 4


@pytest.mark.parametrize("config_first", [True, False])
def test_a_run_file_comes_before_the_settings_of_the_run_that_goes_on(
    train: Run, run: Run, ctrl_c_after: Callable[[int | None], None], config_first: bool
) -> None:
    ctrl_c_after(1)
    assert train(checkpoint_seconds=50)[0] == 130
    ctrl_c_after(None)
    Path("more.yaml").write_text("checkpoint_seconds: 77\n")
    config, resume = ["--config", "more.yaml"], ["--output", "out", "--resume"]
    code, _, err = run("train", *(config + resume if config_first else resume + config))
    assert code == 0, err
    assert yaml.safe_load(Path("out/run.yaml").read_text())["checkpoint_seconds"] == 77


def test_a_run_file_may_hold_labels_as_a_mapping(run: Run, here: Path, model_folder: Path) -> None:
    values = {
        "model": str(model_folder),
        "data": "train.jsonl",
        "template": "[P*2] {country} [MASK]",
        "answer": "label",
        "labels": {True: "yes", "false": ["no", "not"]},
        "output": "out",
        "epochs": 1,
    }
    Path("run.yaml").write_text(yaml.safe_dump(values))
    code, _, err = run("train", "--config", "run.yaml")
    assert code == 0, err
    assert Prompt.load("out").labels["false"] == ("no", "not")


def test_evaluate_predict_and_inspect_use_the_saved_prompt(train: Run, run: Run) -> None:
    train(dev="dev.csv")
    code, out, err = run("evaluate", "out", "--data", "dev.csv", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["examples"] == 4 and report["majority_answer"] == "Paris"
    assert 0 <= report["accuracy"] <= 1 and len(report["predictions"]) == 4
    code, out, err = run("evaluate", "out", "--data", "dev.csv", "--manual", "{country} is [MASK]")
    assert code == 0 and "manual: {country} is [MASK]" in out
    code, out, err = run("predict", "out", "--data", "train.jsonl", "--output", "said.jsonl")
    assert code == 0, err
    said = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    assert [row["id"] for row in said] == list(range(8))
    assert {"prediction", "probability"} <= set(said[0])
    code, out, err = run("predict", "out", "--data", "dev.csv")
    assert code == 0 and len(out.splitlines()) == 4
    code, out, err = run("inspect", "out")
    assert code == 0 and TEMPLATE in out and "[P] 3" in out
    code, out, _ = run("inspect", "out", "--json", "--words", 2)
    assert code == 0 and len(json.loads(out)["virtual_tokens"][0]["nearest"]) == 2


def test_labels_give_confusion_and_probabilities(train: Run, run: Run, here: Path) -> None:
    code, _, err = train(template="[P*3] {country}? [MASK]", answer="label",
                         labels="true=yes,false=no")  # fmt: skip
    assert code == 0, err
    code, out, _ = run("evaluate", "out", "--data", "train.jsonl")
    assert code == 0 and "Confusion" in out and "mean probability" in out and "macro F1" in out
    report = json.loads(run("evaluate", "out", "--data", "train.jsonl", "--json")[1])
    assert sum(map(sum, report["confusion"])) == 8 and report["labels"] == ["true", "false"]
    probabilities = report["predictions"][0]["probabilities"]
    assert sum(probabilities.values()) == pytest.approx(1)


def test_many_labels_are_shown_by_their_mistakes(run: Run, model_folder: Path) -> None:
    """A matrix of 40 columns is no wider than a terminal: it was shown without a letter."""
    labels = [f"kind{number}" for number in range(40)]
    rows = [{"text": "Paris", "label": label} for label in labels for _ in range(2)]
    Path("many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompt = Prompt(
        "[P*2] {text} [MASK]", answer="label", verbalizer={label: label for label in labels}
    )
    prompt.vectors = torch.zeros(2, 32)
    prompt.save("many")
    asked = ("evaluate", "many", "--model", model_folder, "--data", "many.jsonl")
    code, out, err = run(*asked)
    assert code == 0, err
    said = json.loads(run(*asked, "--json")[1])
    (answer,) = {prediction["answer"] for prediction in said["predictions"]}
    assert "20 of 40 labels" in out and "taken for" in out and f"{answer} (2)" in out
    wrong = next(label for label in labels if label != answer)
    (line,) = [
        line for line in out.splitlines() if f" {wrong} " in line and f"{answer} (2)" in line
    ]
    assert [cell.strip() for cell in line.strip("│").split("│")][1:3] == ["2", "0"]


def test_predict_among_candidates(train: Run, run: Run, here: Path) -> None:
    train()
    Path("candidates.txt").write_text("Paris\nRome\n\nMadrid\n")
    code, out, err = run("predict", "out", "--data", "dev.csv", "--candidates", "candidates.txt")
    assert code == 0, err
    assert {json.loads(line)["prediction"] for line in out.splitlines()} <= {
        "Paris", "Rome", "Madrid",
    }  # fmt: skip


def test_training_goes_on_from_a_saved_prompt(train: Run, here: Path) -> None:
    train(epochs=3)
    code, _, err = train(init_from="out", output="more", epochs=3)
    assert code == 0, err
    first = json.loads(Path("out/result.json").read_text())["history"]
    more = json.loads(Path("more/result.json").read_text())["history"]
    assert more[0]["loss"] < first[0]["loss"]
    code, _, err = train(init_from="out", output="longer", template="[P*9] {country} [MASK]")
    assert code == 0, err
    assert json.loads(Path("longer/prompt.json").read_text())["num_virtual_tokens"] == 9


@pytest.mark.usefixtures("on_cpu")
def test_a_training_from_a_saved_prompt_is_resumed_and_repeated_with_what_that_prompt_has(
    train: Run, run: Run, ctrl_c_after: Callable[[int | None], None]
) -> None:
    train("--no-answer-end", output="first", encoder="lstm", max_length=30)
    begun = {"init_from": "first", "template": None, "answer": None}
    code, _, err = train(**begun, output="whole")
    assert code == 0, err
    ctrl_c_after(1)
    assert train(**begun)[0] == 130
    ctrl_c_after(None)
    for command in (("--resume",), ("--config", "whole/run.yaml")):
        code, _, err = run("train", "--output", "out", *command)
        assert code == 0, err
        whole, again = Prompt.load("whole"), Prompt.load("out")
        assert again.settings() == whole.settings() == Prompt.load("first").settings()
        assert torch.equal(whole.trained_vectors(), again.trained_vectors())
        shutil.rmtree("out")
    options = ("--output", "longer", "--template", "[P*9] {country} [MASK]")
    code, _, err = run("train", "--config", "whole/run.yaml", *options)
    assert code == 0, err


def test_a_label_bias_is_not_that_of_the_prompt_that_a_training_begins_with(train: Run) -> None:
    labels = {"template": "[P*3] {country}? [MASK]", "answer": "label"}
    code, _, err = train(**labels, labels="true=yes,false=no", calibrate="batch", output="first")
    assert code == 0, err
    assert Prompt.load("first").label_bias
    code, _, err = train(init_from="first", template=None, answer=None)
    assert code == 0, err
    assert Prompt.load("out").labels and Prompt.load("out").label_bias is None
    others = "Paris=Paris,Rome=Rome,Madrid=Madrid,Vienna=Vienna"
    more = {"template": None, "answer": "capital", "labels": others, "output": "others"}
    code, _, err = train(init_from="first", **more)
    assert code == 0, err


def test_a_run_keeps_the_prompt_that_it_begins_with_until_it_is_finished(train: Run) -> None:
    train()
    before = Path("out/prompt.safetensors").read_bytes()
    begun = {"init_from": "out", "template": None}
    code, _, err = train("--overwrite", **begun, max_minutes=1)
    assert code == 2
    assert_one_line(err, "--max-minutes would replace the prompt", "another --output")
    assert Path("out/prompt.safetensors").read_bytes() == before
    assert train(**begun, max_minutes=1, output="other")[0] == 0
    assert train("--overwrite", **begun)[0] == 0


def test_json_goes_to_stdout_alone(train: Run, run: Run) -> None:
    code, out, _ = train("--json")
    assert code == 0 and json.loads(out)["best"]["epoch"] == 2
    code, again, _ = run("train", "--output", "out", "--resume", "--json")
    assert code == 0 and json.loads(again) == json.loads(out)


def test_the_last_line_says_what_chose(train: Run) -> None:
    _, told, _ = train(dev="dev.csv")
    assert "(dev chose this prompt: examples that neither trained" in told
    _, told, _ = train("--overwrite", folds=2)
    assert "(the folds chose its settings: examples that neither trained" in told


def test_a_finished_run_is_kept_and_can_be_replaced_on_request(train: Run, here: Path) -> None:
    train()
    before = (here / "out/prompt.safetensors").read_bytes()
    code, _, err = train(seed=1)
    assert code == 2
    assert_one_line(err, "out holds a saved prompt", "--init-from out", "--overwrite")
    assert "--resume" not in err
    assert (here / "out/prompt.safetensors").read_bytes() == before
    code, _, err = train("--resume")
    assert code == 0 and "finished run" in err
    code, _, _ = train("--overwrite", seed=1)
    assert code == 0 and (here / "out/prompt.safetensors").read_bytes() != before


@pytest.mark.usefixtures("on_cpu")
def test_resume_finds_its_settings_in_the_folder(
    train: Run, run: Run, here: Path, ctrl_c_after: Callable[[int | None], None]
) -> None:
    settings = {"epochs": 4, "dev": "dev.csv", "seed": 3, "encoder": "none"}
    train(**settings, output="whole")
    ctrl_c_after(2)
    code, _, err = train(**settings)
    assert code == 130
    assert err.splitlines()[-1] == "stopped; go on with: ptuning train --output out --resume"
    ctrl_c_after(None)
    code, _, err = train(**settings)
    assert code == 2
    assert_one_line(err, "out holds an interrupted run", "--resume", "--overwrite")
    written = (here / "out/run.yaml").read_text()
    code, _, err = run("train", "--resume", "--output", "out", "--seed", "4")
    assert code == 2
    assert_one_line(err, "cannot resume", "seed")
    assert (here / "out/run.yaml").read_text() == written  # a refused run changes nothing
    code, out, err = run("train", "--output", "out", "--resume")
    assert code == 0, err
    whole, resumed = Prompt.load("whole"), Prompt.load("out")
    assert torch.equal(whole.trained_vectors(), resumed.trained_vectors())
    assert "ptuning predict out --data dev.csv" in out
    code, _, err = run("train", "--output", "out", "--resume")
    assert code == 0 and "out holds a finished run" in err


@pytest.mark.usefixtures("on_cpu")
def test_resume_begins_a_run_that_was_stopped_before_its_first_checkpoint(
    train: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"dev": "dev.csv", "seed": 3, "encoder": "none"}
    train(**settings, output="whole")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", Mock(side_effect=KeyboardInterrupt))
        code, _, err = train(**settings)
    assert code == 130
    assert sorted(path.name for path in Path("out").iterdir()) == ["run.yaml"]
    assert err.splitlines()[-1] == "stopped; go on with: ptuning train --output out --resume"
    code, _, err = run("train", "--output", "out", "--resume")
    assert code == 0, err
    whole, resumed = Prompt.load("whole"), Prompt.load("out")
    assert torch.equal(whole.trained_vectors(), resumed.trained_vectors())


@pytest.mark.parametrize(
    ("interrupted", "seed"),
    [
        ("ptuning.cli.run_folder.begin", 1),
        ("ptuning.training.checkpoint.save", 2),
        ("ptuning.cli.training_report.save", 2),
    ],
)
def test_a_run_that_was_stopped_is_not_taken_for_the_one_that_it_replaces(
    train: Run,
    run: Run,
    ctrl_c_after: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
    interrupted: str,
    seed: int,
) -> None:
    ctrl_c_after(2)
    assert train(seed=1)[0] == 130
    ctrl_c_after(None)
    with monkeypatch.context() as patched:
        patched.setattr(interrupted, Mock(side_effect=KeyboardInterrupt))
        code, _, err = train("--overwrite", seed=2)
    assert code == 130
    last = err.splitlines()[-1]
    assert ("begin again" in last, "--resume" in last) == (seed == 1, seed == 2)
    code, _, err = run("train", "--output", "out", "--resume")
    assert code == 0, err
    assert Prompt.load("out").training["seed"] == seed


@pytest.mark.usefixtures("on_cpu")
def test_a_run_of_an_older_release_goes_on_without_noise_on_words(
    run: Run, here: Path, ctrl_c_after: Callable[[int | None], None], model_folder: Path
) -> None:
    rows = [f"{text},{n % 2}" for n, text in enumerate(["Paris", "Rome", "Oslo", "Vienna"] * 5)]
    Path("table.csv").write_text("\n".join(["text,label", *rows]))
    common = ("train", "--model", str(model_folder), "--data", "table.csv", "--epochs", "3")
    code, _, err = run(*common, "--output", "whole", "--word-noise", "0")
    assert code == 0, err
    ctrl_c_after(2)
    assert run(*common, "--output", "out", "--word-noise", "0")[0] == 130
    ctrl_c_after(None)
    written = Path("out/run.yaml").read_text()
    older = [line for line in written.splitlines() if line != "word_noise: 0.0"]
    assert len(older) == len(written.splitlines()) - 1
    Path("out/run.yaml").write_text("\n".join(older))
    code, _, err = run("train", "--output", "out", "--resume")
    assert code == 0, err
    whole, resumed = Prompt.load("whole"), Prompt.load("out")
    assert torch.equal(whole.trained_vectors(), resumed.trained_vectors())
    code, _, err = run(*common, "--output", "usual")
    assert code == 0, err
    assert "word_noise: 0.5\n" in Path("usual/run.yaml").read_text()
    assert not torch.equal(Prompt.load("usual").trained_vectors(), resumed.trained_vectors())


@pytest.mark.parametrize("steps", [0, 2])
def test_a_folder_whose_training_has_not_ended_is_told_as_such(
    train: Run, run: Run, here: Path, ctrl_c_after: Callable[[int | None], None], steps: int
) -> None:
    ctrl_c_after(2)
    assert train()[0] == 130
    ctrl_c_after(None)
    if not steps:
        shutil.rmtree(here / "out/checkpoints")
    for command in (["predict", "out", "--data", "dev.jsonl"], ["inspect", "out"]):
        code, _, err = run(*command)
        assert code == 2
        assert_one_line(err, "out holds a training that has not come to its end", "--resume")
    assert train("--resume")[0] == 0
    assert run("inspect", "out")[0] == 0


def test_resume_refuses_where_there_is_nothing_to_resume(
    train: Run, run: Run, here: Path, ctrl_c_after: Callable[[int | None], None]
) -> None:
    code, _, err = train("--resume", output="mistyped")
    assert code == 2
    assert_one_line(err, "nothing to resume in --output mistyped", "does not exist")
    assert not (here / "mistyped").exists()
    train()
    (here / "out/result.json").unlink()  # a prompt of another's, without its run
    before = (here / "out/prompt.safetensors").read_bytes()
    code, _, err = train("--resume")
    assert code == 2
    assert_one_line(err, "nothing to resume", "a saved prompt", "--init-from out")
    assert (here / "out/prompt.safetensors").read_bytes() == before
    (here / "other").mkdir()
    (here / "other/notes.txt").write_text("of another's")
    code, _, err = run("train", "--output", "other", "--resume")
    assert code == 2
    assert_one_line(err, "nothing to resume in --output other", "holds no run")
    code, _, err = train("--resume", "--overwrite")
    assert code == 2


def test_a_mistake_does_not_block_the_folder_for_the_corrected_run(train: Run) -> None:
    assert train(answer="capitol")[0] == 2
    code, _, err = train()
    assert code == 0, err


def test_a_folder_with_other_files_is_not_used_unasked(train: Run, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out/notes.txt").write_text("precious")
    code, _, err = train()
    assert code == 2
    assert_one_line(err, "out is not empty", "--overwrite")
    assert train("--overwrite")[0] == 0
    assert (here / "out/notes.txt").read_text() == "precious"


@pytest.mark.parametrize("damaged", ["{", "[]", '{"base_model": null}'])
def test_a_damaged_prompt_can_be_replaced(train: Run, here: Path, damaged: str) -> None:
    (here / "out").mkdir()
    (here / "out/prompt.json").write_text(damaged)
    code, _, err = train("--overwrite")
    assert code == 0, err
    assert Prompt.load("out").template == TEMPLATE


TEMPLATES = [
    ("[P*3] {contry} [MASK]", ["'contry'", "'country'"]),
    ("[P*3] {country} [MASK] [MASK]", ["column 24", "second [MASK]"]),
    ("{country} is [MASK]", ["no virtual token", "[P*3]"]),
    ("[P*3 {country} [MASK]", ["column 1", "'[' is not closed"]),
    ("[P] {country [MASK]", ["column 5", "'{' is not closed"]),
    ("[P*0] {country}", ["[P*0]", "at least 1"]),
    ("[P*-1] {country}", ["[P*-1]", "at least 1"]),
    ("[P*900] {country} [MASK]", ["num_virtual_tokens is 900", "128"]),
]


@pytest.mark.parametrize(("template", "parts"), TEMPLATES)
def test_a_wrong_template_is_one_line(
    train: Run, here: Path, template: str, parts: list[str]
) -> None:
    code, _, err = train(template=template)
    assert code == 2
    assert_one_line(err, *parts)
    assert not (here / "out/prompt.json").exists()


OPTIONS = [
    ({"num_virtual_tokens": 0}, ["num_virtual_tokens is 0", "at least 1"]),
    ({"num_virtual_tokens": -1}, ["num_virtual_tokens is -1"]),
    ({"num_virtual_tokens": 7}, ["num_virtual_tokens is 7", "4 virtual tokens"]),
    ({"data": "none.jsonl"}, ["none.jsonl does not exist"]),
    ({"answer": "city"}, ["'city'", "'capital'"]),
    ({"answer": None}, ["answer"]),
    ({"labels": "Paris=a,Rome=b"}, ["'Madrid' is none of the prompt's labels", "'Paris'"]),
    ({"labels": "Paris"}, ["--labels: 'Paris' is not LABEL=WORD"]),
    ({"labels": "Paris=a"}, ["at least two labels"]),
    ({"encoder": "gru"}, ["encoder is 'gru'", "mlp, lstm, none"]),
    ({"epochs": 0}, ["epochs is 0"]),
    ({"model": "no/such-model"}, ["cannot load the model 'no/such-model'"]),
    ({"model": "missing.gguf"}, ["missing.gguf does not exist"]),
    ({"dtype": "int4"}, ["dtype is 'int4'"]),
    ({"output": "train.jsonl"}, ["is a file"]),
    ({"max_length": 3}, ["num_virtual_tokens is 4", "room for 3"]),
    ({"tracker": "no_such_tracker"}, ["tracker is 'no_such_tracker'", "tensorboard"]),
    ({"answer_tokens": 1}, ["training example 1", "tokens", "answer_tokens is 1"]),
    ({"tracker": "wandb"}, ["'wandb' is not installed", "tensorboard"]),
    ({"template": "[p*3] {country} [MASK]"}, ["capital P", "write: [P*3] {country} [MASK]"]),
    ({"model": "smollm3"}, ["'smollm3'", "smollm2 or minilm", "folder", "hub name"]),
    ({"config": "none.yaml"}, ["none.yaml cannot be read"]),
]


@pytest.mark.parametrize(("options", "parts"), OPTIONS)
def test_a_wrong_option_is_one_line(train: Run, options: dict[str, Any], parts: list[str]) -> None:
    if options == {"answer": None}:
        Path("train.jsonl").write_text('{"country": "France", "capital": "Paris"}\n')
    code, _, err = train(**options)
    assert code == 2, err
    assert_one_line(err, *parts)


FILES = [
    ("empty.jsonl", "", ["empty.jsonl holds no example"]),
    ("bad.jsonl", '{"country": "a", "capital": "b"}\n{"country": \n', ["line 2", "JSON"]),
    ("list.jsonl", "[1, 2]\n", ["element 1", "object"]),
    ("bad.csv", "country,capital\nFrance,Paris\nItaly\n", ["line 3", "1 cell", "header has 2"]),
    ("bytes.csv", b"country,capital\nFr\xff,Paris\n", ["line 2", "UTF-8"]),
    ("blank.jsonl", '{"country": "a", "capital": " "}\n', ["training example 1", "empty"]),
    ("lacks.csv", "country,city\nFrance,Paris\n", ["'capital'", "'city'"]),
    ("notes.doc", "France Paris\n", ["unknown kind", ".jsonl"]),
    ("bad.parquet", "no parquet", ["bad.parquet cannot be read as Parquet"]),
]


@pytest.mark.parametrize(("name", "content", "parts"), FILES)
def test_a_wrong_data_file_is_one_line(
    train: Run, name: str, content: str | bytes, parts: list[str]
) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = train(data=name)
    assert code == 2, err
    assert_one_line(err, *parts)


BEFORE_THE_MODEL = [
    {"answer": "city"},
    {"template": "[P] {contry} [MASK]"},
    {"labels": "Paris=a,Rome=b"},
    {"dtype": "int4"},
    {"population_grid": "encoder=mlp,gru"},
    {"population_grid": "colour=red"},
    {"tracker": "wandb"},
    {"epochs": 0},
    {"dev": "lacks.csv"},
]


@pytest.mark.parametrize("options", BEFORE_THE_MODEL)
def test_a_mistake_is_found_before_the_model_is_loaded_and_leaves_no_folder(
    train: Run, here: Path, options: dict[str, Any]
) -> None:
    (here / "lacks.csv").write_text("country,city\nFrance,Paris\n")
    code, _, err = train(**options)
    assert code == 2
    assert "loading" not in err
    assert not (here / "out").exists()


def test_a_missing_option_an_unknown_one_and_an_unknown_command_are_one_line(run: Run) -> None:
    code, _, err = run("train", "--data", "train.jsonl")
    assert code == 2
    assert_one_line(err, "--output", "ptuning train --help")
    code, _, err = run("train", "--data", "train.jsonl", "--output", "out")
    assert code == 2
    assert_one_line(err, "--model")
    code, _, err = run("train", "--learning-rat", "1")
    assert code == 2
    assert_one_line(err, "--learning-rat")
    code, _, err = run("trian")
    assert code == 2
    assert_one_line(err, "trian")
    code, _, err = run("fetch", "gpt9")
    assert code == 2
    assert_one_line(err, "'gpt9'", "smollm2")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["train", "--model", "", "--data", "train.jsonl"], "what stands behind --model is empty"),
        (["train", "--model", "m", "--output="], "--output is empty"),
        (["evaluate", "", "--data", "dev.csv"], "what stands behind evaluate is empty"),
    ],
)
def test_an_empty_argument_is_not_the_current_folder(
    run: Run, arguments: list[str], name: str
) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert_one_line(err, name, "give it a value")


def test_wrong_options_of_a_saved_prompt_are_one_line_before_the_model_is_loaded(
    train: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    train()
    train(output="labelled", labels="Paris=a,Rome=b,Madrid=c,Vienna=d")
    monkeypatch.setattr("ptuning.backbone.load.load_model", Mock(side_effect=AssertionError))
    Path("candidates.txt").write_text("Paris\nRome\n")
    asked = ["out", "--data", "train.jsonl"]
    wrong: list[tuple[list[str], list[str]]] = [
        *(([command, *asked, option, "0"], [option, "greater than or equal to 1"])
          for command in ("evaluate", "predict", "report")
          for option in ("--batch-size", "--answer-tokens")),
        (["inspect", "out", "--words", "-2"], ["--words", "greater than or equal to 1"]),
        (["evaluate", *asked, "--manual", "[P] {country}"],
         ["a manual template has no virtual tokens", "[P] {country}"]),
        (["report", *asked, "--manual", "{contry}"], ["'contry'", "'country'"]),
        *(([command, "labelled", *asked[1:], "--candidates", "candidates.txt"],
           ["candidates are for free answers"]) for command in ("evaluate", "report")),
    ]  # fmt: skip
    for arguments, parts in wrong:
        code, _, err = run(*arguments)
        assert code == 2, (arguments, err)
        assert_one_line(err, *parts)


def test_an_unknown_key_of_a_run_file_is_named(run: Run) -> None:
    Path("run.yaml").write_text("epoks: 3\n")
    code, _, err = run("train", "--config", "run.yaml")
    assert code == 2
    assert_one_line(err, "run.yaml: unknown option 'epoks'", "epochs")


def test_an_input_longer_than_the_context_is_shortened_and_said(train: Run, run: Run) -> None:
    rows = [{"country": "word " * 400, "capital": "Paris"}, {"country": "Italy", "capital": "Rome"}]
    Path("long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = train(data="long.jsonl")
    assert code == 0, err
    assert "warning: 1 of 2 training examples were shortened to 128 tokens" in err
    code, _, err = run("predict", "out", "--data", "long.jsonl")
    assert code == 0
    assert "warning: 1 of 2 prediction examples were shortened to 128 tokens" in err
    code, _, err = train(data="long.jsonl", template="[P] " + "anchor words " * 200 + "{country}",
                         output="other")  # fmt: skip
    assert code == 2
    assert_one_line(err, "training example 1", "longer than the 128 tokens")


def test_damaged_prompts_are_one_line(train: Run, run: Run, here: Path) -> None:
    train()
    tensors = here / "out/prompt.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[: len(content) // 2])
    code, _, err = run("predict", "out", "--data", "dev.csv")
    assert code == 2
    assert_one_line(err, "prompt.safetensors is truncated or damaged")
    torch.save({"vectors": torch.zeros(4, 32)}, tensors)
    code, _, err = run("predict", "out", "--data", "dev.csv")
    assert code == 2
    assert_one_line(err, "is a pickle")
    tensors.unlink()
    torch.save({}, here / "out/pytorch_model.bin")
    code, _, err = run("inspect", "out")
    assert code == 2
    assert_one_line(err, "pytorch_model.bin", "refused")
    code, _, err = run("inspect", "nowhere")
    assert code == 2
    assert_one_line(err, "nowhere")


def test_a_prompt_for_another_model_is_refused_or_warned_of(
    train: Run, run: Run, here: Path, model_folder: Path
) -> None:
    train()
    tokenizer = tiny.tokenizer()
    for name, changes in (("wide", {"hidden_size": 64}), ("cousin", {"seed": 9})):
        tiny.model("llama", vocab_size=len(tokenizer), **changes).save_pretrained(name)
        tokenizer.save_pretrained(name)
    code, _, err = run("predict", "out", "--data", "dev.csv", "--model", "wide")
    assert code == 2
    assert_one_line(err, "embedding width 32", "has 64", "tiny-llama", "wide")
    code, _, err = run("predict", "out", "--data", "dev.csv", "--model", "cousin")
    assert code == 0
    assert "warning:" in err and "tiny-llama" in err and "cousin" in err and "other weights" in err


def test_a_full_disk_is_one_line_and_keeps_what_was_saved(
    train: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train()
    before = (here / "out/prompt.safetensors").read_bytes()
    real = os.fsync

    def full(descriptor: int) -> None:
        real(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = train("--overwrite", seed=3)
    assert code == 1
    assert_one_line(err, "cannot write to", "No space left on device")
    monkeypatch.undo()
    os.chdir(here)
    assert (here / "out/prompt.safetensors").read_bytes() == before
    assert Prompt.load(here / "out").vectors is not None


def test_a_training_that_a_full_disk_ends_says_how_to_go_on(
    train: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        real(descriptor)
        if list(Path("out").glob("checkpoints/*/DONE")):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        code, _, err = train()
    assert code == 1
    how = "go on with: ptuning train --output out --resume"
    assert_one_line(err, "No space left on device", "free space there", how)
    assert run("train", "--output", "out", "--resume")[0] == 0


def test_a_read_only_output_is_one_line(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "fsync", refuse)  # root may write anywhere
    code, _, err = train()
    assert code == 1
    assert_one_line(err, "cannot write to", "Permission denied")


def test_predict_does_not_replace_a_file_unasked(train: Run, run: Run, here: Path) -> None:
    train()
    Path("said.jsonl").write_text("precious")
    arguments = ("predict", "out", "--data", "dev.csv", "--output", "said.jsonl")
    code, _, err = run(*arguments)
    assert code == 2 and Path("said.jsonl").read_text() == "precious"
    assert_one_line(err, "said.jsonl exists", "--overwrite")
    assert run(*arguments, "--overwrite")[0] == 0


def test_a_gguf_file_that_is_none_is_one_line(train: Run) -> None:
    Path("broken.gguf").write_bytes(b"GGUF nothing")
    code, _, err = train(model="broken.gguf")
    assert code == 2
    assert_one_line(err, "cannot read the GGUF file broken.gguf")


def test_debug_shows_the_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["ptuning", "--debug", "inspect", "nowhere"])
    with pytest.raises(Exception, match="nowhere"):
        main()


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "predict", "inspect", "demo", "fetch", None]
)
def test_help_teaches(run: Run, command: str | None) -> None:
    code, out, _ = run(*([command] if command else []), "--help") if command else run("--help")
    assert code == 0 and "Usage: ptuning" in out
    if command == "train":
        assert "[P*3] {country} [P*3] [MASK]" in out


def _train_process(here: Path, model_folder: Path, output: str, *flags: str) -> list[str]:
    return [
        sys.executable, "-c", "from ptuning.cli import main; main()", "train",
        "--model", str(model_folder), "--data", str(here / "train.jsonl"),
        "--dev", str(here / "dev.csv"), "--template", TEMPLATE, "--answer", "capital",
        "--output", str(here / output), "--epochs", "250", "--batch-size", "2",
        "--encoder", "lstm", "--encoder-dropout", "0.2", "--patience", "0", *flags,
    ]  # fmt: skip


def _result(here: Path, output: str) -> tuple[torch.Tensor, dict[str, float]]:
    result = json.loads((here / output / "result.json").read_text())
    return Prompt.load(here / output).trained_vectors(), result["best"]


def _kill_and_resume(here: Path, model_folder: Path, kills: int) -> None:
    """Kill a training at spread moments, resume each time, and compare with an undisturbed one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        _train_process(here, model_folder, "whole"),
        check=True,
        env=environment,
        capture_output=True,
    )
    killed = 0
    for attempt in range(10 * kills):
        before = checkpoint.load_newest(here / "killed") is not None
        command = _train_process(here, model_folder, "killed")
        if before:  # the settings are in the folder
            command = [*command[:4], "--output", str(here / "killed"), "--resume"]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        if killed < kills:
            # Wait for the training to run (a new checkpoint), then a little, different each time.
            folder = here / "killed" / "checkpoints"
            seen = set(folder.glob("step-*")) if before else set()
            while time.monotonic() < deadline and process.poll() is None:
                if set(folder.glob("step-*")) - seen:
                    break
                time.sleep(0.01)
            time.sleep(0.037 * (attempt % 7))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
            process.wait()
        else:
            assert process.wait() == 0
            break
    assert killed == kills
    vectors, best = _result(here, "killed")
    expected_vectors, expected_best = _result(here, "whole")
    torch.testing.assert_close(vectors, expected_vectors, atol=1e-6, rtol=0)
    assert best == expected_best


@pytest.mark.usefixtures("on_cpu")
def test_a_killed_training_resumes_to_the_same_result(here: Path, model_folder: Path) -> None:
    _kill_and_resume(here, model_folder, kills=3)


@pytest.mark.slow
def test_a_training_killed_twenty_times_resumes_to_the_same_result(
    here: Path, model_folder: Path
) -> None:
    _kill_and_resume(here, model_folder, kills=20)


def test_the_program_runs_as_a_process(here: Path) -> None:
    program = shutil.which("ptuning", path=str(Path(sys.executable).parent))
    command = (
        [program] if program else [sys.executable, "-c", "from ptuning.cli import main; main()"]
    )
    done = subprocess.run(
        [*command, "inspect", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done.stderr, "nowhere")


def test_the_demo_writes_prompt_picture_and_figures(
    run: Run, here: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptuning.experiments import demo

    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "MANUAL_TEMPLATES", demo.MANUAL_TEMPLATES[:2])
    code, out, err = run("demo", "--model", model_folder)
    assert code == 0, err
    assert "P-tuned prompt" in out and "majority answer" in out and "[P] 5" in out
    assert "the training takes about" in err and "shows how loudly it speaks" in out
    metrics = json.loads((here / "demo_output/metrics.json").read_text())
    assert metrics["test_examples"] >= 40 and metrics["seconds"] > 0
    assert all(0 <= metrics[f"{name}_p1"] <= 1 for name in ("manual", "majority", "ptuned"))
    assert (here / "demo_output/curve.png").is_file()
    assert Prompt.load(here / "demo_output").num_virtual_tokens == 6
    Prompt.load(here / "demo_output").save(here / "mine")
    before = (here / "mine/prompt.json").read_bytes()
    code, _, err = run("demo", "--model", model_folder, "--output", "mine")
    assert code == 2 and (here / "mine/prompt.json").read_bytes() == before
    assert_one_line(err, "mine is not empty, and no demo has made what it holds")
    code, _, err = run("demo", "--model", model_folder)
    assert code == 0, err  # its own it replaces
    code, _, err = run("demo", "--model", model_folder, "--output", "x" * 300)
    assert code == 2
    assert_one_line(err, "choose a shorter name")


def test_the_demos_facts_are_sound() -> None:
    from ptuning.experiments import demo

    parts = demo.facts()
    people = [row["person"] for part in parts for row in part]
    assert len(people) == len(set(people)) and len(parts[2]) >= 40
    answers = [row["profession"] for part in parts for row in part]
    assert max(map(answers.count, set(answers))) < len(answers) / 5
    assert all(row["profession"] not in row["person"] for part in parts for row in part)


@pytest.mark.skipif(os.name == "nt", reason="modes of files")
def test_a_training_over_another_one_keeps_the_files_modes(train: Run, here: Path) -> None:
    assert train()[0] == 0
    for path in (here / "out").iterdir():
        path.chmod(0o600)
    assert train("--overwrite", seed=1)[0] == 0
    assert {path.stat().st_mode & 0o777 for path in (here / "out").iterdir()} == {0o600}
