from __future__ import annotations

from typing import Any

import pytest
import torch

import ptuning
from ptuning.backbone.base_model import BaseModel, device_of
from ptuning.backbone.injection import Injector
from ptuning.backbone.kinds import kind_of
from ptuning.backbone.lookups import input_embedding
from ptuning.backbone.traits import context_length
from ptuning.forward import batching, scoring
from ptuning.forward.engine import Engine
from ptuning.inference.attachment import placed
from ptuning.rendering.render import Rendered, Renderer

from .. import tiny

TOKENIZER = tiny.tokenizer()
ROWS = [
    {"text": "Oslo", "label": "city", "answer": "Rome"},
    {"text": "The capital of France is Paris", "label": "rain", "answer": "yes, it does"},
    {"text": "does it rain in Berlin, Madrid, Lisbon and Vienna", "label": "city", "answer": "no"},
    {"text": "Question: is Ottawa a city of Europe?", "label": "rain", "answer": "Ottawa is not"},
    {"text": "naïve café", "label": "rain", "answer": "Italy"},
]
ONE_TOKEN: dict[str, Any] = {"city": ["Paris", "Rome"], "rain": "does"}
MANY_TOKENS: dict[str, Any] = {"city": ["Paris", "Ottawa"], "rain": "does it rain"}
FAMILIES = ["llama", "gpt2", "gemma2", "opt", "bert", "t5", "bart"]


def setting(
    family: str, *, verbalizer: dict[str, Any] | None = None, **changes: Any
) -> tuple[Any, Renderer, list[Rendered], ptuning.Prompt]:
    model = tiny.model(family)
    answer = "label" if verbalizer else "answer"
    prompt = ptuning.Prompt(
        "[P*2] {text} [P] it is [MASK]", answer=answer, verbalizer=verbalizer, **changes
    )
    width = input_embedding(model).embedding_dim
    prompt.vectors = torch.randn(3, width)
    renderer = Renderer(TOKENIZER, prompt, kind_of(model), context_length(model, TOKENIZER))
    return model, renderer, [renderer(row) for row in ROWS], prompt


@pytest.mark.parametrize("verbalizer", [None, ONE_TOKEN, MANY_TOKENS], ids=["free", "one", "many"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_does_not_depend_on_the_batch_size_or_the_order(
    family: str, verbalizer: dict[str, Any] | None
) -> None:
    model, renderer, examples, prompt = setting(family, verbalizer=verbalizer)
    if family == "bert" and verbalizer is MANY_TOKENS:
        assert all(len(example.sequences) == 3 for example in examples)
    with placed(model, TOKENIZER, prompt) as first:
        expected = tiny.score(model, renderer, examples, first, 1)
        for size in (2, 5, 99):
            got = tiny.score(model, renderer, examples[::-1], first, size)
            assert got == pytest.approx(expected, abs=1e-5)
    assert expected[1] > 0


@pytest.mark.parametrize("verbalizer", [None, ONE_TOKEN, MANY_TOKENS], ids=["free", "one", "many"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_accuracy_and_loss_are_those_of_the_examples_apart(
    family: str, verbalizer: dict[str, Any] | None
) -> None:
    model, renderer, examples, prompt = setting(family, verbalizer=verbalizer)
    with placed(model, TOKENIZER, prompt) as first:
        accuracy, loss = tiny.score(model, renderer, examples, first, 3)
        apart = [tiny.score(model, renderer, [example], first, 1) for example in examples]
    assert accuracy == pytest.approx(sum(right for right, _ in apart) / len(examples))
    weights = [1 if verbalizer else len(e.sequences[0].answer) for e in examples]
    weighted = sum(w * one for w, (_, one) in zip(weights, apart, strict=True)) / sum(weights)
    assert loss == pytest.approx(weighted, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_accuracy_on_labels_is_the_share_of_right_predictions(family: str) -> None:
    model, renderer, examples, prompt = setting(family, verbalizer=ONE_TOKEN)
    said = ptuning.predict(model, TOKENIZER, prompt, ROWS)
    right = [row["label"] == answer for row, answer in zip(ROWS, said, strict=True)]
    with placed(model, TOKENIZER, prompt) as first:
        assert tiny.score(model, renderer, examples, first, 2)[0] == pytest.approx(
            sum(right) / len(right)
        )
        flipped = [{**row, "label": answer} for row, answer in zip(ROWS, said, strict=True)]
        assert tiny.score(model, renderer, [renderer(row) for row in flipped], first, 2)[0] == 1.0


def test_a_prompt_changes_the_score_and_a_manual_template_needs_none() -> None:
    model, renderer, examples, prompt = setting("llama")
    with placed(model, TOKENIZER, prompt) as first:
        trained = tiny.score(model, renderer, examples, first, 4)[1]
        injector = Injector.of(model)
        assert injector is not None
        injector.write(injector.spans[0], torch.zeros(3, 32))
        assert tiny.score(model, renderer, examples, first, 4)[1] != pytest.approx(
            trained, abs=1e-4
        )
    task = prompt.manual()
    by_hand = Renderer(TOKENIZER, task, "causal")
    _, loss = tiny.score(model, by_hand, [by_hand(row) for row in ROWS], 0, 4)
    assert loss > 0 and Injector.of(model) is None


def test_the_whole_vocabulary_counts_in_vocabulary_mode() -> None:
    model, renderer, examples, prompt = setting(
        "llama", verbalizer=ONE_TOKEN, label_mode="vocabulary"
    )
    compared = setting("llama", verbalizer=ONE_TOKEN)
    with placed(model, TOKENIZER, prompt) as first:
        over_words = tiny.score(model, renderer, examples, first, 4)[1]
        over_labels = tiny.score(model, compared[1], compared[2], first, 4)[1]
    assert over_words > 4 > 1.5 > over_labels  # ln 400 is 6, ln 2 is 0.7


def test_scoring_computes_no_gradient() -> None:
    model, renderer, examples, _ = setting("llama")
    rows = torch.randn(3, 32).requires_grad_()
    injector = Injector(model)
    span = injector.add(rows)
    tiny.score(model, renderer, examples, span.first, 4)
    assert rows.grad is None and all(p.grad is None for p in model.parameters())


def test_a_tokenizer_without_padding_token_is_padded_with_a_masked_id() -> None:
    model, renderer, examples, prompt = setting("llama")
    with placed(model, TOKENIZER, prompt) as first:
        expected = tiny.score(model, renderer, examples, first, 5)
        bare = tiny.tokenizer()
        bare.pad_token = None
        renderer.tokenizer = bare
        assert tiny.batch(model, renderer, examples, [first] * 5).input_ids[0, 0] == 0
        assert tiny.score(model, renderer, examples, first, 5) == pytest.approx(expected, abs=1e-6)


def test_a_seq2seq_batch_starts_with_the_models_own_id() -> None:
    model, renderer, examples, _ = setting("bart")
    batch = tiny.batch(model, renderer, examples, [400] * 5)
    assert batch.decoder_input_ids is not None
    assert batch.decoder_input_ids[:, 0].eq(model.config.decoder_start_token_id).all()
    assert model.config.decoder_start_token_id == 2


def test_the_device_is_the_models() -> None:
    assert device_of(tiny.model()) == torch.device("cpu")
    assert device_of(torch.nn.Linear(1, 1, device="meta")) == torch.device("meta")


@pytest.mark.parametrize("verbalizer", [None, ONE_TOKEN, MANY_TOKENS], ids=["free", "one", "many"])
def test_few_batches_are_there_together_and_the_score_is_the_same(
    verbalizer: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, renderer, examples, prompt = setting("llama", verbalizer=verbalizer)
    there: list[int] = []
    sharing = Engine.sharing

    def counted(engine: Engine, batches: Any, *args: Any) -> Any:
        there.append(len(batches))
        return sharing(engine, batches, *args)

    monkeypatch.setattr(Engine, "sharing", counted)
    with placed(model, TOKENIZER, prompt) as first:
        whole = tiny.score(model, renderer, examples * 4, first, 2)
        assert there == [10]
        monkeypatch.setattr(batching, "_AT_ONCE", 1)
        assert tiny.score(model, renderer, examples * 4, first, 2) == pytest.approx(whole, abs=1e-6)
    assert there == [10] + [1] * 10


def test_long_answers_of_members_together_have_few_logits_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, renderer, examples, prompt = setting("llama")
    engine = Engine(BaseModel.of(model, TOKENIZER), 0)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: sizes.append(output.numel())
    )
    together: Any = ([renderer] * 2, [examples] * 2)
    with placed(model, TOKENIZER, prompt) as first:
        whole = scoring.score_together(engine, *together, [first] * 2, None)
        most, longest = max(sizes), max(len(e.sequences[0].answer) for e in examples)
        sizes.clear()
        monkeypatch.setattr(scoring, "_LARGEST", most // len(examples))
        again = scoring.score_together(engine, *together, [first] * 2, None)
    assert again == pytest.approx(whole, abs=1e-6)
    assert most == 2 * len(examples) * longest * 400 and max(sizes) <= most // len(examples)
    assert len(sizes) > 1
