from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given, reject, settings
from hypothesis import strategies as st

from ptuning.errors import InputError, TemplateError
from ptuning.prompts.template import Field, Piece, Slot, Template, Text, Virtual, parse

VALID: list[tuple[str, list[Piece]]] = [
    # One piece.
    ("", []),
    ("words alone", [Text("words alone")]),
    ("[P]", [Virtual(1)]),
    ("[P*3]", [Virtual(3)]),
    ("[P*007]", [Virtual(7)]),
    ("[P*10000]", [Virtual(10_000)]),
    ("[P:capital]", [Virtual(0, "capital")]),
    ("[P:capital city]", [Virtual(0, "capital city")]),
    ("[P: capital ]", [Virtual(0, "capital")]),
    ("[P: \nAnswer: ]", [Virtual(0, "\nAnswer:")]),
    ("[P:*3]", [Virtual(0, "*3")]),
    ("{name}", [Field("name")]),
    ("{ name }", [Field("name")]),
    ("{two words}", [Field("two words")]),
    ("{столица}", [Field("столица")]),
    ("{[P]}", [Field("[P]")]),
    ("[MASK]", [Slot(space=False)]),
    # Nothing between pieces.
    ("[P][P*2]", [Virtual(1), Virtual(2)]),
    ("{a}{b}", [Field("a"), Field("b")]),
    ("{a}{a}", [Field("a"), Field("a")]),
    ("a[P]b", [Text("a"), Virtual(1), Text("b")]),
    ("{a}[MASK]", [Field("a"), Slot(space=False)]),
    ("[MASK].", [Slot(space=False), Text(".")]),
    # The space before a virtual token is dropped, the one after it belongs to the next word.
    ("[P] [P]", [Virtual(1), Virtual(1)]),
    ("a [P]", [Text("a"), Virtual(1)]),
    ("[P] a", [Virtual(1), Text(" a")]),
    ("a [P] b", [Text("a"), Virtual(1), Text(" b")]),
    ("a[P] b", [Text("a"), Virtual(1), Text(" b")]),
    ("a [P]b", [Text("a"), Virtual(1), Text("b")]),
    (" [P]", [Virtual(1)]),
    ("[P] ", [Virtual(1), Text(" ")]),
    ("a  [P]  b", [Text("a "), Virtual(1), Text("  b")]),
    ("[P]  [P]", [Virtual(1), Text(" "), Virtual(1)]),
    ("[P] {a}", [Virtual(1), Text(" "), Field("a")]),
    ("{a} [P]", [Field("a"), Virtual(1)]),
    ("{a} {b}", [Field("a"), Text(" "), Field("b")]),
    ("a\n[P]\nb", [Text("a\n"), Virtual(1), Text("\nb")]),
    ("a\t[P]", [Text("a\t"), Virtual(1)]),
    ("a\u00a0[P]", [Text("a\u00a0"), Virtual(1)]),
    ("a [P:b] c", [Text("a"), Virtual(0, "b"), Text(" c")]),
    # The space before [MASK] belongs to the answer.
    ("a [MASK]", [Text("a"), Slot(space=True)]),
    ("a  [MASK]", [Text("a "), Slot(space=True)]),
    ("a\n[MASK]", [Text("a\n"), Slot(space=False)]),
    (" [MASK]", [Slot(space=True)]),
    ("[P] [MASK]", [Virtual(1), Slot(space=True)]),
    ("[P][MASK]", [Virtual(1), Slot(space=False)]),
    ("{a} [MASK]", [Field("a"), Slot(space=True)]),
    ("[MASK] [P]", [Slot(space=False), Virtual(1)]),
    ("[MASK] b", [Slot(space=False), Text(" b")]),
    (
        "[P*2] {country} [P] [MASK]",
        [Virtual(2), Text(" "), Field("country"), Virtual(1), Slot(space=True)],
    ),
    (
        "[P*3] {sub_label} [P*3] capital [P*2] [MASK]",
        [
            *(Virtual(3), Text(" "), Field("sub_label"), Virtual(3)),
            *(Text(" capital"), Virtual(2), Slot(space=True)),
        ],
    ),
    (
        "{premise} Question: {hypothesis}? [P] Answer: [MASK].",
        [
            *(Field("premise"), Text(" Question: "), Field("hypothesis"), Text("?")),
            *(Virtual(1), Text(" Answer:"), Slot(space=True), Text(".")),
        ],
    ),
    # Doubling escapes.
    ("[[P]]", [Text("[P]")]),
    ("[[P*3]]", [Text("[P*3]")]),
    ("[[P*x]]", [Text("[P*x]")]),
    ("[[P:capital city]]", [Text("[P:capital city]")]),
    ("[[MASK]]", [Text("[MASK]")]),
    ("[[MASK]] [MASK]", [Text("[MASK]"), Slot(space=True)]),
    ("[[P]][P]", [Text("[P]"), Virtual(1)]),
    ("[P][[P]]", [Virtual(1), Text("[P]")]),
    ("[[P]] [P]", [Text("[P]"), Virtual(1)]),
    ("[[[P]]]", [Text("[[P]]")]),
    ("{{", [Text("{")]),
    ("}}", [Text("}")]),
    ("{{name}}", [Text("{name}")]),
    ("{{{name}}}", [Text("{"), Field("name"), Text("}")]),
    ("{{{{", [Text("{{")]),
    ("a{{b}}c", [Text("a{b}c")]),
    # Any other bracket is text.
    ("[", [Text("[")]),
    ("]", [Text("]")]),
    ("[]", [Text("[]")]),
    ("[Périgord", [Text("[Périgord")]),
    ("[MASKé {x}", [Text("[MASKé "), Field("x")]),
    ("[[]]", [Text("[[]]")]),
    ("[1] (2)", [Text("[1] (2)")]),
    ("[p]", [Text("[p]")]),
    ("[mask]", [Text("[mask]")]),
    ("[PAD]", [Text("[PAD]")]),
    ("[P3]", [Text("[P3]")]),
    ("[P_1", [Text("[P_1")]),
    ("[ P]", [Text("[ P]")]),
    ("[P ]", [Text("[P ]")]),
    ("[P 3]", [Text("[P 3]")]),
    ("[MASKS]", [Text("[MASKS]")]),
    ("[CLS] a [SEP]", [Text("[CLS] a [SEP]")]),
    ("a[0] = b[{i}]", [Text("a[0] = b["), Field("i"), Text("]")]),
    ("[P {a}]", [Text("[P "), Field("a"), Text("]")]),
    ("[[P]", [Text("["), Virtual(1)]),
    ("[P]]", [Virtual(1), Text("]")]),
    ("x]y[z", [Text("x]y[z")]),
    ("<|virtual-0:1|>", [Text("<|virtual-0:1|>")]),
]

NUMBER = "whole number of at least 1"
INVALID: list[tuple[str, int, str]] = [
    # Numbers of virtual tokens.
    ("[P*0]", 1, NUMBER),
    ("[P*00]", 1, NUMBER),
    ("a [P*x] b", 3, r"\[P\*x\]: expected a " + NUMBER),
    ("[P*]", 1, NUMBER),
    ("[P*-1]", 1, NUMBER),
    ("[P*+1]", 1, NUMBER),
    ("[P*1.5]", 1, NUMBER),
    ("[P* 3]", 1, NUMBER),
    ("[P*3 ]", 1, NUMBER),
    ("[P*٣]", 1, NUMBER),
    ("[P*1_0]", 1, NUMBER),
    ("[P*1000000]", 1, NUMBER),
    ("{a}[P*{n}]", 4, NUMBER),
    ("[P*3:words]", 1, NUMBER),
    # Words.
    ("[P:]", 1, "needs words"),
    ("a [P:  ]", 3, "needs words"),
    ("[P:{x}]", 1, "a field cannot stand there"),
    ("a [P:capital of {x}]", 3, "a field cannot stand there"),
    ("[P:a}b]", 1, "a field cannot stand there"),
    # Not closed.
    ("[P", 1, r"'\[' is not closed"),
    ("a [P*3", 3, r"'\[' is not closed"),
    ("a [P:words", 3, r"'\[' is not closed"),
    ("[P*3 [MASK]", 1, r"'\[' is not closed"),
    ("[P [P]]", 1, r"'\[' is not closed"),
    ("[MASK", 1, r"'\[' is not closed"),
    ("a {b} [MASK", 7, r"'\[' is not closed"),
    ("{", 1, r"'\{' is not closed"),
    ("a {b", 3, r"'\{' is not closed"),
    ("{a {b}", 1, r"'\{' is not closed"),
    ("{{{", 3, r"'\{' is not closed"),
    ("}", 1, r"'\}' closes nothing"),
    ("{a}}", 4, r"'\}' closes nothing"),
    ("ab}", 3, r"'\}' closes nothing"),
    # Fields.
    ("{}", 1, "a field without a name"),
    ("ab{ }", 3, "a field without a name"),
    # The answer slot.
    ("[MASK][MASK]", 7, r"a second \[MASK\]; the first stands at column 1"),
    ("a [MASK] or [MASK]", 13, r"a second \[MASK\]; the first stands at column 3"),
]

FRAGMENTS = [
    *("[P]", "[P*2]", "[P*0]", "[P*", "[P:", "[P:two words]", "[MASK]", "[MASK", "[P", "[[", "]]"),
    *("[", "]", "{", "}", "{{", "}}", "{a}", "{ b }", "{}", "[[P]]", "[[MASK]]", "[[P:{a}]]"),
    *(" ", "  ", "\n", "*", ":", "P", "MASK", "SK]", "0", "7", "word", "é", "\u00a0", "_"),
]
fragments = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
quick = settings(deadline=None, max_examples=300)


def escape(text: str) -> str:
    """What the documentation says: double a bracket that is syntax, and every brace outside it."""
    syntax = r"\[(?:P(?:\*[^\[\]]*|:[^\[\]]*)?|MASK)\]|[{}]"
    return re.sub(syntax, lambda m: f"[{m[0]}]" if len(m[0]) > 1 else m[0] * 2, text)


def flat(template: Template, *, virtual: bool) -> str:
    """Words, fields and slot as one text with marks; words of ``[P:…]`` where `virtual`."""
    parts = []
    for piece in template.pieces:
        match piece:
            case Text(text):
                parts.append(text)
            case Field(name):
                parts.append(f"\ue000{name}\ue001")
            case Slot(space):
                parts.append(" \ue002" if space else "\ue002")
            case Virtual(_, words):
                space = "" if (words or "\n").startswith(("\n", "\r", "\t")) else " "
                parts.append(f"{space}{words or ''}" if virtual else "")
    return "".join(parts)


def writable(text: str) -> bool:
    """Not so: "[P" or "[MASK" that no bracket closes, or that holds a field or slot."""
    unclosed = r"\[(?:P|MASK)(?![A-Za-z0-9_])(?![^\[\]\ue002]*\])"
    return not re.search(rf"{unclosed}|\[P[*:][^\[\]]*\ue000", text)


@pytest.mark.parametrize(("text", "pieces"), VALID, ids=[repr(text) for text, _ in VALID])
def test_valid_template_has_these_pieces(text: str, pieces: list[Piece]) -> None:
    assert list(parse(text).pieces) == pieces
    assert parse(text).text == text


@pytest.mark.parametrize(
    ("text", "column", "message"), INVALID, ids=[repr(text) for text, _, _ in INVALID]
)
def test_invalid_template_is_an_error_at_this_column(text: str, column: int, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        parse(text)
    assert caught.value.column == column
    assert caught.value.template == text
    assert f"column {column}:" in str(caught.value)
    assert text in str(caught.value)
    assert isinstance(caught.value, InputError)


def test_fields_are_listed_once_in_order_of_first_use() -> None:
    assert parse("{b} {a} {b} [P] {c}").fields == ("b", "a", "c")


def test_template_knows_its_virtual_tokens_slot_and_what_follows_it() -> None:
    template = parse("[P*2] {a} [P:of it] is [MASK], [P] {b}.")
    assert template.virtual == (Virtual(2), Virtual(0, "of it"), Virtual(1))
    assert template.slot == Slot(space=True)
    assert template.after_slot == (Text(","), Virtual(1), Text(" "), Field("b"), Text("."))
    assert parse("[P] {a}").slot is None
    assert parse("[P] {a}").after_slot == ()
    assert parse("{a} [MASK]").after_slot == ()


@pytest.mark.parametrize(
    ("text", "manual"),
    [
        ("[P*3] {country} [P*3] [MASK]", "{country} [MASK]"),
        ("[P*3] {sub_label} [P*3] capital [P*2] [MASK]", "{sub_label} capital [MASK]"),
        ("{text}[P:In short] [MASK].", "{text} In short [MASK]."),
        ("[P:The capital] of {x} is [MASK]", "The capital of {x} is [MASK]"),
        ("{text}?[P:\nAnswer:] [MASK]", "{text}?\nAnswer: [MASK]"),
        ("{a}[P*4][MASK]", "{a}[MASK]"),
        ("[P]", ""),
        ("no virtual token {a}", "no virtual token {a}"),
        ("[P] {{x}} [[P]] {a}", "{{x}} [[P]] {a}"),
        ("[P] [[P*x]] [[P:w]] [[MASK]] [MASK]", "[[P*x]] [[P:w]] [[MASK]] [MASK]"),
        ("a\n[P]\n{b}\n", "a\n\n{b}\n"),
        ("[[P:{x}]] [P] {y}", "[[P:{x}]] {y}"),
    ],
)
def test_without_virtual_is_the_manual_template(text: str, manual: str) -> None:
    assert parse(text).without_virtual().text == manual
    assert parse(text).without_virtual() == parse(manual)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("[[P]P]{a}", "[P]\ue000a\ue001"),
        ("[[P]MASK] {a}", "[MASK] \ue000a\ue001"),
        ("[MA[P]SK] {a}", "[MASK] \ue000a\ue001"),
        ("[[P]P*3] {a} [MASK]", "[P*3] \ue000a\ue001 \ue002"),
    ],
)
def test_words_around_a_removed_virtual_token_do_not_become_syntax(text: str, left: str) -> None:
    manual = parse(text).without_virtual()
    assert manual.virtual == ()
    assert flat(manual, virtual=False) == left


@quick
@given(st.one_of(st.text(), st.text(alphabet="[]{}PMASK*:0123 ab", max_size=30), fragments))
@example("[P*" + "0" * 5000 + "1]")
@example("[P*" + "9" * 5000 + "]")
@example("{" * 3000)
@example("[" * 3000 + "P")
def test_any_text_parses_or_is_a_template_error_within_the_text(text: str) -> None:
    try:
        template, fault = parse(text), None
    except TemplateError as error:
        template, fault = None, error
    if fault:
        assert 1 <= fault.column <= len(text)
        assert text[fault.column - 1] in "[{}"
    if template:
        assert Text("") not in template.pieces
        assert sum(isinstance(piece, Slot) for piece in template.pieces) <= 1
        assert not any(
            isinstance(a, Text) and isinstance(b, Text)
            for a, b in zip(template.pieces, template.pieces[1:], strict=False)
        )


literals = st.lists(
    st.one_of(
        st.sampled_from(["[P]", "[P*3]", "[P*x]", "[P:some words]", "[MASK]", "[CLS]", "[[P]]"]),
        st.sampled_from(["{", "}", "{x}", "[P:{x}]", "[", "]", " ", "[0]", "[]"]),
        st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="[")),
    ),
    max_size=8,
).map("".join)


@quick
@given(literals)
@example("[P:{x}]")
@example("[[P]]")
@example("{[MASK]}")
def test_escaped_text_parses_back_to_the_same_text(text: str) -> None:
    assume(writable(text))
    assert list(parse(escape(text)).pieces) == ([Text(text)] if text else [])


@quick
@given(fragments)
@example("[[P]P]")
@example("[[P:{a}]] [P]")
@example("a  [P][MASK]")
def test_without_virtual_keeps_words_fields_and_slot(text: str) -> None:
    try:
        template = parse(text)
    except TemplateError:
        reject()
    assume(writable(flat(template, virtual=True)))
    manual = template.without_virtual()
    assert manual.virtual == ()
    assert manual.fields == template.fields
    assert (manual.slot is None) == (template.slot is None)
    assert flat(manual, virtual=False).strip(" ") == flat(template, virtual=True).strip(" ")
    assert manual.without_virtual() == manual


@pytest.mark.parametrize("words", ["\nAnswer:", "\tAnswer:", "\r\nAnswer:"])
def test_words_that_begin_with_a_line_break_or_a_tab_have_no_space_in_front(words: str) -> None:
    assert parse(f"a [P:{words}]").virtual[0].spelled == words


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("[P*10001] {a}", "more than 10,000 virtual tokens"),
        ("[P*999999]" * 300, "more than 10,000 virtual tokens"),
        ("[P*6000] {a} [P*4001]", "more than 10,000 virtual tokens"),
        ("[P]" + "a" * 100_000, "at most 100,000 characters"),
        ("[P] \ud800", "no character"),
    ],
)
def test_what_no_model_can_use_is_refused_before_it_is_built(template: str, fault: str) -> None:
    with pytest.raises(TemplateError, match=fault) as caught:
        parse(template)
    assert len(str(caught.value)) < 600
