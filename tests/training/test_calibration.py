"""A label bias: the formulas by hand, and that every way of answering applies it."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ptuning
from ptuning import InputError, Prompt, Task
from ptuning.backbone.base_model import BaseModel
from ptuning.inference import exports
from ptuning.inference.evaluation import log_shares, teacher_forced
from ptuning.training.calibration import CONTENT_FREE, bias_against, calibrate, fitted_bias

from .. import tiny
from ..scaffold import Run, hooks_of

TEMPLATE = "[P*3] {text} [P] is [MASK]"
WORDS = {"a": ["is", "does"], "b": "it", "c": "Rome!"}
TEXTS = ("France", "Italy and all of its many islands", "Oslo", "Berlin", "Vienna, it rains")
ROWS = [{"text": text, "label": "abc"[n % 3]} for n, text in enumerate(TEXTS)]


def fresh(**changes: Any) -> Prompt:
    return Prompt(**{"template": TEMPLATE, "answer": "label", "verbalizer": WORDS, **changes})


def trained(family: str = "llama", **options: Any) -> tuple[Any, Any, Prompt, Any]:
    tokenizer = tiny.tokenizer(around=family not in tiny.CAUSAL)
    model, prompt = tiny.model(family, vocab_size=len(tokenizer)), fresh()
    settings = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-2, "verbose": False, **options}
    result = ptuning.train(model, tokenizer, prompt, ROWS, dev=ROWS[:4], **settings)
    return model, tokenizer, prompt, result


def shares(model: Any, tokenizer: Any, task: Task, rows: list[dict[str, str]]) -> torch.Tensor:
    found = ptuning.predict_details(model, tokenizer, task, rows)
    return torch.tensor([[p.probabilities[label] for label in "abc"] for p in found]).double()


@pytest.mark.parametrize("options", [{}, {"population": 3, "ensemble": 2}], ids=["one", "two"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("method", ["context", "batch"])
def test_the_bias_takes_back_the_mean_probability(
    method: str, family: str, options: dict[str, Any]
) -> None:
    model, tokenizer, prompt, result = trained(family, calibrate=method, **options)
    plain = replace(prompt, label_bias=None)
    asked = [{"text": t} for t in (CONTENT_FREE if method == "context" else TEXTS[:4])]
    expected = -shares(model, tokenizer, plain, asked).mean(0).log()
    assert prompt.label_bias is not None
    assert list(prompt.label_bias.values()) == pytest.approx(expected.tolist(), abs=1e-4)
    assert prompt.training["calibrate"] == method == result.calibrated["method"]
    (accuracy, loss) = teacher_forced(model, tokenizer, prompt, ROWS[:4])
    assert result.calibrated["dev_accuracy"] == accuracy == prompt.training["dev_accuracy"]
    assert result.calibrated["dev_loss"] == pytest.approx(loss, abs=1e-5)


def test_a_learned_bias_has_the_least_loss_with_its_prior() -> None:
    torch.manual_seed(3)
    known, labels = torch.randn(40, 3).log_softmax(1), (torch.arange(40) % 7).clamp(max=2)
    bias = fitted_bias(known, labels)

    def loss(at: torch.Tensor) -> float:
        moved = (known.double() + at).log_softmax(1)
        return float(-moved[torch.arange(40), labels].sum() + at.square().sum() / 2)

    for change in torch.eye(3).double():
        for size in (1e-2, -1e-2):
            assert loss(bias) < loss(bias + size * change)
    one_sided = fitted_bias(known[:2], torch.zeros(2, dtype=torch.long))
    assert one_sided.abs().max() < 2  # two examples of one label are no reason to say nothing else


def test_a_bias_is_measured_anew_whatever_the_one_before() -> None:
    model, tokenizer, prompt, _ = trained(calibrate="dev")
    before, base = prompt.label_bias, BaseModel.of(model, tokenizer)
    calibrate(base, prompt, "dev", ROWS, ROWS[:4], 2)
    assert before is not None and prompt.label_bias == pytest.approx(before, abs=1e-5)


def test_a_bias_learned_on_dev_is_that_of_its_log_probabilities() -> None:
    model, tokenizer, prompt, _ = trained(calibrate="dev")
    plain = shares(model, tokenizer, replace(prompt, label_bias=None), ROWS[:4])
    labels = torch.tensor(["abc".index(row["label"]) for row in ROWS[:4]])
    expected = fitted_bias(plain.log(), labels).tolist()
    assert list((prompt.label_bias or {}).values()) == pytest.approx(expected, abs=1e-3)


def test_labels_that_were_trained_as_free_text_are_compared_for_their_bias() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt = fresh(label_mode="vocabulary", verbalizer={**WORDS, "a": "is"})
    options: dict[str, Any] = {"calibrate": "batch", "epochs": 1, "verbose": False}
    ptuning.train(model, tokenizer, prompt, ROWS, **options)
    plain = shares(model, tokenizer, replace(prompt, label_bias=None), ROWS)
    expected = bias_against(plain.log()).tolist()
    assert list((prompt.label_bias or {}).values()) == pytest.approx(expected, abs=1e-3)


def test_a_model_in_training_mode_is_calibrated_without_dropout() -> None:
    model, tokenizer, prompt = (
        tiny.model("gpt2", resid_pdrop=0.5).train(),
        tiny.tokenizer(),
        fresh(),
    )
    options: dict[str, Any] = {"calibrate": "batch", "epochs": 1, "verbose": False}
    ptuning.train(model, tokenizer, prompt, ROWS, **options)
    assert model.training
    plain = shares(model.eval(), tokenizer, replace(prompt, label_bias=None), ROWS)
    expected = bias_against(plain.log()).tolist()
    assert list((prompt.label_bias or {}).values()) == pytest.approx(expected, abs=1e-3)


def test_means_of_probabilities_not_of_logarithms() -> None:
    known = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    assert bias_against(known).tolist() == pytest.approx([-math.log(0.7), -math.log(0.3)])
    unlikely = torch.tensor([[0.0, -800.0], [0.0, -900.0]])  # long words: less than any number
    assert bias_against(unlikely).tolist() == pytest.approx([0.0, 800.0 + math.log(2)])


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_way_of_answering_applies_it(family: str, tmp_path: Path) -> None:
    model, tokenizer, prompt, _ = trained(family)
    bias = {"a": 2.0, "b": -1.0, "c": 0.5}
    expected = shares(model, tokenizer, prompt, ROWS).log() + torch.tensor(list(bias.values()))
    expected = expected.softmax(1)
    prompt.label_bias = bias
    prompt.save(tmp_path)
    loaded = Prompt.load(tmp_path)
    assert loaded.label_bias == bias
    found = shares(model, tokenizer, loaded, ROWS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    result = ptuning.evaluate(model, tokenizer, loaded, ROWS)
    right = [expected[n, "abc".index(row["label"])] for n, row in enumerate(ROWS)]
    assert result.loss == pytest.approx(-float(torch.stack(right).log().mean()), abs=1e-5)
    assert result.predictions == ptuning.predict_details(model, tokenizer, loaded, ROWS)
    several = ptuning.predict_details(model, tokenizer, [loaded, loaded.manual()], ROWS)
    assert [p.answer for p in several[0]] == [p.answer for p in result.predictions]
    chosen = ptuning.predict_details(model, tokenizer, loaded, ROWS, candidates=["Paris", "Rome"])
    assert set(chosen[0].probabilities) == {"Paris", "Rome"}  # other words: no bias of theirs


@pytest.mark.parametrize("label_mode", ["labels", "vocabulary"])
@pytest.mark.parametrize("method", ["batch", "context"])
def test_the_manual_template_is_calibrated_too(method: str, label_mode: str) -> None:
    model, tokenizer, prompt, _ = trained(calibrate=method)
    prompt.label_mode = label_mode
    result = ptuning.evaluate(model, tokenizer, prompt, ROWS, manual="{text} is [MASK]")
    by_hand = prompt.manual("{text} is [MASK]")
    plain = shares(model, tokenizer, by_hand, ROWS)
    nothing = [{"text": text} for text in CONTENT_FREE]
    measured = shares(model, tokenizer, by_hand, nothing) if method == "context" else plain
    said = (plain.log() - measured.mean(0).log()).argmax(1)
    right = [int("abc"[n] == row["label"]) for n, row in zip(said.tolist(), ROWS, strict=True)]
    assert result.manual_calibrated == pytest.approx(sum(right) / len(ROWS))
    assert ["the same, calibrated", f"{100 * sum(right) / 5:.1f}"] in result.rows()
    prompt.label_bias = None
    assert ptuning.evaluate(model, tokenizer, prompt, ROWS).manual_calibrated is None


def test_a_manual_template_is_asked_what_the_prompt_is_asked() -> None:
    model, tokenizer, _, _ = trained()
    prompt = fresh(label_mode="vocabulary")
    ptuning.train(model, tokenizer, prompt, ROWS, dev=ROWS[:4], epochs=1, verbose=False)
    said = ptuning.evaluate(model, tokenizer, prompt, ROWS, manual="{text} is [MASK]")
    found = ptuning.predict(model, tokenizer, prompt.manual("{text} is [MASK]"), ROWS)
    right = [answer == row["label"] for answer, row in zip(found, ROWS, strict=True)]
    assert said.manual_accuracy == pytest.approx(sum(right) / len(ROWS))
    free = Prompt("[P*2] {text} is [MASK]", answer="label", answer_tokens=2)
    free.vectors, free.base_model = torch.zeros(2, 32), prompt.base_model
    by_hand, among = "{text} so [MASK]", ["c", "b", "a"]
    said = ptuning.evaluate(model, tokenizer, free, ROWS, manual=by_hand, candidates=among)
    found = ptuning.predict(model, tokenizer, free.manual(by_hand), ROWS, candidates=among)
    right = [answer == row["label"] for answer, row in zip(found, ROWS, strict=True)]
    assert said.manual_accuracy == pytest.approx(sum(right) / len(ROWS))
    with pytest.raises(InputError, match="a candidate is empty"):
        ptuning.predict(model, tokenizer, free, ROWS, candidates=["a", " "])


def test_a_manual_template_with_a_label_that_is_never_likely_is_calibrated_too() -> None:
    model, tokenizer, _, _ = trained()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 4
    words = {
        "a": "Paris",
        "b": "The capital of Italy is Rome, and it rains in Oslo, yes, it does, in Berlin",
        "c": "Rome",
    }
    task = Task("{text} is [MASK]", verbalizer=words)
    logs = log_shares(model, tokenizer, task, ROWS)
    assert float(logs[:, 1].max()) < -110 and len(set(logs[:, 1].tolist())) == len(ROWS)


def test_a_folder_with_a_bias_is_of_version_two_and_one_without_as_before(tmp_path: Path) -> None:
    _, _, prompt, _ = trained()
    prompt.save(tmp_path / "plain")
    prompt.label_bias = {"a": 0.0, "b": 1.0, "c": -1.0}
    prompt.save(tmp_path / "biased")
    plain, biased = (
        json.loads((tmp_path / name / "prompt.json").read_text()) for name in ("plain", "biased")
    )
    assert (plain["format_version"], biased["format_version"]) == (1, 2)
    assert set(biased) - set(plain) == {"label_bias"}


def test_a_merged_model_says_the_bias_and_pefts_files_cannot() -> None:
    model, tokenizer, prompt, _ = trained()
    prompt.label_bias = {"a": 0.25, "b": 1.0, "c": -1.0}
    merged = ptuning.merge(model, tokenizer, {"kind": prompt})
    assert merged.prompts["kind"]["label_bias"] == prompt.label_bias
    base = BaseModel.of(model, tokenizer)
    parts = json.loads(exports.export(prompt, base, "vllm-embeds")["vllm_embeds.json"])
    assert parts["label_bias"] == prompt.label_bias
    front = fresh(template="[P*4] {text} [MASK]", label_bias=prompt.label_bias)
    front.vectors = prompt.vectors
    with pytest.warns(UserWarning, match="no place for the prompt's label bias"):
        exports.export(front, base, "peft")
    in_front = fresh(template="[P*4]{text} [MASK]", special_tokens="after")
    in_front.vectors = prompt.vectors
    assert "adapter_config.json" in in_front.files(".")
    in_front.label_bias = prompt.label_bias
    assert "adapter_config.json" not in in_front.files(".")  # they would mean something else
    with pytest.warns(UserWarning, match="no place for the prompt's label bias"):
        assert "adapter_config.json" in in_front.files(".", peft=True)


def test_an_ensembles_bias_is_not_its_best_members() -> None:
    model, _, prompt, _ = trained(population=2, ensemble=2, calibrate="batch")
    assert hooks_of(model) == 0  # the prompts are off the model again
    assert all(other.base_model == prompt.base_model for other in prompt.others)
    alone = prompt.alone()
    assert prompt.label_bias and alone.label_bias is None
    of_all = {"members", "dev_accuracy", "dev_loss", "calibrate"}
    assert set(prompt.training) - set(alone.training) == of_all
    assert all(other.label_bias is None for other in prompt.others)


def test_training_on_measures_anew() -> None:
    model, tokenizer, prompt, first = trained(calibrate="batch")
    ptuning.train(model, tokenizer, prompt, ROWS, dev=ROWS[:4], epochs=1, verbose=False)
    assert prompt.label_bias is None and first.calibrated


@pytest.mark.parametrize(
    ("changes", "method", "dev", "message"),
    [
        ({}, "often", True, "calibrate is 'often'; expected one of"),
        ({"verbalizer": None}, "batch", True, "no labels to compare"),
        ({"verbalizer": {"a": "{x}", "b": "it"}}, "context", True, "label words name columns"),
        ({}, "dev", False, "no dev examples"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    changes: dict[str, Any], method: str, dev: bool, message: str
) -> None:
    rows = [{**row, "x": "so"} for row in ROWS]
    with pytest.raises(InputError, match=message):
        ptuning.train(
            tiny.model("llama"), tiny.tokenizer(), fresh(**changes), rows,
            dev=rows if dev else (), calibrate=method,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({"a": 1.0}, "names the labels .'a'., and the verbalizer"),
        ({"a": 1.0, "b": math.inf, "c": 0}, "gives inf for 'b'; expected a number"),
        ({"a": 1.0, "b": "much", "c": 0}, "gives 'much' for 'b'"),
        ([1.0, 2.0, 3.0], "expected label -> number"),
    ],
)
def test_a_bias_that_is_none_is_refused(bias: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fresh(label_bias=bias)


def test_a_bias_may_be_of_numpys_or_torchs_numbers() -> None:
    prompt = fresh(label_bias={"a": np.float32(0.5), "b": torch.tensor(-1), "c": np.int64(0)})
    assert prompt.label_bias == {"a": 0.5, "b": -1.0, "c": 0.0}


def test_the_command_line_calibrates(tmp_path: Path, model_folder: Path, run: Run) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, said, err = run(
            "train", "--model", model_folder, "--data", rows, "--dev", rows, "--template", TEMPLATE,
            "--labels", "a=is|does,b=it,c=Rome!", "--epochs", "1", "--calibrate", "context",
            "--output", out,
        )  # fmt: skip
    assert code == 0, err
    assert "labels calibrated by context, dev" in said
    assert json.loads((out / "result.json").read_text())["calibrated"]["method"] == "context"
    assert "calibrate: context" in (out / "run.yaml").read_text()
    code, said, err = run("evaluate", out, "--data", rows)
    assert code == 0 and "the same, calibrated" in said, err
    code, said, err = run("inspect", out)
    assert code == 0 and "bias" in said, err
