"""Answers of a model with a prompt: labels by comparison, free answers by greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.base_model import BaseModel
from ..backbone.modes import eval_mode
from ..backbone.traits import ModelKind
from ..data import Row, Rows, as_rows
from ..errors import InputError
from ..forward.engine import Engine
from ..forward.plain import by_label
from ..prompts.task import Task
from ..rendering.collate import Batch
from ..rendering.render import Rendered, Renderer, render_each, tell_shortened
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
    rows: Rows,
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
        rows: examples, as `train` takes them; the answer column is not needed.
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


def predict_details(
    model: nn.Module,
    tokenizer: Any,
    prompt: Task | Sequence[Task],
    rows: Rows,
    *,
    candidates: Sequence[str] | None = None,
    answer_tokens: int | None = None,
    batch_size: int = 32,
) -> list[Any]:
    """Like `predict`, with probabilities: a `Prediction` for each row."""
    tasks = [prompt] if isinstance(prompt, Task) else list(prompt)
    blocks = [as_rows(rows)]
    (results,) = _predicted(model, tokenizer, tasks, blocks, candidates, answer_tokens, batch_size)
    return results[0] if isinstance(prompt, Task) else results


def stream_predictions(
    model: nn.Module,
    tokenizer: Any,
    prompt: Task,
    blocks: Iterable[Sequence[Row]],
    *,
    candidates: Sequence[str] | None = None,
    answer_tokens: int | None = None,
    batch_size: int = 32,
    first: int = 1,
) -> Iterator[list[Prediction]]:
    """The predictions of each block of rows when it comes, so that only one is in memory.

    Args:
        model: the frozen base model.
        tokenizer: the model's.
        prompt: as for `predict`.
        blocks: some rows at a time; rows of like length share a batch within a block.
        candidates: choose among these answers.
        answer_tokens: longest free answer in tokens; by default the training's.
        batch_size: rows per forward.
        first: number of the first row, for errors.

    Raises:
        InputError, DataError: prompt, model or rows do not fit together.
    """
    options = candidates, answer_tokens, batch_size
    for (predictions,) in _predicted(model, tokenizer, [prompt], blocks, *options, first):
        yield predictions


@torch.no_grad()
def _predicted(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    blocks: Iterable[Sequence[Row]],
    candidates: Sequence[str] | None,
    answer_tokens: int | None,
    batch_size: int,
    first: int = 1,
) -> Iterator[list[list[Prediction]]]:
    """Block by block each task's predictions."""
    engine = Engine(BaseModel.of(model, tokenizer), _KEPT if len(tasks) == 1 else None)
    choices = list(candidates) if candidates else None
    questions = []
    for task in tasks:
        settled = task if answer_tokens is None else replace(task, answer_tokens=answer_tokens)
        renderer = engine.renderer(settled, choices)
        renderer.compares = bool(renderer.labels)
        questions.append(_Asked(renderer))
    number = first
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for task, question in zip(tasks, questions, strict=True):
            question.first_id = stack.enter_context(placed(model, tokenizer, task))
        for rows in blocks:
            for question in questions:
                question.render(rows, number)
            yield _of_block(engine, questions, batch_size)
            number += len(rows)
    for question in questions:
        tell_shortened(question.renderer, question.shortened, number - first, "prediction")


def _of_block(engine: Engine, questions: list[_Asked], batch_size: int) -> list[list[Prediction]]:
    results: list[list[Prediction]] = [[] for _ in questions]
    with engine.one_document([question.examples for question in questions]):
        for numbers in _in_one_batch(questions):
            group = [questions[number] for number in numbers]
            answers = _answers(engine, group, len(questions[0].examples), batch_size)
            for number, of_one in zip(numbers, answers, strict=True):
                results[number] = of_one
    return results


@dataclass
class _Asked:
    """One task on a block of rows, and the id of its first virtual token."""

    renderer: Renderer
    examples: list[Rendered] = field(default_factory=list)
    first_id: int = 0
    shortened: int = 0

    def render(self, rows: Sequence[Row], first: int) -> None:
        """Take up the next block, whose rows are counted from `first`."""
        rendered = render_each(self.renderer, rows, "prediction", answered=False, first=first)
        self.examples = rendered
        self.shortened += sum(example.shortened for example in rendered)


@dataclass(frozen=True)
class Question:
    """One row for one task.

    Attributes:
        renderer: the task's, on the engine's model.
        example: rendered by it, without an answer.
        first_id: of the prompt's first virtual token; 0 for a manual task.
        limit: longest free answer in tokens; by default the task's.
        watch: is shown each token of a free answer as it comes, and says whether it is enough.
    """

    renderer: Renderer
    example: Rendered
    first_id: int = 0
    limit: int | None = None
    watch: Callable[[int], bool] | None = None

    @property
    def most(self) -> int | None:
        """The longest free answer in tokens."""
        return self.limit or self.renderer.task.answer_tokens


@torch.no_grad()
def answers(
    engine: Engine, questions: Sequence[Question], batch_size: int = 32
) -> Iterator[tuple[int, Prediction]]:
    """Questions of any tasks, mixed in batches: number of the question and its answer.

    They come as they are known: label comparisons first, then free answers.

    Args:
        engine: its model is in eval mode and has the prompts attached.
        questions: each has the answer that it would have alone.
        batch_size: rows per forward.

    Raises:
        InputError: a free answer without a limit.
    """
    groups: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        words = len(question.renderer.owner) if question.renderer.compares else 0
        masks = question.most if not words and engine.base.kind is ModelKind.MASKED else None
        groups.setdefault((not words, words, masks or 0), []).append(number)
    for key in sorted(groups):
        numbers = groups[key]
        for chunk in engine.chunks([questions[n].example for n in numbers], batch_size):
            group = [questions[numbers[i]] for i in chunk]
            rows = [(question.example, row) for row, question in enumerate(group)]
            batch = engine.prediction_batch(rows, [question.first_id for question in group])
            if group[0].renderer.compares:
                predictions = _compare(engine, [q.renderer for q in group], batch)
            else:
                predictions = _decode(engine, [q.most for q in group], batch, _watching(group))
            yield from zip([numbers[i] for i in chunk], predictions, strict=True)


def _watching(questions: list[Question]) -> Callable[[Tensor], Tensor] | None:
    """For `continue_greedily`: each row ends at its own limit, or where its watch says so."""
    if len({question.most for question in questions}) == 1 and not any(
        question.watch for question in questions
    ):
        return None
    counts = [0] * len(questions)

    def watch(ids: Tensor) -> Tensor:
        for row, token in enumerate(ids.tolist()):
            question, counts[row] = questions[row], counts[row] + 1
            if done[row] or question.most is None:
                continue
            enough = question.watch is not None and question.watch(token)
            done[row] = enough or counts[row] >= question.most
        return done.to(ids.device)

    done = torch.zeros(len(questions), dtype=torch.bool)
    return watch


def _in_one_batch(questions: list[_Asked]) -> list[list[int]]:
    """The numbers of tasks whose rows may share batches: those that compare as many words."""
    groups: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        renderer = question.renderer
        key = len(renderer.owner) if renderer.compares else (number,)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _answers(
    engine: Engine, questions: list[_Asked], count: int, batch_size: int
) -> list[list[Prediction]]:
    """The tasks' answers, in batches of rows of like length; a row's tasks stand together."""
    results = [[Prediction("", 0.0)] * count for _ in questions]
    compares = questions[0].renderer.compares
    first_ids = [question.first_id for question in questions]
    size = max(1, batch_size // len(questions))
    for chunk in engine.chunks(questions[0].examples, size):
        cells = [(index, number) for index in chunk for number in range(len(questions))]
        rows = [(questions[number].examples[index], number) for index, number in cells]
        batch = engine.prediction_batch(rows, first_ids)
        renderers = [questions[number].renderer for _, number in cells]
        if compares:
            predictions = _compare(engine, renderers, batch)
        else:
            predictions = _decode(engine, [r.task.answer_tokens for r in renderers], batch)
        for (index, number), prediction in zip(cells, predictions, strict=True):
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


def _decode(
    engine: Engine,
    limits: list[int | None],
    batch: Batch,
    watch: Callable[[Tensor], Tensor] | None = None,
) -> list[Prediction]:
    """The most likely text of each row: at the masks, or token by token."""
    if engine.base.kind is ModelKind.MASKED:
        empty = batch.answers.new_zeros(len(batch.input_ids), limits[0] or 1)
        best = engine.logits(replace(batch, answers=empty)).float().log_softmax(-1).max(-1)
        return _texts(engine.base.tokenizer, best.indices, best.values)
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits):
        raise InputError(
            "how long may a free answer be? Give answer_tokens (--answer-tokens N), or candidates"
        )
    ids, scores = engine.continue_greedily(batch, max(known), watch)
    behind = torch.arange(ids.shape[1]) >= torch.tensor(known)[:, None]
    scores = scores.masked_fill(behind.to(scores.device), 0.0)
    cut = [row[:limit] for row, limit in zip(ids.tolist(), known, strict=True)]
    return _texts(engine.base.tokenizer, cut, scores)


def _texts(tokenizer: Any, ids: Tensor | list[list[int]], scores: Tensor) -> list[Prediction]:
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    probabilities = scores.sum(1).exp().tolist()
    return [
        Prediction(text.strip(), probability)
        for text, probability in zip(texts, probabilities, strict=True)
    ]
