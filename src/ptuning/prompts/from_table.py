"""From a table to a task: a template out of its column names, words out of its labels.

    subject,body,team          [P*20] Subject: {subject}
    "Refund?","I …",billing    Body: {body} [P*20] Team: [MASK]

Knows no tokenizer: whether a label's word is one token shows later, and then another may take its
place (`rendering.short_words`).
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.columns import Columns, are_labels, columns_of
from ..data.rows import named
from ..data.values import plain, text_of
from ..errors import DataError
from .task import Task
from .template import escape

AUTO = "auto"
"""What stands for a template or for labels that are to be found in the table."""
VIRTUAL, ENCODER = 40, "none"
"""Virtual tokens of a template that is made, half of them in front, and what makes them.

Chosen on dev examples of four tasks (benchmarks/README.md, "A template that is made").
"""
_SAY_NOTHING = frozenset(("answer", "class", "gold", "label", "labels", "output", "target", "y"))
_CAPTION = "Type"
"""Before a label whose column is named so."""
_TRUTH = {"0": "no", "1": "yes", "true": "yes", "false": "no", "True": "yes", "False": "no"}
_SIGNS = {"-1": "negative", "0": "neutral", "1": "positive"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class FromTable:
    """What a table's columns and answers gave.

    Attributes:
        columns: what each column is for.
        template: the template.
        words: label -> its name in words, in the order of first use; None for free answers.
    """

    columns: Columns
    template: str
    words: dict[str, str] | None


def from_table(
    rows: Sequence[Mapping[str, Any]],
    answer: str | None = None,
    template: str | None = None,
    virtual: int | None = None,
) -> FromTable:
    """Find answer, columns to read, template and label names of a table.

    Args:
        rows: column -> value.
        answer: the answer's column, where it is known.
        template: where there is one already.
        virtual: how many virtual tokens a template gets that is made; by default 40.

    Raises:
        DataError: the table does not say enough (`columns_of`), or all answers are one.
    """
    columns = columns_of(rows, answer, reads=template is None)
    words = label_words(rows, columns)
    made = template or template_of(columns, virtual or VIRTUAL, words is not None)
    return FromTable(columns, made, words)


def template_of(columns: Columns, virtual: int, labelled: bool) -> str:
    """Virtual tokens around what is read, and the answer's name before the answer."""
    read = columns.read
    vague = labelled and columns.answer.casefold() in _SAY_NOTHING
    texts = [f"{{{name}}}" for name in read]
    if len(read) > 1:
        texts = [f"{_caption(name)}: {text}" for name, text in zip(read, texts, strict=True)]
    body = "\n".join(texts)
    front, back = (f"[P*{n}]" if n else "" for n in (virtual // 2, virtual - virtual // 2))
    asked = _CAPTION if vague else _caption(columns.answer)
    return f"{front} {body} {back} {asked}: [MASK]".lstrip()


def label_words(rows: Sequence[Mapping[str, Any]], columns: Columns) -> dict[str, str] | None:
    """The name of each label in words that differ; None where answers are free text.

    Raises:
        DataError: there are several examples, and one label.
    """
    cells = [plain(row.get(columns.answer)) for row in rows]
    labels = [_label(columns.answer, cell) for cell in cells]
    known = list(dict.fromkeys(label for label in labels if label))
    if len(known) == 1 and len(labels) > 1:
        raise DataError(
            f"every answer in the column {columns.answer!r} is {known[0]!r}; give examples of at "
            "least two kinds, or another column (answer=, --answer)"
        )
    if not (are_labels(labels) or all(isinstance(cell, bool) for cell in cells)):
        return None
    if pair := _alike_but_for_case(known):
        warnings.warn(
            f"the labels {pair[0]!r} and {pair[1]!r} differ only in case, and count as two; make "
            "them one in the data if that is what they are",
            stacklevel=4,
        )
    names = _names(known)
    if columns.twin is not None and not any(map(_has_letters, known)):
        twins = {
            label: text_of(columns.twin, row[columns.twin]).strip()
            for label, row in zip(labels, rows, strict=True)
        }
        names = [twins[label] for label in known]
    return dict(zip(known, _distinct(known, names), strict=True))


def _label(column: str, cell: Any) -> str:
    """A cell of the answer column as a label: JSON's true is ``true``, and 1.0 is ``1``."""
    if isinstance(cell, bool):
        return json.dumps(cell)
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return text_of(column, cell).strip()


def _names(labels: Sequence[str]) -> list[str]:
    """What labels of numbers and truths stand for, and the others as they are."""
    for meaning in (_TRUTH, _SIGNS):
        if set(labels) <= set(meaning) and len({meaning[label] for label in labels}) == len(labels):
            return [meaning[label] for label in labels]
    numbers = {str(n): word for n, word in enumerate(_NUMBERS)}
    return [numbers.get(label, label) for label in labels]


def _distinct(labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Readable names, but for those that would be alike: these labels stay as they are."""
    words = [readable(name) for name in names]
    count = Counter(words)
    return [w if count[w] == 1 and w else label for w, label in zip(words, labels, strict=True)]


def readable(name: str) -> str:
    """``top_up-failed``, ``topUpFailed`` as words: ``top up failed``."""
    spaced = re.sub(r"(?<=[^\W_])[_\s/-]+(?=[^\W_])|(?<=[a-z])(?=[A-Z][a-z])", " ", name)
    return " ".join(spaced.split())


def _caption(name: str) -> str:
    """A column's name as it stands in a template."""
    words = readable(name) or "Answer"
    return escape(words[0].upper() + words[1:])


def _alike_but_for_case(labels: Sequence[str]) -> tuple[str, str] | None:
    """The first two labels that differ in case alone."""
    first: dict[str, str] = {}
    for label in labels:
        if (other := first.setdefault(label.casefold(), label)) != label:
            return other, label
    return None


def _has_letters(text: str) -> bool:
    return any(c.isalpha() for c in text)


def as_verbalizer(words: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Label -> word as a verbalizer, in which braces would name columns."""
    return {label: (w.replace("{", "{{").replace("}", "}}"),) for label, w in words.items()}


def in_two_lines(prompt: Task, columns: Columns, aside: int, of: int) -> tuple[str, str]:
    """What was chosen for a table, for people.

    Args:
        prompt: with its label words.
        columns: of the table.
        aside: examples that were set aside to choose with.
        of: all of them.
    """
    labels = prompt.labels
    kind = f"{len(labels)} labels" if labels else "free text"
    first = f"answers: {columns.answer!r} ({kind}); reads: {named(map(repr, columns.read))}"
    if columns.left_out:
        first += f"; left out: {named(f'{n!r} ({why})' for n, why in columns.left_out.items())}"
    second = f"template: {prompt.template!r}"
    if labels:
        words = (f"{label}={'|'.join(of_label)}" for label, of_label in labels.items())
        second += f"; words: {named(words)}"
    if aside:
        second += f"; {aside} of {of} examples are set aside to choose with"
    return first, second
