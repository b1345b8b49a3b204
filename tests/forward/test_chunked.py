"""Losses in chunks of positions equal those of all logits at once, in value and gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import ptuning
from ptuning.backbone.injection import Injector
from ptuning.forward import batching, chunked, output_head
from ptuning.forward.label_scores import Words
from ptuning.forward.plain import answer_logits, example_losses, examples_right, word_scores
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
    chunked.losses(model, labelled, Words.of([0, 1]))
    assert chunks == [6]


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_label_words_of_several_tokens_in_chunks_equal_the_plain_twin(
    family: str, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "LARGEST_OF_WORDS", 0)
    monkeypatch.setattr(chunked, "POSITIONS", 4)
    model, rows = attached(family)
    model.requires_grad_(False)
    kind = KIND[family]
    texts, words = [(20, 21, 22), (40, 41)], [(50, 51), (30,), (70, 71, 72)]
    examples = [Rendered(tuple(sequence(kind, t, w) for w in words), label=1) for t in texts]
    batch, owner = batch_of(family, examples), Words.of(range(3))
    expected = word_scores(answer_logits(model, batch), batch, 3)
    torch.testing.assert_close(chunked.word_scores(model, batch, 3), expected, atol=1e-5, rtol=1e-5)
    assert chunks == [12]
    loss = F.cross_entropy(expected, batch.labels, reduction="none")  # type: ignore[arg-type]
    found = chunked.losses(model, batch, owner)
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)
    (wanted,) = torch.autograd.grad((loss * WEIGHTS[:2]).sum(), rows)
    (grad,) = torch.autograd.grad((found * WEIGHTS[:2]).sum(), rows)
    torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-5)
    shares = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])  # a teacher's, of labels
    taught = replace(batch, taught=shares)
    torch.testing.assert_close(
        chunked.losses(model, taught, owner),
        example_losses(answer_logits(model, batch), taught, owner),
    )
    assert chunked.reads_in_chunks(model, batch, 1.0)


def test_no_more_rows_are_compared_or_asked_however_many_label_words_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each word of several tokens is a row of the model's, and a row's logits are a vocabulary."""
    tokenizer = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer)).requires_grad_(False)
    monkeypatch.setattr(chunked, "LARGEST_OF_WORDS", 64 * len(tokenizer))
    monkeypatch.setattr(chunked, "POSITIONS", 16)
    monkeypatch.setattr(chunked, "COMPARED", 8)
    rows: list[int] = []
    positions: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: positions.append(output[..., 0].numel())
    )
    collated = batching.collate

    def collate(examples: Any, *args: Any, **options: Any) -> Batch:
        batch = collated(examples, *args, **options)
        rows.append(len(batch.input_ids))
        return batch

    monkeypatch.setattr(batching, "collate", collate)
    monkeypatch.setattr(batching, "_SEQUENCES", 100)
    words = [f"{a} {b}" for a in ("Paris", "Rome", "Oslo") for b in "abcdefghij"]
    task = ptuning.Task("{text} is [MASK]", verbalizer={word: word for word in words})
    texts = [{"text": f"it rains {n}"} for n in range(10)]
    together = ptuning.predict_details(model, tokenizer, task, texts)
    assert max(rows) <= 100 and sum(rows) == 300
    assert max(positions) <= 16
    monkeypatch.setattr(chunked, "LARGEST_OF_WORDS", 2**30)
    plain = ptuning.predict_details(model, tokenizer, task, texts, batch_size=10)
    assert rows[-1] == 300 and max(positions) >= 300
    for one, other in zip(together, plain, strict=True):
        assert one.answer == other.answer
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


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
