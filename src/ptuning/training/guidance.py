"""What a user should know of a training: that nothing chooses, or that nothing was learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_FELL = 0.95
"""A loss that is still this share of the first epoch's has hardly fallen."""
_UNSURE = 0.5
"""A loss of training (nats for each label, or token of a free answer) at which much is left to
learn: where more epochs gained it ended at 0.94, where they did not at 0.25 (benchmarks/README.md,
"Labels without names")."""
_SHORT = 5
"""Whoever asks for fewer epochs than this knows that they are few."""


def without_dev(members: int, patience: int | None) -> str:
    """What it means that there are no dev examples.

    Args:
        members: of the population.
        patience: as in `TrainSettings`.
    """
    if members > 1:
        what = f"{members} prompts compete, and their last training losses decide"
    elif patience:
        what = f"patience {patience} has nothing to measure, and the last epoch is kept"
    else:
        what = "the last epoch is kept, whether or not it is the best"
    return f"no dev examples: {what}; give some, or a share of these (dev=, --dev, --dev-share)"


def nothing_learnt(
    history: Sequence[dict[str, float]],
    best: dict[str, float],
    dev_answers: Sequence[str],
    majority: str,
    right: str = "right",
    complete: bool = True,
) -> str | None:
    """Why the trained prompt looks useless, or None where it does not.

    Args:
        history: one record per epoch.
        best: the record that was kept.
        dev_answers: right answers of the dev examples, if there are any.
        majority: the most frequent answer of the training.
        right: what counts as such, where a teacher says it.
        complete: False where the time was over first.
    """
    advice = (
        "try another learning rate (3 times as high, a third), more epochs, words in the template, "
        "or several seeds (population)"
        if complete
        else "the time was over: go on with more of it (max_minutes, resume)"
    )
    if dev_answers and "dev_accuracy" in best:
        always = sum(answer == majority for answer in dev_answers) / len(dev_answers)
        if best["dev_accuracy"] == always == 1:
            return (
                f"dev cannot tell what was learnt: 100.0 % of it is {right}, and all its answers "
                f"are {majority!r}; give dev examples with other answers, too"
            )
        if best["dev_accuracy"] <= always:
            return (
                f"nothing was learnt: {100 * best['dev_accuracy']:.1f} % of dev is {right}, and "
                f"always answering {majority!r} gives {100 * always:.1f} %; {advice}"
            )
    elif len(history) > 1 and best["loss"] > _FELL * history[0]["loss"]:
        return (
            f"hardly anything was learnt: the loss went from {history[0]['loss']:.4f} to "
            f"{best['loss']:.4f}; {advice}"
        )
    return None


def still_learning(history: Sequence[dict[str, float]], best: float, epochs: int) -> str | None:
    """That more epochs may give more, or None: the last one was the best on dev, and the training
    examples are not known by heart yet.

    Args:
        history: one record per epoch.
        best: the epoch that was kept.
        epochs: those of the whole training.
    """
    if best != epochs or epochs < _SHORT or len(history) < epochs:
        return None
    if history[-1]["loss"] < _UNSURE:
        return None
    return (
        f"dev was best in the last of {epochs} epochs, and the training's loss is still "
        f"{history[-1]['loss']:.2f}: more of them ({3 * epochs}) may give more"
    )


def members_go(had: int, wanted: int) -> str | None:
    """That of an ensemble only the first member is trained on, or None."""
    if had == 1:
        return None
    return (
        f"this prompt is an ensemble of {had} members; training goes on from the first one, and "
        f"afterwards {'there are no others' if wanted == 1 else 'the others are new'}"
    )


def too_few(kept: int, wanted: int) -> str | None:
    """That an ensemble is smaller than was asked for, or None."""
    if kept >= wanted:
        return None
    have = "has a result" if kept == 1 else "have results"
    return f"{kept} of {wanted} members {have}, and the ensemble has no more; try a lower rate"


def dev_far_above(training: Mapping[str, Any], accuracy: float, examples: int) -> str | None:
    """That dev promised more than a test shows, or None where chance may explain the difference,
    or a teacher's answers, which may be wrong, were all that dev told of.

    Args:
        training: a prompt's facts of its training.
        accuracy: on the test.
        examples: of the test.
    """
    dev, count = training.get("dev_accuracy"), training.get("dev_examples")
    if "teacher" in training:
        return None
    if not (isinstance(dev, float) and isinstance(count, int) and count > 0 and examples > 0):
        return None
    if not 0 <= dev <= 1:  # a file that was edited
        return None
    mean = (dev * count + accuracy * examples) / (count + examples)
    chance = 2 * math.sqrt(mean * (1 - mean) * (1 / count + 1 / examples))
    if dev - accuracy <= max(0.05, chance):
        return None
    return (
        f"{100 * accuracy:.1f} % is far below the {100 * dev:.1f} % on the {count} dev examples, "
        "which chose the epoch and so flatter; these examples may be of another kind, dev examples "
        "may stand among the training ones, or be too few"
    )
