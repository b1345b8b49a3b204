"""What an example says to a task: its fields, the columns in label words, the right answer.

Knows no tokenizer, so all rows can be looked at before a model is loaded for them (`check_rows`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..data.rows import listed, names_in
from ..data.values import text_of
from ..errors import DataError, excerpt
from ..prompts.task import Task, as_label, named_fields

Example = Mapping[str, Any]
"""Column -> value."""


def check_rows(task: Task, rows: Iterable[Example], what: str, *, answered: bool = True) -> int:
    """Look at all rows before a model is loaded for them; gives how many there are.

    Args:
        task: whose columns and labels the rows must have.
        rows: column -> value; they may be a stream.
        what: they are for, such as ``"training"``.
        answered: the answer column must be there.

    Raises:
        DataError: names the first example at fault by its number, counted from 1.
    """
    in_words = columns_in_words(task)
    fields, labels, number = task.columns, task.labels, 0
    for number, row in enumerate(rows, 1):
        try:
            column_texts(row, fields, "template")
            column_texts(row, in_words, "verbalizer")
            if answered:
                right_answer(task, row, labels)
        except DataError as error:
            raise DataError(f"{what} example {number}: {error}") from None
    return number


def columns_in_words(task: Task) -> tuple[str, ...]:
    """The columns that a task's label words name."""
    words = [word for words in task.labels.values() for word in words]
    return tuple(dict.fromkeys(name for word in words for name in named_fields(word)))


def all_columns(task: Task) -> tuple[str, ...]:
    """The columns that a task reads, and a row must have: in its template and in its label words.

    Raises:
        InputError: the task has no template.
    """
    return tuple(dict.fromkeys([*task.columns, *columns_in_words(task)]))


def column_texts(example: Example, names: Iterable[str], what: str) -> dict[str, str]:
    """The texts of some columns.

    Args:
        example: column -> value.
        names: of the columns.
        what: names them, such as ``"template"``.

    Raises:
        DataError: a column is missing, or holds what has no text.
    """
    for name in names:
        if name not in example:
            raise DataError(
                f"the {what} names the column {name!r}, and the example has "
                f"{names_in(example)}; rename one of the two"
            )
    return {name: text_of(name, example[name]) for name in names}


def answer_column(task: Task, example: Example) -> str:
    """The column of the right answer: the task's own, else ``answer``, else ``label``.

    Raises:
        DataError: the example has no such column.
    """
    choices = [task.answer] if task.answer else ["answer", "label"]
    for name in choices:
        if name in example:
            return name
    remedy = (
        "rename that column, or correct the prompt's answer column"
        if task.answer
        else "say in which column the answer is (answer=, or train --answer COLUMN)"
    )
    raise DataError(
        f"the example has no answer column {' or '.join(map(repr, choices))}; it has "
        f"{names_in(example)}; {remedy}"
    )


def right_answer(task: Task, example: Example, labels: Collection[str]) -> str:
    """The right answer's text, which is one of the labels where there are any.

    Args:
        task: says which column it is.
        example: column -> value.
        labels: that are compared; none for free answers.

    Raises:
        DataError: there is no such column, it is empty, or it is no label.
    """
    column = answer_column(task, example)
    text = text_of(column, as_label(example[column], labels))
    if not text.strip():
        raise DataError(f"the answer column {column!r} is empty; every example needs an answer")
    if text not in labels and text.strip() in labels:
        return text.strip()
    if labels and text not in labels:
        raise DataError(
            f"{excerpt(repr(text))} is none of the prompt's labels, {listed(map(repr, labels))}; "
            "leave such examples out, or train with it as a label (verbalizer=, --labels)"
        )
    return text
