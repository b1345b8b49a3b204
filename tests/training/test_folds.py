"""Folds: what each of them says, what is chosen, and what trains at last."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ptuning
from ptuning import InputError, Prompt
from ptuning.training import checkpoint, folds
from ptuning.training.folds import splits

from .. import tiny
from ..scaffold import Run, Stopped, stop_after

TEMPLATE = "[P*2] {text} [P] is [MASK]"
LABELS = {"a": "it", "b": "is"}
ROWS = [
    {"text": text, "label": "ab"[n % 2]}
    for n, text in enumerate(("France", "Italy", "Oslo", "Berlin", "Vienna", "Madrid", "Lisbon"))
]
OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 2, "verbose": False}
GRID = {"learning_rate": [1e-3, 3e-2]}


def fresh() -> Prompt:
    return Prompt(TEMPLATE, answer="label", verbalizer=LABELS)


def run(rows: Any = ROWS, **options: Any) -> tuple[Prompt, ptuning.TrainResult]:
    prompt = options.pop("prompt", None) or fresh()
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    return prompt, ptuning.train(model, tokenizer, prompt, rows, **{**OPTIONS, **options})


def test_every_row_is_held_out_once_and_each_answer_is_dealt_to_all_folds() -> None:
    rows = [{"n": n} for n in range(23)]
    answers = ["often" if n % 3 else "seldom" for n in range(23)]
    parts = splits(rows, ["n"], answers, 4, seed=1)
    held = [row["n"] for _, part in parts for row in part]
    assert sorted(held) == list(range(23))
    for train, part in parts:
        assert sorted(row["n"] for row in (*train, *part)) == list(range(23))
        counts = Counter(answers[row["n"]] for row in part)
        assert counts["often"] in (3, 4, 5) and counts["seldom"] in (1, 2, 3)
    assert (
        parts == splits(rows, ["n"], answers, 4, seed=1) != splits(rows, ["n"], answers, 4, seed=2)
    )


def test_rows_that_say_the_same_are_held_out_together() -> None:
    rows = [{"n": n, "text": f"text {n % 6}"} for n in range(20)]
    for train, held in splits(rows, ["text"], ["a"] * 20, 3, seed=0):
        assert not {row["text"] for row in train} & {row["text"] for row in held}
        assert len(held) in (6, 7)
    assert all(held for _, held in splits(rows, ["text"], ["a"] * 20, 7, seed=0))


def test_what_only_a_template_of_the_grid_reads_makes_rows_differ() -> None:
    rows = [{**row, "kind": "city"} for row in ROWS]
    read = "[P*2] {text} [P] is [MASK]"
    plain = Prompt(read, answer="label", verbalizer=LABELS)
    other = Prompt("[P*2] {kind} [P] is [MASK]", answer="label", verbalizer=LABELS)
    for options in ({"folds": 2}, {"dev": 0.3}):
        _, expected = run(rows, prompt=plain, grid={"template": [read]}, **options)
        _, found = run(rows, prompt=other, grid={"template": [read]}, **options)
        assert found.history == expected.history


def test_settings_are_chosen_by_the_mean_of_trainings_one_by_one() -> None:
    prompt, result = run(folds=3, population=2, grid=GRID, choose_by="loss")
    alone: dict[tuple[float, int], list[list[dict[str, float]]]] = {}
    for rate in GRID["learning_rate"]:
        for seed in (0, 1):
            for train, held in splits(ROWS, ["text"], [row["label"] for row in ROWS], 3, seed=0):
                _, one = run(train, dev=held, learning_rate=rate, seed=seed, patience=0)
                alone.setdefault((rate, seed), []).append(one.history)
    best = {}
    for setting in result.folds:
        rate = setting["name"]["learning_rate"]
        histories = [h for seed in (0, 1) for h in alone[rate, seed]]
        losses = [mean(history[e]["dev_loss"] for history in histories) for e in range(3)]
        assert setting["dev_loss"] == pytest.approx(min(losses), abs=1e-4)
        assert setting["epoch"] == 1 + losses.index(min(losses))
        right = [history[setting["epoch"] - 1]["dev_accuracy"] for history in histories]
        assert setting["dev_accuracy"] == pytest.approx(mean(right))
        best[rate] = min(losses)
    assert [s["name"]["learning_rate"] for s in result.folds] == sorted(best, key=best.__getitem__)
    chosen = result.folds[0]
    assert prompt.training["learning_rate"] == chosen["name"]["learning_rate"]
    assert prompt.training["dev_loss"] == chosen["dev_loss"]
    assert prompt.training["folds"] == 3 and prompt.training["examples"] == 7
    assert result.best["epoch"] == chosen["epoch"] == len(result.history)


def test_settings_are_compared_by_epochs_that_are_finite_in_every_fold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    histories = iter(
        [  # of each fold each member's (accuracy, loss); the first one's second epoch is the last
            [[(0.9, math.nan), (0.5, 1.0)], [(0.4, 1.0)] * 3],
            [[(0.9, 1.0), (0.6, 1.0), (0.9, 0.1)], [(0.4, 1.0)] * 3],
        ]
    )

    class Trained:
        def __init__(self, *arguments: Any) -> None:
            self.members = next(histories)

        def train(self, resume: bool) -> list[Any]:
            return [
                SimpleNamespace(
                    history=[{"dev_accuracy": a, "dev_loss": loss} for a, loss in member],
                    rank=lambda record: (record["dev_accuracy"], -record["dev_loss"]),
                )
                for member in self.members
            ]

    monkeypatch.setattr(folds, "Loop", Trained)
    monkeypatch.setattr(folds, "with_examples", lambda *_: [])
    members: Any = [({"learning_rate": r}, None, ptuning.TrainSettings()) for r in (1.0, 2.0)]
    nothing: Any = None
    found = folds.choose(nothing, members, [((), ())] * 2, None, False, lambda heard: None)
    assert found.epochs == 2 and found.chosen == members[:1]
    first, second = found.table
    assert first == {
        "name": {"learning_rate": 1.0},
        "epoch": 2,
        "dev_accuracy": pytest.approx(0.55),
        "dev_loss": 1.0,
        "deviation": pytest.approx(0.1 / math.sqrt(2)),
    }
    assert second["epoch"] == 1 and found.best == {"dev_accuracy": 0.55, "dev_loss": 1.0}


def test_the_final_prompt_trains_on_all_rows_as_long_as_was_best() -> None:
    told: list[Any] = []
    prompt, result = run(folds=2, listener=told.append)
    epochs = result.folds[0]["epoch"]
    assert told[-1].step == told[-1].steps and told[-1].epoch == told[-1].epochs == epochs < 3
    seen: list[Any] = []

    def vectors(heard: Any) -> None:
        if heard.record:
            seen.append(heard.record["loss"])

    run(listener=vectors)
    assert [record["loss"] for record in result.history] == pytest.approx(seen[:epochs], abs=1e-6)
    assert "dev_loss" not in result.history[0] and prompt.vectors is not None


def test_an_ensemble_of_folds_has_seeds_of_the_best_setting() -> None:
    prompt, result = run(folds=2, population=3, grid=GRID, ensemble=2)
    assert [member["name"]["seed"] for member in result.members] == [0, 1]
    assert {m["name"]["learning_rate"] for m in result.members} == {
        result.folds[0]["name"]["learning_rate"]
    }
    assert len(prompt.members) == 2
    with pytest.raises(InputError, match="an ensemble of 3 needs as many"):
        run(folds=2, population=2, grid=GRID, ensemble=3)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("stop", [3, 9, 13, 15])
def test_an_interrupted_run_goes_on_with_the_same_numbers(stop: int, tmp_path: Path) -> None:
    whole, result = run(folds=2, choose_by="loss")
    again = fresh()
    with pytest.raises(Stopped):
        run(folds=2, choose_by="loss", output=tmp_path, listener=stop_after(stop), prompt=again,
            checkpoint_seconds=0.0)  # fmt: skip
    _, second = run(folds=2, choose_by="loss", output=tmp_path, resume=True, prompt=again)
    assert torch.equal(again.trained_vectors(), whole.trained_vectors())
    assert second.folds == result.folds and second.history == result.history
    checkpoint.delete_all(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_begun_anew_forgets_the_folds_of_the_one_before(tmp_path: Path) -> None:
    how: dict[str, Any] = {"folds": 2, "output": tmp_path, "checkpoint_seconds": 0.0}
    run(**how)
    with pytest.raises(Stopped):
        run(learning_rate=3e-2, listener=stop_after(3), **how)
    _, result = run(learning_rate=3e-2, resume=True, **how)
    assert len(result.folds) == 1 and result.complete


@pytest.mark.parametrize(
    ("begun", "again", "then"),
    [({}, {"folds": 2}, "then 0, now 2"), ({"folds": 2}, {}, "then 2, now 0")],
)
def test_a_run_of_other_folds_is_refused_before_anything_is_trained(
    begun: dict[str, Any], again: dict[str, Any], then: str, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"output": tmp_path, "checkpoint_seconds": 0.0}
    with pytest.raises(Stopped):
        run(listener=stop_after(3), **how, **begun)
    told: list[Any] = []
    with pytest.raises(InputError, match=f"folds differs from the interrupted run .{then}"):
        run(resume=True, listener=told.append, **how, **again)
    assert not told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds is 1; give at least 2"),
        ({"folds": 8}, "8 folds need as many rows, and there are 7"),
        ({"folds": 2, "dev": ROWS}, "folds take the place of a dev set"),
        ({"folds": 2, "tune_model": True}, "each fold needs it as it was"),
        ({"folds": 2, "max_minutes": 1.0}, "would stop a fold half done"),
        ({"folds": 2, "calibrate": "dev"}, "no dev examples"),
    ],
)
def test_folds_that_cannot_be_made_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(**options)


def test_the_command_line_has_folds(tmp_path: Path, model_folder: Path, run: Run) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    code, said, err = run(
        "train", "--model", model_folder, "--data", rows, "--template", TEMPLATE, "--folds", "2",
        "--labels", "a=it,b=is", "--epochs", "2", "--calibrate", "batch", "--output", out,
    )  # fmt: skip
    assert code == 0, err
    assert "Folds: what is held out" in said and "mean of the folds" in said
    assert "fold 1 of 2" in err and "fold 2 of 2" in err and "no dev examples" not in err
    assert len(json.loads((out / "result.json").read_text())["folds"]) == 1
    assert not (out / "checkpoints").exists()
    shutil.rmtree(out)


def test_a_bias_that_is_learned_on_dev_has_none_with_folds() -> None:
    with pytest.raises(InputError, match="folds leave no dev examples for it; take batch or conte"):
        run(folds=2, calibrate="dev")
