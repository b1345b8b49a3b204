"""`TrainResult`: what came of a training, for a script and for a notebook."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..reporting import html_picture, html_table, percent, training_curve
from .progress import in_words


@dataclass(frozen=True)
class TrainResult:
    """What came of a training.

    Attributes:
        history: one record per epoch: ``epoch``, ``loss`` and, with dev examples, ``dev_accuracy``
            and ``dev_loss``.
        best: the record of the epoch whose vectors the prompt now has.
        shortened: training examples that were cut to the length limit.
        seconds: wall time of this call.
        members: one for each prompt of the population: ``name`` (its seed and grid values),
            ``best`` (its best record), ``epochs`` that it trained, and ``dropped``, the epoch in
            which it fell out, or None.
        winner: the number of the member that the prompt now is, or the first of an ensemble.
        ensemble: where several members answer together: their numbers (``members``), the best
            first, and with dev examples their ``dev_accuracy`` and ``dev_loss`` together.
        calibrated: where labels got a bias: ``method``, and with dev examples ``dev_accuracy`` and
            ``dev_loss`` with it.
        complete: False where ``max_minutes`` were over before the training was; with an output
            folder it can be resumed.
        refit: where what dev chose went on with all examples: how many ``examples``, for how many
            ``epochs``, and the last ``loss``; `history` and `best` are of before.
        folds: where folds chose: for each setting its ``name``, best ``epoch``, mean
            ``dev_accuracy`` and ``dev_loss``, and ``deviation``; the best first.
    """

    history: list[dict[str, float]]
    best: dict[str, float]
    shortened: int
    seconds: float
    members: list[dict[str, Any]]
    winner: int
    ensemble: dict[str, Any] = field(default_factory=dict)
    calibrated: dict[str, Any] = field(default_factory=dict)
    complete: bool = True
    refit: dict[str, Any] = field(default_factory=dict)
    folds: list[dict[str, Any]] = field(default_factory=list)

    def _repr_html_(self) -> str:
        """For notebooks: the epochs as a table, and the picture."""
        columns = [
            ("dev (%)", "dev_accuracy", percent),
            ("dev loss", "dev_loss", "{:.4f}".format),
        ]
        known = [c for c in columns if any(c[1] in record for record in self.history)]
        rows = [
            [
                f"{record['epoch']}{' (kept)' if record['epoch'] == self.best['epoch'] else ''}",
                f"{record['loss']:.4f}",
                *(write(record[name]) for _, name, write in known),
            ]
            for record in self.history
        ]
        title = f"Trained in {in_words(self.seconds)}"
        if self.ensemble:
            title += f"; {len(self.ensemble['members'])} of {len(self.members)} answer together"
        elif len(self.members) > 1:
            title += f"; the best of {len(self.members)} members"
        if self.refit:
            title += f"; then on with all {self.refit['examples']} examples"
        header = ["epoch", "loss", *(name for name, *_ in known)]
        return html_table(title, header, rows) + html_picture(self._repr_png_())

    def _repr_png_(self) -> bytes:
        return training_curve(self.history)
