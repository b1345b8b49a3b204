"""Answers of a model with a prompt: labels by comparison, free answers by greedy decoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.base_model import BaseModel, eval_mode
from ..backbone.traits import ModelKind
from ..errors import InputError
from ..forward.engine import Engine
from ..forward.plain import by_label
from ..prompts.task import Task
from ..rendering.collate import Batch
from ..rendering.render import Example, Rendered, Renderer, render_all
from .attachment import placed

_KEPT = 64 * 2**20
"""What one prompt's prediction keeps of the parts that its rows share."""


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        answer: a label of the verbalizer, a candidate, or free text.
        probability: of the label among the labels, or of the free answer's tokens.
        probabilities: label -> probability; empty for free answers.
    """

    answer: str
    probability: float
    probabilities: dict[str, float] = field(default_factory=dict)


def predict(
    model: nn.Module,
    tokenizer: Any,
    prompt: Task | Sequence[Task],
    rows: Iterable[Example],
    *,
    candidates: Sequence[str] | None = None,
    answer_tokens: int | None = None,
    batch_size: int = 32,
) -> list[Any]:
    """The answer to each row; `predict_details` also gives probabilities.

    Args:
        model: the frozen base model.
        tokenizer: the model's.
        prompt: a trained prompt, attached or not; or a manual `Task`. Or several: then the result
            has a list for each, and text in front of their virtual tokens, as far as it is the same
            (one document, many tasks), is computed once for a causal model.
        rows: examples, column -> value; the answer column is not needed.
        candidates: choose among these answers.
        answer_tokens: longest free answer in tokens; by default the training's.
        batch_size: rows per forward.

    Returns:
        a string for each row; for several prompts a list of strings for each prompt.

    Raises:
        InputError, DataError: prompt, model or rows do not fit together.

    Example:
        >>> predict(model, tokenizer, prompt, [{"country": "France"}])
        ['Paris']
    """
    options: Any = {"candidates": candidates, "answer_tokens": answer_tokens}
    details: Any = predict_details(model, tokenizer, prompt, rows, **options, batch_size=batch_size)
    if isinstance(prompt, Task):
        return [prediction.answer for prediction in details]
    return [[prediction.answer for prediction in of_one] for of_one in details]


@torch.no_grad()
def predict_details(
    model: nn.Module,
    tokenizer: Any,
    prompt: Task | Sequence[Task],
    rows: Iterable[Example],
    *,
    candidates: Sequence[str] | None = None,
    answer_tokens: int | None = None,
    batch_size: int = 32,
) -> list[Any]:
    """Like `predict`, with probabilities: a `Prediction` for each row."""
    tasks, rows = [prompt] if isinstance(prompt, Task) else list(prompt), list(rows)
    engine = Engine(BaseModel.of(model, tokenizer), _KEPT if len(tasks) == 1 else None)
    choices = list(candidates) if candidates else None
    questions = []
    for task in tasks:
        settled = task if answer_tokens is None else replace(task, answer_tokens=answer_tokens)
        renderer = engine.renderer(settled, choices)
        renderer.compares = bool(renderer.labels)
        examples = render_all(renderer, rows, "prediction", answered=False)
        questions.append(_Question(renderer, examples))
    results: list[list[Prediction]] = [[] for _ in tasks]
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for task, question in zip(tasks, questions, strict=True):
            question.first_id = stack.enter_context(placed(model, tokenizer, task))
        stack.enter_context(engine.one_document([question.examples for question in questions]))
        for numbers in _in_one_batch(questions):
            group = [questions[number] for number in numbers]
            answers = _answers(engine, group, len(rows), batch_size)
            for number, of_one in zip(numbers, answers, strict=True):
                results[number] = of_one
    return results[0] if isinstance(prompt, Task) else results


@dataclass
class _Question:
    """One task on all rows, and the id of its first virtual token."""

    renderer: Renderer
    examples: list[Rendered]
    first_id: int = 0


def _in_one_batch(questions: list[_Question]) -> list[list[int]]:
    """The numbers of tasks whose rows may share batches: those that compare as many words."""
    groups: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        renderer = question.renderer
        key = len(renderer.owner) if renderer.compares else (number,)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _answers(
    engine: Engine, questions: list[_Question], count: int, batch_size: int
) -> list[list[Prediction]]:
    """The tasks' answers, in batches of rows of like length; a row's tasks stand together."""
    results = [[Prediction("", 0.0)] * count for _ in questions]
    answer = _compare if questions[0].renderer.compares else _decode
    first_ids = [question.first_id for question in questions]
    size = max(1, batch_size // len(questions))
    for chunk in engine.chunks(questions[0].examples, size):
        cells = [(index, number) for index in chunk for number in range(len(questions))]
        rows = [(questions[number].examples[index], number) for index, number in cells]
        batch = engine.prediction_batch(rows, first_ids)
        answers = answer(engine, [questions[number].renderer for _, number in cells], batch)
        for (index, number), prediction in zip(cells, answers, strict=True):
            results[number][index] = prediction
    return results


def _compare(engine: Engine, renderers: list[Renderer], batch: Batch) -> list[Prediction]:
    """The most likely label of each row."""
    scores = engine.word_scores(batch, len(renderers[0].owner)).cpu()
    predictions = []
    for row, renderer in zip(scores, renderers, strict=True):
        shares = by_label(row[None], torch.tensor(renderer.owner))[0].softmax(0).tolist()
        labels = list(renderer.labels)
        best = max(range(len(shares)), key=shares.__getitem__)
        probabilities = dict(zip(labels, shares, strict=True))
        predictions.append(Prediction(labels[best], shares[best], probabilities))
    return predictions


def _decode(engine: Engine, renderers: list[Renderer], batch: Batch) -> list[Prediction]:
    """The most likely text of each row: at the masks, or token by token."""
    limit = renderers[0].task.answer_tokens
    if engine.base.kind is ModelKind.MASKED:
        empty = batch.answers.new_zeros(len(batch.input_ids), limit or 1)
        best = engine.logits(replace(batch, answers=empty)).float().log_softmax(-1).max(-1)
        return _texts(engine.base.tokenizer, best.indices, best.values)
    if limit is None:
        raise InputError(
            "how long may a free answer be? Give answer_tokens (--answer-tokens N), or candidates"
        )
    ids, scores = engine.continue_greedily(batch, limit)
    return _texts(engine.base.tokenizer, ids, scores)


def _texts(tokenizer: Any, ids: Tensor, scores: Tensor) -> list[Prediction]:
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    probabilities = scores.sum(1).exp().tolist()
    return [
        Prediction(text.strip(), probability)
        for text, probability in zip(texts, probabilities, strict=True)
    ]
