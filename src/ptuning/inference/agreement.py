"""A prompt beside the text that it learnt from: answers in common, and what a request costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from ..backbone.base_model import BaseModel
from ..data import Row
from ..errors import DataError
from ..forward.engine import Engine
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..rendering.render import Renderer
from .answering import Prediction, Question, Reading, answers, read_back
from .attachment import all_placed
from .prediction import members_of
from .teaching import own_label, teacher_renderers

_TIMED = 8
"""Requests whose time is taken."""
_SURE = 2.0
"""How many times as likely as the next one a sure teacher's label is; rounding hardly turns it."""


@dataclass(frozen=True)
class Agreement:
    """A prompt beside its teacher, on texts that did not train it.

    Attributes:
        examples: how many texts.
        agreement: share of them to which both give the same answer.
        sure: how many texts the teacher is sure of: its label is at least twice as likely as the
            next one; 0 for free answers.
        sure_agreement: share of these to which both give the same answer; None where there are
            none.
        accuracy: share that the prompt answers right, of the texts that have an answer which it
            may give; None where there are none.
        teacher_accuracy: likewise the teacher.
        tokens: of a request to all members, on average, without the answer.
        teacher_tokens: likewise with the teacher.
        seconds: of a request that is computed alone, answer included.
        teacher_seconds: likewise with the teacher, of which nothing is kept.
        kept_seconds: with the teacher's keys and values kept; None where that is not possible.
        kept_bytes: of these keys and values.
    """

    examples: int
    agreement: float
    sure: int
    sure_agreement: float | None
    accuracy: float | None
    teacher_accuracy: float | None
    tokens: float
    teacher_tokens: float
    seconds: float
    teacher_seconds: float
    kept_seconds: float | None
    kept_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def compare(
    model: nn.Module, tokenizer: Any, prompt: Prompt, teacher: Task, rows: Sequence[Row]
) -> Agreement:
    """Both on the same texts.

    Args:
        model: the frozen base model.
        tokenizer: the model's.
        prompt: trained.
        teacher: what it learnt from.
        rows: texts; where they have answers, it is told how many both get right.

    Raises:
        InputError, DataError: prompt, teacher, model or rows do not fit together.
    """
    base = BaseModel.of(model, tokenizer)
    own = [_known_label(prompt, row) for row in rows]
    if not prompt.labels:
        own = [text and read_back(tokenizer, text) for text in own]
    ours = [Engine(base).renderer(member).asking() for member in members_of(prompt)]
    theirs = teacher_renderers(Engine(base), teacher)
    with all_placed(model, tokenizer, [r.task for r in (*ours, *theirs)]) as first:
        asked = _questions(ours, first[: len(ours)], rows, "test")
        taught = _questions(theirs, first[len(ours) :], rows, "teacher")
        found, known = (_answered(Engine(base), questions) for questions in (asked, taught))
        some = slice(0, _TIMED * max(1, len(rows) // _TIMED), max(1, len(rows) // _TIMED))
        keeping = Engine(base)
        seconds = _seconds(Engine(base, 0), asked[some])
        teacher_seconds = _seconds(Engine(base, 0), taught[some])
        kept_seconds = _seconds(keeping, taught[some])
        kept = keeping.store.bytes if keeping.store is not None else 0
    said, wanted = ([prediction.answer for prediction in of_one] for of_one in (found, known))
    same = [a == b for a, b in zip(said, wanted, strict=True)]
    sure = [alike for alike, prediction in zip(same, known, strict=True) if _is_sure(prediction)]
    return Agreement(
        examples=len(rows),
        agreement=float(mean(same)),
        sure=len(sure),
        sure_agreement=float(mean(sure)) if sure else None,
        accuracy=_right(said, own),
        teacher_accuracy=_right(wanted, own),
        tokens=_tokens(asked),
        teacher_tokens=_tokens(taught),
        seconds=seconds,
        teacher_seconds=teacher_seconds,
        kept_seconds=kept_seconds if kept else None,
        kept_bytes=kept,
    )


def _questions(
    renderers: Sequence[Renderer], first_ids: Sequence[int], rows: Sequence[Row], what: str
) -> list[Question]:
    """Each row for all who answer it together."""
    examples = [renderer.each(rows, what, answered=False) for renderer in renderers]
    by_row = zip(*examples, strict=True)
    return [Question.of(map(Reading, renderers, of_row, first_ids)) for of_row in by_row]


def _known_label(prompt: Prompt, row: Row) -> str | None:
    """A row's answer, if it has one that the prompt may give: texts need none, and a column that is
    called so may be of something else."""
    try:
        return own_label(prompt, row)
    except DataError:
        return None


@torch.no_grad()
def _answered(engine: Engine, questions: Sequence[Question]) -> list[Prediction]:
    found = dict(answers(engine, questions))
    return [found[number] for number in range(len(questions))]


def _is_sure(prediction: Prediction) -> bool:
    """Of its label; free answers have no others that they could be compared with."""
    first, *others = sorted(prediction.probabilities.values(), reverse=True) or [0.0]
    return bool(others) and first >= _SURE * others[0]


def _seconds(engine: Engine, questions: Sequence[Question]) -> float:
    """Of one question, asked alone; the middle one's, behind one that warms up."""
    taken = []
    for question in (questions[0], *questions):
        began = time.perf_counter()
        _answered(engine, [question])
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


def _right(said: Sequence[str], own: Sequence[str | None]) -> float | None:
    """Share answered right of the texts that have an answer."""
    known = [answer == right for answer, right in zip(said, own, strict=True) if right is not None]
    return float(mean(known)) if known else None


def _tokens(questions: Sequence[Question]) -> float:
    return mean(
        sum(len(reading.example.sequences[0].ids) for reading in question.readings)
        for question in questions
    )
