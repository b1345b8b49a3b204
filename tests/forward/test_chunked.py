"""Losses in chunks of positions equal those of all logits at once, in value and gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import ptuning
from ptuning.backbone.injection import Injector
from ptuning.forward import chunked, output_head
from ptuning.forward.plain import answer_logits, example_losses, examples_right
from ptuning.forward.prefix_store import PrefixStore
from ptuning.rendering.collate import IGNORED, Batch
from ptuning.rendering.layout import Sequence
from ptuning.rendering.render import Rendered

from .. import tiny
from .test_divergence import spoken
from .test_plain import KIND, attached, batch_of, examples_for, sequence

WEIGHTS = torch.tensor([1.0, -0.5, 2.0])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LARGEST", 0)
    monkeypatch.setattr(chunked, "POSITIONS", 4)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each chunked loss has had."""
    seen: list[int] = []
    original = chunked._by_position

    def by_position(unread: Any, batch: Batch) -> Any:
        seen.append(int((batch.answers != IGNORED).sum()))
        return original(unread, batch)

    monkeypatch.setattr(chunked, "_by_position", by_position)
    return seen


def hold_together(model: Any, rows: Any, batch: Batch, prefix: Any = None) -> None:
    logits = answer_logits(model, batch, prefix)
    expected = example_losses(logits, batch, None)
    right = examples_right(logits, batch, None)
    (expected_grad,) = torch.autograd.grad((expected * WEIGHTS).sum(), rows)
    assert expected_grad.abs().max() > 1e-3
    losses = chunked.losses(model, batch, None, prefix)
    (grad,) = torch.autograd.grad((losses * WEIGHTS).sum(), rows)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)
    figures = chunked.losses_and_right(model, batch, None, prefix)
    torch.testing.assert_close(figures[0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(figures[1], right)
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_an_answer_is_right_though_others_are_longer(family: str, small_chunks: None) -> None:
    model, _ = attached(family)
    batch = batch_of(family, examples_for(KIND[family]))
    said = answer_logits(model.requires_grad_(False), batch).argmax(-1)
    batch = replace(batch, answers=torch.where(batch.answers == IGNORED, IGNORED, said))
    assert (batch.answers == IGNORED).any()
    assert chunked.losses_and_right(model, batch, None)[1].all()


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_chunks_equal_the_plain_twin(family: str, small_chunks: None, chunks: list[int]) -> None:
    model, rows = attached(family)
    model.requires_grad_(False)
    hold_together(model, rows, batch_of(family, examples_for(KIND[family])))
    assert chunks == [6, 6]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_chunks_of_a_teachers_lessons_equal_the_plain_twin(
    family: str, small_chunks: None, chunks: list[int]
) -> None:
    model, rows = attached(family)
    model.requires_grad_(False)
    hold_together(model, rows, batch_of(family, spoken(examples_for(KIND[family]), 7)))
    assert chunks == [6, 6]


SCALED: dict[str, dict[str, Any]] = {
    "Gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("name", list(SCALED))
def test_what_a_model_does_behind_its_head_is_done(
    name: str, small_chunks: None, chunks: list[int]
) -> None:
    values = {**tiny.FAMILIES["llama"][2], **SCALED[name]}
    values |= {"vocab_size": 400, "initializer_range": 0.5}
    config = getattr(transformers, f"{name}Config")(**values)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    rows = torch.randn(3, 32).requires_grad_()
    Injector(model).add(rows)
    hold_together(model, rows, batch_of("llama", examples_for("causal")))
    assert chunks == [6, 6]


def test_a_model_that_does_something_else_takes_the_plain_path(
    small_chunks: None, chunks: list[int]
) -> None:
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            output.logits = output.logits.roll(1, -1) * 3
            return output

    model = Odd(tiny.model("llama").config).eval().requires_grad_(False)
    rows = torch.randn(3, 32).requires_grad_()
    Injector(model).add(rows)
    hold_together(model, rows, batch_of("llama", examples_for("causal")))
    assert chunks == [] and model in output_head._other


@pytest.mark.parametrize("shared", [False, True])
def test_chunks_behind_kept_prefixes(shared: bool, small_chunks: None, chunks: list[int]) -> None:
    """With one prefix for all the rows stand packed in one row of the model."""
    model, rows = attached("llama")
    model.requires_grad_(False)
    text = tuple(range(20, 40))
    examples = []
    for number, answer in enumerate(((30,), (50, 51, 52), (70, 71))):
        own = (*text, *(() if shared else (60 + number,)))
        ids = (*own, *sequence("causal", (), answer).ids)
        examples.append(Rendered((Sequence(ids, len(ids), answer),)))
    batch = batch_of("llama", examples)
    store = PrefixStore(model)
    assert store(batch) is not None
    hold_together(model, rows, batch, store)
    assert chunks == [6, 6]
    expected = example_losses(answer_logits(model, batch), batch, None)
    torch.testing.assert_close(chunked.losses(model, batch, None, store), expected)


def test_short_answers_and_labels_take_the_plain_path(
    chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = attached("llama")
    model.requires_grad_(False)
    batch = batch_of("llama", examples_for("causal"))
    numbers = batch.answers.numel() * 400
    monkeypatch.setattr(chunked, "LARGEST", numbers)
    chunked.losses(model, batch, None)
    assert not chunks
    monkeypatch.setattr(chunked, "LARGEST", numbers - 1)
    chunked.losses(model, batch, None)
    assert chunks == [6]
    labelled = batch_of(
        "llama", [Rendered(((e.sequences[0]),) * 2, label=0) for e in examples_for("causal")]
    )
    chunked.losses(model, labelled, torch.tensor([0, 1]))
    assert chunks == [6]


def test_half_precision_stays_close(small_chunks: None, chunks: list[int]) -> None:
    model, rows = attached("llama")
    model.requires_grad_(False)
    batch = batch_of("llama", examples_for("causal"))
    (expected,) = torch.autograd.grad(chunked.losses(model, batch, None).sum(), rows)
    with torch.autocast("cpu", torch.bfloat16):
        losses = chunked.losses(model, batch, None)
    (grad,) = torch.autograd.grad(losses.sum(), rows)
    assert losses.dtype == torch.float32 and chunks == [6, 6]
    torch.testing.assert_close(grad, expected, atol=0.02, rtol=0.1)


def test_gradients_too_small_for_half_precision_are_kept_for_the_loss_that_is_scaled() -> None:
    weight = 1e-7 * torch.randn(8, 40)
    hidden, answers = torch.randn(5, 8), torch.arange(5)
    found = []
    for dtype in (torch.float32, torch.float16):
        own = hidden.half().to(dtype).requires_grad_()
        losses, _ = chunked._Chunks.apply(own, answers, [], lambda part: part.float() @ weight)
        (losses.sum() * 2.0**16).backward()
        found.append(own.grad.float())
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], atol=2e-4, rtol=2e-2)


def test_no_more_logits_are_there_than_of_one_chunk(small_chunks: None) -> None:
    model, _ = attached("llama")
    model.requires_grad_(False)
    sizes: list[int] = []
    head: nn.Module = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    batch = batch_of("llama", examples_for("causal"))
    chunked.losses(model, batch, None).sum().backward()
    assert max(sizes) == 4 * 400 < batch.answers.numel() * 400


def test_training_gives_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": "France", "answer": "Paris is a city"}, {"a": "Oslo", "answer": "Norway"}] * 3
    vectors, histories = [], []
    for largest in (2**40, 0):
        monkeypatch.setattr(chunked, "LARGEST", largest)
        prompt = ptuning.Prompt("[P*3] {a} [MASK]")
        result = ptuning.train(
            tiny.model("llama"), tiny.tokenizer(), prompt, rows, rows, epochs=12, batch_size=4
        )
        vectors.append(prompt.trained_vectors())
        histories.append(result.history)
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=0)
    assert histories[1] == [pytest.approx(record, abs=1e-5) for record in histories[0]]
