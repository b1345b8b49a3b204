from __future__ import annotations

import copy
import gc
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch

import ptuning
from ptuning import (
    DataError,
    InputError,
    Prompt,
    TrainingError,
    TrainSettings,
    merge,
    predict,
    storage,
    train,
)
from ptuning.backbone.base_model import BaseModel
from ptuning.inference.evaluation import teacher_forced
from ptuning.training import accelerator as accelerator_module
from ptuning.training import checkpoint
from ptuning.training.learner import Learner
from ptuning.training.population import Member
from ptuning.training.progress import Progress
from ptuning.training.steps import _update_each

from .. import tiny

TEMPLATE = "[P*3] {country} [P*2] is [MASK]"
ROWS = [
    {"country": country, "capital": capital}
    for country, capital in [
        ("France", "Paris"),
        ("Italy", "Rome"),
        ("Germany", "Berlin"),
        ("Spain", "Madrid"),
        ("Portugal", "Lisbon"),
        ("Austria", "Vienna"),
        ("Canada", "Ottawa"),
    ]
]
LABELLED = [{"text": row["country"], "label": n % 2} for n, row in enumerate(ROWS)]


class Stopped(Exception):
    pass


def prompt_for(**settings: Any) -> Prompt:
    return Prompt(TEMPLATE, answer="capital", **settings)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.parametrize("encoder", ["mlp", "lstm", "none"])
def test_training_lowers_the_loss_and_changes_nothing_else(family: str, encoder: str) -> None:
    tokenizer = tiny.tokenizer(around=family not in tiny.CAUSAL)
    model = tiny.model(family, vocab_size=len(tokenizer)).train()
    before = tiny.weights(model)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    prompt = prompt_for(encoder=encoder)
    result = train(model, tokenizer, prompt, ROWS, epochs=8, batch_size=4, learning_rate=0.02)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    for name, value in tiny.weights(model).items():
        assert torch.equal(value, before[name]), name
    assert model.training and not frozen.requires_grad
    assert all(p.requires_grad for p in list(model.parameters())[1:])
    assert not model.get_input_embeddings()._forward_hooks
    assert prompt.vectors is not None
    assert prompt.vectors.shape == (5, model.get_input_embeddings().embedding_dim)


def test_the_same_seed_gives_the_same_vectors_and_another_seed_others(
    model: Any, tokenizer: Any
) -> None:
    vectors = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed + 17 * len(vectors))  # the caller's random state has no influence
        prompt = prompt_for()
        train(model, tokenizer, prompt, ROWS, epochs=2, batch_size=2, seed=seed)
        vectors.append(prompt.trained_vectors())
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.allclose(vectors[0], vectors[2])


def test_training_leaves_the_callers_random_state_alone(model: Any, tokenizer: Any) -> None:
    state = torch.get_rng_state()
    train(model, tokenizer, prompt_for(encoder="lstm", encoder_dropout=0.3), ROWS, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("labelled", [False, True])
def test_accumulated_micro_batches_equal_one_batch(
    model: Any, tokenizer: Any, labelled: bool
) -> None:
    vectors = []
    for size, accumulation in ((6, 1), (2, 3)):
        if labelled:
            prompt = Prompt("[P*3] {text} [MASK]", verbalizer={"0": "yes", "1": "no, not"})
            rows = LABELLED
        else:
            prompt, rows = prompt_for(), ROWS
        train(
            model,
            tokenizer,
            prompt,
            rows,
            epochs=3,
            batch_size=size,
            gradient_accumulation=accumulation,
        )
        vectors.append(prompt.trained_vectors())
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("minutes", [None, 1e-9])
def test_an_epochs_loss_is_the_mean_of_its_answers_whatever_the_last_step_has(
    model: Any, tokenizer: Any, minutes: float | None
) -> None:
    prompt = prompt_for()
    how: dict[str, Any] = {"epochs": 3, "batch_size": 3, "learning_rate": 1e-12}
    result = train(model, tokenizer, prompt, ROWS, **how, max_minutes=minutes)
    if minutes:  # of the first step's
        assert len(result.history) == 1 and not result.complete
        order = torch.randperm(7, generator=torch.Generator().manual_seed(0)).tolist()
        rows = [ROWS[i] for i in order[:3]]
    else:  # with an order of its own each
        rows = ROWS
    expected = ptuning.evaluate(model, tokenizer, prompt, rows).loss
    assert [r["loss"] for r in result.history] == pytest.approx([expected] * len(result.history))


@pytest.mark.parametrize(
    ("schedule", "fall"),
    [
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: 0.5 + 0.5 * math.cos(math.pi * done)),
        ("constant", lambda done: 1.0),
    ],
)
def test_the_rate_rises_and_falls_over_all_steps(model: Any, schedule: str, fall: Any) -> None:
    learner = learner_for(model, learning_rate=4.0, warmup=0.3, schedule=schedule)
    rates = []
    for learner.steps_taken in range(10):
        rates += learner.rates()
    expected = [4 / 3, 8 / 3, 4.0, *(4 * fall(step / 7) for step in range(7))]
    assert rates == pytest.approx(expected)
    orders = [learner.order(epoch, 50) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2] and learner.order(0, 50) == orders[0]


@pytest.mark.parametrize("choose_by", ["accuracy", "loss"])
def test_the_best_dev_epoch_is_kept_and_patience_stops(
    model: Any, tokenizer: Any, choose_by: str
) -> None:
    prompt = prompt_for()
    result = train(
        model,
        tokenizer,
        prompt,
        ROWS[:4],
        ROWS[4:],
        epochs=40,
        batch_size=4,
        learning_rate=0.5,  # too high on purpose: dev gets worse soon
        patience=2,
        schedule="constant",
        choose_by=choose_by,
    )
    figures = [(r["dev_accuracy"], -r["dev_loss"]) for r in result.history]
    ranks = figures if choose_by == "accuracy" else [pair[::-1] for pair in figures]
    best = max(range(len(ranks)), key=lambda i: ranks[i])
    assert result.best["epoch"] == result.history[best]["epoch"]
    assert len(result.history) == best + 3 < 40
    measured = ptuning.evaluate(model, tokenizer, prompt, ROWS[4:])
    assert measured.loss == pytest.approx(result.best["dev_loss"], abs=1e-5)
    kept = Member(prompt, model, 0, [None] * 5)  # the encoder's weights are that epoch's too
    torch.testing.assert_close(kept.table().detach(), prompt.trained_vectors())


def test_a_resumed_run_is_no_more_patient(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    def run(**more: Any) -> Any:
        options = {"epochs": 40, "batch_size": 4, "learning_rate": 0.5, "schedule": "constant"}
        data: Any = ROWS[:4], ROWS[4:]
        options |= {"patience": 2, "output": tmp_path, **more}
        return train(model, tokenizer, prompt_for(), *data, **options)

    epochs = len(run().history)

    def stop(progress: Progress) -> None:
        if progress.step == epochs:  # one epoch of two without a gain is behind it
            raise Stopped

    with pytest.raises(Stopped):
        run(listener=stop)
    assert len(run(resume=True).history) == epochs


def test_dropout_of_an_encoder_is_for_training_alone(model: Any, tokenizer: Any) -> None:
    prompt = prompt_for(encoder="lstm", encoder_dropout=0.5)
    result = train(model, tokenizer, prompt, ROWS, ROWS, epochs=2, verbose=False)
    measured = ptuning.evaluate(model, tokenizer, prompt, ROWS)
    assert measured.loss == pytest.approx(result.best["dev_loss"], abs=1e-5)


@pytest.mark.usefixtures("on_cpu")
def test_a_resumed_run_knows_what_it_began_as(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    start = prompt_for(encoder="none")
    train(model, tokenizer, start, ROWS, epochs=20, learning_rate=1e-2, verbose=False)

    def run(**more: Any) -> Any:
        prompt = copy.copy(start)
        options = {"epochs": 3, "batch_size": 4, "learning_rate": 30.0, "choose_by": "loss", **more}
        options |= {"output": tmp_path, "checkpoint_seconds": 0}
        return train(model, tokenizer, prompt, ROWS, ROWS, **options), prompt

    def stop(progress: Progress) -> None:
        if progress.step == 3:  # the first epoch is done
            raise Stopped

    expected, whole = run()
    assert expected.best["epoch"] == 0  # the rate is too high for anything better
    with pytest.raises(Stopped):
        run(listener=stop)
    result, prompt = run(resume=True)
    assert result.best == expected.best
    assert torch.equal(prompt.trained_vectors(), whole.trained_vectors())


def test_answers_may_be_longer_than_those_of_an_earlier_training(
    model: Any, tokenizer: Any
) -> None:
    prompt = prompt_for()
    train(model, tokenizer, prompt, ROWS[:1], epochs=1, verbose=False)
    before = prompt.answer_tokens
    longer = [{"country": "France", "capital": "Paris, and not Rome or Berlin"}]
    train(model, tokenizer, prompt, longer, epochs=1, verbose=False)
    assert before and prompt.answer_tokens and before < prompt.answer_tokens
    masked, its_tokenizer = tiny.model("bert"), tiny.tokenizer("wordpiece")
    asked = prompt_for(answer_tokens=4)
    train(masked, its_tokenizer, asked, ROWS, epochs=1, verbose=False)
    assert asked.answer_tokens == 4  # so many masks, as the user said


def learner_for(model: Any, **settings: Any) -> Learner:
    member = Member(prompt_for(encoder="none"), model, 0, [None] * 5)
    accelerator: Any = SimpleNamespace(scaler=None)
    return Learner(member, TrainSettings(epochs=2, **settings), 10, accelerator)


def test_an_optimizer_computes_in_its_own_way_whatever_a_checkpoint_was_made_with(
    model: Any,
) -> None:
    learner = learner_for(model)
    learner.member.encoder.embedding.weight.grad = torch.ones(5, 32)
    learner.optimizer.step()
    state = copy.deepcopy(learner.state())
    state["optimizer"]["param_groups"][0] |= {"capturable": True, "fused": True, "lr": 9.0}  # a GPU
    again = learner_for(model)
    again.load(state)
    (group,) = again.optimizer.param_groups
    assert not group["capturable"] and not group["fused"] and group["lr"] != 9.0
    (moments,) = again.optimizer.state.values()
    assert moments["exp_avg"].any()


def test_dev_results_are_compared_by_what_is_asked_for(model: Any) -> None:
    sure, right = (
        {"epoch": 1, "loss": 1.0, "dev_accuracy": accuracy, "dev_loss": loss}
        for accuracy, loss in ((0.5, 1.0), (0.6, 1.2))
    )
    for choose_by, best in (("accuracy", right), ("loss", sure)):
        learner = learner_for(model, choose_by=choose_by)
        assert learner.note(sure) is None and learner.note(right) is None
        assert learner.figures() == best


@pytest.mark.parametrize(("patience", "waited"), [(2, 0), (None, 2)])
def test_a_lower_loss_of_a_solved_task_is_a_gain_to_who_asks_for_patience(
    model: Any, patience: int | None, waited: int
) -> None:
    learner = learner_for(model, patience=patience)
    for epoch, loss in enumerate((0.3, 0.2, 0.1), 1):
        learner.note({"epoch": epoch, "loss": 1.0, "dev_accuracy": 1.0, "dev_loss": loss})
    assert learner.without_gain == waited and learner.best["epoch"] == 3 and learner.active


def test_a_single_number_that_is_not_finite_spoils_the_vectors(model: Any) -> None:
    learner = learner_for(model)
    with torch.no_grad():
        learner.member.encoder.embedding.weight[3, 7] = math.inf
    assert learner.note({"epoch": 1, "loss": 1.0}) == "virtual tokens are not finite"
    assert not learner.best


def test_without_dev_the_last_epoch_is_kept(model: Any, tokenizer: Any) -> None:
    result = train(model, tokenizer, prompt_for(), ROWS, epochs=3)
    assert result.best == result.history[-1] and "dev_loss" not in result.best


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("encoder", "dropout"), [("mlp", 0.0), ("lstm", 0.0), ("lstm", 0.4), ("none", 0.0)]
)
@pytest.mark.parametrize("stop_at", [1, 4, 5, 7])
def test_a_stopped_run_resumes_to_the_same_numbers(
    model: Any, tokenizer: Any, tmp_path: Path, encoder: str, dropout: float, stop_at: int
) -> None:
    settings = TrainSettings(epochs=3, batch_size=2, checkpoint_seconds=0)  # 4 steps per epoch

    def run(prompt: Prompt, **more: Any) -> Any:
        return train(
            model, tokenizer, prompt, ROWS, ROWS[:3], settings=settings, output=tmp_path, **more
        )

    def stop(progress: Progress) -> None:
        if progress.step == stop_at:
            raise Stopped

    whole, halved = (prompt_for(encoder=encoder, encoder_dropout=dropout) for _ in range(2))
    expected = train(model, tokenizer, whole, ROWS, ROWS[:3], settings=settings)
    with pytest.raises(Stopped):
        run(halved, listener=stop)
    assert not model.get_input_embeddings()._forward_hooks
    heard: list[int] = []
    halved = prompt_for(encoder=encoder, encoder_dropout=dropout)
    result = run(halved, resume=True, listener=lambda p: heard.append(p.step))
    assert heard[0] >= stop_at  # it went on; it did not start anew
    assert torch.equal(halved.trained_vectors(), whole.trained_vectors())
    assert result.history == expected.history


def test_resume_names_what_differs(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise Stopped

    settings = TrainSettings(epochs=2, batch_size=2, checkpoint_seconds=0)
    with pytest.raises(Stopped):
        train(
            model,
            tokenizer,
            prompt_for(),
            ROWS,
            settings=settings,
            output=tmp_path,
            listener=lambda p: stop(p) if p.step == 3 else None,
        )
    common: dict[str, Any] = {"output": tmp_path, "resume": True, "settings": settings}
    with pytest.raises(InputError, match=r"learning_rate differs .*then null, now 0\.5"):
        train(model, tokenizer, prompt_for(), ROWS, learning_rate=0.5, **common)
    for rows, dev in ((ROWS[:-1], ()), (ROWS, ROWS[:1])):
        with pytest.raises(InputError, match="the data differs"):
            train(model, tokenizer, prompt_for(), rows, dev, **common)
    with pytest.raises(InputError, match="the base model differs"):
        train(tiny.model("llama", seed=1), tokenizer, prompt_for(), ROWS, **common)
    begun = prompt_for(vectors=torch.ones(5, 32))
    with pytest.raises(InputError, match="the prompt to begin from differs"):
        train(model, tokenizer, begun, ROWS, **common)
    with pytest.raises(InputError, match="template differs"):
        train(model, tokenizer, Prompt("[P*5] {country} [MASK]", answer="capital"), ROWS, **common)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [({}, True), ({"encoder": "none"}, False), ({"encoder_hidden_size": 16}, False)],
)
def test_a_run_whose_network_was_as_wide_as_a_wide_model_cannot_go_on(
    model: Any,
    tokenizer: Any,
    changes: dict[str, Any],
    refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of older releases: by default a network has a limit now."""

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise Stopped

    run = partial(train, model, tokenizer, rows=ROWS, output=tmp_path, epochs=2, batch_size=2)
    with pytest.raises(Stopped):
        run(prompt_for(**changes), checkpoint_seconds=0, listener=stop)
    monkeypatch.setattr("ptuning.training.checkpoint.WIDEST", 8)
    expected = pytest.raises(InputError, match="the width of encoders differs")
    with expected if refused else nullcontext():
        run(prompt_for(**changes), resume=True)


def test_a_checkpoint_that_is_not_whole_is_skipped(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, {"step": step, "value": torch.ones(2) * step})
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [f.name for f in folders] == ["step-00000003", "step-00000004"]
    assert checkpoint.load_newest(tmp_path)["step"] == 4  # type: ignore[index]
    (folders[1] / "DONE").unlink()
    assert checkpoint.load_newest(tmp_path)["step"] == 3  # type: ignore[index]
    (folders[0] / "state.pt").write_bytes((folders[0] / "state.pt").read_bytes()[:200])
    with pytest.warns(UserWarning, match="cannot be read and is skipped"):
        assert checkpoint.load_newest(tmp_path) is None


def test_checkpoints_of_a_new_run_stay_where_an_earlier_one_came_further(tmp_path: Path) -> None:
    for step in (900, 1000, 10, 20):
        checkpoint.save(tmp_path, step, {"step": step})
    assert checkpoint.load_newest(tmp_path) == {"step": 20}
    names = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000010", "step-00000020"}


def test_the_clock_does_not_say_which_checkpoint_is_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step})
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        os.utime(folder, (2e9 - step, 2e9 - step))
    assert checkpoint.load_newest(tmp_path) == {"step": 3}


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"step": step, "value": torch.ones(2000)})
    path = tmp_path / "checkpoints" / "step-00000002" / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="SHA-256 of state.pt is not the one in DONE"):
        state = checkpoint.load_newest(tmp_path)
    assert state is not None and state["step"] == 1


def test_checkpoints_of_older_releases_load_and_are_older_than_new_ones(tmp_path: Path) -> None:
    for step in (900, 1000):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        torch.save({"step": step}, folder / "state.pt")
        (folder / "DONE").touch()
    assert checkpoint.load_newest(tmp_path) == {"step": 1000}
    checkpoint.save(tmp_path, 10, {"step": 10})
    assert checkpoint.load_newest(tmp_path) == {"step": 10}


@pytest.mark.parametrize("state", [[1], {"step": "x"}, {"identity": {}}, torch.ones(2)])
def test_a_state_that_is_none_is_skipped(state: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"step": 1})
    checkpoint.save(tmp_path, 2, state)
    with pytest.warns(UserWarning, match="is no state of a training"):
        assert checkpoint.load_newest(tmp_path) == {"step": 1}


def test_a_state_of_another_training_is_one_error(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    options: Any = {"output": tmp_path, "epochs": 1, "checkpoint_seconds": 0}
    train(model, tokenizer, prompt_for(), ROWS, **options)
    state = checkpoint.load_newest(tmp_path)
    assert state is not None
    checkpoint.save(tmp_path, 99, {**state, "learners": [{"encoder": {}}]})
    with pytest.raises(InputError, match="cannot resume: the newest checkpoint"):
        train(model, tokenizer, prompt_for(), ROWS, resume=True, **options)
    checkpoint.save(tmp_path, 99, {**state, "identity": None})
    with pytest.raises(InputError, match="does not say what run it is of"):
        train(model, tokenizer, prompt_for(), ROWS, resume=True, **options)


def test_removing_checkpoints_leaves_what_no_run_made(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"step": 1})
    (tmp_path / "checkpoints" / "mine").touch()
    checkpoint.delete_all(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["mine"]


def test_two_trainings_cannot_share_their_checkpoints(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with (
        storage.locked(tmp_path / "checkpoints"),
        pytest.raises(InputError, match="another run is using"),
    ):
        train(model, tokenizer, prompt_for(), ROWS, output=tmp_path)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "was_run"), "w"))

    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    torch.save({"step": Evil()}, folder / "state.pt")
    (folder / "DONE").touch()
    with pytest.warns(UserWarning, match="skipped"):
        assert checkpoint.load_newest(tmp_path) is None
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("last", [2, 5])
def test_a_loss_that_is_not_finite_stops_and_what_was_reached_stays(
    last: int, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    broken = copy.deepcopy(model)

    def spoil(progress: Progress) -> None:
        if progress.step == last:
            with torch.no_grad():
                broken.lm_head.weight[7] = float("nan")

    prompt = prompt_for()
    options: Any = {"epochs": 2, "batch_size": 2, "checkpoint_seconds": 0, "output": tmp_path}
    kept = f"epoch 1's.*{tmp_path.name}.*lower learn"
    if last < 4:  # in the first epoch
        with pytest.raises(TrainingError, match=r"loss is nan at step 3 of 8.*nothing was learned"):
            train(broken, tokenizer, prompt, ROWS, ROWS[:2], listener=spoil, **options)
        assert prompt.vectors is None
    else:
        with pytest.warns(UserWarning, match=f"loss is nan at step 6 of 8.*{kept}"):
            result = train(broken, tokenizer, prompt, ROWS, ROWS[:2], listener=spoil, **options)
        assert result.best["epoch"] == 1 and len(result.history) == 1
        assert prompt.vectors is not None and torch.isfinite(prompt.vectors).all()
    state = checkpoint.load_newest(tmp_path)
    assert state is not None and state["step"] == (2 if last < 4 else 6)
    for value in state["learners"][0]["encoder"].values():
        assert torch.isfinite(value).all()


def test_a_training_that_fails_leaves_the_prompt_as_it_was(model: Any, tokenizer: Any) -> None:
    def stop(progress: Progress) -> None:
        raise Stopped

    prompt = Prompt(TEMPLATE)
    longer = [{**row, "answer": row["capital"] + " and more"} for row in ROWS]
    with pytest.raises(Stopped):
        train(model, tokenizer, prompt, [{"country": "a", "answer": "b"}], listener=stop)
    assert (prompt.answer, prompt.answer_tokens) == (None, None)
    train(model, tokenizer, prompt, longer, epochs=1)
    assert prompt.answer == "answer" and (prompt.answer_tokens or 0) > 3


def test_training_draws_no_number_of_a_gpu(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeded(_: int) -> None:
        raise AssertionError("another device's generator is the user's")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    before = torch.get_rng_state()
    train(model, tokenizer, prompt_for(encoder="lstm", encoder_dropout=0.1), ROWS, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("on_cpu")
def test_one_scale_serves_all_members(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in fp16: the scaler is a real one, the numbers are float32 (a power of two is exact)."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    made = accelerator_module.make_accelerator

    def with_scaler(*arguments: Any) -> Any:
        accelerator = made(*arguments)
        accelerator.scaler = scaler
        return accelerator

    options: Any = {"epochs": 3, "batch_size": 4, "population": 3, "halving": False}
    plain, scaled = prompt_for(), prompt_for()
    expected = train(model, tokenizer, plain, ROWS, ROWS[:3], **options)
    monkeypatch.setattr(accelerator_module, "make_accelerator", with_scaler)
    got = train(model, tokenizer, scaled, ROWS, ROWS[:3], output=tmp_path, **options)
    assert torch.equal(scaled.trained_vectors(), plain.trained_vectors())
    assert [m["best"] for m in got.members] == [m["best"] for m in expected.members]
    # Six steps: doubled in each second one, and not by each member.
    assert scaler.get_scale() == 4.0 * 2**3
    state = checkpoint.load_newest(tmp_path)
    assert state is not None and state["scaler"]["scale"] == scaler.get_scale()


def test_a_scale_that_is_too_large_for_a_step_ends_no_training(model: Any) -> None:
    learner = learner_for(model)
    scaler = learner.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = learner.member.encoder.embedding.weight
    before = weight.detach().clone()
    scaler.scale(weight.sum() * math.inf).backward()
    assert learner.update(finite=True)  # and so the member goes on
    scaler.update()
    assert torch.equal(weight, before) and scaler.get_scale() == 2.0


def test_a_scale_waits_where_only_those_who_have_left_are_finite(model: Any) -> None:
    left, failing = learner_for(model), learner_for(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    left.active = False
    for learner in (left, failing):
        learner.accelerator.scaler = scaler
    scaler.scale(failing.member.encoder.embedding.weight.sum()).backward()
    losses = torch.tensor([0.0, math.nan])
    assert _update_each([left, failing], losses, failing.accelerator) == [True, False]
    assert scaler.get_scale() == 4.0


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    calls = []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("inf") if len(calls) > 4 else gradient

    def watch(module: Any, args: Any, options: Any) -> None:
        hidden = args[0] if args else options["hidden_states"]
        if hidden.requires_grad:
            hidden.register_hook(overflow)

    hook = model.model.layers[0].register_forward_pre_hook(watch, with_kwargs=True)
    with pytest.warns(UserWarning, match="the gradient is not finite at step 5 of 8"):
        train(
            model,
            tokenizer,
            prompt_for(),
            ROWS,
            epochs=2,
            batch_size=2,
            checkpoint_seconds=0,
            output=tmp_path,
            prefix_cache="off",  # one backward through the first layer for each step
            graphs="off",  # which would not run the hook
        )
    hook.remove()
    state = checkpoint.load_newest(tmp_path)
    assert state is not None
    for value in state["learners"][0]["encoder"].values():
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "none"])
def test_words_initialise_their_virtual_tokens(model: Any, tokenizer: Any, encoder: str) -> None:
    prompt = Prompt("[P*2] {country} [P:capital of] [MASK]", answer="capital", encoder=encoder)
    renderer = ptuning.Renderer(tokenizer, prompt, "causal")
    words = [word for group in renderer.groups for word in group]
    member = Member(prompt, model, 0, words)
    ids = tokenizer(" capital of", add_special_tokens=False)["input_ids"]
    assert words == [None, None, *ids]
    wanted = model.get_input_embeddings().weight[ids]
    torch.testing.assert_close(member.table()[2:], wanted, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("encoder", ["mlp", "lstm", "none"])
def test_a_saved_prompt_goes_on_where_it_stopped(
    model: Any, tokenizer: Any, tmp_path: Path, encoder: str
) -> None:
    first = prompt_for(encoder=encoder)
    train(model, tokenizer, first, ROWS, epochs=4, batch_size=7)
    first.save(tmp_path / "prompt")
    again = Prompt.load(tmp_path / "prompt")
    torch.testing.assert_close(
        Member(again, model, 99, [None] * 5).table(), first.trained_vectors(), atol=1e-6, rtol=0
    )
    again.encoder_weights = None  # as in a folder saved without the encoder, or by PEFT
    torch.testing.assert_close(
        Member(again, model, 99, [None] * 5).table(), first.trained_vectors(), atol=1e-4, rtol=0
    )
    before = ptuning.evaluate(model, tokenizer, first, ROWS).loss
    train(model, tokenizer, again, ROWS, epochs=4, batch_size=7)
    assert ptuning.evaluate(model, tokenizer, again, ROWS).loss < before


@pytest.mark.parametrize("encoder", ["mlp", "none"])
def test_words_may_be_the_best_result(model: Any, tokenizer: Any, encoder: str) -> None:
    """Epoch 0 has the manual template's own figures."""
    prompt = Prompt("{text}[P:\nIt is] [MASK]", verbalizer={"0": "yes", "1": "no"}, encoder=encoder)
    by_hand = teacher_forced(model, tokenizer, prompt.manual(), LABELLED)
    result = train(model, tokenizer, prompt, LABELLED, LABELLED, epochs=2, learning_rate=1e-15)
    assert result.best["epoch"] == 0 and [r["epoch"] for r in result.history] == [1, 2]
    assert teacher_forced(model, tokenizer, prompt, LABELLED) == pytest.approx(by_hand, abs=1e-4)
    figures = result.best["dev_accuracy"], result.best["dev_loss"]
    assert figures == pytest.approx(by_hand, abs=1e-4)


def test_a_trained_prompt_that_further_training_harms_stays_as_it_is(
    model: Any, tokenizer: Any
) -> None:
    prompt = prompt_for(encoder="none")
    train(model, tokenizer, prompt, ROWS, ROWS, epochs=30, learning_rate=3e-2, batch_size=7)
    before = prompt.trained_vectors().clone()
    result = train(model, tokenizer, prompt, ROWS, ROWS, epochs=2, learning_rate=1e4)
    assert result.best["epoch"] == 0
    torch.testing.assert_close(prompt.trained_vectors(), before)


def test_random_virtual_tokens_are_no_result(model: Any, tokenizer: Any) -> None:
    result = train(model, tokenizer, prompt_for(), ROWS, ROWS, epochs=1, learning_rate=1e-9)
    assert result.best["epoch"] == 1


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("labelled", "encoder"), [(False, "mlp"), (False, "none"), (True, "mlp")])
def test_a_plain_trainer_gives_the_same_vectors(
    model: Any, tokenizer: Any, tmp_path: Path, labelled: bool, accumulation: int, encoder: str
) -> None:
    import transformers

    if labelled:
        rows = LABELLED
        ours, theirs = (
            Prompt("[P*3] {text} [MASK]", verbalizer={"0": "yes", "1": "no"}) for _ in range(2)
        )
    else:
        rows, ours, theirs = ROWS, prompt_for(encoder=encoder), prompt_for(encoder=encoder)
    settings = TrainSettings(
        epochs=3, batch_size=3, shuffle=False, schedule="constant", warmup=0.0, learning_rate=1e-2
    )
    settings = replace(settings, gradient_accumulation=accumulation)
    train(model, tokenizer, ours, rows, settings=settings, word_noise=0.0)
    module, data, collator = ptuning.trainer_parts(model, tokenizer, theirs, rows)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=len(rows),
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="epoch",
    )
    trainer = transformers.Trainer(module, arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    measured = trainer.evaluate(data)["eval_loss"]
    module.finish(theirs)
    assert measured == pytest.approx(
        ptuning.evaluate(model, tokenizer, theirs, rows).loss, rel=1e-4
    )
    assert theirs.training["examples"] == len(rows)
    torch.testing.assert_close(theirs.trained_vectors(), ours.trained_vectors(), atol=1e-6, rtol=0)
    saved = next(tmp_path.glob("checkpoint-*/model.safetensors"))
    assert saved.stat().st_size < 100_000  # the encoder alone, not the base model
    assert not model.get_input_embeddings()._forward_hooks


def test_bf16_autocast_trains_a_float32_prompt(model: Any, tokenizer: Any) -> None:
    prompt = prompt_for()
    result = train(model, tokenizer, prompt, ROWS, epochs=4, mixed_precision="bf16")
    assert prompt.trained_vectors().dtype == torch.float32
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_trains_a_float32_prompt(tokenizer: Any, dtype: torch.dtype) -> None:
    model = tiny.model("llama", vocab_size=len(tokenizer)).to(dtype)
    prompt = prompt_for()
    result = train(model, tokenizer, prompt, ROWS, epochs=4, learning_rate=0.01)
    assert prompt.trained_vectors().dtype == torch.float32
    assert model.dtype == dtype
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("encoder", ["none", "mixture"])
def test_what_pytorch_makes_numbers_of_by_default_changes_no_result(
    model: Any, tokenizer: Any, encoder: str, tmp_path: Path
) -> None:
    found = []
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            prompt = Prompt(
                "[P*3] {text} [MASK]", verbalizer={"0": "yes", "1": "not"}, encoder=encoder
            )
            options: dict[str, Any] = {"epochs": 3, "word_noise": 0.5, "calibrate": "dev"}
            result = train(model, tokenizer, prompt, LABELLED, LABELLED[1:], **options)
            assert prompt.encoder_weights is not None
            assert {weight.dtype for weight in prompt.encoder_weights.values()} == {torch.float32}
            prompt.save(tmp_path)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # such as that it is another model
                answers = predict(model, tokenizer, Prompt.load(tmp_path), LABELLED)
            merged = merge(model, tokenizer, {"one": prompt}).model
        finally:
            torch.set_default_dtype(torch.float32)
        figures = result.history, result.calibrated, answers
        found.append((figures, prompt.trained_vectors(), merged.get_output_embeddings().weight))
    (figures, *tensors), (others, *other_tensors) = found
    assert figures == others and all(map(torch.equal, tensors, other_tensors))


def test_trains_where_gradients_are_off(model: Any, tokenizer: Any) -> None:
    vectors = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        prompt = prompt_for()
        with mode():
            train(model, tokenizer, prompt, ROWS, epochs=2)
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
        vectors.append(prompt.trained_vectors())
    assert torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[0], vectors[2])


def test_a_tracker_gets_the_losses(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(model, tokenizer, prompt_for(), ROWS, epochs=2, tracker="tensorboard", output=tmp_path)
    events = EventAccumulator(str(tmp_path / "ptuning"))
    events.Reload()
    assert len(events.Scalars("train_loss")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"schedule": "sine"}, "schedule is 'sine'"),
        ({"schedule": None}, "schedule is None"),
        ({"calibrate": None}, "calibrate is None"),
        ({"weight_decay": None}, "weight_decay is None"),
        ({"choose_by": "f1"}, "choose_by is 'f1'"),
        ({"learning_rte": 1.0}, "unknown training setting 'learning_rte'"),
        ({"mixed_precision": "int3"}, "mixed_precision is 'int3'"),
        ({"max_grad_norm": None}, "max_grad_norm is None; give a value, or leave it out"),
        ({"batch_size": None}, "batch_size is None"),
        ({"population": None}, "population is None; give a whole number"),
        ({"shuffle": "no"}, "shuffle is 'no'; expected True or False"),
        ({"resume": True}, "resume goes on from checkpoints; give the run's folder as output"),
        ({"halving": 0}, "halving is 0; expected True or False"),
        ({"tune_model": 1}, "tune_model is 1; expected True or False"),
        ({"folds": -2}, "folds is -2; give at least 2, or 0 for none"),
        ({"folds": False}, "folds is False; give at least 2"),
        ({"patience": -1}, "patience is -1; give at least 1, or 0 to never stop"),
        ({"patience": 1.5}, "patience is 1.5; give at least 1"),
        ({"patience": 10**10}, "patience is beyond all use"),
        ({"prefix_cache": "9" * 400}, "prefix_cache is '999"),
    ],
)
def test_settings_are_checked(
    model: Any, tokenizer: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(model, tokenizer, prompt_for(), ROWS, **options)


def test_an_example_at_fault_is_named_by_its_number(model: Any, tokenizer: Any) -> None:
    rows = [*ROWS, {"country": "Norway", "capital": " "}]
    with pytest.raises(
        InputError, match="training example 8: the answer column 'capital' is empty"
    ):
        train(model, tokenizer, prompt_for(), rows)
    with pytest.raises(InputError, match="dev example 1: the template names the column 'country'"):
        train(model, tokenizer, prompt_for(), ROWS, [{"capital": "Oslo"}])


def test_history_is_plain_json(model: Any, tokenizer: Any) -> None:
    result = train(model, tokenizer, prompt_for(), ROWS, ROWS, epochs=2)
    assert json.loads(json.dumps(result.history)) == result.history


@pytest.mark.slow
def test_a_real_model_learns_what_a_constant_answer_does_not_reach(
    smollm2: tuple[Any, Any],
) -> None:
    from ptuning.experiments import demo

    model, tokenizer = smollm2
    training, dev, test = demo.facts()
    prompt = Prompt(demo.TEMPLATE, answer=demo.ANSWER)
    train(model, tokenizer, prompt, training, dev, epochs=demo.EPOCHS, batch_size=demo.BATCH_SIZE)
    result = ptuning.evaluate(model, tokenizer, prompt, test)
    assert result.accuracy > result.majority_accuracy + 0.1
    assert result.accuracy > result.manual_accuracy + 0.1


def test_no_row_is_told_also_where_a_share_of_them_would_choose() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    for dev in ((), 0.2):
        with pytest.raises(DataError, match="there is no training example"):
            train(model, tokenizer, prompt_for(), [], dev)


def test_a_template_that_shows_the_answer_is_warned_of() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt = Prompt("[P*2] {capital} [MASK]", answer="capital")
    with pytest.warns(UserWarning, match=r"shows \{capital\}, which is the answer"):
        train(model, tokenizer, prompt, ROWS, epochs=1, verbose=False)


def test_a_label_that_dev_examples_alone_have_is_warned_of() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt = Prompt("[P*3] {text} [MASK]", verbalizer={"0": "yes", "1": "no"})
    training = [row for row in LABELLED if str(row["label"]) == "0"]
    said = "no training example has the answer '1'"
    with pytest.warns(UserWarning, match=said):
        train(model, tokenizer, prompt, training, LABELLED, epochs=1, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=said)
        train(model, tokenizer, prompt, LABELLED, training, epochs=1, verbose=False)


def test_trainers_gradient_checkpointing_is_refused_in_words() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    module, *_ = ptuning.trainer_parts(model, tokenizer, prompt_for(), ROWS)
    with pytest.raises(InputError, match="gradient_checkpointing has no effect here"):
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None)
    module.finish(prompt_for())


def test_a_trainers_result_keeps_nothing_of_a_training_before() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt = Prompt("[P*3] {text} [MASK]", verbalizer={"0": "yes", "1": "no"})
    options: Any = {"epochs": 1, "verbose": False, "calibrate": "batch"}
    train(model, tokenizer, prompt, LABELLED, LABELLED, population=2, ensemble=2, **options)
    assert prompt.label_bias and prompt.others and "dev_accuracy" in prompt.training
    with pytest.warns(UserWarning, match="is an ensemble of 2 members"):
        module, *_ = ptuning.trainer_parts(model, tokenizer, prompt, LABELLED)
    assert prompt.label_bias and prompt.others  # until it is finished
    module.finish(prompt)
    assert not prompt.label_bias and not prompt.others
    assert set(prompt.training) == {"seed", "examples", "majority_answer"}


def test_a_trainers_module_takes_its_own_state_dict(model: Any, tokenizer: Any) -> None:
    module, *_ = ptuning.trainer_parts(model, tokenizer, prompt_for(), ROWS)
    keys = module.load_state_dict(module.state_dict())
    assert not keys.missing_keys and not keys.unexpected_keys
    module.close()


def test_a_trainers_parts_are_refused_as_a_training_is() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    with pytest.raises(InputError, match="expected a Prompt"):
        ptuning.trainer_parts(model, tokenizer, "capital/", ROWS)  # type: ignore[arg-type]
    prompt = prompt_for()
    train(model, tokenizer, prompt, ROWS, epochs=1, verbose=False)
    other = tiny.model("llama", hidden_size=48)
    with pytest.raises(InputError, match="width"):
        ptuning.trainer_parts(other, tokenizer, prompt, ROWS)
    with pytest.raises(InputError, match="width"):
        train(other, tokenizer, prompt, ROWS)
    short = prompt_for(answer_tokens=1)
    with pytest.raises(DataError, match="and answer_tokens is 1; raise answer_tokens"):
        ptuning.trainer_parts(model, tokenizer, short, ROWS)


def test_checkpoints_stay_in_the_folder_that_was_named_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def leaves(heard: Any) -> None:
        monkeypatch.chdir(tmp_path / "elsewhere")

    options: Any = {"epochs": 2, "checkpoint_seconds": 0.0, "verbose": False}
    train(model, tokenizer, prompt_for(), ROWS, output="out", listener=leaves, **options)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert list((tmp_path / "out/checkpoints").glob("step-*"))


def test_a_subclass_with_its_own_making_is_a_prompt() -> None:
    class Named(Prompt):
        def __init__(self, name: str, **others: Any):
            self.name = name
            super().__init__("[P*3] {text} [MASK]", **others)

    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt = Named("mine", verbalizer={"0": "yes", "1": "no"})
    train(model, tokenizer, prompt, LABELLED, epochs=1, verbose=False)
    assert len(ptuning.predict(model, tokenizer, prompt, LABELLED)) == len(LABELLED)


def test_a_checkpoint_of_a_training_with_numpys_numbers_can_be_read(tmp_path: Path) -> None:
    import numpy as np

    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    options: Any = {"output": tmp_path, "checkpoint_seconds": 0, "verbose": False}
    decay = np.float64(0.1)
    train(model, tokenizer, prompt_for(), ROWS, epochs=1, weight_decay=decay, **options)
    assert checkpoint.load_newest(tmp_path) is not None


def test_numpys_numbers_are_numbers_and_what_is_no_setting_is_said() -> None:
    import numpy as np

    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    share, seeds = np.float32(0.3), np.int64(2)
    options: Any = {"dev": share, "population": seeds, "epochs": 1, "verbose": False}
    result = train(model, tokenizer, prompt_for(), ROWS * 3, **options)
    assert len(result.members) == 2 and "dev_loss" in result.best
    with pytest.raises(InputError, match="expected TrainSettings"):
        train(model, tokenizer, prompt_for(), ROWS, settings={"epochs": 1})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="population is True"):
        train(model, tokenizer, prompt_for(), ROWS, population=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lessons": [1]}, "expected Lessons"),
        ({"listener": 3}, "expected a function"),
        ({"output": 3}, "3 is no path"),
        ({"output": ""}, "'' is no path"),
    ],
)
def test_helpers_and_places_that_are_none_are_refused_in_words(
    wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(tiny.model("llama"), tiny.tokenizer(), prompt_for(), ROWS, epochs=1, **wrong)


def test_a_trainers_module_that_is_forgotten_gives_the_model_back() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    module, _, collator = ptuning.trainer_parts(model, tokenizer, prompt_for(), ROWS)
    assert not any(p.requires_grad for p in model.parameters())
    del module, collator
    gc.collect()
    assert all(p.requires_grad for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_a_trainers_module_that_is_still_open_lets_the_process_end_in_silence() -> None:
    script = (
        "import ptuning; from tests import tiny; from ptuning import Prompt\n"
        "model, tokenizer = tiny.model('llama'), tiny.tokenizer()\n"
        "prompt = Prompt('[P*3] {text} [MASK]')\n"
        "rows = [{'text': 'a', 'answer': 'b'}]\n"
        "module = ptuning.trainer_parts(model, tokenizer, prompt, rows)\n"
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0
    assert "ignored" not in ran.stderr and "Error" not in ran.stderr


def test_a_trainers_collator_leaves_batches_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    module, data, collator = ptuning.trainer_parts(model, tokenizer, prompt_for(), ROWS)
    monkeypatch.setattr(BaseModel, "device", torch.device("meta"))  # in place of a GPU
    assert {tensor.device.type for tensor in collator(data[:2]).values()} == {"cpu"}
    module.close()


def test_a_trainers_collator_goes_to_processes_that_are_not_forked() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    module, data, collator = ptuning.trainer_parts(model, tokenizer, prompt_for(), ROWS)
    sent = pickle.dumps((data[:2], collator))
    assert len(sent) < 10_000  # without the model
    there, collator_there = pickle.loads(sent)
    expected, batch = collator(data[:2]), collator_there(there)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())
    module.close()


def test_a_model_with_offloaded_weights_trains_and_answers_as_one_in_memory() -> None:
    whole, tokenizer = tiny.model("llama"), tiny.tokenizer()
    offloaded = accelerate.cpu_offload(tiny.model("llama"), torch.device("cpu"))
    expected, prompt = prompt_for(), prompt_for()
    train(whole, tokenizer, expected, ROWS, epochs=2)
    train(offloaded, tokenizer, prompt, ROWS, epochs=2)
    torch.testing.assert_close(prompt.vectors, expected.vectors)
    answers = predict(whole, tokenizer, expected, ROWS)
    assert predict(offloaded, tokenizer, expected, ROWS) == answers
    words = [ptuning.nearest_words(model, tokenizer, expected) for model in (whole, offloaded)]
    assert words[0] == words[1]
    with pytest.raises(InputError, match="the model is offloaded"):
        merge(offloaded, tokenizer, {"capital": prompt})


def test_a_model_stays_on_the_device_of_the_kind_that_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    model = SimpleNamespace(device=torch.device("cuda:1"), to=pytest.fail)
    assert accelerator_module.move_model(model, there) == torch.device("cuda:1")
    moved: list[Any] = []
    model = SimpleNamespace(device=torch.device("cpu"), to=moved.append)
    assert accelerator_module.move_model(model, there) == torch.device("cuda") and moved


def test_a_trainers_module_that_is_finished_says_so() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    module, data, collator = ptuning.trainer_parts(model, tokenizer, prompt_for(), ROWS)
    batch = collator(data[:2])
    assert torch.isfinite(module(**batch)["loss"])
    del batch["labels"]
    with pytest.raises(InputError, match="leave label_smoothing_factor out"):
        module(**batch)
    module.finish(prompt_for())
    with pytest.raises(InputError, match="is finished"):
        module(**collator(data[:2]))


@pytest.mark.usefixtures("on_cpu")
def test_a_default_device_of_the_users_changes_nothing(tmp_path: Path) -> None:
    """A tensor on ``meta`` has no values: wherever one were used, this would fail."""
    rows = [
        {"text": f"{name} is a place", "kind": kind}
        for name, kind in [("Paris", "city"), ("Italy", "land"), ("Oslo", "city"), ("Rome", "city")]
    ]
    model, tokenizer = tiny.model(vocab_size=400), tiny.tokenizer()
    found = []
    for device in ("cpu", "meta"):
        torch.set_default_device(device)
        try:
            words = {"city": "Paris", "land": "Oslo"}
            prompt = Prompt("{text} [P*3] [MASK]", answer="kind", verbalizer=words)
            ptuning.train(model, tokenizer, prompt, rows, rows, epochs=2, population=2)
            said = ptuning.predict_details(model, tokenizer, prompt, rows)
            loss = ptuning.evaluate(model, tokenizer, prompt, rows).loss
            ptuning.merge(model, tokenizer, {"kind": prompt})
            ptuning.attach(model, tokenizer, prompt).detach()
            prompt.save(tmp_path / device)
            Prompt.load(tmp_path / device)
        finally:
            torch.set_default_device(None)
        found.append((prompt.trained_vectors(), said, loss))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]
