"""What an example says, and rows looked at before there is a tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from ptuning import DataError
from ptuning.prompts.task import Task
from ptuning.rendering.example import answer_column, check_rows
from ptuning.rendering.render import Renderer

from .. import tiny

CHOICES = Task("{x} [MASK]", verbalizer={"0": "{first}", "1": "{second}"})


def test_answer_column_is_the_task_s_own_else_answer_else_label() -> None:
    free, own = Task("{x} [MASK]"), Task("{x} [MASK]", answer="capital")
    assert answer_column(free, {"label": 1, "answer": 2}) == "answer"
    assert answer_column(free, {"x": 0, "label": 1}) == "label"
    assert answer_column(own, {"answer": 1, "capital": 2}) == "capital"
    with pytest.raises(DataError, match="no answer column 'capital'"):
        answer_column(own, {"answer": 1, "label": 2})


@pytest.mark.parametrize(
    "wrong",
    [
        {"first": "a", "second": "b", "label": 0},
        {"x": "Oslo", "first": "a", "label": 0},
        {"x": ["Oslo"], "first": "a", "second": "b", "label": 0},
        {"x": "Oslo", "first": "a", "second": "b"},
        {"x": "Oslo", "first": "a", "second": "b", "label": " "},
        {"x": "Oslo", "first": "a", "second": "b", "label": 2},
    ],
)
def test_rows_are_refused_before_there_is_a_tokenizer_as_they_are_with_one(
    wrong: dict[str, Any],
) -> None:
    right = {"x": "Oslo", "first": "a", "second": "b"}
    rows = [{**right, "label": " 1 "}, {**right, "label": 0.0}, wrong, {}]
    with pytest.raises(DataError) as before:
        check_rows(CHOICES, rows, "test")
    with pytest.raises(DataError) as after:
        Renderer(tiny.tokenizer(), CHOICES, "causal").each(rows, "test")
    assert str(before.value) == str(after.value)
    assert str(before.value).startswith("test example 3: ")


def test_rows_without_answers_are_counted() -> None:
    rows = ({"x": "Oslo", "first": "a", "second": "b"} for _ in range(3))
    assert check_rows(CHOICES, rows, "test", answered=False) == 3
