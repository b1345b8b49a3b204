"""A label matrix: what it makes of scores, how it is trained, and that all who answer apply it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ptuning
from ptuning import InputError, Prompt, PromptFileError, TrainSettings
from ptuning.backbone.base_model import BaseModel
from ptuning.forward.label_scores import matrices_of, mixed
from ptuning.inference import exports
from ptuning.prompts import prompt_files
from ptuning.prompts.label_matrix import LabelMatrix
from ptuning.training.grid import choices
from ptuning.training.label_matrix import (
    MOST,
    packed,
    rows_of,
    settled_matrix,
    too_many_words,
    unpacked,
)
from ptuning.training.loop import Loop

from .. import tiny
from ..scaffold import Stopped, stop_after

WORDS = {"a": "Paris", "b": ["Rome", "Oslo"], "c": "Berlin"}
TEMPLATE = "[P*3] {text} [P*2] is [MASK]"
TEXTS = ["France", "Italy", "the old cities of Spain", "Oslo", "Berlin and Madrid", "Vienna"]
ROWS = [{"text": text, "label": "abc"[n % 3]} for n, text in enumerate(TEXTS)]
HOW: dict[str, Any] = {"epochs": 4, "batch_size": 2, "learning_rate": 1e-2, "verbose": False}


def fresh(template: str = TEMPLATE, **settings: Any) -> Prompt:
    return Prompt(template, answer="label", verbalizer=WORDS, **{"encoder": "none", **settings})


def matrix_of(numbers: Tensor) -> LabelMatrix:
    """Of all words of `fresh`."""
    return LabelMatrix(("Paris", "Rome", "Oslo", "Berlin"), numbers)


def same(one: Prompt, other: Prompt) -> bool:
    """Both have a label matrix, with equal numbers."""
    both = one.label_matrix, other.label_matrix
    found = [None if matrix is None else matrix.numbers for matrix in both]
    return found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])


def trained(
    family: str = "llama", prompt: Prompt | None = None, **options: Any
) -> tuple[Any, Any, Prompt, Any]:
    model, tokenizer, prompt = tiny.model(family), tiny.tokenizer(), prompt or fresh()
    how = {**HOW, "label_matrix": True, **options}
    return model, tokenizer, prompt, ptuning.train(model, tokenizer, prompt, ROWS, ROWS[:4], **how)


def shares(model: Any, tokenizer: Any, prompt: Prompt, **options: Any) -> Tensor:
    found = ptuning.predict_details(model, tokenizer, prompt, ROWS, **options)
    return torch.tensor([list(one.probabilities.values()) for one in found])


def by_hand(model: Any, tokenizer: Any, prompt: Prompt) -> Tensor:
    """The labels' shares from those of the single words."""
    each = {word: word for words in prompt.labels.values() for word in words}
    plain = replace(prompt, label_matrix=None, label_bias=None, others=())
    plain.verbalizer = {word: (word,) for word in each}
    scores = shares(model, tokenizer, plain).double().log()
    assert prompt.label_matrix is not None
    centred = scores - scores.mean(1, keepdim=True)
    p = (scores + centred @ prompt.label_matrix.numbers.double().T).exp()
    by_label = torch.stack([p[:, 0], p[:, 1] + p[:, 2], p[:, 3]], dim=1)
    return (by_label / by_label.sum(1, keepdim=True)).float()


def test_a_words_score_gets_shares_of_the_others_whatever_is_added_to_all() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    matrix = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]])
    found = mixed(scores, matrix)
    torch.testing.assert_close(found, torch.tensor([[0.5, 2.0, 11.0], [-0.5, 0.0, 6.0]]))
    torch.testing.assert_close(mixed(scores + 7, matrix), found + 7)
    torch.testing.assert_close(mixed(scores, torch.zeros(3, 3)), scores)
    each = torch.stack([matrix, torch.zeros(3, 3)])
    torch.testing.assert_close(mixed(scores, each), torch.stack([found[0], scores[1]]))
    odd, other = torch.randn(5, 3), torch.randn(3, 3)
    exact = mixed(odd, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixed(odd, other), exact)
    assert matrices_of([None, None]) is None
    assert torch.equal(matrices_of([matrix, None]), each)  # type: ignore[arg-type]


@pytest.mark.parametrize(("words", "width", "rows"), [(3, 8, 2), (4, 16, 1), (1, 5, 1), (7, 7, 7)])
def test_it_is_packed_into_rows_and_comes_back(words: int, width: int, rows: int) -> None:
    matrix = torch.randn(words, words)
    assert packed(matrix, width).shape == (rows_of(words, width), width) == (rows, width)
    assert torch.equal(unpacked(packed(matrix, width), words), matrix)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "roberta", "t5", "bart"])
def test_every_kind_of_model_trains_one_and_answers_with_it(family: str) -> None:
    model, tokenizer, prompt, result = trained(family)
    assert prompt.label_matrix is not None and prompt.label_matrix.numbers.abs().max() > 1e-3
    assert prompt.label_matrix.numbers.shape == (4, 4)
    expected = by_hand(model, tokenizer, prompt)
    torch.testing.assert_close(shares(model, tokenizer, prompt), expected, atol=1e-5, rtol=1e-4)
    figures = ptuning.evaluate(model, tokenizer, prompt, ROWS[:4])
    right = torch.tensor([0, 1, 2, 0])
    loss = -expected[range(4), right].log().mean()
    assert figures.loss == pytest.approx(float(loss), abs=1e-4)
    assert figures.loss == pytest.approx(result.best["dev_loss"], abs=1e-4)
    assert figures.accuracy == result.best["dev_accuracy"]


def test_words_of_several_tokens_have_one_too() -> None:
    long = {"a": "Paris", "b": ["the old city of Rome", "Oslo"], "c": "Berlin"}
    prompt = replace(fresh(), verbalizer=long)
    model, tokenizer, prompt, _ = trained(prompt=prompt)
    expected = by_hand(model, tokenizer, prompt)
    torch.testing.assert_close(shares(model, tokenizer, prompt), expected, atol=1e-5, rtol=1e-4)


def test_it_begins_at_zero_and_learns_beside_the_vectors() -> None:
    _, _, without, plain = trained(label_matrix=False, epochs=1)
    _, _, prompt, result = trained(epochs=1)
    assert without.label_matrix is None and prompt.label_matrix is not None
    assert result.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], abs=0.1)
    assert result.history[0]["loss"] != plain.history[0]["loss"]
    # AdamW's first steps are as long as the rate: 1e-2 where the encoder has its usual one.
    for encoder, rate, steps in (("none", None, 3e-2), ("mlp", None, 3e-2), ("mlp", 1e-4, 3e-3)):
        how = {"epochs": 1, "learning_rate": rate, "schedule": "constant", "warmup": 0.0}
        _, _, made, _ = trained(prompt=fresh(encoder=encoder), **how)
        assert made.label_matrix is not None
        assert 0.5 * steps < float(made.label_matrix.numbers.abs().max()) <= 1.03 * steps


def test_its_step_is_the_derivative_of_the_loss() -> None:
    """One step of AdamW moves each number by the rate against its gradient's sign."""
    model, tokenizer, prompt, _ = trained(
        epochs=1, batch_size=6, schedule="constant", warmup=0.0, learning_rate=1e-5
    )
    assert prompt.label_matrix is not None
    start = replace(prompt, label_matrix=matrix_of(torch.zeros(4, 4)))
    plain = replace(start, label_matrix=None)
    plain.verbalizer = {word: (word,) for words in prompt.labels.values() for word in words}
    scores = shares(model, tokenizer, plain).log()
    matrix = torch.zeros(4, 4, requires_grad=True)
    p = mixed(scores, matrix).exp()
    by_label = torch.stack([p[:, 0], p[:, 1] + p[:, 2], p[:, 3]], dim=1)
    right = [ord(row["label"]) - ord("a") for row in ROWS]
    loss = -(by_label / by_label.sum(1, keepdim=True)).log()[range(6), right].mean()
    (gradient,) = torch.autograd.grad(loss, matrix)
    clear = gradient.abs() > 1e-4
    assert clear.sum() >= 8
    torch.testing.assert_close(
        prompt.label_matrix.numbers[clear], -1e-5 * gradient.sign()[clear], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_loss_is_that_with_it_and_that_without_in_equal_parts(family: str) -> None:
    model, tokenizer, begun, _ = trained(family)
    assert begun.label_matrix is not None
    begun.label_matrix = matrix_of(20 * begun.label_matrix.numbers)
    plain = replace(begun, label_matrix=None)
    both = [ptuning.evaluate(model, tokenizer, prompt, ROWS).loss for prompt in (begun, plain)]
    assert abs(both[0] - both[1]) > 0.05  # type: ignore[operator]
    how = {**HOW, "epochs": 1, "learning_rate": 1e-12, "batch_size": 6, "word_noise": 0.0}
    result = ptuning.train(model, tokenizer, begun, ROWS, ROWS, **how)
    assert result.history[0]["loss"] == pytest.approx(sum(both) / 2, abs=1e-5)  # type: ignore[arg-type]
    assert result.history[0]["dev_loss"] == pytest.approx(both[0], abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"population": 3},
        {"population": 3, "ensemble": 2},
        {"refit": True},
        {"folds": 2},
        {"grid": {"encoder": ["mlp", "none"]}},
        {"grid": {"template": [TEMPLATE, "[P*4] {text} [MASK]"]}, "ensemble": 2},
        {"calibrate": "dev"},
        {"word_noise": 0.5},
        {"tune_model": True},
        {"gradient_accumulation": 2},
    ],
    ids=str,
)
def test_every_way_to_train_gives_one_that_every_member_applies(options: dict[str, Any]) -> None:
    dev = () if "folds" in options else ROWS[:4]
    model, tokenizer, prompt = tiny.model("llama"), tiny.tokenizer(), fresh()
    how = {**HOW, "label_matrix": True, **options}
    result = ptuning.train(model, tokenizer, prompt, ROWS, dev, **how)
    assert all(member.label_matrix is not None for member in prompt.members)
    logs = torch.stack([by_hand(model, tokenizer, one).log() for one in prompt.members]).mean(0)
    if prompt.label_bias:
        logs = logs + torch.tensor(list(prompt.label_bias.values()))
    found = shares(model, tokenizer, prompt)
    torch.testing.assert_close(found, logs.softmax(1), atol=1e-5, rtol=1e-4)
    if "ensemble" in options:
        told = result.ensemble["dev_loss"]
        assert ptuning.evaluate(model, tokenizer, prompt, dev).loss == pytest.approx(told, abs=1e-4)


def test_members_have_what_they_have_alone() -> None:
    _, _, _, result = trained(population=2, halving=False)
    for seed, member in enumerate(result.members):
        _, _, _, alone = trained(seed=seed)
        assert member["best"]["dev_loss"] == pytest.approx(alone.best["dev_loss"], abs=1e-5)


def test_prompts_with_and_without_one_answer_in_one_batch() -> None:
    model, tokenizer, prompt, _ = trained()
    _, _, other, _ = trained(seed=1)
    _, _, without, _ = trained(label_matrix=False)
    prompts = [prompt, without, other]
    alone = [shares(model, tokenizer, one) for one in prompts]
    found = ptuning.predict_details(model, tokenizer, prompts, ROWS)
    for expected, of_prompt in zip(alone, found, strict=True):
        got = torch.tensor([list(one.probabilities.values()) for one in of_prompt])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    chosen = ptuning.predict(model, tokenizer, prompt, ROWS[:2], candidates=["Paris", "no city"])
    plain = replace(prompt, label_matrix=None)
    assert chosen == ptuning.predict(
        model, tokenizer, plain, ROWS[:2], candidates=["Paris", "no city"]
    )


@pytest.mark.usefixtures("on_cpu")  # replayed steps round as their shapes come
def test_a_resumed_training_is_the_undisturbed_one(tmp_path: Path) -> None:
    how = {"output": tmp_path, "checkpoint_seconds": 0, "population": 2, "word_noise": 0.0}
    _, _, expected, whole = trained(**{**how, "output": None})
    with pytest.raises(Stopped):
        trained(**how, listener=stop_after(7))
    _, _, prompt, result = trained(**how, resume=True)
    assert result.history == whole.history
    assert torch.equal(prompt.vectors, expected.vectors)  # type: ignore[arg-type]
    assert same(prompt, expected)
    with pytest.raises(Stopped):
        trained(**how, listener=stop_after(7))
    with pytest.raises(InputError, match=r"label_matrix differs .*then true, now false"):
        trained(**how, resume=True, label_matrix=False)


def test_training_goes_on_from_it_or_without() -> None:
    model, tokenizer, prompt, first = trained()
    before = copy.copy(prompt)
    again = ptuning.train(
        model, tokenizer, prompt, ROWS, ROWS[:4], **{**HOW, "epochs": 1}, label_matrix=True
    )
    assert again.history[0]["loss"] < first.history[0]["loss"]
    assert not same(prompt, before)
    begun = fresh("[P*4] {text} [MASK]")
    begun.begin_from(prompt)
    assert same(begun, prompt)
    other = replace(fresh(), verbalizer={**WORDS, "c": "Madrid"})
    other.begin_from(prompt)
    assert other.label_matrix is None
    backwards = replace(fresh(), verbalizer=dict(reversed(WORDS.items())))
    backwards.begin_from(prompt)
    found = shares(model, tokenizer, backwards).flip(1)
    torch.testing.assert_close(found, shares(model, tokenizer, prompt), atol=1e-6, rtol=1e-5)
    grid = {"template": [TEMPLATE, "[P*4] {text} [MASK]"]}
    of_grid = choices(prompt, TrainSettings(), 1, grid)
    begun_ones = [(one.vectors is None, one.label_matrix is None) for _, one, _ in of_grid]
    assert begun_ones == [(False, False), (True, True)]
    # Without a word on it training goes on as it began.
    ptuning.train(model, tokenizer, prompt, ROWS, ROWS[:4], **HOW)
    assert prompt.label_matrix is not None
    ptuning.train(model, tokenizer, prompt, ROWS, ROWS[:4], **HOW, label_matrix=False)
    assert prompt.label_matrix is None


@pytest.mark.parametrize("members", [1, 2])
def test_a_saved_one_comes_back_and_its_folder_is_of_version_three(
    members: int, tmp_path: Path
) -> None:
    model, tokenizer, prompt, _ = trained(population=members, ensemble=members)
    prompt.save(tmp_path)
    loaded = Prompt.load(tmp_path)
    for one, other in zip(prompt.members, loaded.members, strict=True):
        assert same(one, other)
    assert torch.equal(shares(model, tokenizer, loaded), shares(model, tokenizer, prompt))
    description = json.loads((tmp_path / "prompt.json").read_text())
    assert description["format_version"] == 3 and "label_matrix" not in description
    assert not (tmp_path / "adapter_config.json").exists()  # PEFT would answer otherwise
    for one in (description, *description.get("ensemble", [])):
        one["verbalizer"]["b"] = ["Rome"]
    (tmp_path / "prompt.json").write_text(json.dumps(description))
    with pytest.raises(PromptFileError, match="other label words than the label matrix"):
        Prompt.load(tmp_path)


@pytest.mark.parametrize("members", [1, 2])
def test_a_description_by_hand_has_the_same_words_in_any_order(
    members: int, tmp_path: Path
) -> None:
    """As a program that sorts keys leaves it."""
    words = {"z": "Paris", "b": ["Rome", "Oslo"], "c": "Berlin"}
    rows = [{**row, "label": "zbc"[n % 3]} for n, row in enumerate(ROWS)]
    model, tokenizer, prompt = tiny.model("llama"), tiny.tokenizer(), fresh()
    prompt.verbalizer = Prompt(TEMPLATE, verbalizer=words).verbalizer
    how = {**HOW, "population": members, "ensemble": members, "label_matrix": True}
    ptuning.train(model, tokenizer, prompt, rows, rows[:4], **how)
    prompt.save(tmp_path)
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    with pytest.warns(UserWarning, match="another verbalizer than its copy"):
        loaded = Prompt.load(tmp_path)
    assert list(loaded.labels) == ["b", "c", "z"]
    found = shares(model, tokenizer, loaded)[:, [2, 0, 1]]
    torch.testing.assert_close(found, shares(model, tokenizer, prompt), atol=1e-6, rtol=1e-5)
    description = json.loads(path.read_text())
    for one in (description, *description.get("ensemble", [])):
        one["verbalizer"]["c"] = ["Madrid"]
    path.write_text(json.dumps(description))
    with pytest.raises(PromptFileError, match=r"other label words than the label matrix in .*give"):
        Prompt.load(tmp_path)


NAMED = [{"text": text, "label": f"{text} yes"} for text in ("Paris", "Oslo does", "capital")] * 3


def test_labels_that_get_other_words_in_training_begin_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a prompt whose words are the names they find the matrix no more."""
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    names = Prompt.for_rows(NAMED)
    words = {label: list(of_label) for label, of_label in names.labels.items()}
    by_name = Prompt(names.template, "label", words, encoder="none")
    ptuning.train(model, tokenizer, by_name, NAMED, **HOW, label_matrix=True)
    assert by_name.label_matrix is not None and len(by_name.label_matrix.words) == 3
    begun = Prompt.for_rows(NAMED)
    begun.begin_from(by_name)
    ptuning.train(model, tokenizer, begun, NAMED, **HOW, label_matrix=True)
    count = sum(map(len, begun.labels.values()))
    assert begun.label_matrix is not None and len(begun.label_matrix.words) == count != 3
    # How many words there are is counted when they are found, too.
    monkeypatch.setattr("ptuning.training.label_matrix.MOST", 3)
    fresh_one = Prompt.for_rows(NAMED)
    with pytest.raises(InputError, match=f"there are {count} label words, more than the 3"):
        ptuning.train(model, tokenizer, fresh_one, NAMED, **HOW, label_matrix=True)


@pytest.mark.parametrize("told", [{"verbalizer": None}, {}, {"verbalizer": {"a": 1}}])
def test_tensors_that_do_not_say_of_which_words_it_is_are_refused(
    told: dict[str, Any], tmp_path: Path
) -> None:
    tensors, labels = {"label_matrix": torch.zeros(1, 1)}, {"a": ["Paris"]}
    with pytest.raises(PromptFileError, match="does not say of which label words"):
        prompt_files.matrix(tmp_path, tensors, 0, labels, {"save_id": "x", **told})


def test_a_matrix_of_other_words_is_refused() -> None:
    with pytest.raises(InputError, match=r"numbers are \(3, 3\), for 4 words"):
        matrix_of(torch.zeros(3, 3))
    with pytest.raises(InputError, match=r"numbers are list, for 1 words"):
        LabelMatrix(("a",), [[0.0]])  # type: ignore[arg-type]
    one = LabelMatrix(("Paris",), torch.zeros(1, 1))
    with pytest.raises(
        InputError, match=r"words \['Paris'\], and the labels have \['Paris', 'Rome'"
    ):
        fresh(label_matrix=one)
    with pytest.raises(InputError, match=r"words \['Paris'\], and the labels have \[\]"):
        Prompt("[P] {x} [MASK]", label_matrix=one)
    with pytest.raises(InputError, match=r"label_matrix is tensor\(.*; expected a LabelMatrix"):
        fresh(label_matrix=torch.zeros(4, 4))


def test_it_goes_with_its_words_when_others_are_given() -> None:
    """As many others would be compared by numbers that were never theirs."""
    model, tokenizer, prompt, _ = trained()
    turned = replace(prompt, verbalizer={"c": "Berlin", "b": ["Oslo", "Rome"], "a": "Paris"})
    found = shares(model, tokenizer, turned).flip(1)
    torch.testing.assert_close(found, shares(model, tokenizer, prompt), atol=1e-6, rtol=1e-5)
    of_others = {**WORDS, "c": "Madrid"}
    with pytest.raises(InputError, match=r"and the labels have .*'Madrid'.*take label_matrix out"):
        replace(prompt, verbalizer=of_others)
    assigned = copy.copy(prompt)
    assigned.verbalizer = {"a": ["Paris"], "b": ["Rome", "Oslo"], "c": ["Madrid"]}
    for use in (
        lambda: shares(model, tokenizer, assigned),
        lambda: ptuning.merge(model, tokenizer, {"kind": assigned}),
        lambda: assigned.files("anywhere"),
        lambda: ptuning.train(model, tokenizer, assigned, ROWS, **HOW),
    ):
        with pytest.raises(InputError, match="take label_matrix out"):
            use()
    without = replace(prompt, verbalizer=of_others, label_matrix=None)
    assert shares(model, tokenizer, without).shape == (6, 3)


def test_what_goes_to_others_tells_it_and_pefts_files_cannot() -> None:
    model, tokenizer, prompt, _ = trained()
    assert prompt.label_matrix is not None
    with pytest.warns(UserWarning, match=r"label_matrix, beside its labels.*--no-label-matrix"):
        merged = ptuning.merge(model, tokenizer, {"kind": prompt})
    assert merged.prompts["kind"]["label_matrix"] == prompt.label_matrix.numbers.tolist()
    base = BaseModel.of(model, tokenizer)
    with pytest.warns(UserWarning, match="label_matrix, beside its labels"):
        parts = json.loads(exports.export(prompt, base, "vllm-embeds")["vllm_embeds.json"])
    assert parts["label_matrix"] == prompt.label_matrix.numbers.tolist()
    front = fresh("[P*5] {text} [MASK]", label_matrix=prompt.label_matrix)
    front.vectors = prompt.vectors
    with pytest.warns(UserWarning, match=r"no place for the prompt's label matrix.*--no-label"):
        exports.export(front, base, "peft")


def test_a_student_of_a_prompt_with_one_learns_what_it_says() -> None:
    model, tokenizer, teacher, _ = trained()
    student = fresh("[P*4] {text} [MASK]")
    said = ptuning.distill(
        model, tokenizer, student, ROWS, ROWS, teacher=teacher, epochs=1, verbose=False
    )
    assert student.label_matrix is None
    told = said.training.best
    expected = by_hand(model, tokenizer, teacher)
    logs = shares(model, tokenizer, student).log()
    divergence = (expected * (expected.log() - logs)).sum(1).mean()
    assert told["dev_loss"] == pytest.approx(float(divergence), abs=1e-3)


def many(count: int) -> Prompt:
    return Prompt("[P] {text} [MASK]", verbalizer={f"label {n}": f"word{n}" for n in range(count)})


@pytest.mark.parametrize(
    ("count", "usual"), [(2, False), (11, False), (12, True), (MOST + 1, False)]
)
def test_from_twelve_labels_on_there_is_one_by_default(count: int, usual: bool) -> None:
    assert settled_matrix(TrainSettings(), [many(count)]) is usual
    assert settled_matrix(TrainSettings(), [many(count)], taught=True) is False
    assert settled_matrix(TrainSettings(label_matrix=False), [many(count)]) is False
    if count <= MOST:
        assert settled_matrix(TrainSettings(label_matrix=True), [many(count)], taught=True) is True
    assert settled_matrix(TrainSettings(), [many(count), many(2)]) is False
    wordy = {label: [f"{label}{n}" for n in range(8)] for label in "ab"}
    assert settled_matrix(TrainSettings(), [Prompt("[P] {text} [MASK]", verbalizer=wordy)]) is False


def test_labels_that_have_too_many_words_for_one_are_told() -> None:
    few, wordy = many(12), many(12)
    wordy.verbalizer = {label: tuple(f"{label} {n}" for n in range(22)) for label in wordy.labels}
    rows = [{"text": "France", "answer": label} for label in wordy.labels]
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    how = {**HOW, "epochs": 1, "verbose": True}
    with pytest.warns(UserWarning, match=r"12 labels have 264 words, .* 256 at most.*verbalizer"):
        ptuning.train(model, tokenizer, wordy, rows, rows[:2], **how)
    assert wordy.label_matrix is None
    for how, prompt in (({"label_matrix": False}, wordy), ({}, few), ({}, many(MOST + 1))):
        assert too_many_words(TrainSettings(**how), [prompt]) is None


def refused(prompt: Prompt) -> str:
    with pytest.raises(InputError) as caught:
        settled_matrix(TrainSettings(label_matrix=True), [prompt])
    assert settled_matrix(TrainSettings(), [prompt]) is False
    return str(caught.value)


def test_labels_that_can_have_none_are_refused_by_name() -> None:
    assert "there are 257 label words, more than the 256" in refused(many(MOST + 1))
    assert "no labels are compared" in refused(Prompt("[P] {text} [MASK]"))
    assert "no labels are compared" in refused(replace(many(20), label_mode="vocabulary"))
    columns = {f"{n}": f"{{choice{n}}}" for n in range(20)}
    assert "name columns" in refused(replace(many(20), verbalizer=columns))
    with pytest.raises(InputError, match="label_matrix is 'yes'; expected True or False"):
        TrainSettings(label_matrix="yes")  # type: ignore[arg-type]


def test_a_run_of_an_older_release_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint does not name the setting."""
    how = {"output": tmp_path, "checkpoint_seconds": 0, "label_matrix": False}
    states: list[Any] = []
    own: Callable[..., Any] = Loop._save

    def save(loop: Loop) -> None:
        states.append(loop.identity)
        own(loop)

    monkeypatch.setattr(Loop, "_save", save)
    with pytest.raises(Stopped):
        trained(**how, listener=stop_after(5))
    assert "label_matrix" not in states[-1]
