"""Several splits instead of one dev set, for few examples.

    fold k of K      its part of the rows is held out, and chooses; the others train
    setting, epoch   those with the best mean over all folds and seeds
    at last          this setting, so many epochs, on all rows

Multi-splits: Zheng et al. 2022 (FewNLU, arXiv 2109.12742), section 4. Every fold is a training like
any other, with checkpoints of its own; when a run is resumed, the folds that are done are read.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..backbone.base_model import BaseModel
from ..data.setting_aside import alike
from ..errors import InputError, TrainingError
from ..rendering.example import Example
from . import checkpoint
from .grid import Named
from .loop import Loop
from .members import with_examples
from .progress import Progress, telling_once
from .settings import TrainSettings


@dataclass(frozen=True)
class FoldResult:
    """What the folds say of the settings.

    Attributes:
        epochs: how long the best setting trains.
        best: its mean figures, ``dev_accuracy`` and ``dev_loss``.
        table: for each setting its ``name`` (grid values), best ``epoch``, ``dev_accuracy``,
            ``dev_loss`` (means), and ``deviation`` of the accuracies; the best first.
        chosen: the members of the best setting, one for each seed.
    """

    epochs: int
    best: dict[str, float]
    table: list[dict[str, Any]]
    chosen: list[Named]


def check_folds(settings: TrainSettings, rows: int, has_dev: bool) -> None:
    """Refuse folds that cannot be made.

    Raises:
        InputError: too few rows, a dev set besides, or what needs one.
    """
    if not settings.folds:
        return
    if has_dev:
        raise InputError(
            "folds take the place of a dev set; leave it out, or put its rows to the training's"
        )
    if rows < settings.folds:
        raise InputError(f"{settings.folds} folds need as many rows, and there are {rows}")
    if settings.max_minutes is not None:
        raise InputError(
            "max_minutes would stop a fold half done, and folds are compared whole; leave one of "
            "the two out, or take fewer epochs"
        )
    if settings.tune_model:
        raise InputError("tune_model changes the model, and each fold needs it as it was")


def splits(
    rows: Sequence[Example], read: Iterable[str], answers: Sequence[str], count: int, seed: int
) -> list[tuple[list[Example], list[Example]]]:
    """For each fold its training rows and those held out; each answer is dealt to all folds, and
    rows that say the same to one, where enough differ.

    Args:
        rows: column -> value.
        read: the columns of what is asked.
        answers: the right ones.
        count: of folds.
        seed: of the dealing.
    """
    dealt = alike(rows, read, answers)
    if len(dealt) < count:
        dealt = [[number] for copies in dealt for number in copies]
    random.Random(seed).shuffle(dealt)
    dealt.sort(key=lambda copies: answers[copies[0]])
    fold_of = {number: place % count for place, copies in enumerate(dealt) for number in copies}
    return [
        (
            [row for number, row in enumerate(rows) if fold_of[number] != fold],
            [row for number, row in enumerate(rows) if fold_of[number] == fold],
        )
        for fold in range(count)
    ]


def choose(
    base: BaseModel,
    chosen: Sequence[Named],
    parts: Sequence[tuple[Sequence[Example], Sequence[Example]]],
    output: Path | None,
    resume: bool,
    listener: Callable[[Progress], None],
) -> FoldResult:
    """Train every member on every fold, and choose.

    Args:
        base: the frozen model.
        chosen: the members.
        parts: of `splits`.
        output: of the run; each fold has its checkpoints in it.
        resume: go on from them.
        listener: of the training.

    Raises:
        TrainingError: no setting trains well in all folds.
    """
    members = [
        (name, prompt, replace(how, patience=0, halving=False)) for name, prompt, how in chosen
    ]
    histories: list[list[list[dict[str, float]]]] = [[] for _ in members]
    for number, (train, held_out) in enumerate(parts, 1):
        variants = with_examples(base, members, train, held_out)
        folder = output and output / checkpoint.FOLDER / f"{checkpoint.FOLD}{number}"
        heard = telling_once(listener, f"fold {number} of {len(parts)}")
        loop = Loop(base, variants, folder, heard)
        for of_member, learner in zip(histories, loop.train(resume), strict=True):
            of_member.append(learner.history)
            rank = learner.rank
    settings: dict[str, list[int]] = {}
    for number, (name, _, _) in enumerate(members):
        settings.setdefault(str(_without_seed(name)), []).append(number)
    found = []
    for numbers in settings.values():
        of_setting = [history for number in numbers for history in histories[number]]
        epochs = min(map(len, of_setting))
        means = [_mean([history[e] for history in of_setting], e + 1) for e in range(epochs)]
        if finite := [figures for figures in means if math.isfinite(figures["dev_loss"])]:
            found.append((max(finite, key=rank), numbers))
    if not found:
        raise TrainingError("no setting has a finite result in every fold; use a lower rate")
    found.sort(key=lambda pair: rank(pair[0]), reverse=True)
    best, numbers = found[0]
    table = [{"name": _without_seed(members[of[0]][0]), **figures} for figures, of in found]
    figures = {name: best[name] for name in ("dev_accuracy", "dev_loss")}
    return FoldResult(int(best["epoch"]), figures, table, [chosen[number] for number in numbers])


def _without_seed(name: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in name.items() if key != "seed"}


def _mean(records: Sequence[dict[str, float]], epoch: int) -> dict[str, float]:
    accuracies = [record["dev_accuracy"] for record in records]
    return {
        "epoch": epoch,
        "dev_accuracy": mean(accuracies),
        "dev_loss": mean(record["dev_loss"] for record in records),
        "deviation": stdev(accuracies) if len(accuracies) > 1 else 0.0,
    }
