"""SuperGLUE: majority, the best manual template, and a P-tuned prompt for each seed.

What is chosen (template, verbalizer, encoder, epoch) is chosen on dev; the figures are from test.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..data import Row
from ..evaluation import teacher_forced
from ..prediction import predict
from ..progress import Progress
from ..prompt import Prompt
from ..settings import TrainSettings
from ..task import Task
from ..training import train
from .superglue_data import Splits
from .superglue_metrics import METRICS, same_noun
from .superglue_tasks import SuperGlueTask, prompted

Figures = dict[str, float]


@dataclass(frozen=True)
class SuperGlueOptions:
    """What a population of prompts is made of.

    Args:
        templates: with virtual tokens in them; by default those of the best manual templates.
        best: of how many manual templates.
        encoders: prompt encoders.
        virtual_tokens: of each group.
        population: seeds of each template and encoder.
        settings: how to train.
    """

    templates: tuple[str, ...]
    best: int
    encoders: tuple[str, ...]
    virtual_tokens: int
    population: int
    settings: TrainSettings


def baselines(
    model: nn.Module, tokenizer: Any, task: SuperGlueTask, splits: Splits
) -> dict[str, Any]:
    """Majority and the manual templates, the best on dev first.

    Returns:
        plain values: ``majority`` and ``manual`` with a figure for each metric on test (None
        without test rows), ``templates`` with template, verbalizer and dev figures of each.
    """
    tried = []
    for by_hand in task.manual():
        on_dev = measured(model, tokenizer, task, by_hand, splits.dev)
        answered = _answerable(task, splits.dev)
        _, loss = teacher_forced(model, tokenizer, by_hand, answered) if answered else (0.0, 0.0)
        tried.append((score(on_dev), -loss, by_hand, on_dev))
    tried.sort(key=lambda entry: entry[:2], reverse=True)
    best = tried[0][2]
    known = [_gold(row) for row in splits.train]
    majority = Counter(known).most_common(1)[0][0]
    return {
        "majority": _figures(task, splits.test, [majority] * len(splits.test)),
        "majority_answer": majority,
        "manual": measured(model, tokenizer, task, best, splits.test),
        "templates": [
            {"template": t.template, "verbalizer": t.settings()["verbalizer"], "dev": figures}
            for _, _, t, figures in tried
        ],
        "train_examples": len(splits.train),
        "dev_examples": len(splits.dev),
        "test_examples": len(splits.test),
    }


def tuned(
    model: nn.Module,
    tokenizer: Any,
    task: SuperGlueTask,
    splits: Splits,
    found: dict[str, Any],
    options: SuperGlueOptions,
    listener: Callable[[Progress], None] | None = None,
) -> tuple[dict[str, Any], Prompt]:
    """A prompt for one seed; `found` are the task's `baselines`."""
    started = time.monotonic()
    first = found["templates"][0]
    alike = [t["template"] for t in found["templates"] if t["verbalizer"] == first["verbalizer"]]
    templates = options.templates or tuple(
        prompted(template, options.virtual_tokens) for template in alike[: options.best]
    )
    prompt = Prompt(
        templates[0],
        answer=task.answer,
        verbalizer=first["verbalizer"],
        encoder=options.encoders[0],
        max_length=task.max_length,
    )
    result = train(
        model,
        tokenizer,
        prompt,
        _answerable(task, splits.train),
        _answerable(task, splits.dev),
        settings=options.settings,
        population=options.population,
        grid={"template": list(templates), "encoder": list(options.encoders)},
        listener=listener,
    )
    figures = {
        "test": measured(model, tokenizer, task, prompt, splits.test),
        "dev": measured(model, tokenizer, task, prompt, splits.dev),
        "template": prompt.template,
        "encoder": prompt.encoder,
        "epoch": result.best["epoch"],
        "members": result.members,
        "seconds": round(time.monotonic() - started, 1),
    }
    return figures, prompt


def measured(
    model: nn.Module, tokenizer: Any, task: SuperGlueTask, asked: Task, rows: list[Row]
) -> Figures | None:
    """The task's metrics of a prompt or manual template on rows; None without rows."""
    if not rows:
        return None
    if not task.generates:
        return _figures(task, rows, predict(model, tokenizer, asked, rows, batch_size=8))
    longest = replace(asked, answer_tokens=max(asked.answer_tokens or 0, 8))
    said = predict(model, tokenizer, longest, rows, batch_size=8)
    same = [same_noun(phrase, row["noun"]) for phrase, row in zip(said, rows, strict=True)]
    return _figures(task, rows, ["true" if right else "false" for right in same])


def score(figures: Figures | None) -> float:
    """A task's one figure: the mean of its metrics, as SuperGLUE has it."""
    return sum(figures.values()) / len(figures) if figures else 0.0


def _figures(task: SuperGlueTask, rows: list[Row], said: list[str]) -> Figures | None:
    if not rows:
        return None
    gold = [_gold(row) for row in rows]
    return {name: METRICS[name](gold, said, rows) for name in task.metrics}


def _gold(row: Row) -> str:
    value = row["label"]
    return str(value).lower() if isinstance(value, bool) else str(value)


def _answerable(task: SuperGlueTask, rows: list[Row]) -> list[Row]:
    """The rows that have a right answer: of a generative task the true ones."""
    return [row for row in rows if _gold(row) == "true"] if task.generates else rows
