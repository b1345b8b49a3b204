"""On with all examples: what dev has chosen trains on, and the dev examples with it.

    dev examples choose      members and epochs; their figures are of these prompts
    at last                  the chosen ones go on from there, with training and dev examples, for
                             two fifths of the epochs at half the rate

It is what ``refit`` means in model selection, but goes on instead of beginning anew: as good in
less time, and from a prompt that is known to be good (benchmarks/README.md, "On with all
examples").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..backbone.base_model import BaseModel
from ..errors import InputError, TrainingError, warn
from ..prompts.label_matrix import LabelMatrix
from ..prompts.prompt import Prompt
from . import checkpoint
from .grid import Variant
from .learner import Learner
from .loop import Loop
from .members import learn_answer_length
from .progress import Progress, telling_once
from .settings import TrainSettings

_RATE = 0.5
"""Of the training's before."""
_FAILED = "training on with all examples failed, and what dev chose stays"
_MOST = 500
"""Examples in all up to which a refit is usual: of many more the dev examples are few."""


def settled_refit(
    settings: TrainSettings, prompts: Iterable[Prompt], count: int, aside: bool
) -> bool:
    """Whether a training is refitted, as it is asked for or as it is usual: for labels of few
    examples, some of which were set aside to choose, since that these are trained on at last
    surprises nobody.

    Args:
        settings: of the training.
        prompts: of all its members.
        count: examples in all.
        aside: dev examples are some of those that were given to train on.
    """
    if settings.refit is not None:
        return settings.refit
    if not aside or count > _MOST or settings.tune_model or settings.calibrate != "none":
        return False
    return all(bool(prompt.labels) for prompt in prompts)


def check_refit(settings: TrainSettings, has_dev: bool) -> None:
    """Refuse a refit that cannot be made.

    Raises:
        InputError: there are no dev examples, or something else depends on what they say.
    """
    if not settings.refit:
        return
    if settings.folds:
        raise InputError("folds train on all examples at last as they are; leave refit out")
    if not has_dev:
        raise InputError(
            "refit trains on the dev examples when they have chosen, and there are none; give some "
            "(dev=, --dev, --dev-share)"
        )
    if settings.calibrate != "none":
        raise InputError(
            "calibrate measures its bias beside dev examples, and refit trains on them; leave one "
            "of the two out"
        )
    if settings.tune_model:
        raise InputError("tune_model changes the model, and refit needs it as it was")


def refit(
    base: BaseModel,
    chosen: Sequence[tuple[Variant, Learner]],
    output: Path | None,
    resume: bool,
    listener: Callable[[Progress], None],
    minutes: float | None,
) -> tuple[dict[str, Any], bool]:
    """Let chosen members go on with all examples; their learners then have these weights as their
    best ones, beside the figures of dev.

    Args:
        base: the frozen model.
        chosen: the members, and how they were trained.
        output: of the run; the refit has its checkpoints in it.
        resume: go on from them.
        listener: of the training.
        minutes: that are left, or None.

    Returns:
        ``examples``, ``epochs`` and the last ``loss``, and whether it came to its end; where there
        was nothing to do, or it failed, no figures, and the learners are as they were.
    """
    # Where dev likes best what a member began as, it stays so.
    going = [(variant, learner) for variant, learner in chosen if learner.best["epoch"] > 0]
    if not going:
        return {}, True
    variants = [_going_on(variant, learner, minutes) for variant, learner in going]
    count, epochs = len(variants[0].examples), variants[0].settings.settled_epochs
    folder = output and place_of(output)
    heard = telling_once(listener, f"on with all {count} examples, dev's too")
    loop = Loop(base, variants, folder, heard, goes_on=True)
    try:
        again = _trained(loop, resume)
    except TrainingError as error:
        warn(f"{_FAILED}: {error}")
        return {}, True
    if loop.stopped:
        return {}, False
    if any(len(learner.history) < epochs for learner in again):
        warn(f"{_FAILED}: its numbers are not finite")
        return {}, True
    for (_, learner), new in zip(going, again, strict=True):
        names = {"weights", "vectors", "label_matrix"} & new.best.keys()
        learner.best |= {name: new.best[name] for name in names}
    for variant, _ in chosen:
        learn_answer_length(variant.prompt, variant.renderer, variant.dev)
    return {"examples": count, "epochs": epochs, "loss": again[0].history[-1]["loss"]}, True


def _trained(loop: Loop, resume: bool) -> list[Learner]:
    """The learners; where one of several processes has no memory left, it ends for all of them.

    Raises:
        TrainingError: the same in every process.
    """
    with distributed.together():
        try:
            return loop.train(resume)
        except torch.OutOfMemoryError as error:
            raise TrainingError(str(error)) from error


def place_of(output: Path) -> Path:
    """Where the checkpoints of a run's refit are."""
    return output / checkpoint.FOLDER / checkpoint.REFIT


def _going_on(variant: Variant, learner: Learner, minutes: float | None) -> Variant:
    """A member that begins as dev liked it best."""
    prompt, before = copy.copy(variant.prompt), variant.settings
    prompt.vectors, prompt.encoder_weights = learner.best["vectors"], learner.best["weights"]
    prompt.label_matrix = LabelMatrix.trained(learner.best.get("label_matrix"), prompt.labels)
    settings = replace(
        before,
        epochs=before.refit_epochs,
        learning_rate=_RATE * learner.rate,
        max_minutes=minutes,
        tracker=None,  # whose run has these steps already
    )
    examples = [*variant.examples, *variant.dev]
    return replace(variant, prompt=prompt, settings=settings, examples=examples, dev=[])
