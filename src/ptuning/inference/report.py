"""The figures of a report on one prompt: what was measured, and how sure one may be of it.

interval(right, n)  Wilson's: centre (p + z²/2n) / (1 + z²/n), ± z √(p(1-p)/n + z²/4n²) / (1 + z²/n)
calibration         rows by their probability in tenths: mean probability against share right
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import formats
from ..errors import PromptFileError
from ..prompts.prompt import Prompt
from ..rendering.example import Example, all_columns
from .evaluation import Evaluation
from .nearest_words import Neighbours

_Z = 1.959963984540054
"""Two-sided 95 %."""
_RESAMPLES, _MISTAKES, _BINS = 1000, 20, 10


@dataclass(frozen=True)
class Bin:
    """Rows of like probability: how many, their mean probability, the share that is right."""

    rows: int
    probability: float
    right: float


@dataclass(frozen=True)
class Report:
    """All that a report's page shows.

    Attributes:
        name: of the prompt.
        data: of the test rows.
        prompt: whose settings are told.
        result: what was measured.
        mistakes: the surest ones: row, right answer, answer, probability.
        bins: of the calibration.
        calibration_error: mean distance of probability and share right, by rows.
        f1_interval: of the macro F1, by bootstrap; None for free answers.
        words: nearest words of each virtual token, and the mean length of the vocabulary's vectors.
        history: of the training, where it is known.
        versions: of packages and machine.
    """

    name: str
    data: str
    prompt: Prompt
    result: Evaluation
    mistakes: list[tuple[dict[str, Any], str, str, float]]
    bins: list[Bin]
    calibration_error: float
    f1_interval: tuple[float, float] | None
    words: tuple[list[Neighbours], float]
    history: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def shares(self) -> list[tuple[str, float, tuple[float, float]]]:
        """The prompt and what it is compared with: share answered right, with its interval."""
        count = self.result.examples
        return [(name, share, wilson(share, count)) for name, share in self.result.compared()]


def report_on(
    name: str,
    data: str,
    prompt: Prompt,
    rows: Sequence[Example],
    result: Evaluation,
    words: tuple[list[Neighbours], float],
    *,
    history: Sequence[dict[str, Any]] = (),
    versions: dict[str, str] | None = None,
) -> Report:
    """Put a report together from an evaluation.

    Args:
        name: of the prompt.
        data: of the rows, as it is told.
        prompt: that was measured.
        rows: on which.
        result: of `evaluate`.
        words: of `nearest_words`.
        history: of the training.
        versions: of `reporting.versions`.
    """
    read = all_columns(prompt)
    shown = [
        (
            {column: rows[number].get(column) for column in read},
            result.right_answers[number],
            result.predictions[number].answer,
            result.predictions[number].probability,
        )
        for number in result.confident_mistakes(_MISTAKES)
    ]
    bins = calibration(result)
    apart = sum(b.rows * abs(b.probability - b.right) for b in bins) / result.examples
    f1 = _f1_interval(result) if result.confusion else None
    return Report(
        name, data, prompt, result, shown, bins, apart, f1, words, list(history), versions or {}
    )


def training_history(folder: Path) -> list[dict[str, Any]]:
    """The epochs in ``result.json`` or the demo's ``metrics.json`` beside a prompt."""
    for name in ("result.json", "metrics.json"):
        try:
            history = formats.read_json(folder / name).get("history")
        except (PromptFileError, OSError):
            continue
        if isinstance(history, list):
            return [record for record in history if isinstance(record, dict)]
    return []


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` rows."""
    if count < 1:
        return 0.0, 1.0
    square = _Z**2 / count
    centre = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration(result: Evaluation) -> list[Bin]:
    """Rows by the probability of their answers, in parts of equal width that are not empty."""
    parts: list[list[tuple[float, bool]]] = [[] for _ in range(_BINS)]
    for prediction, right in zip(result.predictions, result.right_answers, strict=True):
        at = min(int(prediction.probability * _BINS), _BINS - 1)
        parts[at].append((prediction.probability, prediction.answer == right))
    return [
        Bin(len(part), sum(p for p, _ in part) / len(part), sum(r for _, r in part) / len(part))
        for part in parts
        if part
    ]


def _f1_interval(result: Evaluation) -> tuple[float, float]:
    """The 95 % interval of the macro F1: rows drawn anew, with the same seed each time."""
    import numpy as np

    index = {label: number for number, label in enumerate(result.labels)}
    size = len(index)
    right = np.array([index[label] for label in result.right_answers])
    said = np.array([index[prediction.answer] for prediction in result.predictions])
    random = np.random.default_rng(0)
    scores = []
    for _ in range(_RESAMPLES):
        drawn = random.integers(0, len(right), len(right))
        own, other = right[drawn], said[drawn]  # counted apart: a matrix of labels is their square
        hits, named, answered = (
            np.bincount(some, minlength=size) for some in (own[own == other], own, other)
        )
        scores.append(float(np.mean(2 * hits / np.maximum(named + answered, 1))))
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)
