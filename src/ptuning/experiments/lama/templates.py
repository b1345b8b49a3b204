"""Templates of a LAMA relation: manual ones, and those with virtual tokens among their words."""

from __future__ import annotations

import re

from ...prompts.template import escape
from .relations import SUBJECT, Relation

_FIELD = f"{{{SUBJECT}}}"


def manual_template(relation: Relation, kind: str) -> str | None:
    """LAMA's own template in this project's language.

    Causal models get the text before ``[Y]``; None where the subject stands behind it.
    """
    before, after = relation.template.split("[Y]")
    if kind != "causal":
        return f"{_with_field(before)}[MASK]{_with_field(after)}"
    return _with_field(before).rstrip() + " [MASK]" if "[X]" in before else None


def _with_field(text: str) -> str:
    return _FIELD.join(map(escape, text.split("[X]")))


def key_value_templates(relation: Relation) -> list[str]:
    """Plain forms made from the relation's name in words."""
    label = escape(relation.label)
    if not label:
        return []
    key = label[:1].upper() + label[1:]
    return [
        f"{_FIELD}\n{key}: [MASK]",
        f"{_FIELD}. {key}: [MASK]",
        f"Name: {_FIELD}\n{key}: [MASK]",
        f"Name: {_FIELD}. {key}: [MASK]",
        f"Subject: {_FIELD}\n{key}: [MASK]",
        f"The {label} of {_FIELD} is [MASK]",
        f"Question: What is the {label} of {_FIELD}?\nAnswer: [MASK]",
    ]


def all_manual(relation: Relation, kind: str) -> list[str]:
    """Every manual template, LAMA's own first."""
    own = manual_template(relation, kind)
    return ([own] if own else []) + key_value_templates(relation)


def plain_template(kind: str, size: int) -> str:
    """The paper's form: `size` virtual tokens on each side, without a word between them."""
    return anchored_template(f"{_FIELD} [MASK]", kind, size)


def anchored_template(manual: str, kind: str, size: int) -> str:
    """A manual template's words as anchors: virtual tokens in front and behind the subject."""
    group = f"[P*{size}]"
    before, after = manual.split(_FIELD)
    behind = f" {group}" if kind == "masked" else ""
    return f"{group} {before}{_FIELD} {group}{after}{behind}"


def worded_template(manual: str, kind: str, size: int) -> str:
    """A manual template whose words begin the virtual tokens: training starts from what they get.

    Punctuation at the subject stays. Where no words stand beside the subject that could begin
    something, or the answer stands in front of it, `anchored_template`.
    """
    before, after = manual.split(_FIELD)
    between, slot, behind = after.partition(" [MASK]")
    beside, words = re.fullmatch(r"(\S*)(.*)", between, re.DOTALL).groups()  # type: ignore[union-attr]
    front = before.strip()
    if not slot or not (front or words.strip()) or re.search(r"[\[\]{}]", front + words):
        return anchored_template(manual, kind, size)
    start = f"[P:{front}] " if front else ""
    if words.strip():
        words = f"[P:{words}]" if words.startswith("\n") else f" [P:{words.strip()}]"
    return f"{start}{_FIELD}{beside}{words} [MASK]{behind}"
