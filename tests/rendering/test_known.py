"""Rows tokenized together against rows tokenized one by one, every string as a whole."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from ptuning.errors import DataError
from ptuning.prompts.task import Task
from ptuning.rendering import render
from ptuning.rendering.known import Known
from ptuning.rendering.layout import Draft, Layout, Written
from ptuning.rendering.render import _ROWS, Rendered, Renderer
from ptuning.rendering.spaces import cuts_at_spaces, last_word
from ptuning.rendering.virtual_ids import SLOT, NamedTokenizer, Names

from .. import tiny

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def changed(kind: str, **parts: Any) -> Any:
    """A tiny tokenizer with other parts than it was trained with."""
    tokenizer = tiny.tokenizer(kind, around=True)
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def words_alone() -> Any:
    """A tokenizer that has no token for an unknown word, and says so."""
    words = {word: n for n, word in enumerate(["<pad>", "</s>", "yes", "no", "one", "Oslo"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<none>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def bytes_first() -> Any:
    """The cutter sees no spaces any more."""
    cutter = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    return pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(use_regex=False), cutter])


def digits_first() -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(True)]
    )


def unigram() -> Any:
    """As T5's: pieces of a vocabulary with scores."""
    inner = Tokenizer.from_str(tiny.tokenizer("metaspace_always").backend_tokenizer.to_str())
    pieces = sorted(inner.get_vocab().items(), key=lambda item: item[1])
    scored = [(piece, -float(len(piece) == 1) - number / 100) for piece, number in pieces]
    inner.model = models.Unigram(scored, unk_id=3)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", mask_token="<mask>"
    )


MADE: dict[str, Any] = {
    **{kind: functools.partial(tiny.tokenizer, kind) for kind in tiny.TOKENIZERS},
    "byte_bpe-bos": functools.partial(tiny.tokenizer, "byte_bpe", bos=True),
    "metaspace_first-around": functools.partial(tiny.tokenizer, "metaspace_first", around=True),
    "llama3": lambda: changed("byte_bpe", pre_tokenizer=split_by(LLAMA3)),
    "digits": lambda: changed("byte_bpe", pre_tokenizer=digits_first()),
    "lower": lambda: changed("wordpiece", normalizer=normalizers.BertNormalizer()),
    "unigram": unigram,
    "unigram-whole": lambda: changed(
        "metaspace_first", pre_tokenizer=pre_tokenizers.Metaspace(split=False)
    ),
    "llama2": lambda: changed(
        "metaspace_never",
        pre_tokenizer=None,
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "in Python": ByT5Tokenizer,
}
SPACED = {*MADE} - {"unigram-whole", "llama2", "in Python"}


@functools.cache
def made(name: str) -> Any:
    return MADE[name]()


@pytest.fixture(params=[*MADE, "smollm2", "minilm"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Each once for all tests, so that its extended copy is made once."""
    name: str = request.param
    return made(name) if name in MADE else fetched(request.getfixturevalue(f"{name}_folder"))


@functools.cache
def fetched(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


class Alone(Names):
    """Every virtual token has a name of its own."""

    def avoiding(self, text: str) -> NamedTokenizer:
        return replace(super().avoiding(text), by_group=False)


class Plain(Layout):
    """Every string as a whole in a call of its own, every virtual token by its own name."""

    def drafts(self, fields: dict[str, str], words: Iterable[str | None]) -> list[Draft]:
        self._names = Alone(self.tokenizer, self.count)
        return super().drafts(fields, words)

    def _read(self, written: Written, known: Known) -> tuple[list[int], int]:
        named, field = written.named, written.field
        fast = named.tokenizer.is_fast
        encoding = named.tokenizer(
            written.text, add_special_tokens=not self.task.chat, return_offsets_mapping=fast
        )
        shift = self.count if self.task.special_tokens == "after" else 0
        ids = [-1 - i for i in range(shift)] + named.rename(encoding["input_ids"])
        before = written.text[: field.start].rstrip()
        if field and before.endswith("|>") and not self.task.chat:  # right behind virtual tokens
            last = before.rpartition(named.prefix)[2].removesuffix("|>")
            return ids, ids.index(-1 - int(last)) + 1
        places = enumerate(encoding["offset_mapping"] if fast else (), shift)
        inside = [i for i, (a, b) in places if a < field.stop and b > field.start]
        return ids, inside[0] if inside else 0

    def _answer(self, word: str, written: Written, known: Known) -> tuple[int, ...]:
        if self.kind == "seq2seq":
            return super()._answer(word, written, Known())
        named, before = written.named, written.text.partition(written.named.slot)[0]
        answer = written.continued(word)
        alone, both = named.ids(before), named.ids(before + answer)
        if len(both) > len(alone) and both[: len(alone)] == alone:
            ids = both[len(alone) :]
        else:
            apart = named.ids(before + named.slot + answer)
            ids = apart[apart.index(SLOT) + 1 :]
        if not ids:
            raise DataError(f"the answer {word!r} has no token in this tokenizer")
        ends = self.kind == "causal" and self.task.ends_answer
        return (*ids, self.tokenizer.eos_token_id) if ends else tuple(ids)


def one_by_one(renderer: Renderer, rows: list[Any], answered: bool = True) -> list[Rendered]:
    plain = copy.copy(renderer)
    plain.layout = copy.copy(renderer.layout)
    plain.layout.__class__ = Plain
    rendered = []
    for number, row in enumerate(rows, 1):
        try:
            rendered.append(plain(row, answered=answered))
        except DataError as error:
            raise DataError(f"test example {number}: {error}") from None
    return rendered


def outcome(function: Any, *arguments: Any) -> Any:
    """What it gives, or what it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return type(error), str(error)


TEMPLATES = (
    "[P*2] {x} [MASK]",
    "[P*2] {x} [P*3] Label: [MASK]",
    "{x}[P]{y} is [MASK] , {x}",
    "{x} The answer is[MASK]",
    "[P]\n{y} a{x}",
    "one two {x} [P:a word] [MASK]",
)
WORDS = ["", "Oslo", "a", "is", "2024", "12", "one", "two", "Paris.", "naïve", "\u0301", "東京",
         "<mask>", "</s>", "<|virtual-0:0|>", "<|virtual-0:slot|>", "<|virtual-", "0:1|>", "'s",
         "▁", "\n", "\t", "\u00a0", "[P]", "Ġ", "##s", "Σ"]  # fmt: skip
texts = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join),
    st.lists(st.sampled_from([*WORDS, " "]), max_size=6).map("".join),
    st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=12),
)
labels = st.sampled_from(
    [
        {"yes": "yes", "no": "no"},
        {"yes": ["Oslo", "'s"], "no": "two words"},
        {"yes": "{x}", "no": "not {x}"},
        {"yes": "0:1|>", "no": "is a"},
        None,
    ]
)
rows = st.lists(
    st.fixed_dictionaries({"x": texts, "y": texts, "answer": st.sampled_from(["yes", "no"])}),
    max_size=3,
)


@pytest.mark.filterwarnings("ignore:a causal model answers at")
@pytest.mark.filterwarnings("ignore:This sequence already has </s>")  # ByT5's
@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
def test_rows_together_are_the_rows_one_by_one(tokenizer: Any, kind: str) -> None:
    if kind == "masked" and tokenizer.mask_token is None:
        pytest.skip("this tokenizer has no mask token")
    made: dict[str, Renderer] = {}

    def renderer(template: str, verbalizer: Any, context: int | None) -> Renderer:
        if kind == "masked" and "[MASK]" not in template:
            template += " [MASK]"
        ends = tokenizer.eos_token is not None
        task = Task(template, verbalizer=verbalizer, answer_end=ends)
        key = f"{template} {verbalizer} {context}"
        return made.get(key) or made.setdefault(key, Renderer(tokenizer, task, kind, context))

    @settings(deadline=None, max_examples=25)
    @given(
        rows=rows,
        template=st.sampled_from(TEMPLATES),
        verbalizer=labels,
        answers=st.lists(texts, min_size=3, max_size=3),
        context=st.sampled_from([None, None, None, 16]),
        answered=st.booleans(),
    )
    @example(
        rows=[{"x": "Is it <|virtual-0", "y": "", "answer": "yes"}] * 2, template=TEMPLATES[3],
        verbalizer={"yes": ":0|>", "no": ":"}, answers=[], context=None, answered=True,
    )  # fmt: skip
    def check(
        rows: list[dict[str, Any]], template: str, verbalizer: Any, answers: list[str],
        context: int | None, answered: bool,
    ) -> None:  # fmt: skip
        if verbalizer is None:
            rows = [row | {"answer": free} for row, free in zip(rows, answers, strict=False)]
        of_task = renderer(template, verbalizer, context)
        plain = outcome(one_by_one, of_task, rows, answered)
        assert outcome(together, of_task, rows, answered) == plain

    check()


def together(renderer: Renderer, rows: list[Any], answered: bool) -> list[Rendered]:
    return renderer.each(rows, "test", answered=answered)


def test_chats_together_are_chats_one_by_one(smollm2_folder: Path) -> None:
    tokenizer = fetched(smollm2_folder)
    words = {"a": "yes", "b": "not at all"}
    task = Task("[P*2] {x} is what [P] {y}", chat=True, verbalizer=words)
    rows = [{"x": "one two", "y": "a b"}, {"x": "<|im_end|>", "y": ""}, {"x": "", "y": "c d e"}]
    renderer = Renderer(tokenizer, task, "causal")
    assert together(renderer, rows, False) == one_by_one(renderer, rows, False)


# Spaces.


@pytest.mark.parametrize("name", MADE)
def test_tokenizers_that_cut_at_spaces_are_known(name: str) -> None:
    assert cuts_at_spaces(made(name)) == (name in SPACED)


def test_a_tokenizer_s_tokens_in_front_of_a_space_and_behind_it_are_those_of_the_whole(
    tokenizer: Any,
) -> None:
    named = Names(tokenizer, 1).avoiding("")
    if not named.spaced:
        return

    @settings(deadline=None, max_examples=100)
    @given(text=st.tuples(texts, texts, texts).map("a b".join), virtual=st.booleans())
    @example(text="Σ a b1 1", virtual=False)
    def check(text: str, virtual: bool) -> None:
        assume(named.prefix not in text)
        before = named.name(0) if virtual else ""
        at = last_word(text, 0)
        assert text[at] == " " and text[at - 1 : at + 2].replace(" ", "").isalnum()
        front, behind = named.ids(before + text[:at]), named.ids(named.slot + text[at:])
        assert named.ids(before + text) == front + behind[1:]

    check()


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": pre_tokenizers.ByteLevel(use_regex=False)},
        {"pre_tokenizer": split_by(r"\w+ \w+|\s+")},
        {"pre_tokenizer": bytes_first()},
        {"pre_tokenizer": pre_tokenizers.Split(Regex(LLAMA3), "merged_with_previous")},
        {"pre_tokenizer": pre_tokenizers.Digits()},
        {"normalizer": normalizers.Replace(Regex("a b"), "c")},
        {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "")])},
    ],
)  # fmt: skip
def test_tokenizers_that_may_look_across_a_space_are_not_trusted(changes: dict[str, Any]) -> None:
    assert not cuts_at_spaces(changed("byte_bpe", **changes))


@pytest.mark.parametrize(
    ("token", "spaced"),
    [
        (AddedToken("New York"), False),
        (AddedToken("Oslo "), False),
        (AddedToken("Oslo", rstrip=True), False),
        (AddedToken("Oslo", lstrip=True, single_word=True), True),
        (AddedToken("    "), True),
    ],
)
def test_added_tokens_that_may_hold_a_space_are_not_trusted(
    token: AddedToken, spaced: bool
) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([token])
    assert cuts_at_spaces(tokenizer) == spaced
    task = Task("[P] {x} [MASK]", answer_end=False)
    rows = [
        {"x": x, "answer": a} for x in ("a New", "one Oslo", "b") for a in ("York", "two", "  ")
    ]
    rows = [row for row in rows if row["answer"].strip()]
    renderer = Renderer(tokenizer, task, "causal")
    assert together(renderer, rows, True) == one_by_one(renderer, rows)


# What is asked of the tokenizer, and when.


def test_rows_are_tokenized_in_one_call_and_words_behind_literal_text_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: dict[str, list[list[str]]] = {"whole": [], "whole_placed": [], "ids_of": []}
    for name, seen in calls.items():
        plain = getattr(NamedTokenizer, name)

        def spy(self: Any, texts: list[str], plain: Any = plain, seen: Any = seen) -> Any:
            seen.append(texts)
            return plain(self, texts)

        monkeypatch.setattr(NamedTokenizer, name, spy)
    task = Task("[P*2] {x} [P] Label: [MASK]", verbalizer={"a": "yes", "b": "no"})
    renderer = Renderer(tiny.tokenizer("wordpiece"), task, "causal")
    rows = [{"x": f"Oslo {number}"} for number in range(9)]
    renderer.each(rows, "test", answered=False)
    (whole,), (continuations,) = calls["whole"], calls["ids_of"]
    assert len(whole) == 9 and calls["whole_placed"] == []  # the field stands behind virtual tokens
    assert [text.partition("|>")[2] for text in continuations] == [
        " Label:", " Label: yes", " Label: no"
    ]  # fmt: skip


@pytest.mark.parametrize("block", [1, 2, 256])
@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({3: {"y": "Oslo"}, 5: {}}, "test example 4: the template names the column 'x'"),
        ({2: {"x": ["a"]}, 3: {}}, "test example 3: the column 'x' holds a list"),
        ({4: {"x": "Oslo", "answer": "maybe"}}, "test example 5: 'maybe' is none of"),
        ({1: {"x": "one " * 9, "answer": "yes"}, 2: {}}, "test example 3: the template names"),
        ({1: {"x": "Rome", "answer": "yes"}, 2: {}}, "Missing [UNK] token"),
        ({1: {}, 2: {"x": "Rome", "answer": "yes"}}, "test example 2: the template names"),
    ],
)
def test_the_first_row_that_is_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, block: int, spoilt: dict[int, Any], message: str
) -> None:
    monkeypatch.setattr(render, "_ROWS", block)
    task = Task("[P] {x} [MASK]", verbalizer={"yes": "yes", "no": "no"})
    rows = [spoilt.get(n, {"x": "one Oslo", "answer": "no"}) for n in range(6)]
    renderer = Renderer(words_alone(), task, "causal", 8)
    kind, said = outcome(together, renderer, rows, True)
    assert message in said
    assert (kind, said) == outcome(one_by_one, renderer, rows)


def test_a_row_is_named_by_its_number_also_behind_those_tokenized_before_it() -> None:
    renderer = Renderer(tiny.tokenizer(), Task("{x} [MASK]"), "causal")
    rows = [{"x": "a", "answer": "b"}] * (_ROWS + 1)
    with pytest.raises(DataError, match=f"^test example {_ROWS + 2}: the example has no answer"):
        renderer.each([*rows, {"x": "a"}], "test")


def test_a_row_that_does_not_fit_comes_before_a_later_one_that_is_wrong() -> None:
    renderer = Renderer(tiny.tokenizer(), Task("[P*3] The capital is {x} [MASK]"), "causal", 8)
    with pytest.raises(DataError, match=r"test example 1: anchors.*longer than the 8 tokens"):
        renderer.each([{"x": "Oslo", "answer": "yes, it does"}, {}], "test")


def test_few_characters_are_tokenized_together_however_many_words_stand_behind_a_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tokenizer that is not known to cut at spaces reads each label with the whole text."""
    words = ["".join(letters) for letters in itertools.permutations("rains", 3)]
    task = Task("{text} is [MASK]", answer="label", verbalizer={word: word for word in words})
    texts = [{"text": "it rains in Oslo " * 20 + str(n), "label": words[n]} for n in range(12)]
    sizes: list[int] = []
    ahead = Known.ahead

    def counted(known: Known, wanted: Any) -> None:
        listed = list(wanted)
        sizes.append(sum(map(len, {text for _, text in listed})))
        ahead(known, listed)

    monkeypatch.setattr(Known, "ahead", counted)
    together = Renderer(made("llama2"), task, "causal").each(texts, "x")
    assert len(sizes) == 1
    monkeypatch.setattr(render, "_WITH_WORDS", 50_000)
    assert Renderer(made("llama2"), task, "causal").each(texts, "x") == together
    assert len(sizes) == 1 + 4 and max(sizes[1:]) < 80_000 < sizes[0]
    Renderer(made("byte_bpe"), task, "causal").each(texts, "x")  # all their texts end alike
    assert len(sizes) == 1 + 4 + 1
