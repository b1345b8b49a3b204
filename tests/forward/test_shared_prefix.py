"""The shared head against its plain twin: the same losses and gradients, computed once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ptuning
from ptuning.forward import scoring
from ptuning.forward.shared_prefix import SharedPrefix, share_openings
from ptuning.rendering.render import Renderer, render_all
from ptuning.training.population import Member, Population

from .. import tiny

TEMPLATES = ("[P*4] Is it [P*2] so: {country}, {more} [P] [MASK]", "Go [P*3] {country} [P] [MASK]")
ROWS = [
    {"country": "France and the big cities", "more": "x" * n, "capital": "Paris"} for n in (1, 9, 5)
] + [{"country": "", "more": "", "capital": "Rome is not in the north of Italy, it is not"}]


@pytest.fixture(autouse=True)
def at_any_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are shared though batches as small as these are not worth it."""
    monkeypatch.setattr("ptuning.forward.shared_prefix._PRICE", -1e6)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many heads each `SharedPrefix` computes."""
    seen: list[int] = []
    original = SharedPrefix.__init__

    def init(self: SharedPrefix, model: Any, heads: Any, device: torch.device) -> None:
        seen.append(len(heads))
        original(self, model, heads, device)

    monkeypatch.setattr(SharedPrefix, "__init__", init)
    return seen


def steps(
    model: Any, prompts: list[ptuning.Prompt], rows: list[Any], parts: int, shared: bool
) -> tuple[Tensor, Tensor]:
    """Losses and gradients of a population's micro-batch, each member with all rows."""
    tokenizer = tiny.tokenizer()
    renderers = [Renderer(tokenizer, prompt, "causal", 128) for prompt in prompts]
    examples = [render_all(renderer, rows, "training") for renderer in renderers]
    members = [
        Member(prompt, model, number, [None] * renderer.count)
        for number, (prompt, renderer) in enumerate(zip(prompts, renderers, strict=True))
    ]
    owner = renderers[0].owner if renderers[0].compares else None
    with Population(tiny.engine(model, tokenizer), members, owner) as population:
        first = population.first_ids()
        every = [(e, n) for n, some in enumerate(examples) for e in some]

        batches = [population.engine.batch(every[part::parts], first) for part in range(parts)]
        total = torch.zeros(len(members))
        with population.one_table(batches if shared else ()):
            assert (population.engine._shared is not None) == shared
            for part in batches:
                losses = population.losses(part)
                losses.sum().backward()
                total += losses.detach()
    gradients = [p.grad.flatten() for m in members for p in m.parameters() if p.grad is not None]
    return total, torch.cat(gradients)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_losses_and_gradients_are_the_plain_ones(family: str, parts: int, made: list[int]) -> None:
    model = tiny.model(family)
    prompts = [
        ptuning.Prompt(template, answer="capital", answer_end=False, encoder=encoder)
        for template, encoder in zip(TEMPLATES * 2, ("mlp", "mlp", "none", "lstm"), strict=True)
    ]
    plain = steps(model, prompts, ROWS, parts, shared=False)
    assert made == []
    kept = steps(model, prompts, ROWS, parts, shared=True)
    assert made == [len(prompts)]
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-5)


def test_a_part_of_rows_with_empty_fields_takes_the_plain_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ptuning.forward.packing._WORTH", float("inf"))
    empty = [
        {"country": "", "capital": text} for text in ("Paris", "Rome is not in the north " * 2)
    ]
    short = [{"country": "Italy", "capital": "Rome"}] * 2
    # Of two parts of every second row the second has none but empty fields.
    rows = [row for pair in zip(short * 6, empty * 6, strict=True) for row in pair]
    prompt = ptuning.Prompt(TEMPLATES[1], answer="capital", answer_end=False)
    model = tiny.model("llama")
    plain, kept = (steps(model, [prompt], rows, 2, shared) for shared in (False, True))
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "words", [{"yes": "Paris", "no": "Rome"}, {"yes": "not a city", "no": "Ra"}]
)
def test_label_words_of_one_and_several_tokens(words: dict[str, str]) -> None:
    model = tiny.model("llama")
    prompt = ptuning.Prompt(TEMPLATES[0], answer="label", verbalizer=words)
    rows = [{**row, "label": "yes" if n % 2 else "no"} for n, row in enumerate(ROWS)]
    plain, kept = (steps(model, [prompt], rows, 2, shared) for shared in (False, True))
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-5)


def test_gradients_of_half_precision_add_up_in_float32() -> None:
    model = tiny.model("llama").to(torch.bfloat16)
    prompt = ptuning.Prompt(TEMPLATES[0], answer="capital", answer_end=False, encoder="none")
    plain, kept = (steps(model, [prompt], ROWS * 4, 1, shared) for shared in (False, True))
    exact = steps(tiny.model("llama"), [prompt], ROWS * 4, 1, shared=False)
    off = [float((got[1] - exact[1]).norm() / exact[1].norm()) for got in (kept, plain)]
    assert kept[1].dtype == torch.float32
    assert off[0] < 2 * off[1] < 0.2


@pytest.mark.parametrize(
    ("template", "rows"),
    [
        ("{country} and {more} [P*9] [MASK]", ROWS),  # nothing stands in front
        ("A long text in front of it all: {country} [P*3] [MASK]", ROWS),  # the frozen prefix's
        (TEMPLATES[0], ROWS[:1]),  # nothing to share it with
    ],
)
def test_where_nothing_is_saved_there_is_no_head(
    template: str, rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptuning.forward.shared_prefix._PRICE", 1e-6)
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt = ptuning.Prompt(template, answer="capital")
    renderer = Renderer(tokenizer, prompt, "causal", 128)
    examples = render_all(renderer, rows, "training")
    assert share_openings(model, [tiny.batch(model, renderer, examples, [400] * len(rows))]) is None


@pytest.mark.parametrize(
    ("count", "longer", "shared"), [(6, 0, False), (6, 6, True), (20, 0, True)]
)
def test_a_head_must_save_an_eighth_of_what_keeps_the_device_busy(
    count: int, longer: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt = ptuning.Prompt("[P*8] {country} [MASK]", answer="capital", answer_end=False)
    renderer = Renderer(tokenizer, prompt, "causal", 128)
    rows = [{"country": "x" * (1 + n * longer), "capital": "Ra"} for n in range(count)]
    examples = render_all(renderer, rows, "training")
    batch = tiny.batch(model, renderer, examples, [100] * count)  # ids that the model has
    padding = count * max(batch.lengths) - sum(batch.lengths)  # packed rows have none
    assert (7 + 8 * (count - 2) + padding >= 64) == shared
    assert (share_openings(model, [batch]) is not None) == shared


@pytest.mark.parametrize("what", ["checkpointing", "spread"])
def test_models_that_read_no_cache_take_the_plain_path(what: str) -> None:
    model = tiny.model("llama")
    if what == "checkpointing":
        model.gradient_checkpointing_enable()
    else:
        model.hf_device_map = {"model": 0, "lm_head": 1}
    prompt = ptuning.Prompt(TEMPLATES[0], answer="capital", answer_end=False)
    renderer = Renderer(tiny.tokenizer(), prompt, "causal", 128)
    examples = render_all(renderer, ROWS, "training")
    assert share_openings(model, [tiny.batch(model, renderer, examples, [400] * len(ROWS))]) is None


def test_a_training_with_and_without_ends_with_the_same_vectors(made: list[int]) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompts = []
    for cache in ("off", "auto"):
        prompt = ptuning.Prompt(TEMPLATES[0], answer="capital")
        ptuning.train(
            model, tokenizer, prompt, ROWS, dev=ROWS, epochs=6, batch_size=2, prefix_cache=cache,
            gradient_accumulation=2, population=2,
        )  # fmt: skip
        assert bool(made) == (cache == "auto")
        prompts.append(prompt)
    off, auto = prompts
    torch.testing.assert_close(auto.vectors, off.vectors, atol=1e-5, rtol=0)
    assert auto.training == pytest.approx(off.training, abs=1e-5)


def test_scores_are_the_plain_ones(made: list[int]) -> None:
    model = tiny.model("gpt2")
    prompt = ptuning.Prompt(TEMPLATES[0], answer="capital")
    renderer = Renderer(tiny.tokenizer(), prompt, "causal", 128)
    examples = render_all(renderer, ROWS, "training")
    member = Member(prompt, model, 0, [None] * renderer.count)
    with Population(tiny.engine(model, renderer.tokenizer), [member]) as population:
        first = population.first_ids()[0]
        shared = scoring.score(population.engine, renderer, examples, first, 2)
        assert made == [1]
        assert tiny.score(model, renderer, examples, first, 2) == pytest.approx(shared)
        assert made == [1]


def test_a_member_that_is_not_finite_harms_no_other() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompts = [ptuning.Prompt(t, answer="capital", encoder="none") for t in TEMPLATES]
    renderers = [Renderer(tokenizer, prompt, "causal", 128) for prompt in prompts]
    members = [
        Member(p, model, 0, [None] * r.count) for p, r in zip(prompts, renderers, strict=True)
    ]
    examples = [render_all(renderer, ROWS, "training") for renderer in renderers]
    with Population(tiny.engine(model, tokenizer), members) as population:
        members[0].encoder.embedding.weight.data.fill_(float("nan"))  # it went astray
        first = population.first_ids()
        chosen = [(e, n) for n, some in enumerate(examples) for e in some]
        made = tiny.batch(
            model, renderers[0], [e for e, _ in chosen], [first[n] for _, n in chosen]
        )
        batch = replace(made, member=torch.tensor([n for _, n in chosen]))
        with population.one_table([batch]):
            losses = population.losses(batch)
            losses[1].backward()
    assert torch.isnan(losses[0]) and torch.isfinite(losses[1])
    (gradient,) = (p.grad for p in members[1].parameters())
    assert gradient is not None and torch.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize(
    ("dtype", "amx", "shared"),
    [
        (torch.float32, True, True),
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),
    ],
)
def test_where_a_processor_multiplies_in_tiles_a_head_must_save_twice_as_much(
    dtype: torch.dtype, amx: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("ptuning.forward.shared_prefix.cpu_has_amx", lambda: amx)
    model, tokenizer = tiny.model("llama").to(dtype), tiny.tokenizer()
    prompt = ptuning.Prompt("[P*8] {country} [MASK]", answer="capital", answer_end=False)
    renderer = Renderer(tokenizer, prompt, "causal", 128)

    def shares(count: int) -> bool:
        examples = render_all(renderer, [{"country": "x", "capital": "Ra"}] * count, "training")
        batch = tiny.batch(model, renderer, examples, [100] * count)
        return share_openings(model, [batch]) is not None

    assert shares(12) == shared  # 87 tokens of a hundred are saved
    assert shares(20)
