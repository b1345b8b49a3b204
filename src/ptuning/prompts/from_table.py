"""From a table to a task: a template out of its column names, words out of its labels.

    subject,body,team          [P*20] Subject: {subject}
    "Refund?","I …",billing    Body: {body} [P*20] Team: [MASK]

Knows no tokenizer: whether a label's name is one token shows later, and then others may take its
place (`rendering.short_words`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.columns import Columns, columns_of
from ..data.rows import listed
from ..errors import DataError, excerpt, warn
from .label_names import label_words, readable, say_nothing, telling_words
from .task import Task, at_least_one
from .template import heading

AUTO = "auto"
"""What stands for a template or for labels that are to be found in the table."""
VIRTUAL, ENCODER = 40, "none"
"""Virtual tokens of a template that is made, half of them in front, and what makes them.

Chosen on dev examples of four tasks (benchmarks/README.md, "A template that is made").
"""
_SAY_NOTHING = frozenset(("answer", "class", "gold", "label", "labels", "output", "target", "y"))
_CAPTION = "Type"
"""Before a label whose column is named so."""
_SENTENCE = 5
"""Words that no name of a column beside such an answer has."""


@dataclass(frozen=True)
class FromTable:
    """What a table's columns and answers gave.

    Attributes:
        columns: what each column is for.
        template: the template.
        words: label -> its name in words, in the order of first use; None for free answers.
        telling: label -> the words of its name, those first that tell most of it.
        nameless: the names say nothing.
    """

    columns: Columns
    template: str
    words: dict[str, str] | None
    telling: dict[str, tuple[str, ...]]
    nameless: bool


def from_table(
    rows: Sequence[Mapping[str, Any]],
    answer: str | None = None,
    template: str | None = None,
    virtual: int | None = None,
    dev: Sequence[Mapping[str, Any]] = (),
) -> FromTable:
    """Find answer, columns to read, template and label names of a table.

    Args:
        rows: column -> value.
        answer: the answer's column, where it is known.
        template: where there is one already.
        virtual: how many virtual tokens a template gets that is made; by default 40.
        dev: other rows, whose labels count too, and which have to have what is read.

    Raises:
        DataError: the table does not say enough (`columns_of`), all answers are one, or its names
            are plainly an example.
    """
    at_least_one("num_virtual_tokens", virtual)
    columns = columns_of(rows, answer, reads=template is None, dev=dev)
    rows = [*rows, *(row for row in dev if columns.answer in row)]
    words = label_words(rows, columns)
    if words and columns.answer in words:
        _check_header(columns)
    made = template or template_of(columns, virtual or VIRTUAL, words is not None)
    telling = telling_words(words, rows, columns) if words else {}
    nameless = columns.twin is None and say_nothing(words or ())
    return FromTable(columns, made, words, telling, nameless)


def template_of(columns: Columns, virtual: int, labelled: bool) -> str:
    """Virtual tokens around what is read, and the answer's name before the answer."""
    read = columns.read
    vague = labelled and columns.answer.strip().casefold() in _SAY_NOTHING
    texts = [f"{{{name}}}" for name in read]
    if len(read) > 1:
        texts = [f"{_caption(name)}: {text}" for name, text in zip(read, texts, strict=True)]
    body = "\n".join(texts)
    front, back = (f"[P*{n}]" if n else "" for n in (virtual // 2, virtual - virtual // 2))
    asked = _CAPTION if vague else _caption(columns.answer)
    return f"{front} {body} {back} {asked}: [MASK]".lstrip()


def _check_header(columns: Columns) -> None:
    """What to say of a table whose answers' column is called as one of its labels."""
    called = f"the answer's column is called {columns.answer!r}, as one of its labels is"
    sentences = [name for name in columns.read if len(name.split()) >= _SENTENCE]
    if sentences:
        raise DataError(
            f"the table has no header: {called}, and another {excerpt(sentences[0], most=60)!r}; "
            "name its columns (columns=, --columns label,text)"
        )
    warn(f"{called}: if the file has no header, name its columns (columns=, --columns label,text)")


def _caption(name: str) -> str:
    """A column's name as it stands in a template."""
    return heading(readable(name) or "Answer")


def in_two_lines(
    prompt: Task, columns: Columns, aside: int, of: int, refit: bool = False
) -> tuple[str, str]:
    """What was chosen for a table, for people.

    Args:
        prompt: with its label words.
        columns: of the table.
        aside: examples that were set aside to choose with.
        of: all of them.
        refit: at last all of them are trained on.
    """
    labels = prompt.labels
    kind = f"{len(labels)} labels" if labels else "free text"
    first = f"answers: {columns.answer!r} ({kind}); reads: {listed(map(repr, columns.read))}"
    if columns.left_out:
        first += f"; left out: {listed(f'{n!r} ({why})' for n, why in columns.left_out.items())}"
    second = f"template: {prompt.template!r}"
    if labels:
        words = (f"{label}={'|'.join(of_label)}" for label, of_label in labels.items())
        second += f"; words: {listed(words)}"
    if aside:
        second += f"; {aside} of {of} examples are set aside to choose with"
        if refit:
            second += ", and trained on at last"
    return first, second
