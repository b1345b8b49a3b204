"""``torch.export`` and ``torch.compile(fullgraph=True)``: no look at values, the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptuning.peft_compat import PromptEncoderConfig, get_peft_model

from .. import tiny
from .test_calls import base_model

IDS = torch.tensor([[15, 16, 17, 18, 19, 20], [30, 31, 32, 33, 34, 35]])
MASKS = {
    "none": torch.ones_like(IDS),
    "left": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
}
ONE_LAYER: dict[str, dict[str, Any]] = {"bart": {"encoder_layers": 1, "decoder_layers": 1}}


class Logits(nn.Module):
    """A wrapper as a graph's user has it: tensors in, a tensor out."""

    def __init__(self, inner: Any, task: str | None):
        super().__init__()
        self.inner, self.task = inner, task

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        more: dict[str, Any] = {} if self.task in ("SEQ_CLS", "TOKEN_CLS") else {"use_cache": False}
        if self.task == "SEQ_2_SEQ_LM":
            more["decoder_input_ids"] = ids[:, :3]
        return self.inner(input_ids=ids, attention_mask=mask, **more).logits


def wrapped(task: str | None, family: str) -> Logits:
    layers = ONE_LAYER.get(family, {"num_hidden_layers": 1})
    if family == "gpt2":
        layers = {"n_layer": 1}
    config = PromptEncoderConfig(task_type=task, num_virtual_tokens=3, encoder_hidden_size=16)
    base = base_model(task, family, **layers)
    return Logits(get_peft_model(base, config).eval(), task).eval()


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


KINDS = [
    ("CAUSAL_LM", "llama"),
    ("CAUSAL_LM", "gpt2"),
    ("TOKEN_CLS", "bert"),
    ("SEQ_CLS", "llama"),
    ("SEQ_2_SEQ_LM", "bart"),
]


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize(("task", "family"), KINDS)
def test_an_exported_model_gives_the_same(task: str, family: str, side: str) -> None:
    model = wrapped(task, family)
    with torch.no_grad():
        expected = model(IDS, MASKS[side])
        exported = torch.export.export(model, (IDS, MASKS["none"]), strict=False).module()
        torch.testing.assert_close(exported(IDS, MASKS[side]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(("task", "family"), KINDS)
def test_one_graph_gives_the_same(task: str, family: str) -> None:
    model = wrapped(task, family)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for side in MASKS:
            expected = model(IDS, MASKS[side])
            torch.testing.assert_close(compiled(IDS, MASKS[side]), expected, atol=1e-5, rtol=1e-5)
        for parameter in model.inner.prompt_encoder.parameters():
            parameter.mul_(0.5)  # an optimizer's step is seen
        changed = compiled(IDS, MASKS["left"])
        torch.testing.assert_close(changed, model(IDS, MASKS["left"]), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_one_graph_trains() -> None:
    model = wrapped("CAUSAL_LM", "llama").train()
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        call(IDS, MASKS["right"]).square().mean().backward()
        trained = model.inner.prompt_encoder.parameters()
        gradients.append([p.grad.clone() for p in trained if p.grad is not None])
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


def test_a_token_that_is_spelled_like_padding_counts_in_a_graph_too() -> None:
    model = wrapped("SEQ_CLS", "gpt2")
    pad = model.inner.base_model.config.pad_token_id
    ids = IDS.clone()
    ids[0, -1] = pad  # a real token, as the end-of-sequence token often is
    with torch.no_grad():
        expected = model(ids, MASKS["none"])
        exported = torch.export.export(model, (IDS, MASKS["none"]), strict=False).module()
        torch.testing.assert_close(exported(ids, MASKS["none"]), expected, atol=1e-5, rtol=1e-5)
    assert tiny.FAMILIES["gpt2"]
