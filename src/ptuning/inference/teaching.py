"""A teacher's lessons: what the frozen model says behind a long text, or behind trained virtual
tokens, and how sure it is.

The teacher's rows open with the same text, so a causal model computes its keys and values once.
Of label words the whole distribution is kept; of a free answer its tokens, and at each of them the
likeliest 64: 768 bytes a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from ..backbone.base_model import BaseModel
from ..backbone.kinds import ModelKind
from ..data.values import text_of
from ..errors import DataError, InputError
from ..forward.engine import Engine
from ..forward.scoring import label_log_probabilities
from ..forward.together import biased, mean_log_probabilities
from ..prompts.task import Task
from ..rendering.example import Example, answer_column, right_answer
from ..rendering.lesson import Lesson
from ..rendering.render import Rendered, Renderer, render_all
from ..training.calibration import bias_against
from .prediction import members_of

LIKELIEST = 64
"""Tokens whose probabilities are kept at each place of a free answer."""
_ROWS, _LOGITS = 32, 2**26
"""Rows, and numbers that may be there at once while these are found."""
_PARTS = ("tokens", "likely", "shares")
_TOGETHER = 64
"""Texts whose answers are kept as one."""


def teacher_renderers(engine: Engine, teacher: Task) -> list[Renderer]:
    """What renders rows for a teacher, or for each member of an ensemble.

    Raises:
        InputError: the model has no room for a text behind the teacher's, or is a masked one
            without label words.
    """
    return [_renderer(engine, member) for member in members_of(teacher)]


def _renderer(engine: Engine, teacher: Task) -> Renderer:
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


Said = dict[str, Tensor]
"""What a teacher says to N texts, as tensors that begin with a row for each.

Of labels ``log_probabilities`` ``(N, labels)``. Of free answers ``lengths`` ``(N,)``, and of all
their tokens, one answer behind the other, ``tokens`` ``(K,)``, the ``likely`` ``(K, k)`` and their
``shares`` ``(K, k)``.
"""


def ask(
    engine: Engine,
    renderers: Sequence[Renderer],
    first_ids: Sequence[int],
    rows: Sequence[Example],
    batch_size: int | None = None,
    kept: Callable[[Sequence[Rendered], Callable[[], Said]], Said] | None = None,
    listener: Callable[[int], None] = lambda texts: None,
) -> Said:
    """What a teacher says to each row.

    Args:
        engine: of the frozen model, in eval mode; keeps the teacher's keys and values.
        renderers: the teacher's, or its members' (`teacher_renderers`).
        first_ids: of each the first attached id; 0 for one without virtual tokens.
        rows: column -> value; answers are not needed.
        batch_size: rows per forward (`batching.chunks_by_length`).
        kept: gives what was said to some texts before, or has it said (`kept_answers`).
        listener: hears how many texts have been read, now and then.

    Raises:
        DataError: a row lacks a column.
    """
    examples = [render_all(renderer, rows, "teacher", answered=False) for renderer in renderers]
    said: list[Said] = []
    for start in range(0, len(rows), _TOGETHER):
        some = [of_member[start : start + _TOGETHER] for of_member in examples]
        having_it_said = partial(_said, engine, renderers, some, first_ids, batch_size)
        said.append(kept([*chain(*some)], having_it_said) if kept else having_it_said())
        listener(start + len(some[0]))
    return {name: torch.cat([part[name] for part in said]) for name in said[0]}


@torch.no_grad()
def _said(
    engine: Engine,
    renderers: Sequence[Renderer],
    examples: Sequence[list[Rendered]],
    first_ids: Sequence[int],
    batch_size: int | None,
) -> Said:
    if not renderers[0].compares:
        return _spoken(engine, renderers[0].task, examples, first_ids, batch_size)
    found = label_log_probabilities(engine, renderers, examples, first_ids, batch_size)
    return {"log_probabilities": found}


def calibrate(teacher: Task, said: Said, count: int) -> Said:
    """What was said, without what the teacher prefers on average of the first `count` rows
    (`calibration`: batch); the teacher gets that as its label bias."""
    found = said["log_probabilities"]
    bias = bias_against(found[:count]).tolist()
    teacher.label_bias = dict(zip(teacher.labels, bias, strict=True))
    return {"log_probabilities": biased(found, bias)}


def lessons(
    base: BaseModel, task: Task, rows: Sequence[Example], said: Said, label_weight: float = 0.0
) -> list[Lesson]:
    """A teacher's lesson for each row.

    Args:
        base: the frozen model.
        task: of the teacher, or of whom it teaches.
        rows: column -> value.
        said: to these rows (`ask`).
        label_weight: how much of a lesson is the row's own label, where it has one.

    Raises:
        DataError: a row has a label that is none.
    """
    if not task.labels:
        return _of_free_answers(base, said)
    labels = list(task.labels)
    made = []
    of_rows = said["log_probabilities"].softmax(-1).numpy()
    for number, (row, shares) in enumerate(zip(rows, of_rows, strict=True), 1):
        own = own_label(task, row, number) if label_weight else None
        if own is not None:
            shares *= 1 - label_weight
            shares[labels.index(own)] += label_weight
        made.append(Lesson(labels[int(shares.argmax())], shares))
    return made


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
    engine: Engine,
    task: Task,
    examples: Sequence[list[Rendered]],
    first_ids: Sequence[int],
    batch_size: int | None,
) -> Said:
    """Free answers, the likeliest token each time, and then all their distributions at once."""
    limit, tokenizer = task.answer_tokens, engine.base.tokenizer
    if limit is None:
        raise InputError("how long may the teacher's answers be? Give answer_tokens")
    ends, members = engine.ends(task), range(len(examples))
    rows = max(1, min(batch_size or _ROWS, _LOGITS // (limit * len(tokenizer))))
    made: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for chunk in engine.chunks(examples[0], rows, len(members)):
        sizes = [len(members)] * len(chunk)
        asked = [(examples[member][i], member) for i in chunk for member in members]
        batch = engine.prediction_batch(asked, first_ids)
        spoken, _ = engine.continue_greedily(batch, limit, ends, sizes=sizes)
        said = [_until(ids, ends, task.ends_answer) for ids in spoken.tolist()]
        answered = [
            (replace(one, sequences=(replace(one.sequences[0], answer=ids),)), member)
            for i, ids in zip(chunk, said, strict=True)
            for one, member in ((examples[member][i], member) for member in members)
        ]
        batch = engine.prediction_batch(answered, first_ids)
        together = mean_log_probabilities(engine.logits(batch), sizes)
        shares = _with_one_end(together.exp(), ends)
        likeliest = shares.topk(min(LIKELIEST, shares.shape[-1]), dim=-1)
        values, ids = likeliest.values.cpu(), likeliest.indices.cpu()
        for row, (number, tokens) in enumerate(zip(chunk, said, strict=True)):
            first = values.shape[1] - len(tokens) if batch.kind == ModelKind.CAUSAL else 0
            own = slice(first, first + len(tokens))
            spoken_ids = torch.tensor(tokens, dtype=torch.long)
            made[number] = spoken_ids, ids[row, own], values[row, own]
    answers = [made[number] for number in range(len(examples[0]))]
    parts = map(torch.cat, zip(*answers, strict=True))
    lengths = torch.tensor([len(spoken_ids) for spoken_ids, *_ in answers])
    return {"lengths": lengths, **dict(zip(_PARTS, parts, strict=True))}


def _of_free_answers(base: BaseModel, said: Said) -> list[Lesson]:
    parts = (said[name].split(said["lengths"].tolist()) for name in _PARTS)
    return [
        Lesson(
            base.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            shares.numpy(),
            tuple(tokens.tolist()),
            likely.numpy(),
        )
        for tokens, likely, shares in zip(*parts, strict=True)
    ]


def _until(ids: list[int], ends: Sequence[int], kept: bool) -> tuple[int, ...]:
    """An answer's tokens up to its end, which is the first of the ends where it is kept."""
    for at, token in enumerate(ids):
        if token in ends:
            return (*ids[:at], *ends[: int(kept)])
    return tuple(ids)


def _with_one_end(shares: Tensor, ends: Sequence[int]) -> Tensor:
    """Probabilities ``(…, vocabulary)`` where however the teacher ends is the first of the ends:
    a student has the tokenizer's alone."""
    if len(ends) > 1:
        shares[..., ends[0]] = shares[..., list(ends)].sum(-1)
        shares[..., list(ends[1:])] = 0.0
    return shares
