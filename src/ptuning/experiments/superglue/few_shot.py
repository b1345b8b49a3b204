"""SuperGLUE: majority, the best manual template, and a P-tuned prompt for each seed.

What is chosen (template, verbalizer, encoder, epoch, bias) is chosen on dev; the figures are from
test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log, prod
from pathlib import Path
from sys import float_info
from typing import Any

import torch
from torch import nn

from ...backbone.base_model import BaseModel
from ...backbone.kinds import ModelKind, kind_of
from ...data import Row
from ...inference.evaluation import log_shares, teacher_forced
from ...inference.prediction import predict, predict_details
from ...prompts.prompt import Prompt
from ...prompts.task import Task, majority_answer
from ...rendering.example import columns_in_words
from ...training.calibration import calibrate, fitted_bias
from ...training.ensemble import drop_far
from ...training.progress import Progress
from ...training.train import train
from .examples import Splits
from .metrics import METRICS, same_noun
from .options import SuperGlueOptions
from .tasks import SuperGlueTask

Figures = dict[str, float]


def baselines(
    model: nn.Module, tokenizer: Any, task: SuperGlueTask, splits: Splits
) -> dict[str, Any]:
    """The majority answer, and the manual templates, the best on dev first.

    Returns:
        plain values; ``templates`` has each prompt's template, its words alone (``manual``),
        verbalizer and their dev figures; ``bias`` is what dev teaches the best of them to add to
        its labels, or None.
    """
    prompts = task.prompts()
    by_hand = [prompt.manual() for prompt in prompts]
    on_dev = _with_losses(model, tokenizer, task, by_hand, splits.dev)
    quality = [(score(figures), -loss) for figures, loss in on_dev]
    numbers = sorted(range(len(prompts)), key=quality.__getitem__, reverse=True)
    several = len({row["label"] for row in splits.train}) > 1  # WSC's are all true
    known = splits.train if several else splits.dev
    best = by_hand[numbers[0]]
    return {
        "majority_answer": majority_answer(row["label"] for row in known),
        "bias": None if task.generates else _learned_bias(model, tokenizer, best, splits.dev),
        "templates": [
            {
                "template": prompts[number].template,
                "manual": by_hand[number].template,
                "verbalizer": by_hand[number].settings()["verbalizer"],
                "dev": on_dev[number][0],
            }
            for number in numbers
        ],
        "train_examples": len(splits.train),
        "dev_examples": len(splits.dev),
    }


def _learned_bias(
    model: nn.Module, tokenizer: Any, asked: Task, dev: list[Row]
) -> dict[str, float] | None:
    """None where each row has label words of its own: then there is nothing to be biased to."""
    if columns_in_words(asked):
        return None
    labels = list(asked.labels)
    right = torch.tensor([labels.index(row["label"]) for row in dev])
    bias = fitted_bias(log_shares(model, tokenizer, asked, dev), right)
    return dict(zip(labels, bias.tolist(), strict=True))


def best_by_hand(
    task: SuperGlueTask, found: dict[str, Any], bias: dict[str, float] | None = None
) -> Task:
    """The manual template that is best on dev; `found` are the task's `baselines`."""
    first = found["templates"][0]
    return Task(
        first["manual"],
        answer=task.answer,
        verbalizer=first["verbalizer"],
        max_length=task.max_length,
        label_bias=bias,
    )


def majority(task: SuperGlueTask, found: dict[str, Any], rows: list[Row]) -> Figures:
    """The metrics of always the answer that is most frequent in training."""
    return _figures(task, rows, [found["majority_answer"]] * len(rows))


def tuned(
    model: nn.Module,
    tokenizer: Any,
    task: SuperGlueTask,
    splits: Splits,
    found: dict[str, Any],
    options: SuperGlueOptions,
    listener: Callable[[Progress], None] | None = None,
    running: Path | None = None,
) -> tuple[dict[str, Any], Prompt]:
    """A prompt for one seed, and its figures on dev; `found` are the task's `baselines`.

    The training goes on from its newest checkpoint in the folder `running`, if there is one.
    """
    started = time.monotonic()
    first = found["templates"][0]
    alike = [t["template"] for t in found["templates"] if t["verbalizer"] == first["verbalizer"]]
    templates = options.templates or alike[: options.best_templates]
    prompt = Prompt(
        templates[0],
        answer=task.answer,
        verbalizer=first["verbalizer"],
        encoder=options.grid["encoder"][0],
        max_length=task.max_length,
    )
    members = len(templates) * options.population * prod(map(len, options.grid.values()))
    together = options.together and not task.generates
    settings = replace(options.settings, ensemble=members if together else 1)
    rows, dev = _answerable(task, splits.train), _answerable(task, splits.dev)
    result = train(
        model,
        tokenizer,
        prompt,
        rows,
        dev,
        settings=settings,
        population=options.population,
        grid={"template": list(templates), **options.grid},
        listener=listener,
        verbose=False,
        output=running,
        resume=running is not None,
    )
    if together:
        drop_far(prompt, result)
        if not columns_in_words(prompt):
            base = BaseModel.of(model, tokenizer)
            calibrate(base, prompt, "dev", rows, dev, settings.batch_size)
    (on_dev,) = measured(model, tokenizer, task, [prompt], splits.dev)
    figures = {
        "dev": on_dev,
        "together": [member.template for member in prompt.members],
        "label_bias": prompt.label_bias,
        "template": prompt.template,
        "encoder": prompt.encoder,
        "epoch": result.best["epoch"],
        "members": result.members,
        "seconds": round(time.monotonic() - started, 1),
    }
    return figures, prompt


def measured(
    model: nn.Module,
    tokenizer: Any,
    task: SuperGlueTask,
    asked: Sequence[Task],
    rows: list[Row],
) -> list[Figures]:
    """The task's metrics of prompts or manual templates on the same rows."""
    if not task.generates:
        said = predict(model, tokenizer, asked, rows, batch_size=8)
        return [_figures(task, rows, of_one) for of_one in said]
    nouns = [row["noun"] for row in rows]
    found = []
    for phrases in _named(model, tokenizer, asked, rows):
        same = [same_noun(phrase, noun) for phrase, noun in zip(phrases, nouns, strict=True)]
        found.append(_figures(task, rows, ["true" if right else "false" for right in same]))
    return found


def _with_losses(
    model: nn.Module,
    tokenizer: Any,
    task: SuperGlueTask,
    asked: Sequence[Task],
    rows: list[Row],
) -> list[tuple[Figures, float]]:
    """As `measured`, with the mean loss on the rows that have a right answer."""
    if task.generates:
        found = measured(model, tokenizer, task, asked, rows)
        answered = _answerable(task, rows)
        losses = [teacher_forced(model, tokenizer, one, answered)[1] for one in asked if answered]
        return list(zip(found, losses or [0.0] * len(found), strict=True))
    pairs = []
    for of_one in predict_details(model, tokenizer, asked, rows, batch_size=8):
        figures = _figures(task, rows, [prediction.answer for prediction in of_one])
        right = [p.probabilities[row["label"]] for p, row in zip(of_one, rows, strict=True)]
        pairs.append((figures, -sum(log(max(p, float_info.min)) for p in right) / len(right)))
    return pairs


def _named(
    model: nn.Module, tokenizer: Any, asked: Sequence[Task], rows: list[Row]
) -> list[list[str]]:
    """The nouns that each task names; a masked LM has a mask for each token of the candidate."""
    if kind_of(model) is not ModelKind.MASKED:
        asked = [replace(one, answer_tokens=max(one.answer_tokens or 0, 8)) for one in asked]
        return predict(model, tokenizer, asked, rows, batch_size=8)
    nouns = [" " + row["noun"] for row in rows]
    sizes = [len(ids) for ids in tokenizer(nouns, add_special_tokens=False)["input_ids"]]
    named = [[""] * len(rows) for _ in asked]
    for size in set(sizes):
        numbers = [number for number, other in enumerate(sizes) if other == size]
        alike = [rows[number] for number in numbers]
        said = predict(model, tokenizer, asked, alike, answer_tokens=size, batch_size=8)
        for of_one, phrases in zip(named, said, strict=True):
            for number, phrase in zip(numbers, phrases, strict=True):
                of_one[number] = phrase
    return named


def score(figures: Figures) -> float:
    """A task's one figure: the mean of its metrics, as SuperGLUE has it."""
    return sum(figures.values()) / len(figures)


def _figures(task: SuperGlueTask, rows: list[Row], said: list[str]) -> Figures:
    gold = [row["label"] for row in rows]
    return {name: METRICS[name](gold, said, rows) for name in task.metrics}


def _answerable(task: SuperGlueTask, rows: list[Row]) -> list[Row]:
    """The rows that have a right answer: of a generative task the true ones."""
    return [row for row in rows if row["label"] == "true"] if task.generates else rows
