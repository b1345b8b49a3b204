"""Rows of one prefix in one row of the model, against the same rows apart."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

import ptuning
from ptuning.backbone.traits import packs_rows
from ptuning.forward import packing
from ptuning.forward.plain import answer_logits
from ptuning.forward.prefix_store import PrefixStore
from ptuning.rendering.collate import Batch, collate
from ptuning.rendering.layout import Sequence
from ptuning.rendering.render import Rendered, Renderer, render_all
from ptuning.training.population import Member, Population

from .. import tiny

WORDS = {"yes": "not a city", "no": "Ra", "both": "Rome"}
ROWS = [
    {"country": "France and the big cities", "more": "x" * n, "label": label}
    for n, label in ((1, "yes"), (30, "no"), (9, "both"))
]
TEMPLATE = "Question about {country} and {more}: [P*3] is [P*2] [MASK]"


def step(model: Any, store: PrefixStore | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient where each example has a row for each of its words."""
    prompt = ptuning.Prompt(TEMPLATE, verbalizer=WORDS)
    renderer = Renderer(tiny.tokenizer(), prompt, "causal", 128)
    examples = render_all(renderer, ROWS, "training")
    member = Member(prompt, model, 0, [None] * renderer.count)
    engine = tiny.engine(model, renderer.tokenizer, store)
    with Population(engine, [member], renderer.owner) as population:
        batch = tiny.batch(model, renderer, examples, population.first_ids() * len(examples))
        loss = population.step(batch).sum()
        loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in member.parameters()])


def test_packed_rows_have_the_losses_and_gradients_of_rows_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("llama")
    packs: list[Any] = []
    original = packing.pack
    monkeypatch.setattr(
        "ptuning.forward.prefix_store.pack", lambda m, b: packs.append(original(m, b)) or packs[-1]
    )
    packed = step(model, PrefixStore(model))
    assert packs[0].input_ids.shape[0] == len(ROWS)
    torch.testing.assert_close(packed, step(model, None), atol=1e-5, rtol=0)


def test_a_segment_sees_the_prefix_and_itself_alone() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt = ptuning.Prompt(TEMPLATE, verbalizer=WORDS)
    renderer = Renderer(tokenizer, prompt, "causal", 128)
    examples = render_all(renderer, ROWS[:2], "training")
    batch = tiny.batch(model, renderer, examples, [0, 0])
    packed = packing.pack(model, batch)
    assert packed is not None and packed.group.tolist() == [0, 0, 0, 1, 1, 1]
    kept = packed.attention_mask.shape[3] - packed.attention_mask.shape[2]
    lengths = [len(prefix) for prefix in packed.prefixes]
    assert kept == max(lengths)
    for row, length in enumerate(lengths):
        seen = packed.attention_mask[row, 0]
        assert seen[:, kept - length : kept].all() and not seen[:, : kept - length].any()
        starts = (packed.position_ids[row] == length).nonzero().flatten().tolist()
        assert len(starts) >= len(WORDS)
        for start in starts[: len(WORDS)]:  # nothing before a segment's start but the prefix
            assert not seen[start, kept : kept + start].any()
            assert not seen[:start, kept + start :].any()


def test_many_prompts_on_one_document_share_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompts = []
    for size in range(1, 6):
        prompt = ptuning.Prompt(
            f"{{more}} about {{country}} [P*{size}] city? [MASK]", verbalizer={"a": "Ra", "b": "Ro"}
        )
        prompt.set_count(size)
        prompt.vectors = torch.randn(size, 32)
        prompts.append(prompt)
    shapes: list[tuple[int, ...]] = []
    forward = model.model.forward

    @functools.wraps(forward)
    def counted(*args: Any, **inputs: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(*args, **inputs)

    monkeypatch.setattr(model.model, "forward", counted)
    rows = [{k: v for k, v in row.items() if k != "label"} for row in ROWS[:2]]
    got = ptuning.predict_details(model, tokenizer, prompts, rows)
    monkeypatch.undo()
    assert len(shapes) == 2 and shapes[1][0] < len(rows) * len(prompts)
    for prompt, answers in zip(prompts, got, strict=True):
        for row, answer in zip(rows, answers, strict=True):
            (alone,) = ptuning.predict_details(model, tokenizer, prompt, [row])
            assert answer.probabilities == pytest.approx(alone.probabilities, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_models_with_other_positions_or_windows_keep_rows_apart(family: str) -> None:
    assert not packs_rows(tiny.model(family))
    assert packs_rows(tiny.model("llama"))


def test_other_attention_keeps_rows_apart_and_gives_the_same() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt = ptuning.Prompt(TEMPLATE, verbalizer=WORDS)
    renderer = Renderer(tokenizer, prompt.manual(), "causal", 128)
    examples = render_all(renderer, ROWS, "training")
    batch = tiny.batch(model, renderer, examples, [0] * len(ROWS))
    with torch.no_grad():
        packed = answer_logits(model, batch, PrefixStore(model))
        model.set_attn_implementation("eager")
        assert not packs_rows(model)
        apart = answer_logits(model, batch, PrefixStore(model))
    real = batch.answers != -100
    torch.testing.assert_close(packed[real], apart[real], atol=1e-5, rtol=0)


def batch_of(rests: list[int], prefixes: list[tuple[int, ...]]) -> Batch:
    """Rows of so many tokens behind prefixes."""
    rows = []
    for rest, prefix in zip(rests, prefixes, strict=True):
        ids = (*prefix, *range(5, 5 + rest))
        rows.append(Rendered((Sequence(ids, len(ids), (9,), len(prefix)),)))
    return replace(collate(rows, "causal", [400] * len(rows)), prefixes=tuple(prefixes))


@pytest.mark.parametrize(
    ("rests", "pays"), [([2, 3, 4, 9] * 4, True), ([128] * 8, False), ([9] * 16, False)]
)
def test_rows_of_unlike_length_are_packed_and_equal_ones_are_not(
    rests: list[int], pays: bool
) -> None:
    model = tiny.model("llama", hidden_size=576)
    packed = packing.pack(model, batch_of(rests, [(1, 2)] * len(rests)))
    assert (packed is not None) == pays
    assert packed is None or packed.input_ids.numel() <= 1.2 * sum(rests)


def test_a_prompt_with_many_rows_does_not_make_others_wide() -> None:
    """Candidates of eight questions in pairs, and sixteen short rows behind one head."""
    alone = [(number, 2, 3, 4) for number in range(10, 18) for _ in range(2)]
    rests = [20] * 16 + [5] * 16
    model = tiny.model("llama", hidden_size=576)
    packed = packing.pack(model, batch_of(rests, [*alone, *[(1,)] * 16]))
    assert packed is not None
    assert packed.input_ids.numel() <= 1.2 * sum(rests)
