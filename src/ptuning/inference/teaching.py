"""A teacher's lessons: what the frozen model says behind a long text, and how sure it is.

The teacher's rows open with the same text, so a causal model computes its keys and values once.
Of label words the whole distribution is kept; of a free answer its tokens, and at each of them the
likeliest 64: 768 bytes a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch

from ..backbone.kinds import ModelKind
from ..backbone.modes import eval_mode
from ..data.values import text_of
from ..errors import DataError, InputError
from ..forward.engine import Engine
from ..forward.scoring import label_log_probabilities
from ..prompts.task import Task
from ..rendering.example import Example, answer_column, right_answer
from ..rendering.lesson import Lesson
from ..rendering.render import Rendered, Renderer, render_all
from ..training.calibration import bias_against
from .answering import Question, answers

LIKELIEST = 64
"""Tokens whose probabilities are kept at each place of a free answer."""
_ROWS, _LOGITS = 32, 2**26
"""Rows, and numbers that may be there at once while these are found."""


def teacher_renderer(engine: Engine, teacher: Task) -> Renderer:
    """What renders rows for a teacher.

    Raises:
        InputError: the model has no room for a text behind the teacher's, or is a masked one
            without label words.
    """
    renderer = engine.renderer(teacher).asking()
    if engine.base.kind is ModelKind.MASKED and not renderer.compares:
        raise InputError(
            "a masked model teaches label words only, since a free answer's length is unknown; "
            "give a verbalizer (--labels yes=Yes,no=No)"
        )
    alone = renderer.layout(dict.fromkeys(teacher.parsed.fields, ""), None)
    room = renderer.limit
    answer = teacher.answer_tokens or 1
    if room is not None and len(alone.ids) + answer > room:
        remedy = "shorten it" if len(alone.ids) + 1 > room else "give fewer answer_tokens"
        raise InputError(
            f"the teacher alone has {len(alone.ids):,} tokens and its answer up to {answer:,}, and "
            f"this model reads {room:,} with the text; {remedy}"
        )
    return renderer


@torch.no_grad()
def lessons(
    engine: Engine,
    renderer: Renderer,
    rows: Sequence[Example],
    label_weight: float = 0.0,
    batch_size: int | None = None,
) -> list[Lesson]:
    """A teacher's lesson for each row.

    Args:
        engine: of the frozen model; keeps the teacher's keys and values.
        renderer: the teacher's (`teacher_renderer`).
        rows: column -> value; answers are not needed.
        label_weight: how much of a lesson is the row's own label, where it has one.
        batch_size: rows per forward (`batching.chunks_by_length`).

    Raises:
        DataError: a row lacks a column, or has a label that is none.
    """
    examples = render_all(renderer, rows, "teacher", answered=False)
    with eval_mode(engine.base.model):
        if not renderer.compares:
            return _spoken(engine, renderer, examples, batch_size)
        questions = [Question(renderer, example) for example in examples]
        found = dict(answers(engine, questions, batch_size))
    labels = list(renderer.labels)
    made = []
    for number, row in enumerate(rows):
        shares = numpy.array([found[number].probabilities[label] for label in labels], "float32")
        own = own_label(renderer.task, row, number + 1) if label_weight else None
        if own is not None:
            shares *= 1 - label_weight
            shares[labels.index(own)] += label_weight
        made.append(Lesson(labels[int(shares.argmax())], shares))
    return made


def measured_bias(engine: Engine, renderer: Renderer, rows: Sequence[Example]) -> dict[str, float]:
    """For each label what takes back its mean share of a teacher's answers to some rows
    (`calibration`: batch)."""
    examples = render_all(renderer, rows, "teacher", answered=False)
    with eval_mode(engine.base.model):
        found = label_log_probabilities(engine, [renderer], [examples], [0], None)
    return dict(zip(renderer.labels, bias_against(found).tolist(), strict=True))


def own_label(task: Task, row: Example, number: int = 1) -> str | None:
    """The answer that a row has of its own, as it is compared; None where it has none.

    Raises:
        DataError: it has no text, or is no label of the task's.
    """
    try:
        column = answer_column(task, row)
    except DataError:
        return None
    try:
        if not text_of(column, row[column]).strip():
            return None
        answer = right_answer(task, row, task.labels)
    except DataError as error:
        raise DataError(f"example {number}: {error}") from None
    return answer if task.labels else answer.strip()


def _spoken(
    engine: Engine, renderer: Renderer, examples: Sequence[Rendered], batch_size: int | None
) -> list[Lesson]:
    """Free answers, the likeliest token each time, and then all their distributions at once."""
    limit, tokenizer = renderer.task.answer_tokens, engine.base.tokenizer
    if limit is None:
        raise InputError("how long may the teacher's answers be? Give answer_tokens")
    ends = engine.ends(renderer.task)
    width = limit * len(tokenizer)
    rows = max(1, min(batch_size or _ROWS, _LOGITS // width))
    made: dict[int, Lesson] = {}
    for chunk in engine.chunks(examples, rows):
        batch = engine.prediction_batch([(examples[i], 0) for i in chunk], [0])
        spoken, _ = engine.continue_greedily(batch, limit, ends)
        said = [_until(ids, ends, renderer.task.ends_answer) for ids in spoken.tolist()]
        answered = [
            replace(examples[i], sequences=(replace(examples[i].sequences[0], answer=ids),))
            for i, ids in zip(chunk, said, strict=True)
        ]
        batch = engine.prediction_batch([(example, 0) for example in answered], [0])
        shares = _with_one_end(engine.logits(batch).float().softmax(-1), ends)
        likeliest = shares.topk(min(LIKELIEST, shares.shape[-1]), dim=-1)
        values, ids = likeliest.values.cpu().numpy(), likeliest.indices.cpu().numpy()
        for row, (number, tokens) in enumerate(zip(chunk, said, strict=True)):
            first = values.shape[1] - len(tokens) if batch.kind == ModelKind.CAUSAL else 0
            own = slice(first, first + len(tokens))
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            made[number] = Lesson(text, values[row, own], tokens, ids[row, own])
    return [made[number] for number in range(len(examples))]


def _until(ids: list[int], ends: Sequence[int], kept: bool) -> tuple[int, ...]:
    """An answer's tokens up to its end, which is the first of the ends where it is kept."""
    for at, token in enumerate(ids):
        if token in ends:
            return (*ids[:at], *ends[: int(kept)])
    return tuple(ids)


def _with_one_end(shares: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """Probabilities ``(…, vocabulary)`` where however the teacher ends is the first of the ends:
    a student has the tokenizer's alone."""
    if len(ends) > 1:
        shares[..., ends[0]] = shares[..., list(ends)].sum(-1)
        shares[..., list(ends[1:])] = 0.0
    return shares
