"""A merged prompt's text has the attached prompt's ids, whatever the tokenizer does at seams."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from ptuning import InputError, Prompt
from ptuning.inference.merged_tokenizer import with_names
from ptuning.prompts.task import fill
from ptuning.rendering.merged_text import merged_text, names_of
from ptuning.rendering.render import Renderer

from .. import tiny

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEMPLATES = {
    "around": {"template": "[P*2] {country} of [P] {name}, [P:capital city]: [MASK]"},
    "anchors": {"template": "Say {{{name}}} [[P]]: [P]{country}[P*3] so [MASK]"},
    "after": {"template": "[P*4]{country} is {name} [MASK]", "special_tokens": "after"},
    "after a space": {"template": "[P*4] {country} [MASK]", "special_tokens": "after"},
    "no field": {"template": "The capital [P*2] [MASK]"},
    "behind the answer": {"template": "{country} [P] [MASK] and [P] {name}."},
}


def _prompt(**settings: Any) -> Prompt:
    return Prompt(**settings)


def _check(tokenizer: Any, prompt: Prompt, kind: str, count: int = 40) -> str:
    width = Renderer(tokenizer, prompt, kind).count
    merged, ids = with_names(tokenizer, names_of("task", width))
    made = merged_text(prompt, "task", kind, tokenizer, merged, ids)
    layout = Renderer(tokenizer, prompt, kind).layout
    choose = random.Random(0)
    words = " ".join(tiny.TEXTS).split()
    for _ in range(count):
        texts = [" ".join(choose.sample(words, choose.randint(1, 6))) for _ in range(2)]
        row = dict(zip(("country", "name"), texts, strict=True))
        wanted = [i if i >= 0 else ids[-1 - i] for i in layout(row, None).ids]
        filled = fill(made.text, row)
        assert merged(filled, add_special_tokens=made.add_special_tokens)["input_ids"] == wanted
    return made.text


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_text_has_the_ids_of_the_attached_prompt(kind: str, form: str, around: bool) -> None:
    tokenizer = tiny.tokenizer(kind, around=around)
    model = "causal" if form != "behind the answer" else "masked"
    _check(tokenizer, _prompt(**TEMPLATES[form]), model)


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_text_of_an_encoder_decoder_has_the_encoders_ids(kind: str) -> None:
    _check(
        tiny.tokenizer(kind, around=True), _prompt(template="[P*2] {country} [P] [MASK]"), "seq2seq"
    )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", ["byte_bpe", "metaspace_first"])
def test_text_of_a_chat_prompt_is_the_whole_chat(kind: str, bos: bool) -> None:
    tokenizer = tiny.tokenizer(kind, bos=bos)
    tokenizer.chat_template = CHAT
    text = _check(
        tokenizer, _prompt(template="[P*2] {country} in {name}? [P]", chat=True), "causal"
    )
    assert "<|task:0|><|task:1|> {country} in {name}?<|task:2|>" in text
    assert text.endswith("<|assistant|>\n")
    if (
        kind == "byte_bpe"
    ):  # the beginning that the tokenizer adds itself does not stand in the text
        assert text.startswith("<s>") is not bos


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_text_for_a_tokenizer_that_splits_special_tokens(kind: str) -> None:
    tokenizer = tiny.tokenizer(kind, around=True)
    tokenizer.split_special_tokens = True
    _check(tokenizer, _prompt(template="[P*2] {country} of [P] {name} [MASK]"), "seq2seq")


@pytest.mark.parametrize(
    ("kind", "around", "settings", "token"),
    [
        ("masked", False, {"template": "[P*2] {country} [P] [MASK]"}, "<mask>"),
        ("masked", True, {"template": "[P] {country} [MASK] and {name}."}, "<mask>"),
        ("masked", False, {"template": "[P] {country} [MASK]", "answer_tokens": 2}, "<mask>"),
        ("causal", True, {"template": "[P*2] {country} [MASK]"}, "<s>"),
        (
            "seq2seq",
            True,
            {"template": "[P*2] {country} [MASK]", "special_tokens": "after"},
            "<s> and </s>",
        ),
    ],
)
@pytest.mark.parametrize("spelled", tiny.TOKENIZERS)
def test_a_text_whose_special_tokens_the_tokenizer_splits_is_refused_for_that(
    spelled: str, kind: str, around: bool, settings: dict[str, Any], token: str
) -> None:
    tokenizer, prompt = tiny.tokenizer(spelled, around=around), _prompt(**settings)
    tokenizer.split_special_tokens = True
    with pytest.raises(InputError, match=f"its text has {token} in it.*split_special_tokens=False"):
        _check(tokenizer, prompt, kind)
    tokenizer.split_special_tokens = False  # as it says
    _check(tokenizer, prompt, kind)


def test_labels_are_words_as_they_continue_the_text() -> None:
    tokenizer = tiny.tokenizer()
    prompt = _prompt(
        template="[P] {country} [MASK]", verbalizer={"y": "Yes", "n": ["No", "{name}"]}
    )
    merged, ids = with_names(tokenizer, names_of("t", 1))
    made = merged_text(prompt, "t", "causal", tokenizer, merged, ids)
    assert made.text == "<|t:0|> {country}" and made.turn is None
    assert made.labels == {"y": " Yes", "n": [" No", " {name}"]}
    spaced = replace(prompt, verbalizer={"y": " Yes", "n": "No"})
    assert merged_text(spaced, "t", "causal", tokenizer, merged, ids).labels == {
        "y": " Yes", "n": " No",
    }  # fmt: skip
    assert merged_text(prompt, "t", "seq2seq", tokenizer, merged, ids).labels == {
        "y": "Yes", "n": ["No", "{name}"],
    }  # fmt: skip
    in_chat = tiny.tokenizer()
    in_chat.chat_template = CHAT
    prompt.chat = True
    assert merged_text(prompt, "t", "causal", in_chat, merged, ids).labels == {
        "y": "Yes", "n": ["No", "{name}"],
    }  # fmt: skip


@pytest.mark.parametrize("words", [
    ("is", "capital of Italy"), ("capital of Italy", "is"), (" is", " it"), ("{{is}}", "{{it}}"),
])  # fmt: skip
def test_a_masked_text_has_as_many_masks_as_the_longest_label_word(words: tuple[str, str]) -> None:
    tokenizer = tiny.tokenizer()
    prompt = _prompt(
        template="[P] {country} [MASK]", verbalizer=dict(zip("ab", words, strict=True))
    )
    merged, ids = with_names(tokenizer, names_of("t", 1))
    made = merged_text(prompt, "t", "masked", tokenizer, merged, ids)
    row = {"country": "France", "answer": "a"}
    answers = [s.answer for s in Renderer(tokenizer, prompt, "masked")(row).sequences]
    answers += [(token,) for token in Renderer(tokenizer, prompt, "masked")(row).label_ids]
    assert made.text.count("<mask>") == max(map(len, answers))


def test_a_prompt_without_template_stands_in_front_of_a_text() -> None:
    tokenizer = tiny.tokenizer(bos=True)
    prompt = Prompt(num_virtual_tokens=2)
    prompt.vectors = torch.zeros(2, 4)
    merged, ids = with_names(tokenizer, names_of("t", 2))
    made = merged_text(prompt, "t", "causal", tokenizer, merged, ids)
    assert (made.text, made.add_special_tokens) == ("<|t:0|><|t:1|><s>{text}", False)


def test_a_text_that_no_tokenizer_gives_is_refused() -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    tokenizer.mask_token = "mask"  # a word, which the text before it swallows
    prompt = _prompt(template="[P] {country} and[MASK]")
    merged, ids = with_names(tokenizer, names_of("t", 1))
    merged.add_tokens(["andmask"])
    with pytest.raises(InputError, match="'t' cannot be merged: no text has its ids"):
        merged_text(prompt, "t", "masked", tokenizer, merged, ids)
