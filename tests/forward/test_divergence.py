"""Losses against a teacher's distribution equal the Kullback-Leibler divergence by its formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from ptuning.forward import chunked, divergence
from ptuning.forward.label_scores import Words
from ptuning.forward.plain import answer_logits, example_losses, examples_right
from ptuning.rendering.layout import Sequence
from ptuning.rendering.lesson import Lesson
from ptuning.rendering.render import Rendered

from .. import tiny
from .test_plain import KIND, START, attached, batch_of, examples_for, sequence


def some_shares(rows: int, count: int, whole: float = 1.0) -> Any:
    shares = torch.rand(rows, count, generator=torch.Generator().manual_seed(rows)).softmax(-1)
    return (whole * shares).numpy()


def spoken(examples: list[Rendered], most: int) -> list[Rendered]:
    """With lessons about `most` tokens at each place, which have 0.9 of all."""
    made = []
    for example in examples:
        (one,) = example.sequences
        ids = numpy.stack([numpy.arange(most) * 3 + token for token in one.answer])
        shares = some_shares(len(one.answer), most, 0.9)
        made.append(replace(example, lesson=Lesson("", shares, one.answer, ids)))
    return made


def kl(shares: Tensor, probabilities: Tensor) -> Tensor:
    return (shares * (shares.log() - probabilities.log())).sum()


def logits_of(model: Any, family: str, one: Sequence) -> Tensor:
    """Logits ``(K, vocabulary)`` where an answer is, unpadded."""
    kind, answer = KIND[family], one.answer
    ids = [399 - i if i < 0 else i for i in one.ids]
    if kind == "causal":
        whole = model(input_ids=torch.tensor([[*ids, *answer]])).logits[0]
        return whole[len(ids) - 1 : len(ids) - 1 + len(answer)]
    decoder = torch.tensor([[START[family], *answer[:-1]]])
    return model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder).logits[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "t5", "bart"])
def test_of_tokens_the_others_count_as_one_more(family: str) -> None:
    model, rows = attached(family)
    examples = spoken(examples_for(KIND[family]), 7)
    losses = chunked.losses(model, batch_of(family, examples), None)
    expected = []
    for example in examples:
        assert example.lesson is not None
        places = logits_of(model, family, example.sequences[0]).softmax(-1)
        shares, ids = (torch.from_numpy(t) for t in (example.lesson.shares, example.lesson.likely))
        expected.append(
            torch.stack(
                [
                    kl(torch.cat([q, 1 - q.sum()[None]]), torch.cat([p[i], 1 - p[i].sum()[None]]))
                    for p, q, i in zip(places, shares, ids, strict=True)
                ]
            ).sum()
        )
    torch.testing.assert_close(losses, torch.stack(expected), atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(losses.sum(), rows)
    (plain_grad,) = torch.autograd.grad(torch.stack(expected).sum(), rows)
    assert plain_grad.abs().max() > 1e-3
    torch.testing.assert_close(grad, plain_grad, atol=1e-5, rtol=1e-5)


WORDS = Words.of([0, 0, 1, 2])
"""The first label has two words."""


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.parametrize("long", [False, True])
def test_of_labels_their_words_are_pooled(family: str, long: bool) -> None:
    model, rows = attached(family)
    words = ((30,), (50, 51), (40, 41, 42), (9,)) if long else ((30,), (50,), (40,), (9,))
    shares = some_shares(2, 3)
    examples = []
    for number, text in enumerate(((20, 21, 22), (40, 41, 42, 43, 44))):
        sequences = tuple(sequence(KIND[family], text, word) for word in words)
        lesson = Lesson("", shares[number])
        short = {} if long else {"label_ids": (30, 50, 40, 9)}
        own = sequences if long else sequences[:1]
        examples.append(Rendered(own, label=int(shares[number].argmax()), lesson=lesson, **short))
    batch = batch_of(family, examples)
    losses, right = chunked.losses_and_right(model, batch, WORDS)
    one_by_one = [replace(example, lesson=None) for example in examples]
    nll = torch.stack(
        [
            example_losses(
                answer_logits(model, plain := batch_of(family, [replace(e, label=label)])),
                plain,
                WORDS,
            )[0]
            for e in one_by_one
            for label in range(3)
        ]
    ).view(2, 3)
    expected = torch.stack(
        [kl(torch.from_numpy(q), (-n).exp()) for q, n in zip(shares, nll, strict=True)]
    )
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert right.tolist() == (nll.argmin(1).numpy() == shares.argmax(1)).tolist()
    losses = chunked.losses(model, batch, WORDS)
    (grad,) = torch.autograd.grad(losses.sum(), rows)
    (plain_grad,) = torch.autograd.grad(expected.sum(), rows)
    torch.testing.assert_close(grad, plain_grad, atol=1e-5, rtol=1e-5)
    logits = answer_logits(model, batch)
    torch.testing.assert_close(example_losses(logits, batch, WORDS), losses)
    assert torch.equal(examples_right(logits, batch, WORDS), right)


def test_who_says_the_same_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(5, 40).requires_grad_()
    shares = logits.detach().softmax(-1)
    known = shares.topk(6, dim=-1)
    losses = divergence.of_tokens(logits, known.values, known.indices)
    losses = torch.cat([losses, divergence.of_labels(logits, shares)])
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(losses, torch.zeros(10), atol=1e-6, rtol=0)
    torch.testing.assert_close(grad, torch.zeros(5, 40), atol=1e-6, rtol=0)


def test_all_that_a_model_can_say_may_be_among_the_likeliest() -> None:
    logits = (3 * torch.randn(4, 9)).requires_grad_()
    shares, ids = torch.randn(4, 9).softmax(-1), torch.arange(9).expand(4, 9)
    losses = divergence.of_tokens(logits, shares, ids)
    expected = torch.stack([kl(q, p) for q, p in zip(shares, logits.softmax(-1), strict=True)])
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(torch.autograd.grad(losses.sum(), logits)[0]).all()
