"""How high the right answer stands among all answers of one token: P@1, P@10, MRR."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...backbone.base_model import BaseModel
from ...backbone.modes import eval_mode
from ...backbone.traits import ModelKind
from ...data import Row
from ...errors import DataError
from ...forward.engine import Engine
from ...inference.attachment import placed
from ...prompts.task import Task
from ...rendering.render import render_all


@torch.no_grad()
def ranks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    rows: Sequence[Row],
    candidates: Sequence[int] | None = None,
) -> list[list[int]]:
    """For each task the rank of each row's answer, 1 for the best; of equal ones the worst.

    All tasks' rows share batches, which are as large as keeps the device busy.

    Args:
        model: the base model.
        tokenizer: the model's.
        tasks: prompts or manual templates whose answers are single tokens (``answer_end=False``).
        rows: with the answer column.
        candidates: ids that compete; by default the whole vocabulary.

    Raises:
        DataError: an answer has several tokens, or is no candidate.
    """
    engine = Engine(BaseModel.of(model, tokenizer), 0)
    examples = [render_all(engine.renderer(task), rows, "test") for task in tasks]
    competing = None if candidates is None else sorted(set(candidates))
    for number, of_row in enumerate(zip(*examples, strict=True), 1):
        for answer in (example.sequences[0].answer for example in of_row):
            if len(answer) != 1 or not (competing is None or answer[0] in competing):
                raise DataError(f"the answer of row {number} has several tokens or is no candidate")
    column = -1 if engine.base.kind is ModelKind.CAUSAL else 0
    places = {id(one): (n, i) for n, of_one in enumerate(examples) for i, one in enumerate(of_one)}
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        first_ids = [stack.enter_context(placed(model, tokenizer, task)) for task in tasks]
        found, order = [], []
        parts = engine.parts([(e, n) for n, of_one in enumerate(examples) for e in of_one])
        batches = [engine.batch(part, first_ids) for part in parts]
        with engine.sharing(batches):
            for part, batch in zip(parts, batches, strict=True):
                logits = engine.logits(batch)[:, column]
                found.append(_ranks(logits, batch.answers[:, column], competing))
                order += [places[id(example)] for example, _ in part]
    result = [[0] * len(rows) for _ in tasks]
    for (number, row), rank in zip(order, torch.cat(found).tolist(), strict=True):
        result[number][row] = rank
    return result


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
