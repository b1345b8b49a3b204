"""Where virtual tokens begin, and that an example never reads itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import normalizers

import ptuning
from ptuning import InputError, Prompt
from ptuning.backbone.base_model import BaseModel
from ptuning.prompts.transfer import groups_of, resampled
from ptuning.rendering.layout import Sequence
from ptuning.rendering.render import Renderer, render_all
from ptuning.training.grid import choices
from ptuning.training.members import with_examples
from ptuning.training.population import Member
from ptuning.training.settings import TrainSettings
from ptuning.training.starts import left_out, start_of

from .. import tiny

TEMPLATE = "[P*5] {text} [P*3] is [MASK]"
LABELS = {"a": "capital of", "b": "it", "c": "Rome!"}
TEXTS = ("France", "Italy and all of its islands", "Oslo", "Berlin", "Vienna, it rains", "Madrid")
ROWS = [{"text": text, "label": "abc"[n % 3]} for n, text in enumerate(TEXTS)]
ANSWERS = [row["label"] for row in ROWS]


def fresh(**changes: Any) -> Prompt:
    return Prompt(**{"template": TEMPLATE, "answer": "label", "verbalizer": LABELS, **changes})


def words_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_drawn_words_are_words_of_the_model_where_the_tokenizer_has_more() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model(vocab_size=350)
    engine = tiny.engine(model, tokenizer)
    prompt = fresh(template="[P*40] {text} is [MASK]")
    words = start_of(engine.renderer(prompt), ROWS, ANSWERS, "words", 0).words
    assert len(tokenizer) == 400 and all(isinstance(w, int) and 3 <= w < 350 for w in words)
    assert max(w for w in words if w is not None) > 300


def test_label_words_fill_the_first_virtual_tokens_in_order() -> None:
    tokenizer = tiny.tokenizer()
    renderer = Renderer(tokenizer, fresh(template="[P:does] {text} [P*12] [MASK]"), "causal")
    start = start_of(renderer, ROWS, ANSWERS, "labels", 0)
    given = renderer.groups[0]
    known = [i for word in LABELS.values() for i in words_of(tokenizer, f" {word}")]
    expected = [*given, *known, *[None] * (12 - len(known))]
    assert start.words == expected[: len(given) + 12] and not start.came_from


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("[P*3] {text} so [MASK]", ["▁yes", "▁it", None]),
        ("[P*3] {text} ([MASK]", ["yes", "i", "t"]),
    ],
)
def test_label_words_are_the_tokens_that_a_model_is_to_say(
    template: str, expected: list[str | None]
) -> None:
    tokenizer = tiny.tokenizer("metaspace_never")
    backend = tokenizer.backend_tokenizer  # of Llama 2's form, which puts a space in front of all
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    assert tokenizer.tokenize(" yes") == ["▁", "▁yes"]
    prompt = fresh(template=template, verbalizer={"a": "yes", "b": "it"})
    start = start_of(Renderer(tokenizer, prompt, "causal"), ROWS, ANSWERS, "labels", 0)
    assert [w if w is None else tokenizer.convert_ids_to_tokens(w) for w in start.words] == expected


def test_random_words_fill_what_the_template_gives_no_words_and_are_the_vectors() -> None:
    tokenizer = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer))
    prompt = fresh(template="[P:does] {text} [P*12] [MASK]")
    renderer = Renderer(tokenizer, prompt, "causal")
    start = start_of(renderer, ROWS, ANSWERS, "words", 0)
    given = renderer.groups[0]
    assert start.words[: len(given)] == given and None not in start.words
    many = Renderer(tokenizer, fresh(template="[P*4000] {text} [MASK]"), "causal")
    drawn = set(start_of(many, ROWS, ANSWERS, "words", 0).words)
    assert len(drawn) > 350 and not drawn & set(tokenizer.all_special_ids)
    assert not set(start.words[len(given) :]) & set(tokenizer.all_special_ids)
    assert start == start_of(renderer, ROWS, ANSWERS, "words", 0)
    assert start != start_of(renderer, ROWS, ANSWERS, "words", 1)
    words = start_of(Renderer(tokenizer, fresh(), "causal"), ROWS, ANSWERS, "words", 0).words
    expected = model.get_input_embeddings()(torch.tensor(words))
    for encoder in ("mlp", "lstm", "none"):
        member = Member(fresh(encoder=encoder), model, 0, words)
        torch.testing.assert_close(member.table(), expected, atol=1e-5, rtol=1e-4)


def test_examples_fill_all_and_say_where_each_token_is_from() -> None:
    tokenizer = tiny.tokenizer()
    renderer = Renderer(tokenizer, fresh(), "causal")
    start = start_of(renderer, ROWS, ANSWERS, "examples", 3)
    assert None not in start.words
    owners = list(start.came_from)
    assert len(owners) == 2 and ANSWERS[owners[0]] != ANSWERS[owners[1]]
    for example, virtual in start.came_from.items():
        row = ROWS[example]
        ids = words_of(tokenizer, f"{row['text']} {LABELS[row['label']]}")
        assert [start.words[number] for number in sorted(virtual)] == ids[-len(virtual) :]
    assert start == start_of(renderer, ROWS, ANSWERS, "examples", 3)
    assert start != start_of(renderer, ROWS, ANSWERS, "examples", 4)


def test_examples_fill_all_where_they_do_not_divide_them_evenly() -> None:
    long = [{"text": text * 9, "label": label} for text, label in zip(TEXTS, "abcabc", strict=True)]
    renderer = Renderer(tiny.tokenizer(), fresh(template="[P*13] {text} is [MASK]"), "causal")
    start = start_of(renderer, long, ANSWERS, "examples", 0)
    assert None not in start.words
    assert sorted(map(len, start.came_from.values())) == [3, 5, 5]


def test_examples_say_the_label_words_of_their_own_columns() -> None:
    tokenizer, words = tiny.tokenizer(), {"a": "{one}", "b": "{two} {{it}}"}
    rows = [{"text": "Oslo", "label": label, "one": "Rome", "two": "does"} for label in "ab"]
    renderer = Renderer(tokenizer, fresh(verbalizer=words), "causal")
    start = start_of(renderer, rows, ["a", "b"], "examples", 0)
    for example, said in enumerate(("Oslo Rome", "Oslo does {it}")):
        virtual = sorted(start.came_from[example])
        assert [start.words[n] for n in virtual] == words_of(tokenizer, said)[-len(virtual) :]


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_an_example_is_trained_on_without_what_came_from_it(family: str) -> None:
    tokenizer = tiny.tokenizer(around=family not in tiny.CAUSAL)
    base = BaseModel.of(tiny.model(family, vocab_size=len(tokenizer)), tokenizer)
    renderer = Renderer(tokenizer, fresh(), base.kind)
    plain = render_all(renderer, ROWS, "training")
    start = start_of(renderer, ROWS, ANSWERS, "examples", 0)
    for number, (one, other) in enumerate(zip(left_out(plain, start), plain, strict=True)):
        gone = start.came_from.get(number, frozenset())
        for mine, whole in zip(one.sequences, other.sequences, strict=True):
            seen = {-1 - i for i in mine.ids if i < 0}
            assert seen == set(range(8)) - gone
            assert [i for i in mine.ids if i >= 0] == [i for i in whole.ids if i >= 0]
            assert mine.answer == whole.answer
            assert mine.ids[mine.opening :] == whole.without(gone).ids[mine.opening :]
            seen_before = [i for i in mine.ids[: mine.opening] if i >= 0]
            assert seen_before == [i for i in whole.ids[: whole.opening] if i >= 0]
            if base.kind == "masked":
                assert mine.ids[mine.slot] == tokenizer.mask_token_id
    (variant,) = with_examples(
        base, choices(fresh(), TrainSettings(init="examples"), 1, None), ROWS, ()
    )
    assert variant.examples == left_out(plain, start) and variant.has_start


def test_positions_move_with_what_is_left_out() -> None:
    whole = Sequence((7, -1, 8, -2, -3, 9, 10), 6, (4,), 2)
    less = whole.without({0, 2})
    assert less == Sequence((7, 8, -2, 9, 10), 4, (4,), 1)
    assert whole.without({9}) is whole


def test_a_trained_prompt_begins_as_it_is_and_its_examples_are_whole() -> None:
    base = BaseModel.of(tiny.model("llama"), tiny.tokenizer())
    prompt = fresh()
    ptuning.train(base.model, base.tokenizer, prompt, ROWS, epochs=1, verbose=False)
    members = choices(prompt, TrainSettings(init="examples", epochs=1), 1, None)
    (variant,) = with_examples(base, members, ROWS, ())
    assert variant.examples == render_all(variant.renderer, ROWS, "training")
    assert variant.words == [None] * 8


def test_seeds_begin_at_other_words_and_words_of_a_template_are_a_start() -> None:
    base = BaseModel.of(tiny.model("llama"), tiny.tokenizer())
    settings = TrainSettings(init="words")
    for template, begun in ((TEMPLATE, False), ("[P:it is] {text} [P*2] so [MASK]", True)):
        members = choices(fresh(template=template), settings, 2, None)
        first, second = with_examples(base, members, ROWS, ())
        assert first.words != second.words and first.has_start == second.has_start == begun


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "none", "residual", "mixture"])
@pytest.mark.parametrize("init", ["labels", "examples"])
def test_members_begin_at_the_words_vectors(encoder: str, init: str) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt, settings = fresh(encoder=encoder), TrainSettings(init=init)
    base = BaseModel.of(model, tokenizer)
    (variant,) = with_examples(base, choices(prompt, settings, 1, None), ROWS, ())
    table = Member(variant.prompt, model, 0, variant.words).table().detach()
    vocabulary = model.get_input_embeddings().weight.detach()
    for row, word in enumerate(variant.words):
        if word is not None:
            torch.testing.assert_close(table[row], vocabulary[word], atol=1e-4, rtol=0)


def test_a_grid_compares_starts() -> None:
    model, tokenizer, prompt = tiny.model("llama"), tiny.tokenizer(), fresh()
    result = ptuning.train(
        model, tokenizer, prompt, ROWS, dev=ROWS, epochs=2, batch_size=2, verbose=False,
        population=2, grid={"init": ["encoder", "labels", "examples"]}, halving=False,
    )  # fmt: skip
    assert [m["name"]["init"] for m in result.members[::2]] == ["encoder", "labels", "examples"]


@pytest.mark.parametrize(
    ("changes", "init", "message"),
    [
        ({}, "anywhere", "init is 'anywhere'; expected one of"),
        ({"verbalizer": None}, "labels", "init is labels, and there are none"),
        ({"verbalizer": {"a": "{text}", "b": "x", "c": "y"}}, "labels", "words name columns"),
    ],
)
def test_a_start_that_there_is_not_is_refused(
    changes: dict[str, Any], init: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ptuning.train(
            tiny.model("llama"), tiny.tokenizer(), fresh(**changes), ROWS, init=init, epochs=1
        )


def test_vectors_go_to_like_places_of_like_groups() -> None:
    vectors = torch.arange(5.0)[:, None]

    def places(before: list[int], after: list[int]) -> list[int]:
        return resampled(vectors, before, after).flatten().int().tolist()

    assert places([2, 3], [2, 3]) == [0, 1, 2, 3, 4]
    assert places([2, 3], [4, 1]) == [0, 0, 1, 1, 3]
    assert places([5], [2, 1]) == [0, 2, 4]
    assert places([2, 3], [10]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert groups_of(fresh(), 8) == [5, 3]
    assert groups_of(fresh(template="[P:it is] {text} [P] [MASK]"), 4) == [4]


def test_a_prompt_begins_at_the_vectors_of_another_whose_encoder_has_other_layers() -> None:
    model, first = tiny.model("llama"), fresh(encoder="lstm", encoder_num_layers=1)
    ptuning.train(model, tiny.tokenizer(), first, ROWS, epochs=1, verbose=False)
    second = fresh(encoder="lstm", encoder_num_layers=2)
    second.begin_from(first)
    table = Member(second, model, 0, [None] * 8).table().detach()
    torch.testing.assert_close(table, first.trained_vectors(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("encoder", ["mlp", "none", "mixture"])
def test_a_prompt_begins_at_another_of_another_length(encoder: str) -> None:
    model, tokenizer, first = tiny.model("llama"), tiny.tokenizer(), fresh(encoder=encoder)
    ptuning.train(model, tokenizer, first, ROWS, epochs=1, verbose=False)
    second = fresh(template="[P*3] {text} [P*9] so [MASK]", encoder=encoder)
    second.begin_from(first)
    assert second.encoder_weights is None
    expected = resampled(first.trained_vectors(), [5, 3], [3, 9])
    member = Member(second, model, 0, [None] * 12)
    torch.testing.assert_close(member.table().detach(), expected, atol=1e-4, rtol=0)
    same = fresh(encoder=encoder)
    same.begin_from(first)
    assert same.encoder_weights is first.encoder_weights


@pytest.mark.parametrize("encoder", ["mlp", "none"])
@pytest.mark.parametrize("words", ["The", "The capital of"])
def test_a_prompt_of_words_begins_at_another_of_another_length(encoder: str, words: str) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    first = fresh(template="[P*2] {text} [MASK]", encoder=encoder)
    ptuning.train(model, tokenizer, first, ROWS, epochs=1, verbose=False)
    vectors = first.trained_vectors()
    for grid in (None, {"weight_decay": [0.0, 0.1]}):
        second = fresh(template=f"[P:{words}] {{text}} [MASK]", encoder=encoder)
        second.begin_from(first)
        ptuning.train(
            model, tokenizer, second, ROWS, epochs=1, learning_rate=1e-9, grid=grid, verbose=False
        )
        count = len(tokenizer(words, add_special_tokens=False)["input_ids"])
        assert second.num_virtual_tokens == count != 2
        expected = resampled(vectors, [2], [count])
        torch.testing.assert_close(second.trained_vectors(), expected, atol=1e-3, rtol=0)


def test_vectors_of_another_number_than_a_templates_words_have_tokens_are_refused() -> None:
    prompt = fresh(template="[P:The] {text} [MASK]", vectors=torch.zeros(3, 32))
    with pytest.raises(InputError, match="has 1 virtual tokens, and its vectors are 3"):
        Renderer(tiny.tokenizer(), prompt, "causal")
