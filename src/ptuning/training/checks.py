"""What can be refused of a training before there is a model: settings, columns, labels, members."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ..data.rows import listed
from ..errors import DataError, InputError, briefly, warn
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..rendering.example import Example, answer_column, check_rows, right_answer
from ..rendering.lesson import Lessons
from .accelerator import check_tracker
from .calibration import check_calibration
from .ensemble import check_ensemble
from .folds import check_folds
from .grid import choices
from .refit import check_refit
from .settings import TrainSettings
from .starts import check_start


def check_some(rows: Sequence[Example]) -> None:
    """Refuse to learn from nothing.

    Raises:
        DataError: there is no example.
    """
    if not rows:
        raise DataError("there is no training example; give at least one")


def check_helpers(lessons: Any, listener: Any, output: object, resume: bool) -> None:
    """Refuse what can neither be learnt from, be told, nor be gone on with.

    Raises:
        InputError: `lessons` that are no `Lessons`, a `listener` that cannot be called, or nowhere
            to resume from.
    """
    if not isinstance(lessons, Lessons | None):
        raise InputError(f"lessons is {briefly(lessons)}; expected Lessons, as `distill` makes")
    if listener is not None and not callable(listener):
        raise InputError(f"listener is {briefly(listener)}; expected a function of a Progress")
    if resume and output is None:
        raise InputError("resume goes on from checkpoints; give the run's folder as output")


def check_whole(task: Task, rows: Sequence[Example], *, answered: bool = True) -> None:
    """Look at examples before some are set aside, while their numbers are those of their file.

    Raises:
        DataError: names the first example at fault.
    """
    if task.template is not None:
        check_rows(task, rows, "training", answered=answered)


def check_run(
    prompt: Prompt,
    rows: Sequence[Example],
    dev: Sequence[Example],
    settings: TrainSettings,
    population: int,
    grid: Mapping[str, Sequence[Any]] | None,
    *,
    answered: bool = True,
) -> None:
    """Refuse what `train` would refuse of its arguments but for the model.

    Args:
        prompt: to train, and the other arguments as `train` takes them.
        rows: training examples.
        dev: examples that choose.
        settings: how to train.
        population: seeds.
        grid: values to train side by side.
        answered: the rows have answers; without, a teacher gives them.

    Raises:
        InputError, DataError: data, template, grid or settings that do not fit together, or a
            tracker that is not installed.
    """
    check_some(rows)
    check_tracker(settings.tracker)
    draft = copy.copy(prompt)
    if answered:
        draft.answer = answer_column(prompt, rows[0])
    else:
        _check_taught(settings)
    members = choices(draft, settings, population, grid)
    check_calibration(draft, settings.calibrate, bool(dev), settings.folds)
    for _, member, how in members:
        check_start(member, how.init)
    check_folds(settings, len(rows), bool(dev))
    if answered:
        check_refit(settings, bool(dev))
    check_ensemble(settings.ensemble, population if settings.folds else len(members))
    if settings.tune_model and len(members) > 1:
        raise InputError(
            f"tune_model trains the base model with one prompt, and the population has "
            f"{len(members)}; leave one of the two out"
        )
    if settings.tune_model and settings.word_noise:
        raise InputError("word_noise is for a frozen model; leave it or tune_model out")
    for member in {member.template: member for _, member, _ in members}.values():
        if member.template is not None:
            if member.parsed.slot is None and "[mask]" in member.template.lower():
                warn(
                    f"only [MASK] in capitals is the answer's place; here it is text: "
                    f"{member.template}"
                )
            if answered and draft.answer in member.parsed.fields:
                warn(
                    f"the template shows {{{draft.answer}}}, which is the answer: a prompt learns "
                    "to copy it, and knows nothing where it is not there; leave it out of the text"
                )
            check_rows(member, rows, "training", answered=answered)
            check_rows(member, dev, "dev", answered=answered)
    if answered and dev and draft.labels:
        _tell_untrained(draft, rows, dev)


def _tell_untrained(task: Task, rows: Sequence[Example], dev: Sequence[Example]) -> None:
    """Warn of labels that dev examples ask for and no training example shows."""
    shown, asked = ({right_answer(task, r, task.labels) for r in part} for part in (rows, dev))
    if missing := sorted(asked - shown):
        warn(
            f"no training example has the answer {listed(map(repr, missing))}, and dev examples "
            "have: nothing is learnt of it; move some of them to the training examples"
        )


def _check_taught(settings: TrainSettings) -> None:
    """Refuse what reads the examples' own answers where a teacher gives them.

    Raises:
        InputError: names it.
    """
    if settings.refit:
        raise InputError("refit is for examples with answers; with a teacher leave it out")
    if settings.folds:
        raise InputError(
            "folds are for few labels, and texts without labels are many; leave folds out"
        )
    if settings.calibrate != "none":
        raise InputError(
            "a distilled prompt learns the teacher's shares of the labels; leave calibrate out, or "
            "calibrate the teacher (calibrate_teacher)"
        )
