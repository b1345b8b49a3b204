"""Label words without the rest of the vocabulary, against their plain twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ptuning
from ptuning.forward import label_words, output_head
from ptuning.forward.label_words import label_word_scores
from ptuning.forward.plain import answer_logits, word_scores
from ptuning.forward.prefix_store import PrefixStore
from ptuning.rendering.collate import Batch
from ptuning.rendering.render import Renderer, render_all
from ptuning.training.population import Member, Population

from .. import tiny

ROWS = [
    {"text": "The capital of France is Paris. " * n, "label": "yes" if n % 2 else "no"}
    for n in (1, 3, 2)
]
TEMPLATE = "{text} [P*3] city? [MASK]"


@pytest.fixture(autouse=True)
def no_model_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_words, "_alike", set())
    monkeypatch.setattr(output_head, "_other", set())


def twice(
    family: str, run: Callable[[Any, Batch], Tensor], words: tuple[str, str] = ("yes", "not")
) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """The model, and what `run` gives with its gradient at the first and at the second call."""
    model = tiny.model(family)
    tokenizer = tiny.tokenizer()
    prompt = ptuning.Prompt(
        TEMPLATE, answer="label", verbalizer={"yes": words[0], "no": words[1]}, encoder="none"
    )
    kind = {"t5": "seq2seq", "bart": "seq2seq"}.get(
        family, "masked" if family in tiny.MASKED else "causal"
    )
    renderer = Renderer(tokenizer, prompt, kind, 128)
    examples = render_all(renderer, ROWS, "training")
    found = []
    for _ in range(2):
        member = Member(prompt, model, 0, [None] * renderer.count)
        with Population(tiny.engine(model, tokenizer), [member], renderer.owner) as population:
            batch = tiny.batch(model, renderer, examples, population.first_ids() * len(ROWS))
            with population.one_table():
                scores = run(model, batch)
                scores.square().sum().backward()
        (gradient,) = (p.grad for p in member.parameters())
        found.append((scores.detach(), gradient))
    return model, found


def plain(model: Any, batch: Batch) -> Tensor:
    return word_scores(answer_logits(model, batch), batch, 2)


def fast(model: Any, batch: Batch) -> Tensor:
    return label_word_scores(model, batch, 2)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_scores_and_gradients_are_the_plain_ones(family: str) -> None:
    _, (expected, _) = twice(family, plain)
    model, found = twice(family, fast)
    for got in found:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    if family != "bart":  # its logits get a bias of the whole vocabulary
        assert model in label_words._alike


def test_the_vocabulary_is_computed_the_first_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, inputs: Tensor) -> Tensor:
        if self.out_features == 400:
            seen.append(inputs.numel())
        return original(self, inputs)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    twice("llama", fast)
    assert seen[0] > 0 and seen[1:] == [0]


def test_words_of_several_tokens_take_the_plain_path() -> None:
    words = ("not a city", "Ra")
    _, (expected, _) = twice("llama", plain, words)
    model, found = twice("llama", fast, words)
    torch.testing.assert_close(found[1], expected)
    assert model not in label_words._alike


def test_a_model_that_makes_its_logits_in_another_way_takes_the_plain_path() -> None:
    expected = None
    for run in (plain, fast):

        def twisted(model: Any, batch: Batch, run: Any = run) -> Tensor:
            original = type(model).forward

            def forward(**inputs: Any) -> Any:
                output = original(model, **inputs)
                output.logits = 3 * output.logits
                return output

            model.forward = forward
            try:
                return run(model, batch)
            finally:
                del model.forward

        model, found = twice("llama", twisted)
        if expected is None:
            expected = found[0]
        torch.testing.assert_close(found, [expected, expected])
    assert model in output_head._other


def test_a_kept_prefix_and_packed_rows_are_served() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt = ptuning.Prompt(TEMPLATE, answer="label", verbalizer={"yes": "yes", "no": "not"})
    renderer = Renderer(tokenizer, prompt, "causal", 128)
    examples = render_all(renderer, [*ROWS, ROWS[0]], "training")
    member = Member(prompt, model, 0, [None] * renderer.count)
    with (
        Population(tiny.engine(model, tokenizer), [member], renderer.owner) as population,
        torch.no_grad(),
    ):
        for some in (examples, examples[:3]):  # packed; each row with its own prefix
            batch = tiny.batch(model, renderer, some, population.first_ids() * len(some))
            expected = plain(model, batch)
            for _ in range(2):
                got = label_word_scores(model, batch, 2, PrefixStore(model))
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
