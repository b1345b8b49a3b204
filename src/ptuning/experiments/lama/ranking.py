"""How high the right answer stands among all answers of one token: P@1, P@10, MRR."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ...backbone.base_model import BaseModel
from ...backbone.kinds import ModelKind
from ...data import Row
from ...errors import DataError
from ...forward.engine import Engine
from ...forward.scoring import batches_together
from ...forward.together import first_rows, mean_log_probabilities
from ...inference.attachment import all_placed
from ...inference.prediction import members_of
from ...prompts.task import Task
from ...rendering.collate import Batch
from ...rendering.render import Rendered, render_all


@torch.no_grad()
def ranks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    rows: Sequence[Row],
    candidates: Sequence[int] | None = None,
) -> list[list[int]]:
    """For each task the rank of each row's answer, 1 for the best; of equal ones the worst.

    All tasks' rows share batches, which are as large as keeps the device busy; the members of an
    ensemble answer together, in batches of their own.

    Args:
        model: the base model.
        tokenizer: the model's.
        tasks: prompts, ensembles too, or manual templates whose answers are single tokens
            (``answer_end=False``).
        rows: with the answer column.
        candidates: ids that compete; by default the whole vocabulary.

    Raises:
        DataError: an answer has several tokens, or is no candidate.
    """
    engine = Engine(BaseModel.of(model, tokenizer), 0)
    competing = None if candidates is None else sorted(set(candidates))
    members = [members_of(task) for task in tasks]
    examples = [[_rendered(engine, one, rows, competing) for one in of_one] for of_one in members]
    result: list[list[int]] = [[] for _ in tasks]
    with all_placed(model, tokenizer, chain.from_iterable(members)) as placed:
        ids = iter(placed)
        first_ids = [[next(ids) for _ in of_one] for of_one in members]
        alone = [number for number, of_one in enumerate(members) if len(of_one) == 1]
        if alone:
            first = (
                [examples[number][0] for number in alone],
                [first_ids[number][0] for number in alone],
            )
            for number, found in zip(alone, _of_single(engine, *first, competing), strict=True):
                result[number] = found
        for number in set(range(len(tasks))) - set(alone):
            result[number] = _of_members(engine, examples[number], first_ids[number], competing)
    return result


def _rendered(
    engine: Engine, task: Task, rows: Sequence[Row], competing: list[int] | None
) -> list[Rendered]:
    examples = render_all(engine.renderer(task), rows, "test")
    for number, answer in enumerate((example.sequences[0].answer for example in examples), 1):
        if len(answer) != 1 or not (competing is None or answer[0] in competing):
            raise DataError(f"the answer of row {number} has several tokens or is no candidate")
    return examples


def _of_single(
    engine: Engine,
    examples: Sequence[list[Rendered]],
    first_ids: Sequence[int],
    competing: list[int] | None,
) -> list[list[int]]:
    """Ranks of tasks that answer alone: all their rows share batches."""
    places = {id(one): (n, i) for n, of_one in enumerate(examples) for i, one in enumerate(of_one)}
    parts = engine.parts([(e, n) for n, of_one in enumerate(examples) for e in of_one])
    batches = (engine.batch(part, first_ids) for part in parts)
    result = [[0] * len(of_one) for of_one in examples]
    found = []
    for some in engine.some_at_once(batches):
        with engine.sharing(some):
            found += [_ranks(*_at_answer(engine, batch), competing) for batch in some]
    order = [places[id(example)] for part in parts for example, _ in part]
    for (number, row), rank in zip(order, torch.cat(found).tolist(), strict=True):
        result[number][row] = rank
    return result


def _of_members(
    engine: Engine,
    examples: Sequence[list[Rendered]],
    first_ids: Sequence[int],
    competing: list[int] | None,
) -> list[int]:
    """Ranks in what an ensemble's members say together (`forward.together`)."""
    result = [0] * len(examples[0])
    for batch, sizes, chunk in batches_together(engine, examples, first_ids, None):
        logits, answers = _at_answer(engine, batch)
        means = mean_log_probabilities(logits, sizes)
        found = _ranks(means, answers[first_rows(sizes)], competing)
        for row, rank in zip(chunk, found.tolist(), strict=True):
            result[row] = rank
    return result


def _at_answer(engine: Engine, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``(R, vocabulary)`` and the right ids ``(R,)`` where the answer's one token stands."""
    column = -1 if engine.base.kind is ModelKind.CAUSAL else 0
    logits = engine.logits(batch)[:, column]
    return logits, batch.answers[:, column].to(logits.device)


def _ranks(logits: Tensor, answers: Tensor, competing: list[int] | None) -> Tensor:
    right = logits.gather(1, answers[:, None])
    if competing is not None:
        logits = logits[:, competing]
    return (~(logits < right)).sum(1)  # what is not a number ranks last


def metrics(found: Sequence[int]) -> dict[str, float]:
    """P@1, P@10 and the mean reciprocal rank, as fractions."""
    count = len(found)
    return {
        "p1": sum(rank <= 1 for rank in found) / count,
        "p10": sum(rank <= 10 for rank in found) / count,
        "mrr": sum(1 / rank for rank in found) / count,
    }
