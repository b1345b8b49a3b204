"""Noise on words' vectors: what it is, and that every way to compute a step sees the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ptuning
from ptuning import InputError, Prompt, train
from ptuning.backbone.injection import Injector
from ptuning.inference.distillation import distill
from ptuning.training import population
from ptuning.training.loop import Loop
from ptuning.training.progress import Progress
from ptuning.training.word_noise import WordNoise, usual_noise

from .. import tiny

FRONT, AFTER = "[P*3] {text} [P*2] is [MASK]", "Question about {text}: [P*3] is [P*2] [MASK]"
LABELS = {"0": "yes", "1": "no"}
PLACES = ["France", "Italy", "the old cities of Spain", "Oslo", "Berlin and Madrid", "Vienna"]
ROWS = [{"text": text, "label": str(n % 2)} for n, text in enumerate(PLACES)]
HOW: dict[str, Any] = {"epochs": 4, "batch_size": 2, "learning_rate": 1e-2, "verbose": False}


class Stopped(Exception):
    pass


@pytest.fixture
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return tiny.model("llama", vocab_size=len(tokenizer))


def labelled(template: str = FRONT) -> Prompt:
    return Prompt(template, answer="label", verbalizer=LABELS)


def test_it_grows_to_its_share_of_the_words_size_and_spares_special_tokens(
    model: Any, tokenizer: Any
) -> None:
    embedding = model.get_input_embeddings()
    ids = torch.arange(len(tokenizer)).unsqueeze(0)
    vectors = embedding(ids).detach()
    noise = WordNoise(model, tokenizer.all_special_ids, 0.5)

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


def test_rows_of_virtual_tokens_and_other_threads_forwards_have_none(
    model: Any, tokenizer: Any
) -> None:
    noise = WordNoise(model, tokenizer.all_special_ids, 0.5)
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
    ],
    ids=lambda value: getattr(value, "template", value),
)
def test_it_is_usual_for_labels_where_no_prefix_could_be_kept(prompt: Prompt, share: float) -> None:
    assert usual_noise(prompt) == share


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

    def stop(progress: Progress) -> None:
        if progress.step == 7:
            raise Stopped

    whole, halved = labelled(), labelled()
    expected = train(model, tokenizer, whole, ROWS, ROWS[:3], **how)
    with pytest.raises(Stopped):
        train(model, tokenizer, halved, ROWS, ROWS[:3], output=tmp_path, listener=stop, **how)
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
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompt = labelled()
    result = train(model, tokenizer, prompt, ROWS, ROWS, **{**HOW, "epochs": 10})
    assert result.history[-1]["loss"] < result.history[0]["loss"] + 0.1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.get_input_embeddings()._forward_hooks


def test_by_default_neither_a_student_nor_a_tuned_model_has_it(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []

    class Seen(WordNoise):
        def __init__(self, model: Any, special: Any, share: float):
            made.append(share)
            super().__init__(model, special, share)

    monkeypatch.setattr(population, "WordNoise", Seen)
    texts = [{"text": row["text"]} for row in ROWS]
    distill(model, tokenizer, labelled(), texts, texts, teacher="A city or not?", **HOW)
    train(model, tokenizer, labelled(), ROWS, **{**HOW, "tune_model": True})
    assert made == []
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
    monkeypatch.setattr(Loop, "_dev_results", lambda loop, numbers: [figures] * len(numbers))

    def epochs(**how: Any) -> int:
        how = {**HOW, "epochs": 10, "patience": 2, **how}
        return len(train(model, tokenizer, labelled(), ROWS, ROWS, **how).history)

    assert epochs(word_noise=0.0) == 3
    assert epochs() == 5  # of ten epochs it has grown after the fourth, which is the first to count
