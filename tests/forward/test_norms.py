"""Norms with a gradient of few passes against transformers' own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import ptuning
from ptuning.forward import norms
from ptuning.forward.norms import own_norms, plain_norms

from .. import tiny
from .test_attention import model_of

FULL, HALF = torch.float32, torch.bfloat16
SERVED = {"Llama": 5, "Mistral": 5, "Qwen2": 5, "Qwen3": 9, "Phi3": 5, "Granite": 5}
"""Families, and the norms of two layers and behind them."""


def weighted(family: str, dtype: torch.dtype = FULL) -> Any:
    """A frozen random model; its norms have weights unlike one."""
    model = model_of(family).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(1.0, 0.3)
    return model.to(dtype)


def used(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What goes through our norm."""
    seen, plain = [], norms._Norm.apply

    def noted(x: Tensor, *others: Any) -> Tensor:
        seen.append(x)
        return plain(x, *others)  # type: ignore[no-any-return]

    monkeypatch.setattr(norms._Norm, "apply", noted)
    return seen


def found(model: Any, own: bool) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the inputs."""
    torch.manual_seed(1)
    vectors = torch.randn(2, 7, model.config.hidden_size).to(model.dtype).requires_grad_()
    if own:
        with own_norms(model):
            logits = model(inputs_embeds=vectors).logits
    else:
        logits = model(inputs_embeds=vectors).logits
    logits.float().logsumexp(-1).sum().backward()
    assert vectors.grad is not None
    return logits.detach(), vectors.grad.float()


@pytest.mark.parametrize("family", SERVED)
def test_logits_are_the_same_to_the_bit_and_gradients_to_rounding(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = weighted(family)
    plain, exact = found(model, False)
    seen = used(monkeypatch)
    ours, gradient = found(model, True)
    assert len(seen) - _trials(model) == SERVED[family]
    assert torch.equal(ours, plain)
    torch.testing.assert_close(gradient, exact, atol=1e-6, rtol=1e-5)
    model.to(HALF)
    plain, rounded = found(model, False)
    ours, gradient = found(model, True)
    assert torch.equal(ours, plain)
    assert (gradient - exact).norm() < 1.5 * (rounded - exact).norm() + 1e-3


def _trials(model: Any) -> int:
    """How often norms were tried when the model was first met."""
    return len(norms._served(model))


@pytest.mark.parametrize("family", ["Gemma", "Gemma2", "Olmo2", "Cohere"])
def test_norms_of_another_formula_stay_as_they_are_or_give_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = weighted(family)
    plain, exact = found(model, False)
    ours, gradient = found(model, True)
    assert torch.equal(ours, plain)
    torch.testing.assert_close(gradient, exact, atol=1e-6, rtol=1e-5)
    if family.startswith("Gemma"):  # (1 + w) x r
        assert norms._served(model) == []


def test_only_a_norm_of_one_weight_that_gives_the_same_is_served() -> None:
    class WrongRMSNorm(nn.Module):
        def __init__(self, power: int):
            super().__init__()
            self.weight = nn.Parameter(torch.full((8,), 1.5))
            self.eps, self.power = 1e-6, power

        def forward(self, x: Tensor) -> Tensor:
            r = (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
            return self.weight**self.power * (x * r)

    assert norms._is_alike(WrongRMSNorm(1))
    assert not norms._is_alike(WrongRMSNorm(2))
    assert not norms._is_alike(nn.LayerNorm(8))
    assert not norms._is_alike(nn.RMSNorm(8, eps=1e-6).to(torch.float16))
    no_number = WrongRMSNorm(1)
    no_number.eps = None  # type: ignore[assignment]
    assert not norms._is_alike(no_number)


@pytest.mark.parametrize(("dtype", "served"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_norm_that_rounds_elsewhere_is_not_served(dtype: torch.dtype, served: bool) -> None:
    norm = Olmo2RMSNorm(64)  # the weight comes before the rounding
    nn.init.normal_(norm.weight)
    assert norms._is_alike(norm.to(dtype)) == served


def test_nothing_is_left_and_nothing_changes_where_no_gradient_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = weighted("Llama")
    norms._served(model)
    seen = used(monkeypatch)
    ids = torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad(), own_norms(model):
        model(input_ids=ids)
    with own_norms(model):  # frozen as a whole
        model(input_ids=ids)
    with plain_norms():
        found(model, True)
    assert seen == []
    with pytest.raises(ZeroDivisionError), own_norms(model), own_norms(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())
    found(model, False)
    assert seen == []


def test_weights_that_are_trained_keep_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = weighted("Llama")
    norms._served(model)
    model.requires_grad_(True)
    seen = used(monkeypatch)
    found(model, True)
    assert seen == []
    weight = model.model.layers[0].input_layernorm.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_forwards_that_overlap_take_ours_away_with_the_last() -> None:
    model = weighted("Llama")
    first, second = own_norms(model), own_norms(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert any("forward" in vars(module) for module in model.modules())
    second.__exit__(None, None, None)
    assert not any("forward" in vars(module) for module in model.modules())


def test_another_thread_has_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = weighted("Llama")
    norms._served(model)
    seen = used(monkeypatch)
    with own_norms(model):
        thread = threading.Thread(target=found, args=(model, False))
        thread.start()
        thread.join()
    assert seen == []


@pytest.mark.usefixtures("on_cpu")
def test_a_training_uses_them_and_gives_what_plain_norms_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = used(monkeypatch)
    rows = [{"text": f"{n} France", "answer": "Paris"} for n in range(8)]
    vectors = []
    for plain in (True, False):
        model, tokenizer = tiny.model("llama"), tiny.tokenizer()
        prompt = ptuning.Prompt("[P*3] {text} [P*2] is [MASK]")
        settings: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-2, "verbose": False}
        if plain:
            with plain_norms():
                ptuning.train(model, tokenizer, prompt, rows, rows[:2], **settings)
            assert seen == []
        else:
            ptuning.train(model, tokenizer, prompt, rows, rows[:2], **settings)
            assert len(seen) > 10
        vectors.append(prompt.trained_vectors())
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=0)


def test_what_others_put_before_a_norm_since_is_called_and_stays() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    rows = [{"a": "it rains", "label": "yes"}, {"a": "Oslo", "label": "no"}] * 2

    def train() -> None:
        prompt = ptuning.Prompt("[P*2] {a} [MASK]", verbalizer={"yes": "yes", "no": "no"})
        ptuning.train(model, tokenizer, prompt, rows, epochs=1, verbose=False)

    train()
    norm: Any = model.model.norm
    plain, calls = norm.forward, []

    def put(hidden: Tensor) -> Any:
        calls.append(hidden.shape)
        return plain(hidden)

    norm.forward = put
    train()
    assert calls and norm.forward is put
