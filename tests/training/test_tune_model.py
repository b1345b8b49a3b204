"""Prompt and model trained together, the paper's other setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import ptuning
from ptuning.errors import InputError
from ptuning.inference.evaluation import teacher_forced

from .. import tiny
from ..scaffold import Run, Stopped, stop_after

ROWS = [
    {"country": country, "capital": capital}
    for country, capital in (
        ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Austria", "Vienna"),
        ("Germany", "Berlin"),
    )
]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "epochs": 25, "batch_size": 2, "tune_model": True, "model_learning_rate": 3e-3,
    "choose_by": "loss",
}  # fmt: skip


def prompt() -> ptuning.Prompt:
    return ptuning.Prompt("[P*2] {country} [P] [MASK]", answer="capital")


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_prompt_and_model_learn_together(family: str) -> None:
    tokenizer = tiny.tokenizer(around=family == "bert")
    model = tiny.model(family, vocab_size=len(tokenizer))
    frozen, before = prompt(), tiny.weights(model)
    alone = ptuning.train(model, tokenizer, frozen, ROWS, ROWS, **{**SETTINGS, "tune_model": False})
    assert all(torch.equal(v, before[k]) for k, v in tiny.weights(model).items())
    both = prompt()
    result = ptuning.train(model, tokenizer, both, ROWS, ROWS, **SETTINGS)
    assert not all(torch.equal(v, before[k]) for k, v in tiny.weights(model).items())
    assert result.best["dev_loss"] < 0.5 * alone.best["dev_loss"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    accuracy, loss = teacher_forced(model, tokenizer, both, ROWS)
    assert accuracy == result.best["dev_accuracy"]
    assert loss == pytest.approx(result.best["dev_loss"], rel=1e-4)


def test_long_answers_bring_gradients_to_the_output_head(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.tokenizer()
    heads = []
    for largest in (10**9, 0):
        monkeypatch.setattr("ptuning.forward.chunked.LARGEST", largest)
        model = tiny.model("llama", vocab_size=len(tokenizer))
        ptuning.train(model, tokenizer, prompt(), ROWS, **{**SETTINGS, "epochs": 1})
        heads.append(tiny.weights(model)["lm_head.weight"])
    torch.testing.assert_close(*heads)
    assert not torch.equal(heads[0], tiny.model("llama", vocab_size=len(tokenizer)).lm_head.weight)


def test_the_model_gets_the_weights_of_the_best_epoch() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    wild = {**SETTINGS, "model_learning_rate": 3.0, "schedule": "constant", "epochs": 6, "seed": 1}
    trained = prompt()
    result = ptuning.train(model, tokenizer, trained, ROWS, ROWS, **wild)
    last = result.history[-1]
    assert result.best["epoch"] < last["epoch"], "the last epoch is the best: nothing is tested"
    _, loss = teacher_forced(model, tokenizer, trained, ROWS)
    assert loss == pytest.approx(result.best["dev_loss"], rel=1e-4)


def test_an_interrupted_training_goes_on_with_the_same_model(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    whole, undisturbed = tiny.model("llama"), prompt()
    ptuning.train(whole, tokenizer, undisturbed, ROWS, **SETTINGS)

    options = {**SETTINGS, "output": tmp_path, "checkpoint_seconds": 0.0}
    with pytest.raises(Stopped):
        ptuning.train(
            tiny.model("llama"), tokenizer, prompt(), ROWS, listener=stop_after(17), **options
        )
    model, resumed = tiny.model("llama"), prompt()
    ptuning.train(model, tokenizer, resumed, ROWS, resume=True, **options)
    torch.testing.assert_close(resumed.vectors, undisturbed.vectors, atol=1e-6, rtol=0)
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_populations_and_quantized_or_offloaded_models_are_refused() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    with pytest.raises(InputError, match="the population has 2"):
        ptuning.train(model, tokenizer, prompt(), ROWS, population=2, **SETTINGS)
    model.is_quantized = True
    with pytest.raises(InputError, match="load it unquantized"):
        ptuning.train(model, tokenizer, prompt(), ROWS, **SETTINGS)
    offloaded = accelerate.cpu_offload(tiny.model("llama"), torch.device("cpu"))
    with pytest.raises(InputError, match="without offloading"):
        ptuning.train(offloaded, tokenizer, prompt(), ROWS, **SETTINGS)


def test_the_command_line_saves_prompt_and_model(
    tmp_path: Path, model_folder: Path, run: Run
) -> None:
    lines = ["country,capital", *(f"{row['country']},{row['capital']}" for row in ROWS)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    out, rows = tmp_path / "out", tmp_path / "rows.csv"
    code, _, err = run(
        "train", "--model", model_folder, "--data", rows, "--output", out,
        "--template", "[P*2] {country} [P] [MASK]", "--answer", "capital", "--tune-model",
        "--epochs", "40", "--batch-size", "2", "--model-learning-rate", "3e-3",
    )  # fmt: skip
    assert code == 0, err
    code, said, err = run("evaluate", out, "--data", rows, "--json")
    assert code == 0 and '"accuracy": 1.0' in said, err
    code, said, err = run("evaluate", out, "--data", rows, "--model", model_folder, "--json")
    assert code == 0 and '"accuracy": 1.0' not in said, err
    code, _, err = run(
        "train", "--model", out / "model", "--data", rows, "--output", out, "--overwrite",
        "--template", "[P*2] {country} [P] [MASK]", "--answer", "capital", "--epochs", 1,
    )  # fmt: skip
    assert code == 2 and "this run would replace it; choose another --output" in err
    assert (out / "model/config.json").is_file()
