"""What a training is, before its first step: the members, the examples that each reads, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..backbone.base_model import BaseModel
from ..backbone.eight_bits import frozen_format
from ..backbone.modes import check_free
from ..data import Row, Rows, optional_rows
from ..data.setting_aside import set_aside
from ..data.values import plain
from ..errors import InputError
from ..prompts.prompt import Prompt
from ..rendering.example import answer_column
from ..rendering.lesson import Lessons
from . import guidance
from .checks import check_run, check_some, check_whole
from .found_words import find_words
from .grid import Named, Variant, choices, columns_read
from .label_matrix import settled_matrix, too_many_words
from .members import answers_of, settled, with_examples
from .refit import settled_refit
from .settings import TrainSettings
from .word_noise import settled_noise


@dataclass(frozen=True)
class Plan:
    """What is trained, on what.

    Attributes:
        base: the model.
        settings: those of all members, with the epochs that so many examples take.
        rows: training examples.
        dev: those that choose.
        answers: of `rows`, or what a teacher says to them.
        dev_answers: of `dev`, likewise.
        chosen: of each member its name, its prompt and its settings.
        variants: the members with their rendered examples.
        goes_on: what dev has chosen is trained on with all examples.
        about: what is said of the teacher, where there is one.
        advice: what the user should know before it begins.
    """

    base: BaseModel
    settings: TrainSettings
    rows: Sequence[Row]
    dev: Sequence[Row]
    answers: Sequence[str]
    dev_answers: Sequence[str]
    chosen: list[Named]
    variants: list[Variant]
    goes_on: bool
    about: dict[str, Any] | None
    advice: list[str | None]


def planned(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    rows: Sequence[Row],
    dev: Rows | float | None,
    settings: TrainSettings,
    *,
    population: int,
    grid: Mapping[str, Sequence[Any]] | None,
    lessons: Lessons | None,
) -> Plan:
    """The plan of a training, of which all is checked; the prompt stays as it is.

    The arguments are those of `train`.

    Raises:
        InputError: data, template, model or settings that do not fit together.
    """
    draft = prompt.checked()  # a training that fails leaves the prompt as it was
    check_some(rows)
    dev, aside = plain(dev), False  # a share may be numpy's
    if isinstance(dev, int | float):
        check_whole(prompt, rows, answered=lessons is None)
        read = columns_read(choices(draft, settings, population, grid))
        rows, dev = set_aside(rows, read, answer_column(prompt, rows[0]), dev, settings.seed)
        aside = bool(dev)
    dev = optional_rows(dev)
    check_run(prompt, rows, dev, settings, population, grid, answered=lessons is None)
    settings = settings.for_examples(len(rows))
    base = BaseModel.of(model, tokenizer)
    _check_model(base, prompt, settings)
    advice = [guidance.members_go(len(prompt.members), settings.ensemble)]
    draft.others, draft.label_bias = (), None
    if lessons is None:
        draft.answer = answer_column(prompt, rows[0])
        find_words(base, draft, rows)
    draft.nameless = False
    chosen = choices(draft, settings, population, grid)
    prompts, count = settled(base, [one for _, one, _ in chosen]), len(rows) + len(dev)
    noise = settled_noise(settings, prompts, lessons is not None)
    matrix = settled_matrix(settings, prompts, lessons is not None)
    goes_on = lessons is None and settled_refit(settings, prompts, count, aside)
    same: dict[str, Any] = {"word_noise": noise, "label_matrix": matrix, "refit": goes_on}
    chosen = [
        (name, one, replace(how, **same))
        for (name, _, how), one in zip(chosen, prompts, strict=True)
    ]
    if lessons is None:
        advice.append(too_many_words(settings, prompts))
    if not dev and not settings.folds:
        advice.append(guidance.without_dev(len(chosen), settings.patience))
    learnt = (None, None) if lessons is None else (lessons.training, lessons.dev)
    return Plan(
        base=base,
        settings=settings,
        rows=rows,
        dev=dev,
        chosen=chosen,
        variants=with_examples(base, chosen, rows, dev, learnt),
        answers=answers_of(draft, rows, learnt[0]),
        dev_answers=answers_of(draft, dev, learnt[1]),
        goes_on=goes_on,
        about=None if lessons is None else lessons.about,
        advice=advice,
    )


def _check_model(base: BaseModel, prompt: Prompt, settings: TrainSettings) -> None:
    """Refuse a model that is not the prompt's, that is in use, or that cannot be trained along."""
    if prompt.base_model:
        base.check_same(prompt.base_model)
    check_free(base.model, settings.tune_model)
    quantized = getattr(base.model, "is_quantized", False) or frozen_format(base.model)
    if settings.tune_model and quantized:
        raise InputError("tune_model needs the base model's own weights; load it unquantized")
    if settings.tune_model and any(parameter.is_meta for parameter in base.model.parameters()):
        raise InputError(
            "tune_model needs the weights in memory; load the model without offloading"
        )
