"""`Task`: what is asked of the model, with or without virtual tokens in it.

Template, answer column, verbalizer and the policies of special tokens and length. A manual template
is a `Task`; a `Prompt` is a `Task` with trained virtual tokens.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral
from typing import Any, Self

from ..data.values import is_number, plain, text_of
from ..errors import InputError, excerpt
from .template import Template, Virtual, parse

MOST_ANSWER_TOKENS = 10_000
_WHOLE = re.compile(r"([+-]?[0-9]+)(?:\.0+)?")
_IN_WORD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


@dataclass(eq=False)
class Task:
    """A template and how its answer is read.

    Args:
        template: where columns, virtual tokens and answer stand: ``[P*3] {country} [P*3] [MASK]``.
        answer: column of the right answer; by default ``answer``, else ``label``.
        verbalizer: label -> the word(s) that stand for it. None means free answers. A word may
            name columns, as ``{"0": "{choice1}", "1": "{choice2}"}`` does: then each example
            compares words of its own (`fill`).
        label_mode: ``labels`` compares the label words only, ``vocabulary`` trains over the whole
            vocabulary. Without a verbalizer it is the vocabulary.
        special_tokens: ``around``: BOS, CLS and SEP stand around the whole, virtual tokens
            included. ``after``: PEFT's placement, ``v v [CLS] text [SEP]``.
        chat: the rendered template is the user's turn of the model's chat template.
        max_length: longest input in tokens; by default the model's context.
        answer_tokens: longest free answer in tokens, its end included; a training learns it.
        answer_end: a free answer ends with the end-of-sequence token, so predictions stop there.
        label_bias: label -> what is added to its log-probability before the labels are compared; a
            training may measure it (``calibrate``).

    Raises:
        InputError, TemplateError: settings that contradict each other or the template language.
    """

    template: str | None = None
    answer: str | None = None
    verbalizer: Mapping[str, str | Sequence[str]] | None = None
    label_mode: str = "labels"
    special_tokens: str = "around"
    chat: bool = False
    max_length: int | None = None
    answer_tokens: int | None = None
    answer_end: bool = True
    label_bias: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_type(self, str, "template", "answer", optional=True)
        check_characters("answer", self.answer or "")
        check_type(self, bool, "chat", "answer_end")
        one_of("label_mode", self.label_mode, ("labels", "vocabulary"))
        one_of("special_tokens", self.special_tokens, ("around", "after"))
        self.max_length, self.answer_tokens = plain(self.max_length), plain(self.answer_tokens)
        at_least_one("max_length", self.max_length)
        at_least_one("answer_tokens", self.answer_tokens, MOST_ANSWER_TOKENS)
        if self.verbalizer is not None:
            self.verbalizer = _words_by_label(self.verbalizer)
        if self.label_bias is not None:
            self.label_bias = _bias_by_label(self.label_bias, self.labels)
        if self.template is not None and self.special_tokens == "after" and not self.prompt_leads:
            raise InputError(
                'special_tokens="after" puts the virtual tokens before everything, so the template '
                f"must begin with all of them; it is: {excerpt(self.template)}"
            )

    def checked(self, **changes: Any) -> Self:
        """The same as its fields are now, which may have been assigned since it was made.

        Args:
            changes: fields that are others.

        Raises:
            InputError, TemplateError: they contradict each other.
        """
        same = copy.copy(self)
        for name, value in changes.items():
            setattr(same, name, value)
        same.__post_init__()
        return same

    @property
    def parsed(self) -> Template:
        """The parsed template.

        Raises:
            InputError: there is no template.
        """
        if self.template is None:
            raise InputError(
                "this prompt has no template, only virtual tokens in front; give one, such as "
                '"[P*20]{text}", with special_tokens="after"'
            )
        return _parsed(self.template)

    @property
    def prompt_leads(self) -> bool:
        """All virtual tokens stand at the template's beginning."""
        pieces = self.parsed.pieces
        leading = next((i for i, p in enumerate(pieces) if not isinstance(p, Virtual)), len(pieces))
        return leading == len(self.parsed.virtual)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names."""
        return self.parsed.fields

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """The verbalizer as label -> words; empty without one."""
        return {k: tuple(v) for k, v in (self.verbalizer or {}).items()}

    def label_text(self, value: Any) -> str:
        """A cell of the answer column as it is compared."""
        text = text_of("answer", as_label(value, self.labels))
        return text if text in self.labels else text.strip()

    @property
    def ends_answer(self) -> bool:
        """Answers end with the end-of-sequence token: free ones do, label words do not."""
        return self.answer_end and not self.verbalizer

    def turns(self, text: str) -> list[dict[str, str]]:
        """The turns of a chat in which a user says `text`."""
        return [{"role": "user", "content": text}]

    def settings(self) -> dict[str, Any]:
        """The fields of `Task` as plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(Task)}
        values["verbalizer"] = {k: list(v) for k, v in self.labels.items()} or None
        return values

    def manual(self, template: str | None = None) -> Task:
        """The same task with a hand-written template; by default this one's words alone."""
        text = template if template is not None else self.parsed.without_virtual().text
        settings = {**Task.settings(self), "template": text, "special_tokens": "around"}
        made = Task(**{**settings, "label_bias": None})  # which is another template's
        made.check_manual()
        return made

    def check_manual(self) -> None:
        """Refuse virtual tokens: a task that is no prompt has no vectors for them.

        Raises:
            InputError: the template has some.
        """
        if self.parsed.virtual:
            raise InputError(
                f"a manual template has no virtual tokens; leave them out of: {self.template}"
            )


_parsed = lru_cache(256)(parse)


def majority_answer(answers: Iterable[str]) -> str:
    """The commonest answer (of several the first): what to say without a look at the question."""
    return Counter(answers).most_common(1)[0][0]


def as_label(value: Any, labels: Collection[str]) -> Any:
    """The label that a cell of the answer column means, else the cell: true is the label ``true``
    or ``True`` where there is one, as JSON has it or in letters of either case, since each kind of
    file writes it in its own way.

    And 1.0 is the label ``1``, as a number and as text, and the other way round: pandas makes
    fractions of whole numbers where one is missing, and writes them so.
    """
    value = plain(value)
    if not isinstance(value, str | bool | float) and not _is_small(value):
        return value
    said = json.dumps(value) if isinstance(value, bool) else str(value)
    text = said.strip()
    if said in labels or text in labels:
        return said if said in labels else text
    if (truth := text.casefold()) in ("true", "false"):
        alike = [label for label in labels if label.casefold() == truth]
        return alike[0] if len(alike) == 1 else value
    if isinstance(value, float) and value.is_integer():
        text = f"{value:.0f}"  # also of those that Python writes with an exponent
    whole = whole_number(text)
    forms = () if whole is None else (whole, f"{whole}.0")
    return next((form for form in forms if form in labels), value)


def whole_number(text: str) -> str | None:
    """The whole number that a text says, ``1`` of ``1.0``; None of other text."""
    found = _WHOLE.fullmatch(text)
    return found[1] if found else None


def _is_small(value: Any) -> bool:
    """A whole number that Python writes, as it does not one of thousands of digits."""
    return isinstance(value, int) and value.bit_length() < 1000


def named_fields(word: str) -> tuple[str, ...]:
    """The columns that a label word names, such as ``{choice1}``; doubled braces are text."""
    return tuple(match[1] for match in _IN_WORD.finditer(word) if match[1])


def fill(word: str, columns: Mapping[str, str]) -> str:
    """A label word with its columns' texts in place of their names."""
    return _IN_WORD.sub(lambda match: columns[match[1]] if match[1] else match[0][0], word)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value`, if it is allowed.

    Raises:
        InputError: lists what is allowed.
    """
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
    return value


def check_type(owner: object, kind: type, *names: str, optional: bool = False) -> None:
    """Refuse a field of another type, such as a file written by hand may hold.

    Raises:
        InputError: names the field, what it holds, and what it should.
    """
    for name in names:
        value = getattr(owner, name)
        if not (isinstance(value, kind) or (optional and value is None)):
            raise InputError(f"{name} is {value!r}; expected {_KINDS[kind]}")


_KINDS = {str: "text", bool: "true or false", dict: "an object", float: "a number"}


def check_characters(name: str, *texts: str) -> None:
    """Refuse text that no tokenizer reads and no file of a prompt can hold.

    Raises:
        InputError: names it, and shows the text.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{name} has half a surrogate pair: {excerpt(repr(text))}; is the text UTF-8?"
            ) from None


def at_least_one(name: str, value: int | None, most: int = 10**9, *, optional: bool = True) -> None:
    """Refuse a count that is no whole number of at least 1, or beyond all use; None is one that is
    not given, where it is `optional`.

    Raises:
        InputError: names the field and the value.
    """
    if value is None and optional:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is {excerpt(repr(value))}; give a whole number of at least 1")
    if value > most:
        raise InputError(f"{name} is beyond all use; give at most {most:,}")


def _words_by_label(verbalizer: Mapping[str, str | Sequence[str]]) -> dict[str, tuple[str, ...]]:
    if not isinstance(verbalizer, Mapping):
        raise InputError(
            f"verbalizer is {verbalizer!r}; expected label -> word, such as {{'yes': 'Yes'}}"
        )
    words: dict[str, tuple[str, ...]] = {}
    for label, given in verbalizer.items():
        listed: Any = given if isinstance(given, list | tuple) else [given]
        if not all(isinstance(word, str) for word in listed):
            raise InputError(
                f"the verbalizer's label {str(label)!r} stands for {given!r}; expected a word or a "
                "list of words"
            )
        if str(label) in words:
            raise InputError(
                f"the verbalizer has the label {str(label)!r} twice, as text and as another kind "
                "of value; keep one of the two"
            )
        check_characters("the verbalizer", str(label), *listed)
        words[str(label)] = tuple(listed)
    if len(words) < 2:
        raise InputError(f"a verbalizer needs at least two labels; it has {sorted(words)}")
    for label, options in words.items():
        if not options or not all(word.strip() for word in options):
            raise InputError(f"label {label!r} has an empty word; give the word that stands for it")
    owner: dict[str, str] = {}
    for label, options in words.items():
        for word in options:
            if owner.setdefault(word, label) != label:
                raise InputError(
                    f"labels {owner[word]!r} and {label!r} share the word {word!r}; each label "
                    "needs words of its own"
                )
    return words


def _bias_by_label(bias: Any, labels: Mapping[str, Any]) -> dict[str, float]:
    if not isinstance(bias, Mapping):
        raise InputError(f"label_bias is {bias!r}; expected label -> number")
    found = {str(label): plain(value) for label, value in bias.items()}
    for label, value in found.items():
        if not is_number(value) or not abs(value) <= sys.float_info.max:
            raise InputError(f"label_bias gives {value!r} for {label!r}; expected a number")
    if set(found) != set(labels):
        raise InputError(
            f"label_bias names the labels {sorted(found)}, and the verbalizer {sorted(labels)}; "
            "give a number for each label"
        )
    return {label: float(found[label]) for label in labels}
