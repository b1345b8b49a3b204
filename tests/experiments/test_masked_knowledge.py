"""Masked LMs that know facts: tiny models trained until they do, then asked by a prompt."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import ptuning
from ptuning.forward.plain import answer_logits, example_losses
from ptuning.inference.evaluation import manual_score, teacher_forced
from ptuning.rendering.render import Renderer

from .. import tiny

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Austria": "Vienna",
    "Germany": "Berlin",
    "Poland": "Warsaw",
}
FACTS = [{"country": country, "capital": capital} for country, capital in CAPITALS.items()]
FORMS = (
    "the capital of {country} is [MASK]",
    "we know the capital of {country} is [MASK] today",
    "and so the big one is: the capital of {country} is [MASK]",
    "{country} has the capital [MASK] now",
    "so {country} has the capital [MASK]",
    "[MASK] is the capital of {country}",
    "yes [MASK] is the capital of {country}",
    "{country}: [MASK]",
    "see {country}: [MASK] and go",
)
FAMILIES = ("bert", "roberta", "modernbert")


@cache
def knowing(family: str) -> tuple[Any, Any]:
    """A model that has learned the facts by heart, in several sentences."""
    tokenizer = tiny.tokenizer(around=True)
    model = tiny.model(
        family, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96
    ).train(False)
    renderers = [Renderer(tokenizer, ptuning.Task(f, answer="capital"), "masked") for f in FORMS]
    examples = [renderer(fact) for renderer in renderers for fact in FACTS]
    batch = tiny.batch(model, renderers[0], examples, [0] * len(examples))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        example_losses(answer_logits(model, batch), batch, None).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_knows_the_facts_where_it_learned_them(family: str) -> None:
    model, tokenizer = knowing(family)
    lengths = {len(tokenizer(f" {c}", add_special_tokens=False)[0]) for c in CAPITALS.values()}
    assert len(lengths) > 1  # one mask for some answers, several for others
    for form in FORMS:
        task = ptuning.Task(form, answer="capital")
        assert manual_score(model, tokenizer, task, FACTS) == 1.0


@pytest.mark.parametrize(
    "template", ["[MASK] [P*2] {country} [P*2]", "[P*2] capital {country} [P] [MASK] [P:today]"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_brings_out_facts_with_the_slot_anywhere(family: str, template: str) -> None:
    model, tokenizer = knowing(family)
    prompt = ptuning.Prompt(template, answer="capital", encoder="none")
    before, _ = teacher_forced(model, tokenizer, prompt.manual(), FACTS)
    ptuning.train(
        model,
        tokenizer,
        prompt,
        FACTS,
        FACTS,
        epochs=60,
        batch_size=2,
        learning_rate=0.1,
        patience=0,
    )
    after, _ = teacher_forced(model, tokenizer, prompt, FACTS)
    assert after >= max(before, 5 / 6)
    answers = ptuning.predict(model, tokenizer, prompt, FACTS, candidates=list(CAPITALS.values()))
    assert sum(a == fact["capital"] for a, fact in zip(answers, FACTS, strict=True)) >= 5


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_finds_facts_that_it_was_not_trained_on(family: str) -> None:
    """What it brings out is the model's knowledge, not what it learned itself."""
    model, tokenizer = knowing(family)
    prompt = ptuning.Prompt(
        "[P:the capital of] {country} [P:is] [MASK] [P*2]", answer="capital", encoder="none"
    )
    seen, unseen = FACTS[:4], FACTS[4:]
    ptuning.train(model, tokenizer, prompt, seen, epochs=20, batch_size=4, learning_rate=0.02)
    accuracy, _ = teacher_forced(model, tokenizer, prompt, unseen)
    assert accuracy == 1.0
