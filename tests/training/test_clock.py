"""How long a training takes, and what is there when its time is over."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ptuning import Prompt, TrainResult, train
from ptuning.training import loop
from ptuning.training.clock import Clock
from ptuning.training.progress import Progress

from .. import tiny
from ..scaffold import Stopped, stop_after

ROWS = [{"country": f"F{n}", "capital": ["Paris", "Rome"][n % 2]} for n in range(12)]


def ticking() -> Any:
    """A clock that is a second later whenever it is looked at."""
    return itertools.count().__next__


@pytest.fixture
def base() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer()
    return tiny.model("llama", vocab_size=len(tokenizer)), tokenizer


@pytest.fixture
def prompt() -> Prompt:
    return Prompt("[P*2] {country} [MASK]", answer="capital")


def trained(base: Any, prompt: Prompt, **options: Any) -> TrainResult:
    settings = {"epochs": 3, "batch_size": 2, "learning_rate": 0.02, "patience": 0, **options}
    return train(*base, prompt, ROWS[:8], ROWS[8:], verbose=False, **settings)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("minutes", [0.01, 0.1, 0.15, 0.2, 0.25])
def test_a_training_stops_in_time_and_goes_on_as_if_it_had_not(
    base: Any, prompt: Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float
) -> None:
    trained(base, prompt)
    undisturbed = prompt.trained_vectors()
    monkeypatch.setattr(loop, "Clock", lambda *args: Clock(*args, now=ticking()))
    cut = Prompt(prompt.template, answer="capital")
    first = trained(base, cut, output=tmp_path, max_minutes=minutes)
    assert not first.complete and first.best["dev_accuracy"] >= 0
    assert cut.vectors is not None and not torch.equal(cut.vectors, undisturbed)
    again = Prompt(prompt.template, answer="capital")
    result = trained(base, again, output=tmp_path, resume=True)
    assert result.complete and [record["epoch"] for record in result.history] == [1, 2, 3]
    assert torch.equal(again.trained_vectors(), undisturbed)


def test_an_epoch_that_was_stopped_has_the_mean_loss_of_its_steps(
    base: Any, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "Clock", lambda *args: Clock(*args, now=ticking()))
    heard: list[Progress] = []
    rows = [{**row, "capital": "Paris"} for row in ROWS]
    options: dict[str, Any] = {"batch_size": 2, "learning_rate": 0.02, "verbose": False}
    result = train(
        *base, prompt, rows, rows[:2], max_minutes=0.15, listener=heard.append, **options
    )
    steps = [one.loss for one in heard if one.record is None]
    done = len(steps) % 6  # of the epoch's
    assert not result.complete and 1 < done < 6
    assert result.history[-1]["loss"] == pytest.approx(mean(steps[-done:]), rel=1e-5)


def test_a_training_that_ends_in_time_is_complete(base: Any, prompt: Prompt) -> None:
    assert trained(base, prompt, max_minutes=60).complete


def test_reading_the_examples_takes_of_the_time_too(
    base: Any, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    minutes = SimpleNamespace(monotonic=partial(lambda now: 60.0 * now(), ticking()))
    for module in ("train", "clock"):
        monkeypatch.setattr(sys.modules[f"ptuning.training.{module}"], "time", minutes)
    monkeypatch.setattr(loop, "Clock", lambda limit, *args: given.append(limit) or Clock(60, *args))
    trained(base, prompt, max_minutes=3)  # one of which is over when the loop begins
    trained(base, prompt, max_minutes=0.5)
    assert given[0] == 2.0 and 0 < given[1] < 1e-3


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, ""),
        ({"refit": True}, ", and 6 min more on with all examples"),
        ({"refit": True, "population": 3}, ", and 2 min more on with all examples"),
    ],
)
def test_what_a_training_takes_is_said_with_its_second_step(
    base: Any, prompt: Prompt, monkeypatch: pytest.MonkeyPatch, options: Any, more: str
) -> None:
    heard: list[Progress] = []
    slow = partial(lambda now: 60.0 * now(), ticking())
    monkeypatch.setattr(loop, "Clock", lambda *args: Clock(*args, now=slow))
    trained(base, prompt, listener=heard.append, **options)
    said, *_ = [(one.step, one.note) for one in heard if one.note]
    assert said == (3, "3 epochs take about 16 min, if dev does not stop earlier" + more)


@pytest.mark.usefixtures("on_cpu")
def test_a_run_that_goes_on_is_said_to_take_the_epochs_that_are_left(
    base: Any, prompt: Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = partial(lambda now: 60.0 * now(), ticking())
    monkeypatch.setattr(loop, "Clock", lambda *args: Clock(*args, now=slow))
    with pytest.raises(Stopped):
        trained(base, prompt, output=tmp_path, listener=stop_after(5))  # four are an epoch
    heard: list[Progress] = []
    trained(base, prompt, output=tmp_path, listener=heard.append, resume=True)
    (said,) = [one.note for one in heard if one.note]
    assert said.startswith("2 epochs take about 10 min, if dev")


def test_the_estimate_names_the_end_of_the_time_and_seconds_are_not_worth_a_line() -> None:
    times = iter([0.0, 5.0, 7.0])
    clock = Clock(1, epochs=10, dev_steps=4, now=lambda: next(times))
    assert clock.stepped(100) is None
    assert clock.stepped(99) == (
        "10 epochs take about 5 min, if dev does not stop earlier; the time given is over after "
        "60 s"
    )
    times = iter([0.0, 5.0, 7.0])
    once = Clock(None, epochs=1, dev_steps=0, now=lambda: next(times))
    assert [once.stepped(n) for n in (100, 99)] == [None, "1 epoch takes about 3 min"]
    times = iter([0.0, 1.0, 1.1])
    short = Clock(None, epochs=10, dev_steps=4, now=lambda: next(times))
    assert [short.stepped(n) for n in (100, 99)] == [None, None] and not short.is_over()


def over_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The time of the training that follows is over behind this step."""
    steps = itertools.count(1)
    monkeypatch.setattr(Clock, "is_over", lambda self: next(steps) == step)


def test_a_training_whose_patience_ends_with_its_time_is_complete(
    base: Any, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"epochs": 30, "batch_size": 8, "patience": 1, "learning_rate": 1.0}
    count = len(trained(base, prompt, **settings).history)
    assert count < 30
    over_at(monkeypatch, count)
    again = trained(base, Prompt(prompt.template, answer="capital"), **settings)
    assert again.complete and len(again.history) == count


def test_nobody_falls_out_of_a_population_in_an_epoch_that_was_stopped(
    base: Any, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"epochs": 6, "population": 4}
    dropped = [member["dropped"] for member in trained(base, prompt, **settings).members]
    assert sorted(dropped, key=str) == [2, 2, 4, None]
    over_at(monkeypatch, 6)  # of four steps an epoch
    result = trained(base, Prompt(prompt.template, answer="capital"), **settings)
    assert not result.complete and result.history[-1]["epoch"] == 2
    assert {member["dropped"] for member in result.members} == {None}


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_no_time_is_refused(base: Any, prompt: Prompt, minutes: float) -> None:
    with pytest.raises(ValueError, match="max_minutes is"):
        trained(base, prompt, max_minutes=minutes)


def test_steps_in_which_much_is_prepared_are_not_what_the_others_take() -> None:
    passed = itertools.accumulate([0.0, 5.0, 20.0, 1.0, 20.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    clock = Clock(2, epochs=10, dev_steps=4, prepares=8, now=lambda: next(passed))
    said = [clock.stepped(100 - n) for n in range(10)]
    assert said[:9] == [None] * 9
    assert said[9] == (
        "10 epochs take about 2 min, if dev does not stop earlier; the time given is over after "
        "2 min"
    )
    assert clock._step == 1.0


def test_time_is_over_where_a_step_and_a_look_at_dev_would_end_behind_it() -> None:
    now = 0.0
    clock = Clock(1, epochs=10, dev_steps=4, now=lambda: now)
    now = 20.0
    clock.stepped(100)
    now = 22.0
    clock.stepped(99)
    now = 49.9  # a step takes 2 seconds, and dev is taken to take 4 steps
    assert not clock.is_over()
    now = 50.0
    assert clock.is_over()
    clock.looked(since=45.0)  # it took 5, and no step did
    now = 52.9
    assert not clock.is_over()
    now = 53.0
    assert clock.is_over()
    now = 54.0
    assert clock.stepped(98) is None and clock._step == (2 + 27) / 2  # of 32 seconds dev took 5
