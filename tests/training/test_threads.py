"""A training beside other users of its model, in other threads: the numbers of one alone."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.state import is_initialized
from torch import Tensor, nn

import ptuning
from ptuning import peft_compat
from ptuning.errors import InputError

from .. import tiny
from ..scaffold import together

TOKENIZER = tiny.tokenizer(bos=True)
FACTS = [
    {"country": c, "capital": a}
    for c, a in [("France", "Paris"), ("Italy", "Rome"), ("Norway", "Oslo"), ("Spain", "Madrid")]
]
TEMPLATES = {
    "around the field": "[P*3] {country} [P*3] [MASK]",
    "a shared prefix": "[P*70] {country} [P*3] [MASK]",
    "kept keys and values": "The capital of {country}: [P*3] [MASK]",
}


def trained(model: nn.Module, template: str = TEMPLATES["around the field"], **options: Any) -> Any:
    """The vectors of a prompt after a short training."""
    names = ("encoder", "encoder_dropout")
    about = {"encoder": "none"} | {k: options.pop(k) for k in names if k in options}
    prompt = ptuning.Prompt(template, answer="capital", **about)
    ptuning.train(
        model, TOKENIZER, prompt, FACTS, **{"epochs": 3, "batch_size": 2, "seed": 1} | options
    )
    return prompt.vectors


def asking() -> ptuning.Prompt:
    prompt = ptuning.Prompt(
        "The {country} [P*4]: [MASK]",
        answer="capital",
        verbalizer={"Paris": "Paris", "Rome": "Rome"},
    )
    prompt.vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    return prompt


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_predictions_beside_a_training_change_nothing_in_it_nor_it_in_them(template: str) -> None:
    model = tiny.model()
    prompt = asking()
    predict = partial(ptuning.predict_details, model, TOKENIZER, prompt, FACTS)
    alone, expected, rounds = trained(model, template, dev=FACTS), predict(), [0]

    def ask() -> None:
        assert predict() == expected
        with ptuning.attach(model, TOKENIZER, prompt):
            rounds[0] += 1

    for _ in range(4):
        (got,) = together(partial(trained, model, template, dev=FACTS), beside=ask)
        assert torch.equal(got, alone)
    assert rounds[0] > 10
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures("on_cpu")
def test_trainings_of_one_model_at_the_same_time_get_the_numbers_of_one_alone() -> None:
    model = tiny.model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    kinds = [
        partial(trained, model, encoder="none"),
        partial(trained, model, encoder="mlp", epochs=2),
        partial(trained, model, encoder="lstm", encoder_dropout=0.5),
        partial(
            trained, model, encoder="lstm", encoder_dropout=0.5, seed=2, population=2, dev=FACTS
        ),
    ]
    alone = [train() for train in kinds]
    for _ in range(4):
        assert all(map(torch.equal, together(*kinds), alone))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not is_initialized()  # accelerate's state: the next training may have another precision


@pytest.mark.usefixtures("on_cpu")
def test_trainings_of_two_models_at_the_same_time_get_the_numbers_of_one_alone() -> None:
    kinds = [
        partial(trained, tiny.model(), encoder="lstm", encoder_dropout=0.3),
        partial(trained, tiny.model("gpt2"), encoder="lstm", encoder_dropout=0.3),
    ]
    alone = [train() for train in kinds]
    for _ in range(6):
        assert all(map(torch.equal, together(*kinds), alone))


@pytest.mark.usefixtures("on_cpu")
def test_a_training_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tiny.model())  # what is imported by the first one may set variables
    changed: list[Any] = []
    monkeypatch.setattr(os, "putenv", lambda *change: changed.append(change))
    monkeypatch.setattr(os, "unsetenv", lambda *change: changed.append(change))
    trained(tiny.model())
    trained(tiny.model(), mixed_precision="bf16", dev=FACTS, population=2)
    assert changed == []  # tokenizers read a variable with each batch, without Python's lock


def test_predictions_of_a_model_in_train_mode_never_see_dropout() -> None:
    model = tiny.model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    predict = partial(ptuning.predict_details, model, TOKENIZER, asking(), FACTS)
    expected = predict()

    def work() -> None:
        for _ in range(40):
            assert predict() == expected

    together(*[work] * 4)
    assert model.training


def test_a_training_that_changes_the_weights_is_refused_beside_another() -> None:
    model = tiny.model()
    refused: list[str] = []

    def listener(progress: Any) -> None:
        def other(**options: Any) -> None:
            with pytest.raises(InputError, match="in use by another training") as caught:
                trained(model, **options)
            refused.append(str(caught.value))

        if not refused:
            together(partial(other, tune_model=True))

    alone = trained(tiny.model())
    assert torch.equal(trained(model, listener=listener), alone) and len(refused) == 1
    tuned = trained(tiny.model(), tune_model=True)

    def tuning_listener(progress: Any) -> None:
        with pytest.raises(InputError, match="its weights are being trained"):
            together(partial(trained, model))

    assert torch.equal(trained(model, tune_model=True, listener=tuning_listener), tuned)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures("on_cpu")
def test_what_a_trainer_drives_may_stay_open_beside_a_training() -> None:
    model = tiny.model()
    alone = trained(model)
    prompt = ptuning.Prompt(TEMPLATES["around the field"], answer="capital", encoder="mlp")
    module, data, collator = ptuning.trainer_parts(model, TOKENIZER, prompt, FACTS)
    batch = collator(data)

    def gradients() -> list[Tensor]:
        module.zero_grad()
        module(**batch)["loss"].backward()
        return [p.grad.clone() for p in module.members.parameters() if p.grad is not None]

    expected = gradients()

    def step() -> None:
        assert all(map(torch.equal, gradients(), expected))

    for _ in range(4):
        (got,) = together(partial(trained, model), beside=step)
        assert torch.equal(got, alone)
    assert not any(p.requires_grad for p in model.parameters())
    module.finish(prompt)
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_is_trained_while_other_threads_use_it() -> None:
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft_compat.get_peft_model(tiny.model(), config).eval()
    ids = torch.randint(5, 400, (2, 6))

    def train() -> list[Tensor]:
        gradients = []
        for _ in range(25):
            loss = model(input_ids=ids, labels=ids).loss
            gradients.append(torch.autograd.grad(loss, list(model.prompt_encoder.parameters())))
        return [gradient for step in gradients for gradient in step]

    expected = train()
    with torch.no_grad():
        logits = model(input_ids=ids).logits

    @torch.no_grad()
    def ask() -> None:
        assert torch.equal(model(input_ids=ids).logits, logits)

    for _ in range(3):
        for got in together(train, train, beside=ask):
            assert all(map(torch.equal, got, expected))
