"""The template language: a template's text as pieces. Pure Python; knows no tensor or tokenizer.

    [P*3] {sub_label} [P*3] capital [P*2] [MASK]

``[P]`` is one virtual token, ``[P*n]`` are n, ``[P:capital city]`` one per token of those words and
initialised from them; ``{name}`` is a column of the example; ``[MASK]`` is the answer slot, at most
one. Any other bracket is text. Doubling escapes: ``[[P]]``, ``{{``, ``}}``.

A space beside a virtual token is layout: the one before it is dropped, the one after it belongs to
the next word. The space before ``[MASK]`` belongs to the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from ..errors import InputError, TemplateError, a_kind


@dataclass(frozen=True)
class Text:
    """Anchor words, as they stand."""

    text: str


@dataclass(frozen=True)
class Field:
    """A column of the example."""

    name: str


@dataclass(frozen=True)
class Virtual:
    """`count` virtual tokens, or one per token of `words` (then `count` is 0 until tokenized)."""

    count: int
    words: str | None = None

    @property
    def spelled(self) -> str:
        """The words as they continue a text: behind a space, or the line break they begin with."""
        words = self.words or ""
        return words if not words or words[0] in "\n\r\t" else f" {words}"


@dataclass(frozen=True)
class Slot:
    """Where the answer stands; `space`: the answer begins with a space."""

    space: bool


MOST_CHARACTERS, MOST_VIRTUAL = 100_000, 10_000
"""Of a template: refused before work is done for it."""
Piece = Text | Field | Virtual | Slot

_BRACKET = r"\[(?:P(?:\*[^\[\]]*|:[^\[\]]*)?|MASK)\]"
ESCAPED = re.compile(rf"\[({_BRACKET})\]")
_SYNTAX = re.compile(rf"{_BRACKET}|[{{}}]")
_NAME_FOLLOWS = re.compile(r"\[(?:P|MASK)(?!\w)")
_NEVER_CLOSED = re.compile(rf"{_NAME_FOLLOWS.pattern}(?=[^\[\]]*(?:\[|\Z))")


@dataclass(frozen=True)
class Template:
    """A parsed template.

    Attributes:
        text: the template as written.
        pieces: in order, with the spaces already given to their owners.
    """

    text: str
    pieces: tuple[Piece, ...]

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Column names in the order of their first use."""
        return tuple(dict.fromkeys(p.name for p in self.pieces if isinstance(p, Field)))

    @property
    def virtual(self) -> tuple[Virtual, ...]:
        """The groups of virtual tokens in order."""
        return tuple(p for p in self.pieces if isinstance(p, Virtual))

    @property
    def slot(self) -> Slot | None:
        """The answer slot, if the template has one."""
        return next((p for p in self.pieces if isinstance(p, Slot)), None)

    @property
    def after_slot(self) -> tuple[Piece, ...]:
        """What follows the answer slot."""
        slot = self.slot
        return self.pieces[self.pieces.index(slot) + 1 :] if slot else ()

    def without_virtual(self) -> Template:
        """The manual template: the same words, those of ``[P:words]`` too, and no virtual token."""
        parts: list[str] = []
        literal = ""
        for piece in (*self.pieces, None):
            if isinstance(piece, Text):
                literal += piece.text
            elif isinstance(piece, Virtual):
                literal += piece.spelled
            else:
                parts.append(escape(literal))
                literal = ""
                if isinstance(piece, Field):
                    parts.append(f"{{{piece.name}}}")
                elif piece:
                    parts.append(" [MASK]" if piece.space else "[MASK]")
        return parse("".join(parts).strip(" "))


def parse(text: str) -> Template:
    """Parse a template.

    Raises:
        TemplateError: with the column of the fault and what was expected.

    Example:
        >>> [type(piece).__name__ for piece in parse("[P*2] {country} [P] [MASK]").pieces]
        ['Virtual', 'Text', 'Field', 'Virtual', 'Slot']
    """
    _check_size(text)
    pieces: list[Piece] = []
    literal: list[str] = []
    slot_column = None
    virtual = 0
    at = 0

    def flush() -> None:
        if literal:
            pieces.append(Text("".join(literal)))
            literal.clear()

    while at < len(text):
        piece: Piece | None = None
        if escaped := ESCAPED.match(text, at):
            literal.append(escaped[1])
            at = escaped.end()
        elif text.startswith(("{{", "}}"), at):
            literal.append(text[at])
            at += 2
        elif text[at] == "{":
            piece, at = _field(text, at)
        elif text[at] == "}":
            raise TemplateError("'}' closes nothing; write '}}' for the character", text, at + 1)
        elif _NAME_FOLLOWS.match(text, at) and (bracket := _bracket(text, at)):
            piece, end = bracket
            if isinstance(piece, Slot):
                if slot_column:
                    raise TemplateError(
                        f"a second [MASK]; the first stands at column {slot_column}, and a "
                        "template has one answer slot",
                        text,
                        at + 1,
                    )
                slot_column = at + 1
            elif isinstance(piece, Virtual):
                virtual += piece.count
                if virtual > MOST_VIRTUAL:
                    raise TemplateError(
                        f"more than {MOST_VIRTUAL:,} virtual tokens; a few are enough, as in [P*3]",
                        text,
                        at + 1,
                    )
            at = end
        else:
            literal.append(text[at])
            at += 1
        if piece:
            flush()
            pieces.append(piece)
    flush()
    return Template(text, _give_spaces(pieces))


def _check_size(text: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"a template is text, and {a_kind(text)} came: {text!r}")
    if len(text) > MOST_CHARACTERS:
        raise TemplateError(
            f"a template has at most {MOST_CHARACTERS:,} characters, and this one has "
            f"{len(text):,}; long texts belong in a column",
            text,
            MOST_CHARACTERS + 1,
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TemplateError(
            f"{text[error.start]!r} is no character (half a surrogate pair); is the text UTF-8?",
            text.encode("utf-8", "backslashreplace").decode(),
            error.start + 1,
        ) from None


def _field(text: str, start: int) -> tuple[Field, int]:
    end = text.find("}", start)
    name = text[start + 1 : end] if end > 0 else ""
    if end < 0 or "{" in name:
        raise TemplateError(
            "'{' is not closed; write {column}, or '{{' for the character", text, start + 1
        )
    if not name.strip():
        raise TemplateError("a field without a name; write {column}", text, start + 1)
    return Field(name.strip()), end + 1


def _bracket(text: str, start: int) -> tuple[Piece, int] | None:
    """The piece of ``[P…]`` or ``[MASK…]`` at `start`, or None where it is ordinary text."""
    end = text.find("]", start)
    inside = text[start + 1 : end] if end > 0 else ""
    if end < 0 or "[" in inside:
        raise TemplateError(
            "'[' is not closed; write [P], [P*3], [P:words] or [MASK]", text, start + 1
        )
    if inside == "MASK":
        return Slot(space=False), end + 1
    if inside == "P":
        return Virtual(1), end + 1
    if inside.startswith("P*"):
        if not re.fullmatch(r"0{0,9}[1-9][0-9]{0,5}", inside[2:], re.ASCII):
            raise TemplateError(
                f"[{inside}]: expected a whole number of at least 1 after '*', as in [P*3]",
                text,
                start + 1,
            )
        return Virtual(int(inside[2:])), end + 1
    if inside.startswith("P:"):
        if not inside[2:].strip():
            raise TemplateError("[P:] needs words, as in [P:capital city]", text, start + 1)
        if "{" in inside or "}" in inside:
            raise TemplateError(
                "the words of [P:…] are fixed when training starts; a field cannot stand there",
                text,
                start + 1,
            )
        return Virtual(0, inside[2:].strip(" ")), end + 1
    return None


def _give_spaces(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Drop the space before a virtual token; hand the space before the slot to the answer."""
    result: list[Piece] = []
    for index, piece in enumerate(pieces):
        following = pieces[index + 1] if index + 1 < len(pieces) else None
        if (
            isinstance(piece, Text)
            and piece.text.endswith(" ")
            and isinstance(following, Virtual | Slot)
        ):
            piece = Text(piece.text[:-1])
            if isinstance(following, Slot):
                pieces[index + 1] = Slot(space=True)
        if piece != Text(""):
            result.append(piece)
    return tuple(result)


def escape(text: str) -> str:
    """The template that parses to `text` alone, unless it opens a bracket that is not closed."""
    return _SYNTAX.sub(lambda m: f"[{m[0]}]" if len(m[0]) > 1 else m[0] * 2, text)


def heading(name: str) -> str:
    """A column's name as words of a template, whatever stands behind them: one that opens what it
    does not close, ``share [P``, has no spelling there and becomes ``Share (P``."""
    words = _NEVER_CLOSED.sub(lambda m: f"({m[0][1:]}", name[:1].upper() + name[1:])
    return escape(words)
