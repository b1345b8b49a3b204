"""What a training shows, and what it tells people who look."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import ptuning
from ptuning import Prompt, TrainSettings, train
from ptuning.training import guidance, progress
from ptuning.training.progress import Pace, Progress, epoch_line, in_words

from .. import tiny

ROWS = [
    {"country": country, "capital": capital}
    for country, capital in [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid")]
]


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer()
    return tiny.model("llama", vocab_size=len(tokenizer)), tokenizer


def trained(base: tuple[Any, Any], dev: list[Any] | None = None, **options: Any) -> Any:
    prompt = Prompt("[P*2] {country} [MASK]", answer="capital", encoder="none")
    rows = ROWS[:2] if dev is not None else ROWS
    return train(*base, prompt, rows, dev or (), **{"epochs": 2, **options})


@pytest.mark.usefixtures("on_cpu")
def test_a_training_shows_its_epochs_unless_it_is_told_not_to(
    base: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trained(base, epochs=3)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and [line[:12] for line in lines] == [f"epoch {n} of 3" for n in (1, 2, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(base, verbose=False)
    assert capsys.readouterr() == ("", "")
    trained(base, listener=lambda heard: None)
    assert capsys.readouterr() == ("", "")


def test_the_time_that_is_left_goes_by_the_pace_since_the_first_step() -> None:
    now = [100.0]
    pace = Pace(lambda: now[0])
    assert pace.left(Progress(20, 100, 1, 1.0)) is None  # resumed at step 20
    now[0] += 10
    assert pace.left(Progress(40, 100, 1, 1.0)) == pytest.approx(30)
    assert pace.left(Progress(100, 100, 1, 1.0)) is None
    assert pace.left(Progress(1, 10, 1, 1.0)) is None  # a part of the training has begun
    now[0] += 2
    assert pace.left(Progress(2, 10, 1, 1.0)) == pytest.approx(16)
    assert [in_words(s) for s in (0.2, 40, 240, 3900)] == ["1 s", "40 s", "4 min", "1 h 5 min"]
    record = {"epoch": 3, "loss": 0.5, "dev_accuracy": 0.25, "dev_loss": 1.5}
    heard = Progress(30, 100, 3, 0.5, record, epochs=10)
    assert epoch_line(heard, 240.0) == (
        "epoch  3 of 10  loss 0.5000  dev 25.0 %  dev loss 1.5000, about 4 min left"
    )


def test_a_long_epoch_is_heard_of_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_SILENCE", -1.0)
    said: list[str] = []
    with progress.shown(say=said.append) as listener:
        listener(Progress(1, 100, 1, 1.0, epochs=10))
        listener(Progress(2, 100, 1, 1.0, epochs=10))
    assert said[0] == "epoch  1 of 10, 1 %" and said[1].startswith("epoch  1 of 10, 2 %, about ")


def test_training_without_dev_examples_says_what_is_kept(base: tuple[Any, Any]) -> None:
    with pytest.warns(UserWarning, match="no dev examples: the last epoch is kept"):
        trained(base)
    with pytest.warns(UserWarning, match="no dev examples: 2 prompts compete"):
        trained(base, population=2)
    with pytest.warns(UserWarning, match="no dev examples: patience 3 has nothing to measure"):
        trained(base, patience=3)


def test_a_training_that_taught_nothing_says_so(base: tuple[Any, Any]) -> None:
    with pytest.warns(UserWarning, match=r"nothing was learnt: 0.0 % of dev is right, and always"):
        trained(base, [ROWS[2]], learning_rate=1e-9)
    with pytest.warns(UserWarning, match="hardly anything was learnt"):
        trained(base, learning_rate=1e-9)


def test_a_training_whose_time_was_over_is_told_to_go_on(base: tuple[Any, Any]) -> None:
    with pytest.warns(UserWarning, match=r"nothing was learnt: .* the time was over: go on with"):
        trained(base, [ROWS[2]], learning_rate=1e-9, max_minutes=1e-6)


def test_words_that_may_be_the_best_as_they_are_are_not_called_useless(
    base: tuple[Any, Any],
) -> None:
    prompt = Prompt("[P:it is] {country} [MASK]", answer="capital", encoder="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(*base, prompt, ROWS[:2], [ROWS[2]], epochs=2, learning_rate=1e-9)


def test_a_training_that_taught_something_is_not_called_useless() -> None:
    history = [{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": 1.0}]
    assert guidance.nothing_learnt(history, history[1], [], "Paris") is None
    best = {"epoch": 2, "loss": 1.0, "dev_accuracy": 0.6}
    assert guidance.nothing_learnt(history, best, ["Paris", "Rome"], "Paris") is None


def test_a_training_that_ends_before_it_has_learnt_its_examples_is_told_so(
    base: tuple[Any, Any],
) -> None:
    losses = [3.0, 1.9, 1.5, 1.2, 0.93]
    history = [{"epoch": n, "loss": loss} for n, loss in enumerate(losses, 1)]
    said = guidance.still_learning(history, 5, 5)
    assert said == (
        "dev was best in the last of 5 epochs, and the training's loss is still 0.93: more of "
        "them (15) may give more"
    )
    assert guidance.still_learning(history, 4, 5) is None
    assert guidance.still_learning(history, 5, 10) is None  # stopped before its end
    assert guidance.still_learning(history[:2], 2, 2) is None
    assert guidance.still_learning([*history[:4], {"epoch": 5, "loss": 0.1}], 5, 5) is None
    prompt = Prompt("[P:it is] {country} [MASK]", answer="capital", encoder="none")
    with pytest.warns(UserWarning, match=r"best in the last of 5 epochs.*\(15\) may give more"):
        train(*base, prompt, ROWS[:2], ROWS[:2], epochs=5, learning_rate=1e-3, choose_by="loss")


def test_where_all_dev_answers_are_one_and_right_dev_cannot_tell() -> None:
    best = {"epoch": 1, "loss": 1.0, "dev_accuracy": 1.0}
    said = guidance.nothing_learnt([best], best, ["Paris", "Paris"], "Paris", "as the teacher says")
    assert said == (
        "dev cannot tell what was learnt: 100.0 % of it is as the teacher says, and all its "
        "answers are 'Paris'; give dev examples with other answers, too"
    )


def test_by_default_a_training_stops_soon_after_its_task_is_solved(base: tuple[Any, Any]) -> None:
    words = {"Paris": "yes", "Rome": "no"}

    def epochs(**options: Any) -> list[dict[str, float]]:
        prompt = Prompt("[P*2] {country}? [MASK]", answer="capital", verbalizer=words)
        chosen: Any = {"learning_rate": 0.01, "epochs": 20, "verbose": False, **options}
        return train(*base, prompt, ROWS[:1], ROWS[:1], **chosen).history

    history = epochs()
    solved = [record["dev_accuracy"] for record in history].index(1.0)
    assert len(history) == solved + 1 + 4 < 20
    losses = [record["dev_loss"] for record in history]
    assert losses[-1] < losses[solved]  # which alone is no reason to go on
    assert len(epochs(patience=0)) == 20  # never


def test_few_examples_have_more_epochs_and_as_many_steps_of_patience() -> None:
    settled = {n: TrainSettings().for_examples(n) for n in (5, 32, 100, 200, 5000)}
    assert [one.epochs for one in settled.values()] == [50, 50, 16, 10, 10]
    assert TrainSettings(epochs=3).for_examples(5).epochs == 3
    assert TrainSettings(gradient_accumulation=4).for_examples(300).epochs == 20
    patience = [s.patience_for(s.steps_per_epoch(n), solved=False) for n, s in settled.items()]
    assert patience == [100, 25, 8, 4, 4]
    assert TrainSettings().patience_for(4, solved=True) == 4
    assert TrainSettings(patience=2).patience_for(4, solved=False) == 2


def test_without_a_word_of_epochs_few_examples_are_trained_on_for_fifty(
    base: tuple[Any, Any],
) -> None:
    heard: list[Progress] = []
    rest: Any = {"verbose": False, "patience": 0, "listener": heard.append, "epochs": None}
    result = trained(base, ROWS[:2], **rest)
    assert len(result.history) == heard[0].epochs == 50


def test_a_training_that_starts_slowly_goes_on(base: tuple[Any, Any]) -> None:
    result = trained(base, ROWS[:2], epochs=12, learning_rate=0.02, verbose=False)
    assert {record["dev_accuracy"] for record in result.history} == {0.0}
    assert len(result.history) == 12  # its loss falls


def test_results_are_tables_and_pictures_in_a_notebook(base: tuple[Any, Any]) -> None:
    prompt = Prompt(
        "[P*2] {country}? [MASK]",
        answer="capital",
        verbalizer={"<Paris>": "yes", "Rome": "no"},
    )
    rows = [{"country": "France", "capital": "<Paris>"}, {"country": "Italy", "capital": "Rome"}]
    result = train(*base, prompt, rows, rows, epochs=2, verbose=False)
    page = result._repr_html_()
    assert page.count("<tr>") == 3 and "(kept)" in page and "data:image/png;base64," in page
    assert result._repr_png_().startswith(b"\x89PNG")
    measured = ptuning.evaluate(*base, prompt, rows)
    page = measured._repr_html_()
    assert "majority" in page and "Confusion" in page and "&lt;Paris&gt;" in page
    assert measured._repr_png_().startswith(b"\x89PNG")
    assert repr(result).startswith("TrainResult(")


def test_the_package_lists_its_names() -> None:
    assert set(ptuning.__all__) <= set(dir(ptuning)) and ptuning.__version__


def test_members_that_a_training_leaves_behind_are_said(base: tuple[Any, Any]) -> None:
    prompt = Prompt("[P*2] {country} [MASK]", answer="capital", encoder="none")
    train(*base, prompt, ROWS[:2], ROWS[2:], epochs=1, population=2, ensemble=2, verbose=False)
    assert len(prompt.members) == 2
    with pytest.warns(UserWarning, match="is an ensemble of 2 members; training goes on from the"):
        train(*base, prompt, ROWS[:2], ROWS[2:], epochs=1, listener=lambda heard: None)
    assert len(prompt.members) == 1


@pytest.mark.parametrize("accuracy", [2.5, -1.0, float("inf"), float("nan")])
def test_a_dev_accuracy_that_is_no_share_promises_nothing(accuracy: float) -> None:
    told = {"dev_accuracy": accuracy, "dev_examples": 100}
    assert guidance.dev_far_above(told, 0.1, 100) is None


@pytest.mark.parametrize("value", [1e38, float("inf"), float("nan"), 10**400])
def test_a_number_beyond_all_use_is_refused(value: float) -> None:
    for name in ("learning_rate", "model_learning_rate", "weight_decay", "word_noise"):
        with pytest.raises(ptuning.InputError, match=f"{name} is .*; give a number"):
            TrainSettings(**{name: value})


def test_a_seed_beyond_what_orders_are_drawn_with_is_refused() -> None:
    assert TrainSettings(seed=10**12).seed == 10**12
    with pytest.raises(ptuning.InputError, match="give a whole number, at most 1,000,000,000,000"):
        TrainSettings(seed=10**12 + 1)
