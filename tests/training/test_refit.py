"""On with all examples when dev has chosen: what trains, from where, and what is told of it."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ptuning
from ptuning import DataError, InputError, Prompt, TrainingError, TrainSettings, train
from ptuning.training import checkpoint, refit
from ptuning.training.learner import Learner
from ptuning.training.loop import Loop
from ptuning.training.progress import Progress
from ptuning.training.refit import settled_refit

from .. import tiny
from ..scaffold import Stopped, stop_after

TEMPLATE = "[P*2] {text} [P*2] is [MASK]"
LABELS = {"0": "yes", "1": "no"}
PLACES = ["France", "Italy", "the old cities of Spain", "Oslo", "Berlin and Madrid", "Vienna"]
ROWS = [{"text": text, "label": str(n % 2)} for n, text in enumerate(PLACES)]
DEV = [{"text": text, "label": str(n % 2)} for n, text in enumerate(["Rome", "old Lisbon"])]
HOW: dict[str, Any] = {"epochs": 5, "batch_size": 2, "learning_rate": 1e-2, "verbose": False}


def labelled(**options: Any) -> Prompt:
    return Prompt(TEMPLATE, answer="label", verbalizer=LABELS, **options)


def run(prompt: Prompt, rows: Any = ROWS, dev: Any = DEV, **options: Any) -> ptuning.TrainResult:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    return train(model, tokenizer, prompt, rows, dev, **{**HOW, **options})


@pytest.mark.parametrize("encoder", ["none", "mlp", "lstm"])
@pytest.mark.usefixtures("on_cpu")
def test_the_chosen_prompt_goes_on_with_all_examples_at_half_the_rate(encoder: str) -> None:
    chosen, whole = labelled(encoder=encoder), labelled(encoder=encoder)
    without = run(chosen, word_noise=0.0)
    result = run(whole, word_noise=0.0, refit=True)
    assert result.refit == {"examples": 8, "epochs": 2, "loss": result.refit["loss"]}
    assert (result.history, result.best) == (without.history, without.best)
    expected = copy.deepcopy(chosen)
    again = run(expected, [*ROWS, *DEV], (), epochs=2, learning_rate=5e-3, word_noise=0.0)
    assert torch.equal(whole.trained_vectors(), expected.trained_vectors())
    assert not torch.equal(whole.trained_vectors(), chosen.trained_vectors())
    assert again.history[-1]["loss"] == result.refit["loss"]
    facts = {name: whole.training[name] for name in ("examples", "dev_examples", "refit_examples")}
    assert facts == {"examples": 6, "dev_examples": 2, "refit_examples": 8}
    assert whole.training["dev_loss"] == without.best["dev_loss"]
    run(expected, refit=False)  # its encoder's weights are those of its vectors
    run(whole, refit=False)
    assert torch.equal(whole.trained_vectors(), expected.trained_vectors())


def test_noise_on_words_has_its_size_from_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from ptuning.training.word_noise import WordNoise

    sizes: list[tuple[bool, float]] = []
    at = WordNoise.at

    def noted(self: WordNoise, step: int, of: int, grown: bool) -> None:
        at(self, step, of, grown)
        sizes.append((grown, float(self._size) / self._full))

    monkeypatch.setattr(WordNoise, "at", noted)
    run(labelled(), refit=True)
    assert [grown for grown, _ in sizes] == [False] * 15 + [True] * 8
    assert {share for grown, share in sizes if grown} == {1.0}


@pytest.mark.parametrize("options", [{"refit": True}, {"dev": (), "folds": 2}], ids=str)
def test_what_a_part_keeps_goes_before_the_next_one_begins(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[weakref.ref[Any]] = []
    trained = Loop.train

    def noted(self: Loop, resume: bool) -> list[Learner]:
        assert not any(engine() for engine in kept)
        learners = trained(self, resume)
        kept.append(weakref.ref(self.engine))
        return learners

    monkeypatch.setattr(Loop, "train", noted)
    gc.collect()
    gc.disable()  # which comes round seldom, and memory of a device does not call it
    try:
        run(labelled(), **options)
    finally:
        gc.enable()
    assert len(kept) > 1


def test_a_tracker_hears_of_the_training_that_dev_looks_at_alone(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(labelled(), refit=True, tracker="tensorboard", output=tmp_path)
    assert result.refit["epochs"] == 2
    files = tmp_path.rglob("events.out.tfevents.*")
    assert {file.relative_to(tmp_path).parts[0] for file in files} == {"ptuning"}
    events = EventAccumulator(str(tmp_path / "ptuning"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == list(range(1, 16))


def test_dev_examples_that_are_trained_on_count_among_those_that_were_cut() -> None:
    dev = [DEV[0], {"text": "Oslo and " * 40, "label": "1"}]
    for goes_on, cut in ((False, 0), (True, 1)):
        with pytest.warns(UserWarning, match="1 of 2 dev examples were shortened to 40 tokens"):
            result = run(labelled(max_length=40), dev=dev, refit=goes_on, epochs=1)
        assert result.shortened == cut and result.best["epoch"] == 1


def test_its_own_time_is_told_without_a_further_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptuning.training.clock._WORTH_SAYING", 0.0)
    notes: list[str] = []
    run(labelled(), refit=True, listener=lambda heard: notes.append(heard.note))
    told = [note for note in notes if " take about " in note]
    assert [note.endswith("more on with all examples") for note in told] == [True, False]


def test_it_is_usual_where_few_labelled_examples_were_set_aside() -> None:
    how = TrainSettings()
    free = Prompt("[P] {text} [MASK]")
    assert settled_refit(how, [labelled()], 500, aside=True)
    assert not settled_refit(how, [labelled()], 501, aside=True)
    assert not settled_refit(how, [labelled()], 500, aside=False)
    assert not settled_refit(how, [labelled(), free], 50, aside=True)
    assert not settled_refit(replace(how, calibrate="context"), [labelled()], 50, aside=True)
    assert not settled_refit(replace(how, tune_model=True), [labelled()], 50, aside=True)
    assert not settled_refit(replace(how, refit=False), [labelled()], 50, aside=True)
    assert settled_refit(replace(how, refit=True), [free], 900, aside=False)


def test_a_share_set_aside_is_trained_on_at_last_and_dev_examples_are_not() -> None:
    assert run(labelled(), [*ROWS, *DEV], 0.25).refit["examples"] == 8
    assert run(labelled(), ROWS, DEV).refit == {}
    assert run(labelled(), [*ROWS, *DEV], 0.25, refit=False).refit == {}
    assert run(labelled(), [*ROWS, *DEV], 0.0).refit == {}


def test_what_dev_likes_best_as_it_begins_stays_so() -> None:
    start = labelled(encoder="none")
    run(start, ROWS, ROWS, epochs=20)
    before = start.trained_vectors().clone()
    result = run(start, ROWS, ROWS, refit=True, learning_rate=30.0, choose_by="loss")
    assert result.best["epoch"] == 0 and result.refit == {}
    assert torch.equal(start.trained_vectors(), before)


def test_all_members_of_an_ensemble_go_on() -> None:
    alone = labelled()
    run(alone, refit=True, seed=1)
    together = labelled()
    result = run(together, refit=True, population=2, ensemble=2, halving=False)
    number = next(n for n, place in enumerate(result.ensemble["members"]) if place == 1)
    ours = together.members[number].trained_vectors()
    assert torch.allclose(ours, alone.trained_vectors(), atol=1e-5)
    without = labelled()
    plain = run(without, population=2, ensemble=2, halving=False)
    assert result.ensemble == plain.ensemble  # the figures of dev are those of before
    for one, before in zip(together.members, without.members, strict=True):
        assert not torch.equal(one.trained_vectors(), before.trained_vectors())


def test_dev_answers_may_be_longer_than_those_of_the_training() -> None:
    rows = [{"text": place, "answer": "Oslo"} for place in PLACES]
    dev = [{"text": "Rome", "answer": "Oslo Berlin Vienna Madrid"}]
    short, long = Prompt("[P*2] {text} [MASK]"), Prompt("[P*2] {text} [MASK]")
    assert run(short, rows, dev).refit == {}
    assert run(long, rows, dev, refit=True).refit["examples"] == 7
    assert short.answer_tokens and long.answer_tokens
    assert long.answer_tokens > short.answer_tokens


def test_dev_answers_that_are_trained_on_fit_into_the_answer_tokens_given() -> None:
    rows = [{"text": place, "answer": "Oslo"} for place in PLACES]
    dev = [{"text": "Rome", "answer": "Oslo Berlin Vienna Madrid"}]
    kept = Prompt("[P*2] {text} [MASK]", answer_tokens=3)
    run(kept, rows, dev)
    assert kept.answer_tokens == 3
    with pytest.raises(DataError, match="dev example 1: the answer has 8 tokens, its end included"):
        run(Prompt("[P*2] {text} [MASK]", answer_tokens=3), rows, dev, refit=True)


@pytest.mark.parametrize("begun", [True, False])
def test_a_refit_with_longer_dev_answers_may_come_to_a_resumed_run_or_be_left_out(
    begun: bool, tmp_path: Path
) -> None:
    rows = [{"text": place, "answer": "Oslo"} for place in PLACES]
    dev = [{"text": "Rome", "answer": "Oslo Berlin Vienna Madrid"}]
    how: dict[str, Any] = {"checkpoint_seconds": 0.0, "output": tmp_path}
    with pytest.raises(Stopped):
        run(Prompt("[P*2] {text} [MASK]"), rows, dev, listener=stop_after(4), refit=begun, **how)
    prompt = Prompt("[P*2] {text} [MASK]")
    result = run(prompt, rows, dev, resume=True, refit=not begun, **how)
    assert bool(result.refit) is not begun and prompt.answer_tokens == (2 if begun else 8)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("stop", [4, 15, 17, 22])
def test_an_interrupted_run_goes_on_with_the_same_numbers(stop: int, tmp_path: Path) -> None:
    whole, again = labelled(), labelled()
    result = run(whole, refit=True)
    how: dict[str, Any] = {"refit": True, "checkpoint_seconds": 0.0, "output": tmp_path / "out"}
    with pytest.raises(Stopped):
        run(again, listener=stop_after(stop), **how)
    chosen, without = labelled(), labelled()
    run(without)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "out", kept)
    run(chosen, resume=True, **{**how, "refit": False, "output": kept})  # it may be left out
    assert torch.equal(chosen.trained_vectors(), without.trained_vectors())
    second = run(again, resume=True, **how)
    assert torch.equal(again.trained_vectors(), whole.trained_vectors())
    assert (second.refit, second.history) == (result.refit, result.history)
    checkpoint.delete_all(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_where_its_time_is_over_dev_s_choice_stays_and_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, whole = labelled(), labelled()
    run(chosen)
    run(whole, refit=True)
    from ptuning.training import train as trained

    for minutes in ([1e-9, 60.0], [60.0, 1e-9]):  # of the training and of what comes behind it
        stopped, left = labelled(), iter(minutes)
        monkeypatch.setattr(trained, "minutes_left", lambda given, started, left=left: next(left))
        result = run(stopped, refit=True, output=tmp_path, max_minutes=60)
        assert not result.complete and result.refit == {}
    assert torch.equal(stopped.trained_vectors(), chosen.trained_vectors())
    monkeypatch.undo()
    stopped = labelled()
    result = run(stopped, refit=True, output=tmp_path, resume=True)
    assert result.complete and result.refit["examples"] == 8
    assert torch.allclose(stopped.trained_vectors(), whole.trained_vectors(), atol=1e-6)


def test_a_member_that_dev_likes_best_as_it_begins_stays_while_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = Learner.note_start

    def note_start(learner: Learner, figures: dict[str, float]) -> None:
        rank(learner, {"dev_accuracy": 2.0, "dev_loss": 0.0} if learner.settings.seed else figures)

    monkeypatch.setattr(Learner, "note_start", note_start)
    how: dict[str, Any] = {"population": 2, "ensemble": 2, "init": "labels", "halving": False}
    without, whole = labelled(encoder="none"), labelled(encoder="none")
    run(without, **how)
    result = run(whole, refit=True, **how)
    assert result.refit["examples"] == 8 and result.ensemble["members"] == [1, 0]
    stays, goes = (
        torch.equal(one.trained_vectors(), before.trained_vectors())
        for one, before in zip(whole.members, without.members, strict=True)
    )
    assert stays and not goes
    rows = [{"text": place, "answer": "Oslo"} for place in PLACES]
    longer = [{"text": "Rome", "answer": "Oslo Berlin Vienna Madrid"}]
    free = Prompt("[P:it is] {text} [MASK]", answer="answer", encoder="none")
    run(free, rows, longer, refit=True, population=2, ensemble=2, halving=False)
    first, second = (member.answer_tokens for member in free.members)
    assert first == second and first and first > 4  # they write together


@pytest.mark.parametrize("then", [{"folds": 2}, {"dev": DEV, "refit": True}])
def test_masked_answers_of_unlike_lengths_train_in_all_parts(then: dict[str, Any]) -> None:
    answers = ["Oslo", "Oslo", "Oslo", "Oslo Berlin", "Oslo Berlin Vienna", "Oslo"]
    rows = [{"text": p, "answer": a} for p, a in zip(PLACES, answers, strict=True)]
    then = {**then, **({"dev": rows[:2]} if "dev" in then else {})}
    model, tokenizer = tiny.model("bert"), tiny.tokenizer("wordpiece")
    prompt = Prompt("[P*2] {text} [MASK]", answer="answer")
    result = train(model, tokenizer, prompt, rows, **{**HOW, **then})
    assert result.complete and prompt.answer_tokens


def test_rows_that_virtual_tokens_begin_at_are_those_of_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, expected = labelled(encoder="none"), labelled(encoder="none")
    how: dict[str, Any] = {"init": "examples", "word_noise": 0.0}
    rows = [{"text": f"{p} {q}", "label": str(n % 2)} for n, p in enumerate(PLACES) for q in PLACES]
    seen: list[list[Any]] = []
    trained = Loop.train

    def noted(self: Loop, resume: bool) -> list[Learner]:
        seen.append([*self.variants[0].examples, *self.variants[0].dev])
        return trained(self, resume)

    monkeypatch.setattr(Loop, "train", noted)
    run(whole, rows, DEV, refit=True, epochs=1, **how)
    run(expected, rows, DEV, epochs=1, **how)
    assert seen[0] == seen[1] == seen[2]


def test_a_run_begun_anew_forgets_the_refit_of_the_one_before(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        nonlocal behind
        behind += progress.note.startswith("on with all") or bool(behind)
        if behind == 3:
            raise Stopped

    how: dict[str, Any] = {"refit": True, "checkpoint_seconds": 0.0, "output": tmp_path}
    for rate in (1e-2, 3e-3):
        behind = 0
        with pytest.raises(Stopped):
            run(labelled(), listener=stop, learning_rate=rate, **how)
    result = run(labelled(), resume=True, learning_rate=3e-3, **how)
    assert result.refit["examples"] == 8


@pytest.mark.parametrize("fails", ["at once", "memory", "on its way"])
def test_a_refit_that_fails_leaves_what_dev_chose(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, whole = labelled(), labelled()
    members: dict[str, Any] = {"population": 2, "ensemble": 2} if fails == "on its way" else {}
    run(chosen, **members)

    class Failing(refit.Loop):
        def train(self, resume: bool) -> Any:
            if fails == "at once":
                raise TrainingError("the loss is nan at step 3 of 8")
            if fails == "memory":
                raise torch.OutOfMemoryError("2 GiB wanted")
            learners = super().train(resume)
            learners[0].history.pop()  # and the other one comes to its end
            return learners

    monkeypatch.setattr(refit, "Loop", Failing)
    why = {"at once": "the loss is nan", "memory": "2 GiB", "on its way": "not finite"}[fails]
    with pytest.warns(UserWarning, match=f"what dev chose stays: .*{why}"):
        result = run(whole, refit=True, **members)
    assert result.refit == {} and result.complete
    for one, before in zip(whole.members, chosen.members, strict=True):
        assert torch.equal(one.trained_vectors(), before.trained_vectors())


@pytest.mark.parametrize(
    ("dev", "options", "message"),
    [
        ((), {}, "there are none; give some"),
        ((), {"folds": 2}, "folds train on all examples at last as they are"),
        (DEV, {"calibrate": "dev"}, "leave one of the two out"),
        (DEV, {"tune_model": True}, "refit needs it as it was"),
    ],
)
def test_a_refit_that_cannot_be_made_is_refused(
    dev: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(labelled(), ROWS, dev, refit=True, **options)
    with pytest.raises(InputError, match="refit is 'yes'; expected True or False"):
        TrainSettings(refit="yes")  # type: ignore[arg-type]
