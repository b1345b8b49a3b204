from __future__ import annotations

import copy
import functools
import gc
import re
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors
from tokenizers.normalizers import BertNormalizer, Lowercase
from transformers import AutoTokenizer, ByT5Tokenizer

from ptuning.errors import DataError, InputError
from ptuning.prompts.prompt import Prompt
from ptuning.prompts.task import Task
from ptuning.rendering import virtual_ids
from ptuning.rendering.layout import Sequence
from ptuning.rendering.render import Rendered, Renderer
from ptuning.rendering.short_words import settle_words

from .. import tiny

SPECIAL = [{}, {"bos": True}, {"around": True}]
KINDS = [(kind, special) for kind in tiny.TOKENIZERS for special in SPECIAL]
tokenizers = pytest.mark.parametrize(
    ("kind", "special"), KINDS, ids=["-".join([kind, *special]) for kind, special in KINDS]
)
SLOT, VIRTUAL = "\ue000", "\ue001"


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_folder)


@functools.cache
def plain(kind: str = "byte_bpe", special: str = "") -> Any:
    return tiny.tokenizer(kind, **({special: True} if special else {}))


@functools.cache
def extended(kind: str, special: str, count: int) -> tuple[Any, dict[int, int]]:
    """A tokenizer as merging makes it, and what its new ids mean in rendered ids."""
    return extend(plain(kind, special), count)


def extend(tokenizer: Any, count: int) -> tuple[Any, dict[int, int]]:
    tokenizer = copy.deepcopy(tokenizer)
    names = [f"<|oracle-{i}|>" for i in range(count)]
    tokenizer.add_tokens(
        [AddedToken(n, special=True, normalized=False, lstrip=False, rstrip=False) for n in names]
    )
    return tokenizer, {tokenizer.convert_tokens_to_ids(n): -1 - i for i, n in enumerate(names)}


@dataclass(frozen=True)
class Whole:
    """The whole string by the layout's rule for spaces, written without the package."""

    before: str
    after: str
    space: bool

    @staticmethod
    def of(parts: list[tuple[str, str]], fields: dict[str, str]) -> Whole:
        marks = {"virtual": VIRTUAL, "slot": SLOT}
        text = "".join(marks.get(kind) or (f"\ue002{v}\ue003" if kind == "field" else v)
                       for kind, v in parts)  # fmt: skip
        text = re.sub(f" ?{VIRTUAL}", VIRTUAL, text)
        space = f" {SLOT}" in text
        text = text.replace(f" {SLOT}", SLOT)
        number = iter(range(100))
        text = re.sub(VIRTUAL, lambda _: f"<|oracle-{next(number)}|>", text)
        slot = SLOT in text
        before, _, after = (
            re.sub("\ue002(.*?)\ue003", lambda m: fields[m[1]], part)
            for part in text.partition(SLOT)
        )
        if not slot:
            space = not before.endswith(("\n", "\t"))
            before = before.removesuffix(" ")
        return Whole(before, after, space)

    def answered(self, word: str) -> str:
        return self.before + (f" {word}" if self.space and not word.startswith(" ") else word)


def template_of(parts: list[tuple[str, str]]) -> str:
    written = {"virtual": "[P]", "slot": "[MASK]"}
    escaped = r"\[(?:P(?:\*[^\[\]]*|:[^\[\]]*)?|MASK)\]|[{}]"
    result, literal = "", ""
    for kind, value in [*parts, ("end", "")]:
        if kind == "text":
            literal += value
            continue
        result += re.sub(escaped, lambda m: f"[{m[0]}]" if len(m[0]) > 1 else m[0] * 2, literal)
        literal = ""
        result += f"{{{value}}}" if kind == "field" else written.get(kind, "")
    return result


def writable(template: str) -> bool:
    return not re.search(r"\[(?:P|MASK)(?![A-Za-z0-9_])(?![^\[\]]*\])", template)


def one(rendered: Rendered) -> Sequence:
    assert len(rendered.sequences) == 1
    return rendered.sequences[0]


def render(template: str, row: dict[str, Any], kind: str = "causal", **settings: Any) -> Sequence:
    tokenizer = settings.pop("tokenizer", None) or plain()
    context = settings.pop("context", None)
    answered = "answer" in row
    return one(
        Renderer(tokenizer, Task(template, **settings), kind, context)(row, answered=answered)
    )


def ids_of(text: str, tokenizer: Any = None) -> tuple[int, ...]:
    return tuple((tokenizer or plain())(text, add_special_tokens=False)["input_ids"])


ODD = ["[P]", "{x}", "[MASK]", "<|virtual-0:0|>", "<|virtual-0:slot|>", " ", "  ", "\n", "▁", "Ġ"]
WORDS = [*ODD, "Paris", "capital", "東京", "naïve", "##s", "'s", ".", "3.14", "\u00a0", "\u2028"]
ordinary = st.characters(exclude_categories=("Cs",), exclude_characters="\ue000\ue001\ue002\ue003[")
texts = st.one_of(
    st.text(alphabet=ordinary, max_size=10),
    st.lists(st.sampled_from([*WORDS, "[", "["]), max_size=5).map("".join),
)
anchors = st.one_of(
    st.text(alphabet=ordinary, max_size=6),
    st.sampled_from([" ", "  ", " is ", ".", "\n", " [P] ", "{x}", " [CLS] ", "capital", "a"]),
)
pieces = st.one_of(
    anchors.map(lambda text: ("text", text)),
    st.sampled_from([("virtual", ""), ("virtual", ""), ("field", "x"), ("field", "y")]),
)
layouts = st.lists(pieces, max_size=7)
answers = st.one_of(
    st.sampled_from(["Paris", "yes", "Rome!", "東京", "two words", "[P]", "<|virtual-0:0|>"]),
    st.text(alphabet=ordinary, min_size=1, max_size=6).filter(lambda text: bool(text.strip())),
)
examples = settings(deadline=None, max_examples=40)


@tokenizers
@examples
@given(
    head=layouts, slot=st.sampled_from(["", "[MASK]", " [MASK]"]), x=texts, y=texts, answer=answers
)
@example(head=[("virtual", ""), ("field", "x")], slot=" [MASK]", x="France", y="", answer="Paris")
@example(head=[("field", "x"), ("virtual", "")], slot="[MASK]", x="", y="", answer="Paris")
@example(head=[("text", " "), ("virtual", "")], slot="", x="", y="", answer="<|virtual-0:0|>")
@example(
    head=[("virtual", ""), ("field", "x"), ("field", "y")],
    slot=" [MASK]", x="<|virtual-", y="0:0|>", answer="Paris",
)  # fmt: skip
def test_causal_input_and_answer_are_the_whole_string_s_ids(
    kind: str, special: dict[str, bool], head: list[tuple[str, str]], slot: str, x: str, y: str,
    answer: str,
) -> None:  # fmt: skip
    parts = [*head, ("text", " ")] if slot.startswith(" ") else head
    parts = [*parts, ("slot", "")] if slot else parts
    assume(writable(template_of(parts)))
    count = sum(kind == "virtual" for kind, _ in head)
    oracle, meaning = extended(kind, *special or [""], count)
    whole = Whole.of(parts, {"x": x, "y": y})

    def ids(text: str) -> list[int]:
        return [meaning.get(i, i) for i in oracle(text, add_special_tokens=False)["input_ids"]]

    expected, before = ids(whole.answered(answer)), ids(whole.before)
    task = Task(template_of(parts))
    row = {"x": x, "y": y, "answer": answer}
    assume(len(expected) > len(before))
    sequence = one(Renderer(plain(kind, *special), task, "causal")(row))
    start = [oracle.bos_token_id] if special else []
    assert list(sequence.ids) == start + before
    assert sequence.slot == len(sequence.ids)
    assert not sequence.shortened
    assert sequence.answer[-1] == oracle.eos_token_id
    if expected[: len(before)] == before:  # else the answer would merge with the word before it
        assert list(sequence.ids + sequence.answer[:-1]) == start + expected
    else:
        assert not whole.space or answer[0].isspace()


@tokenizers
@examples
@given(head=layouts, tail=layouts, x=texts, y=texts, answer=answers)
@example(
    head=[("virtual", ""), ("text", " "), ("field", "x"), ("text", " ")],
    tail=[("text", " is it"), ("virtual", "")], x="[MASK]", y="<mask>", answer="Paris",
)  # fmt: skip
def test_masked_input_is_the_whole_string_s_ids_with_as_many_masks_as_answer_tokens(
    kind: str, special: dict[str, bool], head: list[tuple[str, str]],
    tail: list[tuple[str, str]], x: str, y: str, answer: str,
) -> None:  # fmt: skip
    parts = [*head, ("slot", ""), *tail]
    assume(writable(template_of(parts)))
    count = sum(kind == "virtual" for kind, _ in parts)
    oracle, meaning = extended(kind, *special or [""], count)
    whole = Whole.of(parts, {"x": x, "y": y})
    task = Task(template_of(parts))
    row = {"x": x, "y": y, "answer": answer}
    try:
        sequence = one(Renderer(plain(kind, *special), task, "masked")(row))
    except DataError:
        assert not oracle(answer, add_special_tokens=False)["input_ids"]
        return
    masks = "<mask>" * len(sequence.answer)
    expected = oracle(whole.before + masks + whole.after)["input_ids"]
    assert list(sequence.ids) == [meaning.get(i, i) for i in expected]
    held = sequence.ids[sequence.slot : sequence.slot + len(sequence.answer)]
    assert set(held) == {oracle.mask_token_id}


@tokenizers
@examples
@given(head=layouts, space=st.booleans(), x=texts, y=texts, answer=answers)
def test_seq2seq_input_is_the_whole_string_s_ids_and_the_answer_the_decoder_s(
    kind: str, special: dict[str, bool], head: list[tuple[str, str]], space: bool, x: str, y: str,
    answer: str,
) -> None:  # fmt: skip
    parts = [*head, *([("text", " ")] if space else []), ("slot", "")]
    assume(writable(template_of(parts)))
    count = sum(kind == "virtual" for kind, _ in head)
    oracle, meaning = extended(kind, *special or [""], count)
    whole = Whole.of(parts, {"x": x, "y": y})
    labels = plain(kind, *special)(text_target=answer)["input_ids"]
    assume(labels)
    row = {"x": x, "y": y, "answer": answer}
    sequence = one(Renderer(plain(kind, *special), Task(template_of(parts)), "seq2seq")(row))
    expected = [meaning.get(i, i) for i in oracle(whole.before)["input_ids"]]
    assert list(sequence.ids) == expected
    assert list(sequence.answer) == labels


REAL: list[list[tuple[str, str]]] = [
    [("virtual", ""), ("text", " "), ("field", "x"), ("text", " "), ("virtual", ""), ("slot", "")],
    [("field", "x"), ("text", " Question: "), ("field", "y"), ("text", "?\nAnswer:"),
     ("virtual", ""), ("text", " "), ("slot", "")],
    [("virtual", ""), ("field", "x"), ("field", "y"), ("text", " "), ("slot", "")],
    [("text", "a"), ("virtual", ""), ("virtual", ""), ("text", "b  "), ("virtual", ""),
     ("field", "y")],
]  # fmt: skip


@pytest.mark.parametrize("parts", REAL, ids=map(template_of, REAL))
def test_real_tokenizer_gives_the_whole_string_s_ids(
    smollm2_tokenizer: Any, parts: list[tuple[str, str]]
) -> None:
    oracle, meaning = extend(smollm2_tokenizer, sum(kind == "virtual" for kind, _ in parts))
    renderer = Renderer(smollm2_tokenizer, Task(template_of(parts)), "causal")

    @settings(deadline=None, max_examples=25)
    @given(x=texts, y=texts, answer=answers)
    def check(x: str, y: str, answer: str) -> None:
        assume(oracle(answer)["input_ids"])  # SmolLM2 has no token for some control characters
        whole = Whole.of(parts, {"x": x, "y": y})
        expected = [meaning.get(i, i) for i in oracle(whole.answered(answer))["input_ids"]]
        before = [meaning.get(i, i) for i in oracle(whole.before)["input_ids"]]
        sequence = one(renderer({"x": x, "y": y, "answer": answer}))
        assert list(sequence.ids) == before
        if expected[: len(before)] == before:
            assert list(sequence.ids + sequence.answer[:-1]) == expected
        else:
            assert not whole.space or answer[0].isspace()

    check()


# Text stays text.

SPELLINGS = ["[P]", "[P*3]", "{x}", "{y}", "[MASK]", "<|virtual-0:0|>", "<|virtual-0:1|>",
             "<|virtual-0:slot|>", "<|virtual-0:0|><|virtual-1:0|>", "<|virtual-0:"]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
def test_field_that_spells_syntax_stays_text(spelling: str, kind: str) -> None:
    sequence = render("[P*2] {x} [MASK]", {"x": spelling, "y": "no", "answer": "yes"}, kind)
    virtual = [i for i in sequence.ids if i < 0]
    assert virtual == [-1, -2]
    ids = [i for i in sequence.ids if i >= 0 and i not in plain().all_special_ids]
    assert plain().decode(ids).strip() == spelling
    assert all(i >= 0 for i in sequence.answer)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
def test_answer_that_spells_syntax_stays_text(spelling: str, kind: str) -> None:
    sequence = render("[P*2] {x} [MASK]", {"x": "a", "answer": spelling}, kind)
    assert all(i >= 0 for i in sequence.answer)
    text = plain().decode(sequence.answer, skip_special_tokens=True)
    assert text.strip() == spelling


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("[P*2] {x}{y} [MASK]", {"x": "<|virtual-", "y": "0:1|>"}),
        ("[P*2] <|virtual-{y} [MASK]", {"y": "0:1|>"}),
        ("[P*2] {x}0|> [MASK]", {"x": "<|virtual-0:"}),
        ("[P*2] {x}-0:slot|> [MASK]", {"x": "<|virtual"}),
        ("[P*2] {x}{x}{x} [MASK]", {"x": "<|virtual-0:0|><|virtual-"}),
    ],
)
def test_pieces_that_together_spell_a_virtual_token_stay_text(
    template: str, row: dict[str, str]
) -> None:
    sequence = render(template, {**row, "answer": "yes"})
    text = template.removeprefix("[P*2]").removesuffix(" [MASK]").format(**row)
    assert [i for i in sequence.ids if i < 0] == [-1, -2]
    assert plain().decode(sequence.ids[2:]) == text


def test_field_that_a_normalizer_would_turn_into_a_virtual_token_stays_text() -> None:
    tokenizer = tiny.tokenizer("wordpiece")
    tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=True)
    row = {"x": "<|VIRTUAL-0:0|> and <|Virtual-0:SLOT|>", "answer": "yes"}
    sequence = render("[P*2] {x} [MASK]", row, tokenizer=tokenizer)
    assert [i for i in sequence.ids if i < 0] == [-1, -2]
    assert sequence.ids[2:] == ids_of(row["x"], tokenizer)


def test_syntax_that_the_template_escapes_is_text() -> None:
    sequence = render("[P] [[P]] {{x}} [[MASK]] [MASK]", {"answer": "yes"})
    assert sequence.ids == (-1, *ids_of(" [P] {x} [MASK]"))


def test_rendering_leaves_the_tokenizer_as_it_was() -> None:
    tokenizer = tiny.tokenizer(around=True)
    before = tokenizer.backend_tokenizer.to_str()
    render("[P*9] {x} [MASK]", {"x": "<|virtual-0:0|>", "answer": "a"}, tokenizer=tokenizer)
    assert len(tokenizer) == 400
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.model_max_length == 512


@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
@pytest.mark.parametrize("row", [{"x": "\ud83d", "answer": "a"}, {"x": "a", "answer": "\ud83d"}])
def test_half_a_surrogate_pair_is_a_data_error(kind: str, row: dict[str, str]) -> None:
    with pytest.raises(DataError):
        render("[P] {x} [MASK]", row, kind)


# Where the answer stands.


def test_causal_input_ends_before_the_answer() -> None:
    sequence = render("[P*2] {x} [P] [MASK]", {"x": "France", "answer": "Paris"})
    assert sequence.ids == (-1, -2, *ids_of(" France"), -3)
    assert sequence.slot == len(sequence.ids)
    assert sequence.answer == (*ids_of(" Paris"), plain().eos_token_id)


@pytest.mark.parametrize(
    ("template", "answer"),
    [("{x} [MASK]", " Paris"), ("{x}[MASK]", "Paris"), ("{x}\n[MASK]", "Paris"),
     ("{x} is", " Paris"), ("{x} is ", " Paris"), ("{x}\n", "Paris"), ("{x}\t", "Paris"),
     ("{x} [P]", " Paris")],
)  # fmt: skip
def test_answer_begins_with_a_space_where_the_template_has_one(template: str, answer: str) -> None:
    sequence = render(template, {"x": "Oslo.", "answer": "Paris"}, answer_end=False)
    assert sequence.answer == ids_of(answer)
    spaced = render(template, {"x": "Oslo.", "answer": " Paris"}, answer_end=False)
    assert spaced.answer == ids_of(" Paris")  # and no second space


def test_answer_that_would_merge_with_the_word_before_is_kept_apart() -> None:
    whole = ids_of("Paris")
    before = ids_of("Par")
    assert whole[: len(before)] != before
    sequence = render("Par[MASK]", {"answer": "is"}, answer_end=False)
    assert sequence.ids == before
    assert sequence.answer == ids_of("is")


def test_end_of_answer_is_the_task_s_choice() -> None:
    row = {"answer": "yes"}
    with_end = render("[P] [MASK]", row).answer
    assert with_end == (*render("[P] [MASK]", row, answer_end=False).answer, plain().eos_token_id)


@pytest.mark.parametrize(("word", "count"), [("yes", 1), ("Zürich Oslo", 2), ("yyy", 3)])
def test_masked_slot_has_as_many_masks_as_the_answer_has_tokens(word: str, count: int) -> None:
    mask = plain().mask_token_id
    row = {"x": "Oslo", "answer": word}
    sequence = render("[P] {x} is [MASK], not", row, "masked")
    assert len(sequence.answer) >= count
    assert sequence.answer == ids_of(f" {word}")
    assert sequence.slot == 1 + len(ids_of(" Oslo is"))
    masks = (mask,) * len(sequence.answer)
    assert sequence.ids == (-1, *ids_of(" Oslo is"), *masks, *ids_of(", not"))


@pytest.mark.parametrize(("tokens", "count"), [(None, 1), (1, 1), (4, 4)])
def test_masked_slot_without_an_answer_has_the_task_s_length(
    tokens: int | None, count: int
) -> None:
    sequence = render("{x} [MASK].", {"x": "Oslo"}, "masked", answer_tokens=tokens)
    assert sequence.ids == (*ids_of("Oslo"), *(plain().mask_token_id,) * count, *ids_of("."))
    assert sequence.answer == ()


def test_masked_slot_is_found_where_the_field_spells_the_mask() -> None:
    row = {"x": "<mask>", "y": "b", "answer": "yes"}
    sequence = render("{x} [MASK] {y}", row, "masked")
    assert sequence.slot == 1
    assert sequence.ids == (*(plain().mask_token_id,) * 2, *ids_of(" b"))


def test_seq2seq_answer_has_the_decoder_s_special_tokens() -> None:
    tokenizer = plain("byte_bpe", "around")
    row = {"x": "Oslo", "answer": "Paris"}
    sequence = render("[P] {x} [MASK]", row, "seq2seq", tokenizer=tokenizer)
    assert sequence.ids == (1, -1, *ids_of(" Oslo"), 2)
    assert sequence.answer == (1, *ids_of("Paris"), 2)
    assert sequence.slot == len(sequence.ids) - 1
    short = render("{x}", row, "seq2seq", tokenizer=tokenizer, answer_end=False)
    assert short.answer == (1, *ids_of("Paris"))


@pytest.mark.parametrize("special", ["", "around"])
def test_seq2seq_words_keep_special_tokens_of_their_own(special: str) -> None:
    """T5's ``<extra_id_0>``, and what its vocabulary lacks: words are told apart by them."""
    tokenizer = plain("metaspace_always", special)
    words = ["RomC", "Rom", "<mask>"]
    task = Task("{x} [MASK]", verbalizer={"1": "RomC", "2": "Rom", "3": "<mask>"})
    sequences = Renderer(tokenizer, task, "seq2seq")({"x": "a", "answer": "1"}).sequences
    begin = (1,) if special else ()
    for word, sequence in zip(words, sequences, strict=True):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert sequence.answer == (*begin, *ids)
    assert sequences[0].answer[-1] == tokenizer.unk_token_id


def test_unanswered_example_has_no_answer() -> None:
    assert render("[P] {x} [MASK]", {"x": "Oslo"}).answer == ()
    rendered = Renderer(plain(), Task("{x} [MASK]"), "causal")({"x": "a"}, answered=False)
    assert rendered.label is None
    assert not rendered.compares


# Special tokens.


@pytest.mark.parametrize(
    ("special", "around", "after"),
    [
        ("", (-1, -2, "text"), (-1, -2, "text")),
        ("bos", (1, -1, -2, "text"), (-1, -2, 1, "text")),
        ("around", (1, -1, -2, "text", 2), (-1, -2, 1, "text", 2)),
    ],
)
@pytest.mark.parametrize("kind", ["masked", "seq2seq"])
def test_special_tokens_stand_around_the_whole_or_after_the_virtual_tokens(
    special: str, around: tuple[Any, ...], after: tuple[Any, ...], kind: str
) -> None:
    def filled(layout: tuple[Any, ...], text: str) -> tuple[int, ...]:
        content = ids_of(text) + ((plain().mask_token_id,) if kind == "masked" else ())
        return tuple(i for p in layout for i in (content if p == "text" else (p,)))

    tokenizer, row = plain("byte_bpe", special), {"x": "Oslo"}
    first = render("[P*2]{x} [MASK]", row, kind, tokenizer=tokenizer)
    assert first.ids == filled(around, "Oslo")
    second = render("[P*2]{x} [MASK]", row, kind, tokenizer=tokenizer, special_tokens="after")
    assert second.ids == filled(after, "Oslo")
    spaced = render("[P*2] {x} [MASK]", row, kind, tokenizer=tokenizer, special_tokens="after")
    assert spaced.ids == second.ids
    for sequence in (first, second, spaced):
        assert sequence.ids[sequence.opening :][: len(ids_of("Oslo"))] == ids_of("Oslo")


def test_causal_placements_on_a_tokenizer_with_bos() -> None:
    tokenizer = plain("byte_bpe", "bos")
    row = {"x": "Oslo", "answer": "yes"}
    around = render("[P*2]{x} [MASK]", row, tokenizer=tokenizer)
    after = render("[P*2]{x} [MASK]", row, tokenizer=tokenizer, special_tokens="after")
    assert around.ids == (1, -1, -2, *ids_of("Oslo"))
    assert after.ids == (-1, -2, 1, *ids_of("Oslo"))
    assert around.answer == after.answer


def test_after_is_peft_s_placement() -> None:
    tokenizer = plain("wordpiece", "around")
    text = "The capital of France is Paris."
    sequence = render(
        "[P*4]{x}", {"x": text}, "seq2seq", tokenizer=tokenizer, special_tokens="after"
    )
    assert sequence.ids == (-1, -2, -3, -4, *tokenizer(text)["input_ids"])


def test_both_placements_agree_on_a_tokenizer_that_adds_nothing(smollm2_tokenizer: Any) -> None:
    row = {"x": "Oslo", "answer": "yes"}
    around, after = (
        render("[P*2]{x} [MASK]", row, tokenizer=smollm2_tokenizer, special_tokens=placement)
        for placement in ("around", "after")
    )
    assert around == after
    assert around.ids == (-1, -2, *ids_of("Oslo", smollm2_tokenizer))


def test_after_needs_all_virtual_tokens_in_front() -> None:
    with pytest.raises(InputError, match="begin with all of them"):
        Task("{x} [P] [MASK]", special_tokens="after")


# The place of the first field.


@tokenizers
@pytest.mark.parametrize("kind_of_model", ["causal", "masked", "seq2seq"])
@pytest.mark.parametrize(
    ("template", "before"),
    [
        ("[P*2] {x} [P] {y}: {x} [MASK]", ""),
        ("[P*2] The capital of {x} [P] {y} [MASK]", "The capital of"),
        ("{x} [P*2] {y} [MASK]", ""),
        ("The cities of {x} [MASK]", "The cities of"),
        ("[P*2]{x}{y} [MASK]", ""),
    ],
)
def test_the_opening_ends_where_the_first_field_begins(
    template: str, before: str, kind: str, special: dict[str, bool], kind_of_model: str
) -> None:
    row = {"x": "France", "y": "cities of Europe", "answer": "Paris"}
    tokenizer = plain(kind, *special)
    sequence = render(template, row, kind_of_model, tokenizer=tokenizer)
    parts = [sequence.ids[: sequence.opening], sequence.ids[sequence.opening :]]
    front, behind = (tokenizer.decode([i for i in part if i >= 0]) for part in parts)
    assert front.replace(tokenizer.bos_token or "\0", "").strip() in (before, f"[CLS] {before}")
    assert behind.strip().startswith("France")


def test_an_opening_behind_the_slot_moves_with_the_masks() -> None:
    row = {"x": "France", "answer": "two words"}
    for kind in ("masked", "seq2seq"):
        sequence = render("[P] [MASK] of {x}", row, kind)
        assert plain().decode(sequence.ids[sequence.opening :]).strip().startswith("France")


def test_the_last_token_of_all_is_in_no_opening() -> None:
    for text, opening in ((" ", 1), ("", 0)):  # a field without tokens, and an empty one
        sequence = render("[P*2] {x} [MASK]", {"x": text}, tokenizer=plain("wordpiece"))
        assert (sequence.ids, sequence.opening) == ((-1, -2), opening)


@examples
@given(x=texts, y=texts)
def test_what_stands_in_front_of_any_text_is_the_same(x: str, y: str) -> None:
    for template in ("[P] {x} [P] {y} [MASK]", "[P] Is {x} [P] {y} [MASK]"):
        sequence = render(template, {"x": x, "y": y})
        front = sequence.ids[: sequence.opening]
        # A space in front of the field may be a token of its own.
        assert front in ((), (-1,), (-1, *ids_of(" Is")), (-1, *ids_of(" Is ")))
        assert front or not x or "Is" in template


# Over-long inputs.


@pytest.mark.parametrize("limit", range(16, 34))
@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
def test_long_field_is_shortened_and_nothing_else(kind: str, limit: int) -> None:
    tokenizer = plain("byte_bpe", "around")
    row = {"x": "The capital of France is Paris. " * 9, "y": "Oslo", "answer": "yes, it does"}
    sequence = render(
        "[P*2] {x} [P] Question: {y} [MASK]", row, kind, tokenizer=tokenizer, context=limit
    )
    assert sequence.shortened
    fed = len(sequence.ids) + (len(sequence.answer) - 1 if kind == "causal" else 0)
    assert limit - 3 <= fed <= limit
    assert [i for i in sequence.ids if i < 0] == [-1, -2, -3]
    assert sequence.ids[0] == tokenizer.bos_token_id
    behind = ids_of(" Question: Oslo")
    after = sequence.ids[sequence.ids.index(-3) + 1 :]
    assert after[: len(behind)] == behind
    if kind == "masked":
        assert set(after[len(behind) : -1]) == {tokenizer.mask_token_id}
        assert len(after) == len(behind) + len(sequence.answer) + 1
    whole = render("[P*2] {x} [P] Question: {y} [MASK]", row, kind, tokenizer=tokenizer)
    assert not whole.shortened
    assert sequence.answer == whole.answer
    field = sequence.ids[sequence.opening : sequence.ids.index(-3)]
    assert row["x"].startswith(tokenizer.decode(field).strip())


def test_longest_field_is_shortened_first() -> None:
    row = {"long": "Berlin Madrid " * 12, "middle": "Lisbon Vienna " * 4, "short": "Oslo"}
    template = "[P] {long} | {middle} | {short} [MASK]"
    full = render(template, row)
    kept = {}
    for limit in range(12, len(full.ids)):
        sequence = render(template, row, context=limit)
        assert sequence.shortened and len(sequence.ids) <= limit
        parts = [part.strip() for part in plain().decode(sequence.ids[1:]).split("|")]
        held = dict(zip(row, parts, strict=True))
        kept[limit] = {name: len(held.get(name, "")) for name in row}
        assert all(row[name].startswith(held.get(name, "")) for name in row)
        # What is longer than another field after cutting must have been longer before.
        if kept[limit]["middle"] < len(row["middle"].strip()):
            assert kept[limit]["long"] <= kept[limit]["middle"] + len(" Berlin Madrid")
        if kept[limit]["short"] < len("Oslo"):
            assert max(kept[limit].values()) <= len(" Berlin Madrid")
    assert kept[len(full.ids) - 1]["middle"] == len(row["middle"].strip())
    assert kept[12]["short"] == len("Oslo")


def test_example_that_fits_exactly_is_not_shortened() -> None:
    row = {"x": "The capital of France", "answer": "Paris, Rome"}
    whole = render("[P] {x} [MASK]", row)
    needed = len(whole.ids) + len(whole.answer) - 1
    assert render("[P] {x} [MASK]", row, context=needed) == whole
    assert render("[P] {x} [MASK]", row, max_length=needed) == whole
    less = render("[P] {x} [MASK]", row, max_length=needed - 1)
    assert less.shortened and len(less.ids) < len(whole.ids)


def test_smaller_of_the_two_limits_counts() -> None:
    task = Task("[P] {x} [MASK]", max_length=20)
    assert Renderer(plain(), task, "causal", 10).limit == 10
    assert Renderer(plain(), task, "causal", 30).limit == 20
    assert Renderer(plain(), task, "causal").limit == 20
    assert Renderer(plain(), Task("[P] {x} [MASK]"), "causal").limit is None


def test_room_for_the_longest_answer_is_kept_free_when_there_is_none_yet() -> None:
    row = {"x": "The capital of France is Paris. " * 9}
    sequence = render("[P] {x} [MASK]", row, context=20, answer_tokens=6)
    assert sequence.shortened
    assert len(sequence.ids) <= 20 - 6 + 1


@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
@pytest.mark.parametrize("row", [{"x": ""}, {"x": "word " * 50}])
def test_example_that_no_shortening_makes_fit_is_an_error(kind: str, row: dict[str, str]) -> None:
    template = "[P*3] The capital of France is Paris. {x} [MASK]"
    with pytest.raises(DataError, match="longer than the 8 tokens"):
        render(template, {**row, "answer": "yes"}, kind, context=8)


def test_virtual_tokens_that_fill_the_context_are_an_error() -> None:
    with pytest.raises(InputError, match=r"num_virtual_tokens is 8.*room for 8"):
        Renderer(plain(), Task("[P*8] {x} [MASK]"), "causal", 8)


def test_shortened_example_says_so_as_a_whole() -> None:
    task = Task("[P] {x} [MASK]", verbalizer={"a": "yes", "b": "yes, it does"})
    renderer = Renderer(plain(), task, "causal", 12)
    assert renderer({"x": "word " * 30, "label": "a"}).shortened
    assert not renderer({"x": "w", "label": "a"}).shortened


# What follows [MASK].


def test_causal_model_drops_what_follows_the_slot_with_one_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        renderer = Renderer(plain(), Task("[P] {x} [MASK], says {y}."), "causal")
        for number in range(3):
            sequence = one(renderer({"x": f"Oslo {number}", "y": "no", "answer": "yes"}))
            assert sequence.ids == (-1, *ids_of(f" Oslo {number}"))
    assert len(caught) == 1
    assert "is dropped" in str(caught[0].message)


@pytest.mark.parametrize("kind", ["masked", "seq2seq"])
def test_other_models_keep_what_follows_the_slot(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sequence = render("[P] {x} [MASK] [P].", {"x": "Oslo", "answer": "yes"}, kind)
    assert sequence.ids[-2:] == (-2, *ids_of("."))


def test_virtual_tokens_behind_a_causal_slot_are_an_error() -> None:
    with pytest.raises(InputError, match=r"virtual tokens stand there.*\[MASK\] \[P\]"):
        Renderer(plain(), Task("{x} [MASK] [P]"), "causal")


def test_masked_model_needs_a_slot_and_a_mask_token() -> None:
    with pytest.raises(InputError, match="the template has none"):
        Renderer(plain(), Task("[P] {x}"), "masked")
    tokenizer = tiny.tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(InputError, match="no mask token"):
        Renderer(tokenizer, Task("[P] {x} [MASK]"), "masked")


def test_causal_model_needs_an_end_token_for_free_answers() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="answer_end=False"):
        Renderer(tokenizer, Task("[P] [MASK]"), "causal")
    Renderer(tokenizer, Task("[P] [MASK]", answer_end=False), "causal")
    Renderer(tokenizer, Task("[P] [MASK]", verbalizer={"a": "yes", "b": "no"}), "causal")


# Chats.


@pytest.mark.parametrize("template", ["[P*2] {x} [P] Answer: [MASK]", "[P*2] {x} [P] Answer:"])
def test_chat_puts_the_template_into_the_user_s_turn_and_the_answer_behind_the_header(
    smollm2_tokenizer: Any, template: str
) -> None:
    row = {"x": "Is it [P] or {x}?", "answer": "Paris"}
    sequence = render(template, row, tokenizer=smollm2_tokenizer, chat=True)
    oracle, meaning = extend(smollm2_tokenizer, 3)
    text = "<|oracle-0|><|oracle-1|> Is it [P] or {x}?<|oracle-2|> Answer:"
    turn = [{"role": "user", "content": text}]
    chat = oracle.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>assistant\n")
    expected = [meaning.get(i, i) for i in oracle(chat, add_special_tokens=False)["input_ids"]]
    assert list(sequence.ids) == expected
    assert sequence.slot == len(sequence.ids)
    eos = smollm2_tokenizer.eos_token_id
    assert sequence.answer == (*ids_of("Paris", smollm2_tokenizer), eos)
    field = sequence.ids[sequence.opening : sequence.ids.index(-3)]
    assert smollm2_tokenizer.decode(field) == " Is it [P] or {x}?"
    users, end = ids_of("<|im_start|>user\n", smollm2_tokenizer), sequence.ids.index(-3)
    assert sequence.ids[sequence.ids.index(-1) - len(users) : sequence.ids.index(-1)] == users
    assert smollm2_tokenizer.convert_tokens_to_ids("<|im_end|>") in sequence.ids[end:]


def test_chat_has_only_the_special_tokens_of_its_template() -> None:
    tokenizer = tiny.tokenizer(around=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}Q:{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    row = {"x": "Oslo", "answer": "yes"}
    sequence = render("[P] {x} [MASK]", row, tokenizer=tokenizer, chat=True)
    assert sequence.ids == (1, *ids_of("Q:"), -1, *ids_of(" OsloA:"))
    assert sequence.answer == (*ids_of("yes"), 2)


@pytest.mark.parametrize(
    "content",
    [
        "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}",
        "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}IMAGE{% endfor %}"
        "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] }}{% endfor %}",  # LLaVA's
        "{% if m.content is string %}{{ raise_exception('parts, please') }}{% endif %}"
        "{{ m.content[0].text }}",
    ],
)
def test_a_chat_template_may_take_turns_as_lists_of_parts(content: str) -> None:
    plain, in_parts = tiny.tokenizer(), tiny.tokenizer()
    around = "{{% for m in messages %}}Q:{}{{% endfor %}}A:".format
    plain.chat_template, in_parts.chat_template = around("{{ m.content }}"), around(content)
    row = {"x": "Oslo", "answer": "yes"}
    expected = render("[P*2] {x} [P*2] [MASK]", row, tokenizer=plain, chat=True)
    found = render("[P*2] {x} [P*2] [MASK]", row, tokenizer=in_parts, chat=True)
    assert found.ids == expected.ids


@pytest.mark.parametrize(
    "content",
    [
        "{% for part in m.content %}{{ part.words }}{% endfor %}",
        "{{ m.content | upper }}",
        "{{ m.content }} {{ m.content }}",
        "{{ m.content[:8] }}",
    ],
)
def test_a_chat_template_that_loses_or_repeats_virtual_tokens_is_refused(content: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q:" + content + "{% endfor %}A:"
    row = {"x": "Oslo", "answer": "yes"}
    with pytest.raises(InputError, match="does not write what the user says once and as it is"):
        render("[P*2] {x} [P*2] [MASK]", row, tokenizer=tokenizer, chat=True)


def test_chat_shortens_the_field_and_keeps_the_turns(smollm2_tokenizer: Any) -> None:
    settings = {"tokenizer": smollm2_tokenizer, "chat": True}
    row = {"x": "one two three " * 40, "answer": "yes"}
    whole = render("[P*2] {x} [MASK]", row, **settings)
    sequence = render("[P*2] {x} [MASK]", row, context=60, **settings)
    assert sequence.shortened and len(sequence.ids) + len(sequence.answer) - 1 <= 60
    assert sequence.ids[-5:] == whole.ids[-5:]
    assert sequence.ids[: whole.ids.index(-2) + 1] == whole.ids[: whole.ids.index(-2) + 1]


@pytest.mark.parametrize(
    ("kind", "template", "chat", "message"),
    [
        ("causal", None, True, "chat=True needs a causal model"),
        ("masked", None, True, "chat=True needs a causal model"),
        ("masked", "[P*2] {x}", False, "a masked LM answers at"),
        ("causal", "{x} [MASK] [P*2]", False, "never sees what follows"),
    ],
)
def test_a_prompt_made_of_a_table_is_refused_as_any_other(
    kind: str, template: str | None, chat: bool, message: str
) -> None:
    """Its label words are settled by the tokenizer before it is rendered."""
    rows = [{"x": f"text {n}", "label": "good" if n % 2 else "bad"} for n in range(8)]
    prompt = Prompt.for_rows(rows, template=template, chat=chat)
    with pytest.raises(InputError, match=message):
        settle_words(prompt, plain(), kind)
    with pytest.raises(InputError, match=message):
        Renderer(plain(), Prompt.for_rows(rows, template=template, chat=chat), kind)


def test_chat_needs_a_causal_model_with_a_chat_template(smollm2_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="chat=True needs"):
        Renderer(plain(), Task("[P] {x}", chat=True), "causal")
    with pytest.raises(InputError, match="chat=True needs"):
        Renderer(smollm2_tokenizer, Task("[P] {x}", chat=True), "seq2seq")


# Labels.


@pytest.mark.parametrize(
    ("verbalizer", "label", "index"),
    [
        ({"no": "no", "yes": "yes"}, "yes", 1),
        ({0: "no", 1: "yes"}, 1, 1),
        ({0: "no", 1: "yes"}, "0", 0),
        ({"0": "no", "1": "yes"}, 0, 0),
        ({False: "no", True: "yes"}, True, 1),
        ({False: "no", True: "yes"}, "False", 0),
        ({"false": "no", "true": "yes"}, True, 1),
        ({"False": "no", "True": "yes"}, False, 0),
        ({"false": "no", "true": "yes"}, "True", 1),
        ({"false": "no", "true": "yes"}, " FALSE ", 0),
        ({"FALSE": "no", "TRUE": "yes"}, True, 1),
        ({"FALSE": "no", "TRUE": "yes"}, "true", 1),
        ({"true": "no", "True": "yes"}, "True", 1),
        ({-1: "no", 2.5: "yes"}, 2.5, 1),
    ],
)
def test_label_of_any_type_is_found_by_its_text(
    verbalizer: dict[Any, str], label: Any, index: int
) -> None:
    task = Task("[P] {x} [MASK]", verbalizer=verbalizer)
    rendered = Renderer(plain(), task, "causal")({"x": "a", "label": label})
    assert rendered.label == index


def test_single_token_words_share_one_sequence() -> None:
    tokenizer = plain("wordpiece")
    task = Task("[P] {x} [MASK]", verbalizer={"a": "yes", "b": ["Rome", "Paris"]})
    renderer = Renderer(tokenizer, task, "causal")
    rendered = renderer({"x": "Oslo", "label": "b"})
    assert len(rendered.sequences) == 1
    assert rendered.label_ids == tuple(
        tokenizer.convert_tokens_to_ids(word) for word in ("yes", "Rome", "Paris")
    )
    assert renderer.owner == [0, 1, 1]
    assert (rendered.label, rendered.compares, rendered.weight) == (1, True, 1)
    unlabelled = renderer({"x": "Oslo"}, answered=False)
    assert unlabelled.label is None
    assert unlabelled.label_ids == rendered.label_ids


@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
def test_words_of_several_tokens_have_a_sequence_each(kind: str) -> None:
    words = {"a": "yes", "b": "two words", "c": ["Rome", "it does not"]}
    renderer = Renderer(plain(), Task("[P] {x} [MASK]", verbalizer=words), kind)
    rendered = renderer({"x": "Oslo", "label": "c"})
    listed = ["yes", "two words", "Rome", "it does not"]
    space = "" if kind == "seq2seq" else " "
    assert [s.answer for s in rendered.sequences] == [ids_of(space + word) for word in listed]
    assert renderer.owner == [0, 1, 2, 2]
    assert rendered.label_ids == ()
    assert (rendered.label, rendered.compares, rendered.weight) == (2, True, 1)
    for sequence in rendered.sequences:
        masks = sequence.ids.count(plain().mask_token_id)
        assert masks == (len(sequence.answer) if kind == "masked" else 0)


def test_sequences_of_one_example_share_the_shortened_fields() -> None:
    words = {"a": "yes", "b": "not at all, never, in no city of Europe"}
    renderer = Renderer(plain(), Task("[P] {x} [MASK]", verbalizer=words), "causal", 40)
    rendered = renderer({"x": "Berlin Madrid Lisbon " * 20, "label": "a"})
    first, second = rendered.sequences
    assert rendered.shortened
    assert first.ids == second.ids


def test_vocabulary_mode_trains_on_the_label_s_first_word() -> None:
    words = {"a": "yes", "b": ["two words", "no"]}
    task = Task("[P] {x} [MASK]", verbalizer=words, label_mode="vocabulary")
    rendered = Renderer(plain(), task, "causal")({"x": "Oslo", "label": "b"})
    assert one(rendered).answer == ids_of(" two words")
    assert (rendered.label, rendered.compares) == (1, False)
    assert rendered.weight == len(ids_of(" two words"))


def test_candidates_are_compared_instead_of_labels() -> None:
    renderer = Renderer(plain(), Task("[P] {x} [MASK]"), "causal", candidates=["Rome", "Paris"])
    rendered = renderer({"x": "Oslo"}, answered=False)
    assert renderer.labels == {"Rome": ("Rome",), "Paris": ("Paris",)}
    assert rendered.compares
    assert len(rendered.label_ids or rendered.sequences) == 2


def test_unknown_label_is_an_error_that_lists_the_known() -> None:
    renderer = Renderer(plain(), Task("{x} [MASK]", verbalizer={0: "no", 1: "yes"}), "causal")
    with pytest.raises(DataError, match=r"'2' is none of the prompt's labels, '0', '1'; leave"):
        renderer({"x": "a", "label": 2})


@pytest.mark.parametrize("value", [None, "", "  ", "\n"])
def test_empty_answer_is_an_error_that_names_the_column(value: str | None) -> None:
    renderer = Renderer(plain(), Task("{x} [MASK]", answer="capital"), "causal")
    with pytest.raises(DataError, match="the answer column 'capital' is empty"):
        renderer({"x": "a", "capital": value})


def test_missing_column_is_an_error_that_lists_those_there() -> None:
    renderer = Renderer(plain(), Task("{x} {country} [MASK]"), "causal")
    with pytest.raises(DataError, match="the column 'country', and the example has 'x', 'answer'"):
        renderer({"x": "a", "answer": "b"})
    with pytest.raises(DataError, match="no answer column 'answer' or 'label'; it has 'x', 'c"):
        renderer({"x": "a", "country": "b"})


def test_the_answer_of_the_answer_column_is_rendered() -> None:
    both = {"x": "a", "answer": "Paris", "label": "Rome"}
    rendered = Renderer(plain(), Task("{x} [MASK]"), "causal")(both)
    assert one(rendered).answer[:-1] == ids_of(" Paris")


@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
def test_answer_without_a_token_is_an_error(kind: str) -> None:
    tokenizer = tiny.tokenizer("wordpiece")
    tokenizer.backend_tokenizer.normalizer = BertNormalizer()
    with pytest.raises(DataError, match="has no token"):
        render("{x} [MASK]", {"x": "a", "answer": "\x07"}, kind, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_answer_that_an_unknown_word_swallows_keeps_its_token(kind: str) -> None:
    tokenizer = plain("wordpiece")
    assert ids_of("5Paris", tokenizer) == ids_of("5", tokenizer)
    sequence = render("5[MASK]", {"answer": "Paris"}, kind, tokenizer=tokenizer, answer_end=False)
    assert sequence.answer == ids_of("Paris", tokenizer)


def test_fields_of_any_type_become_text_and_none_is_empty() -> None:
    row = {"a": 1, "b": 2.5, "c": True, "d": None, "answer": 7}
    sequence = render("{a} {b} {c} {d}. [MASK]", row)
    assert sequence.ids == ids_of("1 2.5 True .")
    assert sequence.answer[:-1] == ids_of(" 7")


@pytest.mark.parametrize(
    ("verbalizer", "part"),
    [
        ({}, "at least two labels"),
        ({"a": "yes"}, "at least two labels"),
        ({"a": "yes", "b": ""}, "label 'b' has an empty word"),
        ({"a": "yes", "b": []}, "label 'b' has an empty word"),
        ({"a": "yes", "b": ["no", " "]}, "label 'b' has an empty word"),
        ({"a": "yes", "b": 3}, "label 'b'"),
        ({"a": "yes", "b": None}, "label 'b'"),
        ({"a": "yes", "b": ["no", "yes"]}, "'a' and 'b' share the word 'yes'"),
        ({1: "one", "1": "uno", "2": "due"}, "has the label '1' twice"),
    ],
)
def test_unusable_verbalizer_is_an_error(verbalizer: dict[Any, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        Task("[P] {x} [MASK]", verbalizer=verbalizer)


def test_words_that_a_tokenizer_does_not_tell_apart_are_refused_before_a_training() -> None:
    tokenizer = tiny.tokenizer("wordpiece")
    task = Task(
        "{x} [MASK]",
        verbalizer={"good": ["\N{THUMBS UP SIGN}"], "bad": ["no", "\N{THUMBS DOWN SIGN}"]},
    )
    row = {"x": "it rains", "label": "good"}
    with pytest.raises(InputError, match=r"label 'good' and .* of 'bad' are the same to this"):
        Renderer(tokenizer, task, "masked")(row)
    with pytest.raises(InputError, match="give each label words that it tells apart"):
        Renderer(tokenizer, task, "masked").each([row], "training")
    # An example's own words may be alike.
    own = Task("{x} [MASK]", verbalizer={"0": "{one}", "1": "{two}"})
    made = Renderer(tokenizer, own, "masked")({"x": "a", "one": "yes", "two": "yes", "label": "0"})
    assert made.label_ids[0] == made.label_ids[1]


@pytest.mark.parametrize("word", ["it", " it", "It"])
def test_words_of_one_label_that_are_the_same_to_a_tokenizer_are_told_of_once(word: str) -> None:
    """They count twice: without a word the label would be twice as likely as it is."""
    tokenizer = tiny.tokenizer("wordpiece")
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    row = {"x": "it rains", "label": "good"}
    render = Renderer(
        tokenizer, Task("{x} [MASK]", verbalizer={"good": ["it", word], "bad": "is"}), "masked"
    )
    told = rf"the words 'it' and '{word}' of the label 'good' are the same .*, so it counts twice"
    with pytest.warns(UserWarning, match=told):
        assert len(render(row).label_ids) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render(row)


# [P:words].


@pytest.mark.parametrize(
    ("template", "texts_of_groups"),
    [
        ("[P:capital city] {x} [MASK]", ["capital city"]),
        ("{x} [P:capital city] [MASK]", [" capital city"]),
        ("[P*2] {x} [P:capital of] [P] [MASK]", [None, " capital of", None]),
        ("[P][P:capital] {x} [MASK]", [None, " capital"]),
        ("{x}[P:\nAnswer:] [MASK]", ["\nAnswer:"]),
        ("[P:\nAnswer:]{x} [MASK]", ["\nAnswer:"]),
    ],
)
def test_words_have_one_virtual_token_per_token(
    template: str, texts_of_groups: list[str | None]
) -> None:
    prompt = Prompt(template)
    renderer = Renderer(plain(), prompt, "causal")
    for group, text in zip(renderer.groups, texts_of_groups, strict=True):
        assert tuple(group) == (ids_of(text) if text else (None,) * len(group))
    assert prompt.num_virtual_tokens == renderer.count == sum(map(len, renderer.groups))
    sequence = one(renderer({"x": "Oslo", "answer": "yes"}))
    virtual = [i for i in sequence.ids if i < 0]
    assert virtual == [-1 - i for i in range(renderer.count)]


def test_words_that_disagree_with_the_number_are_an_error() -> None:
    prompt = Prompt("[P:capital city] {x} [MASK]", num_virtual_tokens=99)
    with pytest.raises(InputError, match="num_virtual_tokens is 99"):
        Renderer(plain(), prompt, "causal")


def test_task_without_a_template_cannot_be_rendered() -> None:
    with pytest.raises(InputError, match="no template"):
        Renderer(plain(), Prompt(num_virtual_tokens=3), "causal")


def test_renderers_of_one_tokenizer_share_its_extended_copy() -> None:
    tokenizer = tiny.tokenizer()
    first = render("[P*2] {x} [MASK]", {"x": "Oslo", "answer": "yes"}, tokenizer=tokenizer)
    copied = virtual_ids.Names(tokenizer, 3).avoiding("").tokenizer
    tokenizer(["Oslo", "does it rain in Oslo?"], padding=True, truncation=True, max_length=4)
    assert virtual_ids.Names(tokenizer, 5).avoiding("").tokenizer is copied
    again = render("[P*2] {x} [MASK]", {"x": "Oslo", "answer": "yes"}, tokenizer=tokenizer)
    assert again == first
    wider = virtual_ids.Names(tokenizer, 40).avoiding("")
    assert wider.ids(f"{wider.name(39)}{wider.slot}") == [-40, virtual_ids.SLOT]


@pytest.mark.parametrize("change", ["token", "normalizer", "around", "model"])
def test_a_tokenizer_that_its_owner_changes_is_copied_anew(change: str) -> None:
    tokenizer = tiny.tokenizer()
    example = {"x": "Oslo </s> Rome", "answer": "yes"}
    before = render("[P*2] {x} [MASK]", example, tokenizer=tokenizer)
    if change == "token":
        tokenizer.add_tokens(["Oslo"])
    elif change == "normalizer":
        tokenizer.backend_tokenizer.normalizer = Lowercase()
    elif change == "around":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    else:
        merges = tokenizer.backend_tokenizer.model
        merges.dropout = 1.0
        tokenizer.backend_tokenizer.model = merges
    after = render("[P*2] {x} [MASK]", example, tokenizer=tokenizer)
    assert after != before
    assert after == render("[P*2] {x} [MASK]", example, tokenizer=copy.deepcopy(tokenizer))


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_special_tokens_in_a_text_are_split_where_the_tokenizer_splits_them(kind: str) -> None:
    tokenizer = tiny.tokenizer(kind, around=True)
    tokenizer.split_special_tokens = True
    row = {"x": "Oslo </s><mask> Rome", "answer": "a </s>"}
    sequence = render("{x}[P*2][MASK]", row, tokenizer=tokenizer, answer_end=False)
    split = ids_of(row["x"], tokenizer)
    assert split != ids_of(row["x"], plain(kind)) and tokenizer.eos_token_id not in split
    assert sequence.ids == (tokenizer.bos_token_id, *split, -1, -2)
    assert tokenizer.eos_token_id not in sequence.answer
    assert sequence.opening == 1


def test_a_tokenizer_that_splits_all_added_tokens_is_refused() -> None:
    tokenizer = ByT5Tokenizer()  # in Python
    row = {"x": "Oslo </s>"}
    assert render("[P]{x}[MASK]", row, "seq2seq", tokenizer=tokenizer).ids[0] == -1
    tokenizer.split_special_tokens = True
    with pytest.raises(InputError, match=r"ByT5Tokenizer.*load it with split_special_tokens=False"):
        render("[P]{x}[MASK]", row, "seq2seq", tokenizer=tokenizer)


def test_a_tokenizer_that_takes_no_tokens_is_refused() -> None:
    tokenizer = tiny.WithoutTokens(tiny.tokenizer())
    with pytest.raises(
        InputError, match=r"WithoutTokens\) takes no further tokens.*tokenizer.json"
    ):
        render("[P]{x}[MASK]", {"x": "Oslo"}, "causal", tokenizer=tokenizer)


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
@pytest.mark.parametrize(
    "state",
    [
        {"clean_up_tokenization_spaces": True},
        {"clean_up_tokenization_spaces": False},
        {"add_prefix_space": True},
        {"model_max_length": 2},
        {"padding_side": "left"},
        {"truncation_side": "left"},
        {"model_input_names": ["input_ids"]},
        {"pad_token": None},
    ],
    ids=str,
)
def test_what_does_not_say_how_text_is_cut_changes_nothing(
    state: dict[str, Any], kind: str
) -> None:
    row = {"x": "Oslo </s> , does it rain ?", "answer": "yes"}
    wanted = render("[P*2] {x} [P] [MASK]", row, tokenizer=plain(kind, "around"))
    tokenizer = tiny.tokenizer(kind, around=True)
    for name, value in state.items():
        setattr(tokenizer, name, value)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert render("[P*2] {x} [P] [MASK]", row, tokenizer=tokenizer) == wanted


def test_an_extended_copy_goes_with_its_tokenizer() -> None:
    tokenizer = tiny.tokenizer()
    copied = weakref.ref(virtual_ids.Names(tokenizer, 2).avoiding("").tokenizer)
    del tokenizer
    gc.collect()
    assert copied() is None


def test_texts_that_hold_names_of_virtual_tokens_make_one_copy_more_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    extended = virtual_ids._extended

    def counted(*given: Any) -> Any:
        made.append(given[1])
        return extended(*given)

    monkeypatch.setattr(virtual_ids, "_extended", counted)
    renderer = Renderer(tiny.tokenizer(), Prompt("[P*2] {text} [MASK]"), "causal", None)
    for number in range(9):
        text = "".join(f"<|virtual-{n}:0|>" for n in range(number))
        rendered = renderer({"text": text, "answer": "no"}).sequences[0].ids
        assert list(rendered).count(-1) == 1 and list(rendered).count(-2) == 1
    assert len(made) <= 2
    other = made[-1]
    renderer({"text": f"<|virtual-0:0|>{other}0|>", "answer": "no"})
    assert len(made) <= 3 and made[-1] != other
