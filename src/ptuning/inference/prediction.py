"""Answers of a model with a prompt: labels by comparison, free answers by greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import nn

from ..backbone.base_model import BaseModel, device_of
from ..data import Row, Rows, as_rows
from ..data.values import text_of
from ..devices import on_cpu_by_default
from ..errors import InputError
from ..forward.engine import Engine
from ..prompts.consistency import check_kind
from ..prompts.prompt import Prompt
from ..prompts.task import Task, at_least_one
from ..rendering.render import Rendered, Renderer, tell_shortened
from .answering import Later, Prediction, Question, Reading, in_one_batch, one_ahead
from .attachment import all_placed

_KEPT = 64 * 2**20
"""What one prompt's prediction keeps of the parts that its rows share."""
_AHEAD = 2048
"""Rows that a GPU computes while the next ones are rendered."""
_WORDS_AT_ONCE = 2**16
"""Words that the rows of a block compare in all: each may be a sequence of its own."""


def predict(
    model: nn.Module,
    tokenizer: Any,
    prompt: Task | Sequence[Task],
    rows: Rows,
    *,
    candidates: Sequence[str] | None = None,
    answer_tokens: int | None = None,
    batch_size: int | None = None,
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
        batch_size: rows per forward; by default 32, and on a GPU more of short ones.

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


@on_cpu_by_default
def predict_details(
    model: nn.Module,
    tokenizer: Any,
    prompt: Task | Sequence[Task],
    rows: Rows,
    *,
    candidates: Sequence[str] | None = None,
    answer_tokens: int | None = None,
    batch_size: int | None = None,
) -> list[Any]:
    """Like `predict`, with probabilities: a `Prediction` for each row."""
    at_least_one("batch_size", batch_size)
    tasks = as_tasks(prompt)
    base = BaseModel.of(model, tokenizer)
    candidates = as_candidates(candidates)
    whole = as_rows(rows)
    at_once = rows_at_once(model, tasks, candidates, batch_size, len(whole))
    blocks = [whole[at : at + at_once] for at in range(0, max(1, len(whole)), at_once)]
    found = _predicted(base, tasks, blocks, candidates, answer_tokens, batch_size)
    results = [list(chain.from_iterable(of_task)) for of_task in zip(*found, strict=True)]
    return results[0] if isinstance(prompt, Task) else results


def rows_at_once(
    model: nn.Module,
    tasks: Sequence[Task],
    candidates: Sequence[str] | None,
    batch_size: int | None,
    on_cpu: int,
) -> int:
    """Rows of a block, which are rendered together; fewer where each compares many words.

    Args:
        model: on a GPU, which computes one block while the next is rendered, it says how many.
        tasks: that each row is asked.
        candidates: of `predict`; by default the tasks' label words are compared.
        batch_size: rows per forward.
        on_cpu: rows of a block elsewhere.
    """
    on_gpu = device_of(model).type != "cpu"
    rows = max(_AHEAD, 8 * (batch_size or 1)) if on_gpu else on_cpu
    own = (len(words) for task in tasks for words in task.labels.values())
    words = len(candidates) * len(tasks) if candidates else sum(own)
    return max(1, min(rows, _WORDS_AT_ONCE // max(1, words)))


def stream_predictions(
    model: nn.Module,
    tokenizer: Any,
    prompt: Task,
    blocks: Iterable[Sequence[Row]],
    *,
    candidates: Sequence[str] | None = None,
    answer_tokens: int | None = None,
    batch_size: int | None = None,
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
        batch_size: rows per forward; by default 32, and on a GPU more of short ones.
        first: number of the first row, for errors.

    Raises:
        InputError, DataError: prompt, model or rows do not fit together.
    """
    at_least_one("batch_size", batch_size)
    options = candidates, answer_tokens, batch_size
    base = BaseModel.of(model, tokenizer)
    for (predictions,) in _predicted(base, as_tasks(prompt), blocks, *options, first):
        yield predictions


@torch.no_grad()
def _predicted(
    base: BaseModel,
    tasks: Sequence[Task],
    blocks: Iterable[Sequence[Row]],
    candidates: Sequence[str] | None,
    answer_tokens: int | None,
    batch_size: int | None,
    first: int = 1,
) -> Iterator[list[list[Prediction]]]:
    """Block by block each task's predictions."""
    members = [members_of(task) for task in tasks]
    answers = as_candidates(candidates)
    changes = {} if answer_tokens is None else {"answer_tokens": answer_tokens}
    engine = Engine(base, None if sum(map(len, members)) > 1 else _KEPT, repeats=True)
    renderers = [
        engine.renderer(one.checked(**changes), answers).asking()
        for one in chain.from_iterable(members)
    ]
    starts = [0, *accumulate(map(len, members))]
    of_tasks = [slice(*ends) for ends in pairwise(starts)]

    def render(rows: Sequence[Row], number: int) -> list[list[Rendered]]:
        return [r.each(rows, "prediction", answered=False, first=number) for r in renderers]

    cut, count = [0] * len(renderers), 0
    with all_placed(base.model, base.tokenizer, [r.task for r in renderers]) as first_ids:
        for examples in _ahead(render, blocks, first, engine.base.device.type != "cpu"):
            readings = [
                [Reading(renderer, example, first_id) for example in of_one]
                for renderer, of_one, first_id in zip(renderers, examples, first_ids, strict=True)
            ]
            yield _of_block(engine, [readings[own] for own in of_tasks], batch_size)
            for number, of_one in enumerate(examples):
                cut[number] += sum(example.shortened for example in of_one)
            count += len(examples[0])
    for first_member in starts[:-1]:
        tell_shortened(renderers[first_member], cut[first_member], count, "prediction")


def _ahead(
    render: Callable[[Sequence[Row], int], list[list[Rendered]]],
    blocks: Iterable[Sequence[Row]],
    first: int,
    threaded: bool,
) -> Iterator[list[list[Rendered]]]:
    """Each block rendered; in a thread, while the device computes the one before."""

    def numbered() -> Iterator[tuple[Sequence[Row], int]]:
        number = first
        for rows in blocks:
            yield rows, number
            number += len(rows)

    if not threaded:
        for rows, number in numbered():
            yield render(rows, number)
        return
    with ThreadPoolExecutor(1, "rendering") as thread:
        for coming in one_ahead(thread.submit(render, *block) for block in numbered()):
            yield coming.result()


def as_tasks(prompt: Task | Sequence[Task]) -> list[Task]:
    """One prompt or several as a list, as their fields are now.

    Raises:
        InputError: no prompt, something else, or fields that contradict each other.
    """
    several = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    tasks: list[Any] = list(prompt) if several else [prompt]  # type: ignore[arg-type]
    if not tasks:
        raise InputError("there is no prompt to ask; give one, or a list of some")
    for task in tasks:
        check_kind(task, Task)
    return [task.checked() for task in tasks]


def as_candidates(candidates: Iterable[Any] | None) -> list[str] | None:
    """The answers that compete, as text.

    Raises:
        InputError: one text, or none; a candidate is no text.
    """
    if candidates is None:
        return None
    listed = isinstance(candidates, Iterable) and not isinstance(candidates, str | bytes | Mapping)
    found = list(candidates) if listed else None
    if not found:
        raise InputError(
            f"candidates is {candidates!r}; give a list of the answers that compete, or None"
        )
    return [text_of("candidates", candidate) for candidate in found]


def members_of(task: Task) -> list[Task]:
    """What answers together: an ensemble's members, else the task alone."""
    return [*task.members] if isinstance(task, Prompt) else [task]


def _of_block(
    engine: Engine, tasks: list[list[list[Reading]]], batch_size: int | None
) -> list[list[Prediction]]:
    """Each task's answers to a block of rows, in batches of rows of like length; a row's tasks,
    and their members, stand together.

    Args:
        engine: has the prompts attached.
        tasks: for each its members, and how each of these reads the rows.
        batch_size: rows per forward.
    """
    members = list(chain.from_iterable(tasks))
    results = [[Prediction("", 0.0)] * len(members[0]) for _ in tasks]
    if not members[0]:
        return results

    def batches() -> Iterator[tuple[list[tuple[int, int]], Later]]:
        for numbers in _sharing_batches([of_task[0][0].renderer for of_task in tasks]):
            examples = [reading.example for reading in tasks[numbers[0]][0]]
            of_row = sum(len(tasks[number]) for number in numbers)
            for chunk in engine.chunks(examples, batch_size, of_row):
                cells = [(index, number) for index in chunk for number in numbers]
                group = [Question.of(of_one[index] for of_one in tasks[n]) for index, n in cells]
                yield cells, in_one_batch(engine, group)

    with engine.one_document([[reading.example for reading in of_one] for of_one in members]):
        for cells, later in one_ahead(batches()):
            for (index, number), prediction in zip(cells, later(), strict=True):
                results[number][index] = prediction
    return results


def _sharing_batches(renderers: list[Renderer]) -> list[list[int]]:
    """The numbers of tasks whose rows may share batches: those that compare as many words."""
    groups: dict[Any, list[int]] = {}
    for number, renderer in enumerate(renderers):
        key = len(renderer.owner) if renderer.compares else (number,)
        groups.setdefault(key, []).append(number)
    return list(groups.values())
