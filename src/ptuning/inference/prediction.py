"""Answers of a model with a prompt: labels by comparison, free answers by greedy decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.base_model import BaseModel
from ..backbone.modes import eval_mode
from ..backbone.traits import ModelKind
from ..data import Row, Rows, as_rows
from ..errors import InputError, PtuningError
from ..forward.engine import Engine
from ..forward.plain import by_label
from ..forward.together import biased, mean_log_probabilities
from ..prompts.prompt import Prompt
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
    members = [members_of(task) for task in tasks]
    several = sum(map(len, members)) > 1
    engine = Engine(BaseModel.of(model, tokenizer), None if several else _KEPT)

    def reader(task: Task) -> _Asked:
        settled = task if answer_tokens is None else replace(task, answer_tokens=answer_tokens)
        renderer = engine.renderer(settled, list(candidates) if candidates else None)
        renderer.compares = bool(renderer.labels)
        return _Asked(renderer)

    asked = [[reader(task) for task in of_task] for of_task in members]
    number = first
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for one in chain.from_iterable(asked):
            one.first_id = stack.enter_context(placed(model, tokenizer, one.renderer.task))
        for rows in blocks:
            for one in chain.from_iterable(asked):
                one.render(rows, number)
            yield _of_block(engine, asked, len(rows), batch_size)
            number += len(rows)
    for one, *_ in asked:
        tell_shortened(one.renderer, one.shortened, number - first, "prediction")


def members_of(task: Task) -> list[Task]:
    """What answers together: an ensemble's members, else the task alone."""
    return [*task.members] if isinstance(task, Prompt) else [task]


@dataclass
class _Asked:
    """One member on a block of rows, and the id of its first virtual token."""

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
class Reading:
    """One row as one prompt has it.

    Attributes:
        renderer: the prompt's, on the engine's model.
        example: rendered by it, without an answer.
        first_id: of the prompt's first virtual token; 0 for a manual task.
    """

    renderer: Renderer
    example: Rendered
    first_id: int = 0


@dataclass(frozen=True)
class Question(Reading):
    """One row for one task: how a prompt reads it, or the first member of an ensemble.

    Attributes:
        limit: longest free answer in tokens; by default the task's.
        watch: is shown each token of a free answer as it comes, and says whether it is enough.
        others: how the further members of an ensemble read the row.
    """

    limit: int | None = None
    watch: Callable[[int], bool] | None = None
    others: tuple[Reading, ...] = ()

    @property
    def most(self) -> int | None:
        """The longest free answer in tokens."""
        return self.limit or self.renderer.task.answer_tokens

    @property
    def readings(self) -> list[Reading]:
        """Of all who answer together."""
        return [self, *self.others]


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
        size = batch_size // max(len(questions[n].readings) for n in numbers)
        for chunk in engine.chunks([questions[n].example for n in numbers], max(1, size)):
            predictions = _in_one_batch(engine, [questions[numbers[i]] for i in chunk])
            yield from zip([numbers[i] for i in chunk], predictions, strict=True)


def _in_one_batch(engine: Engine, questions: list[Question]) -> list[Prediction]:
    """The answers to questions that compare as many words each, or none."""
    readings = [reading for question in questions for reading in question.readings]
    rows = [(reading.example, row) for row, reading in enumerate(readings)]
    batch = engine.prediction_batch(rows, [reading.first_id for reading in readings])
    compares = questions[0].renderer.compares
    predictions = (_compare if compares else _decode)(engine, questions, batch)
    if any(math.isnan(prediction.probability) for prediction in predictions):
        dtype = str(engine.base.model.dtype).removeprefix("torch.")
        raise PtuningError(
            f"the model ({dtype}) answers with numbers that are not finite (NaN): its weights are "
            "damaged, or what it computes is too large for its precision; load it in another one "
            "(--dtype float32 or bfloat16)"
        )
    return predictions


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


def _of_block(
    engine: Engine, asked: list[list[_Asked]], count: int, batch_size: int
) -> list[list[Prediction]]:
    """Each task's answers to a block of rows, in batches of rows of like length; a row's tasks,
    and their members, stand together."""
    results = [[Prediction("", 0.0)] * count for _ in asked]
    with engine.one_document([reader.examples for reader in chain.from_iterable(asked)]):
        for numbers in _sharing_batches([readers[0].renderer for readers in asked]):
            size = max(1, batch_size // sum(len(asked[number]) for number in numbers))
            for chunk in engine.chunks(asked[numbers[0]][0].examples, size):
                cells = [(index, number) for index in chunk for number in numbers]
                group = [_question(asked[number], index) for index, number in cells]
                predictions = _in_one_batch(engine, group)
                for (index, number), prediction in zip(cells, predictions, strict=True):
                    results[number][index] = prediction
    return results


def _question(readers: list[_Asked], index: int) -> Question:
    """A row as all members of a task read it."""
    first, *others = (Reading(r.renderer, r.examples[index], r.first_id) for r in readers)
    return Question(**vars(first), others=tuple(others))


def _sharing_batches(renderers: list[Renderer]) -> list[list[int]]:
    """The numbers of tasks whose rows may share batches: those that compare as many words."""
    groups: dict[Any, list[int]] = {}
    for number, renderer in enumerate(renderers):
        key = len(renderer.owner) if renderer.compares else (number,)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _compare(engine: Engine, questions: list[Question], batch: Batch) -> list[Prediction]:
    """The most likely label of each question."""
    scores = engine.word_scores(batch, len(questions[0].renderer.owner)).cpu()
    sizes, predictions = [len(question.readings) for question in questions], []
    for rows, question in zip(scores.split(sizes), questions, strict=True):
        renderer = question.renderer
        of_members = by_label(rows, torch.tensor(renderer.owner))
        means = mean_log_probabilities(of_members, [len(rows)])[0]
        shares = biased(means, renderer.bias).exp().tolist()
        labels = list(renderer.labels)
        best = max(range(len(shares)), key=shares.__getitem__)
        probabilities = dict(zip(labels, shares, strict=True))
        predictions.append(Prediction(labels[best], shares[best], probabilities))
    return predictions


def _decode(engine: Engine, questions: list[Question], batch: Batch) -> list[Prediction]:
    """The most likely text of each question: at the masks, or token by token."""
    limits, sizes = [q.most for q in questions], [len(q.readings) for q in questions]
    if engine.base.kind is ModelKind.MASKED:
        empty = batch.answers.new_zeros(len(batch.input_ids), limits[0] or 1)
        best = mean_log_probabilities(engine.logits(replace(batch, answers=empty)), sizes).max(-1)
        return _texts(engine.base.tokenizer, best.indices, best.values)
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits):
        raise InputError(
            "how long may a free answer be? Give answer_tokens (--answer-tokens N), or candidates"
        )
    ids, scores = engine.continue_greedily(batch, max(known), _watching(questions), sizes)
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
