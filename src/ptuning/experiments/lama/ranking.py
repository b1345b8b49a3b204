"""How high the right answer stands among all answers of one token: P@1, P@10, MRR."""

from __future__ import annotations

from collections.abc import Sequence
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
    task: Task,
    rows: Sequence[Row],
    candidates: Sequence[int] | None = None,
    batch_size: int = 64,
) -> list[int]:
    """The rank of each row's answer, 1 for the best; of equal ones the worst.

    Args:
        model: the base model.
        tokenizer: the model's.
        task: a prompt or manual template whose answers are single tokens (``answer_end=False``).
        rows: with the answer column.
        candidates: ids that compete; by default the whole vocabulary.
        batch_size: rows per forward.

    Raises:
        DataError: an answer has several tokens, or is no candidate.
    """
    engine = Engine(BaseModel.of(model, tokenizer), 0)
    renderer = engine.renderer(task)
    examples = render_all(renderer, rows, "test")
    competing = None if candidates is None else torch.tensor(sorted(set(candidates)))
    for number, example in enumerate(examples, 1):
        answer = example.sequences[0].answer
        if len(answer) != 1 or not (competing is None or answer[0] in competing):
            raise DataError(f"the answer of row {number} has several tokens or is no candidate")
    result = [0] * len(examples)
    column = -1 if engine.base.kind is ModelKind.CAUSAL else 0
    with eval_mode(model), placed(model, tokenizer, task) as first_id:
        chunks = list(engine.chunks(examples, batch_size))
        batches = [engine.batch([(examples[i], 0) for i in c], [first_id]) for c in chunks]
        with engine.sharing(batches):
            for chunk, batch in zip(chunks, batches, strict=True):
                logits = engine.logits(batch)[:, column]
                ranked = _ranks(logits, batch.answers[:, column], competing)
                for index, rank in zip(chunk, ranked.tolist(), strict=True):
                    result[index] = rank
    return result


def _ranks(logits: Tensor, answers: Tensor, competing: Tensor | None) -> Tensor:
    right = logits.gather(1, answers[:, None])
    if competing is not None:
        logits = logits[:, competing.to(logits.device)]
    return (~(logits < right)).sum(1)  # what is not a number ranks last


def metrics(found: Sequence[int]) -> dict[str, float]:
    """P@1, P@10 and the mean reciprocal rank, as fractions."""
    count = len(found)
    return {
        "p1": sum(rank <= 1 for rank in found) / count,
        "p10": sum(rank <= 10 for rank in found) / count,
        "mrr": sum(1 / rank for rank in found) / count,
    }
