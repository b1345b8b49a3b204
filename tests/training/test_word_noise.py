"""Noise on words' vectors: what it is, and that every way to compute a step sees the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

import ptuning
from ptuning import InputError, Prompt, TrainSettings, train
from ptuning.backbone.injection import Injector
from ptuning.experiments.lama.options import LamaOptions
from ptuning.experiments.superglue.options import SuperGlueOptions
from ptuning.inference.distillation import distill
from ptuning.training import population
from ptuning.training.loop import Loop
from ptuning.training.word_noise import WordNoise, settled_noise

from .. import tiny
from ..scaffold import Stopped, stop_after

FRONT, AFTER = "[P*3] {text} [P*2] is [MASK]", "Question about {text}: [P*3] is [P*2] [MASK]"
LABELS = {"0": "yes", "1": "no"}
PLACES = ["France", "Italy", "the old cities of Spain", "Oslo", "Berlin and Madrid", "Vienna"]
ROWS = [{"text": text, "label": str(n % 2)} for n, text in enumerate(PLACES)]
HOW: dict[str, Any] = {"epochs": 4, "batch_size": 2, "learning_rate": 1e-2, "verbose": False}


def labelled(template: str = FRONT) -> Prompt:
    return Prompt(template, answer="label", verbalizer=LABELS)


def test_it_grows_to_its_share_of_the_words_size_and_spares_special_tokens(
    model: Any, tokenizer: Any
) -> None:
    embedding = model.get_input_embeddings()
    ids = torch.arange(len(tokenizer)).unsqueeze(0)
    vectors = embedding(ids).detach()
    noise = WordNoise(model, tokenizer, 0.5)

    def added(step: int) -> torch.Tensor:
        noise.at(step, 100)
        return noise(ids, vectors) - vectors

    assert not added(15).any()
    size = float(embedding.weight.pow(2).mean().sqrt())
    ordinary = [n for n in range(len(tokenizer)) if n not in tokenizer.all_special_ids]
    for step, share in ((40, 0.5), (100, 0.5), (27, 0.5 * 12 / 25)):
        assert float(added(step)[0, ordinary].std()) == pytest.approx(share * size, rel=0.02)
        assert not added(step)[0, tokenizer.all_special_ids].any()
    assert not torch.equal(added(40), added(41))
    twice = ids[:, [9, 50, 9]]
    of_twice = noise(twice, embedding(twice).detach())
    assert torch.equal(of_twice[0, 0], of_twice[0, 2]), "a word has one noise in a step"


def test_special_tokens_without_a_role_and_rows_of_no_word_have_no_part_in_it() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("Oslo")])
    assert len(tokenizer) - 2 not in tokenizer.all_special_ids
    model = tiny.model("llama", vocab_size=4 * len(tokenizer))
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[len(tokenizer) :] = 0.0
    noise = WordNoise(model, tokenizer, 1.0)
    noise.at(1, 1)
    ids = torch.arange(len(embedding.weight))
    vectors = embedding(ids).detach()
    added = noise(ids, vectors) - vectors
    turn, oslo = tokenizer.convert_tokens_to_ids(["<|turn|>", "Oslo"])
    assert not added[turn].any() and added[oslo].any() and not added[len(tokenizer) :].any()
    size = float(embedding.weight[5 : len(tokenizer)].pow(2).mean().sqrt())
    assert float(added[5:turn].std()) == pytest.approx(size, rel=0.03)


def test_special_tokens_that_the_model_has_no_row_for_have_no_part_in_it() -> None:
    tokenizer = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer))
    expected = WordNoise(model, tokenizer, 1.0)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    noise, ids = WordNoise(model, tokenizer, 1.0), torch.arange(400)
    vectors = model.get_input_embeddings()(ids).detach()
    for one in (noise, expected):
        one.at(1, 1)
    assert torch.equal(noise(ids, vectors), expected(ids, vectors))


def test_the_size_is_that_of_words_from_all_over_the_vocabulary(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptuning.backbone.word_size._SAMPLE", 10)
    with torch.no_grad():
        model.get_input_embeddings().weight[:200] = 0.0
    noise, vectors = WordNoise(model, tokenizer, 1.0), torch.zeros(400, 32)
    noise.at(1, 1)
    whole = float(model.get_input_embeddings().weight[5:].detach().pow(2).mean().sqrt())
    assert float(noise(torch.arange(400), vectors).std()) == pytest.approx(whole, rel=0.2)


def test_scaled_embeddings_have_noise_of_their_scale(tokenizer: Any) -> None:
    model = tiny.model("gemma2", vocab_size=len(tokenizer))
    embedding = model.get_input_embeddings()
    ids = torch.arange(5, len(tokenizer))
    vectors = embedding(ids).detach()
    assert not torch.allclose(vectors, embedding.weight[5:])
    noise = WordNoise(model, tokenizer, 1.0)
    noise.at(1, 1)
    expected = float(vectors.pow(2).mean().sqrt())
    assert float((noise(ids, vectors) - vectors).std()) == pytest.approx(expected, rel=0.03)


def test_rows_of_virtual_tokens_and_other_threads_forwards_have_none(
    model: Any, tokenizer: Any
) -> None:
    noise = WordNoise(model, tokenizer, 0.5)
    noise.at(1, 1)
    injector, rows = Injector.on(model), torch.full((2, 32), 3.0)
    span = injector.add(rows)
    embedding = model.get_input_embeddings()
    ids = torch.tensor([[span.first, 9, span.first + 1]])
    with injector.serving({span: rows}, alone=True, words=noise):
        served = embedding(ids)
    assert torch.equal(served[0, [0, 2]], rows)
    assert torch.equal(served[:, 1:2], noise(ids[:, 1:2], embedding(ids[:, 1:2])))
    assert torch.equal(embedding(ids)[:, 1], embedding.weight[9:10])
    injector.remove(span)


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        (labelled(), 0.5),
        (labelled("[P: Is it] {text} [MASK]"), 0.5),
        (labelled(AFTER), 0.0),
        (labelled("{text} [P*3] [MASK]"), 0.0),
        (Prompt(FRONT, answer="label"), 0.0),
        (Prompt.for_rows(ROWS), 0.5),
        (Prompt(num_virtual_tokens=3, answer="label"), 0.0),
        (Prompt(FRONT, answer="label", verbalizer=LABELS, chat=True), 0.0),
    ],
    ids=lambda value: getattr(value, "template", value),
)
def test_it_is_usual_for_labels_where_no_prefix_could_be_kept(prompt: Prompt, share: float) -> None:
    usual = ptuning.TrainSettings()
    assert settled_noise(usual, [prompt]) == share
    assert settled_noise(usual, [prompt], taught=True) == 0
    assert settled_noise(replace(usual, tune_model=True), [prompt]) == 0
    assert settled_noise(replace(usual, word_noise=1), [prompt], taught=True) == 1.0


@pytest.mark.parametrize("first", [FRONT, AFTER])
def test_templates_side_by_side_have_it_if_each_would_alone(
    first: str, model: Any, tokenizer: Any
) -> None:
    def best(template: str, *templates: str) -> list[dict[str, float]]:
        how = {**HOW, "halving": False, "grid": {"template": list(templates)}}
        result = train(model, tokenizer, labelled(template), ROWS, ROWS[:4], **how)
        return [member["best"] for member in result.members]

    together = best(first, FRONT, AFTER)
    for got, template in zip(together, (FRONT, AFTER), strict=True):
        alone = labelled(template)
        result = train(model, tokenizer, alone, ROWS, ROWS[:4], **{**HOW, "word_noise": 0.0})
        assert got == pytest.approx(result.best, abs=1e-5)
    (one,) = best(first, FRONT)
    usual = train(model, tokenizer, labelled(FRONT), ROWS, ROWS[:4], **HOW)
    assert one == pytest.approx(usual.best, abs=1e-5)


def test_training_has_it_and_dev_results_do_not(model: Any, tokenizer: Any) -> None:
    def history(**how: Any) -> list[dict[str, float]]:
        how = {**HOW, "learning_rate": 1e-12, "shuffle": False, **how}
        return train(model, tokenizer, labelled(), ROWS, ROWS, **how).history

    usual, without = history(), history(word_noise=0.0)
    assert usual == history(word_noise=0.5)
    assert [r["dev_loss"] for r in usual] == pytest.approx([r["dev_loss"] for r in without])
    assert usual[0]["loss"] != pytest.approx(without[0]["loss"], abs=1e-6)  # from step 2 of 12 on
    assert usual[3]["loss"] != pytest.approx(without[3]["loss"], abs=1e-4)


@pytest.mark.usefixtures("on_cpu")
def test_a_stopped_run_resumes_to_the_same_numbers(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    how = {**HOW, "checkpoint_seconds": 0}

    whole, halved = labelled(), labelled()
    expected = train(model, tokenizer, whole, ROWS, ROWS[:3], **how)
    with pytest.raises(Stopped):
        train(
            model, tokenizer, halved, ROWS, ROWS[:3], output=tmp_path, listener=stop_after(7), **how
        )
    with pytest.raises(InputError, match=r"word_noise differs .*then 0\.5, now 0\.0"):
        train(
            *(model, tokenizer, labelled(), ROWS, ROWS[:3]),
            **{**how, "output": tmp_path, "resume": True, "word_noise": 0.0},
        )
    halved = labelled()
    result = train(model, tokenizer, halved, ROWS, ROWS[:3], output=tmp_path, resume=True, **how)
    assert torch.equal(halved.trained_vectors(), whole.trained_vectors())
    assert result.history == expected.history


@pytest.mark.parametrize("template", [FRONT, AFTER, "is it {text} [P*2] {text} [MASK]"])
def test_fast_paths_and_members_see_the_same_noise(
    template: str, model: Any, tokenizer: Any
) -> None:
    def trained(**how: Any) -> tuple[Prompt, ptuning.TrainResult]:
        prompt = labelled(template)
        how = {**HOW, "word_noise": 0.5, **how}
        return prompt, train(model, tokenizer, prompt, ROWS, ROWS[:4], **how)

    plain, of_plain = trained(prefix_cache="off")
    fast, of_fast = trained()
    torch.testing.assert_close(fast.trained_vectors(), plain.trained_vectors(), atol=1e-5, rtol=0)
    _, together = trained(population=2, halving=False)
    _, second = trained(seed=1)
    for member, alone in zip(together.members, (of_fast, second), strict=True):
        assert member["best"] == pytest.approx(alone.best, abs=1e-5)
    assert of_plain.history[-1]["loss"] == pytest.approx(of_fast.history[-1]["loss"], abs=1e-5)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_family_trains_with_it(family: str) -> None:
    tokenizer = tiny.tokenizer(around=family not in tiny.CAUSAL)
    model = tiny.model(family, vocab_size=len(tokenizer))
    before = tiny.weights(model)
    prompt = labelled()
    result = train(model, tokenizer, prompt, ROWS, ROWS, **{**HOW, "epochs": 10})
    assert result.history[-1]["loss"] < result.history[0]["loss"] + 0.1
    assert all(torch.equal(before[name], value) for name, value in tiny.weights(model).items())
    assert not model.get_input_embeddings()._forward_hooks


def test_by_default_neither_a_student_nor_a_tuned_model_has_it(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []

    class Seen(WordNoise):
        def __init__(self, model: Any, tokenizer: Any, share: float):
            made.append(share)
            super().__init__(model, tokenizer, share)

    monkeypatch.setattr(population, "WordNoise", Seen)
    texts = [{"text": row["text"]} for row in ROWS]
    distill(model, tokenizer, labelled(), texts, texts, teacher="A city or not?", **HOW)
    train(model, tokenizer, labelled(), ROWS, **{**HOW, "tune_model": True})
    assert made == []
    with pytest.raises(InputError, match="word_noise is for a frozen model"):
        train(model, tokenizer, labelled(), ROWS, **HOW, tune_model=True, word_noise=0.5)
    distill(
        *(model, tokenizer, labelled(), texts, texts),
        teacher="A city or not?",
        **{**HOW, "word_noise": 0.25},
    )
    assert made == [0.25]


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf"), "much", True])
def test_a_share_that_is_none_is_refused(share: Any) -> None:
    with pytest.raises(InputError, match=r"word_noise is .*give a number from 0 on"):
        ptuning.TrainSettings(word_noise=share)


def test_patience_begins_when_the_noise_has_its_size(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"dev_accuracy": 0.5, "dev_loss": 1.0}  # no epoch after the first is a gain
    steps: list[tuple[int, int]] = []
    at = WordNoise.at
    monkeypatch.setattr(
        WordNoise, "at", lambda *to, **how: (steps.append(to[1:]), at(*to, **how))[1]
    )
    monkeypatch.setattr(Loop, "_dev_results", lambda loop, numbers: [figures] * len(numbers))

    def epochs(**how: Any) -> int:
        how = {**HOW, "epochs": 10, "patience": 2, **how}
        return len(train(model, tokenizer, labelled(), ROWS, ROWS, **how).history)

    assert epochs(word_noise=0.0) == 3
    assert epochs() == 5  # of ten epochs it has grown after the fourth, which is the first to count
    assert steps == [(n, 30) for n in range(1, 16)]
    figures["dev_accuracy"] = 1.0
    assert epochs() == 3  # solved: there is nothing to wait for


def test_published_experiments_have_none() -> None:
    for options in (LamaOptions(), SuperGlueOptions(), SuperGlueOptions(settings=TrainSettings())):
        assert options.settings.word_noise == 0
    assert SuperGlueOptions(settings=TrainSettings(word_noise=0.25)).settings.word_noise == 0.25
