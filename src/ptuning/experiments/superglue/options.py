"""`SuperGlueOptions`: what a population of prompts for one task is made of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...errors import DataError, InputError
from ...prompts.prompt_settings import PromptSettings
from ...prompts.task import at_least_one
from ...rendering.example import check_rows
from ...training.grid import checked_grid
from ...training.settings import TrainSettings

if TYPE_CHECKING:
    from .examples import Splits
    from .tasks import SuperGlueTask


@dataclass(frozen=True)
class SuperGlueOptions:
    """What a population of prompts is made of.

    Args:
        templates: of prompts; by default the task's own.
        best_templates: so many of the task's own templates: those best on dev as words alone.
        grid: what members differ in beside it: ``encoder`` (by default ``none``) and others of
            `train`'s keys.
        population: seeds of each template, encoder and rate.
        together: all members that are about as good on dev as the best one answer together, with a
            bias for each label that is learned there; else the best one alone.
        settings: how to train.

    Raises:
        InputError: a count below 1, or a grid of what cannot vary.
    """

    templates: tuple[str, ...] = ()
    best_templates: int = 3
    grid: dict[str, list[Any]] = field(default_factory=dict)
    population: int = 1
    together: bool = True
    settings: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            epochs=10, choose_by="loss", patience=0, init="encoder"
        )
    )

    def __post_init__(self) -> None:
        grid = checked_grid(self.grid)
        grid.setdefault("encoder", ["none"])
        object.__setattr__(self, "grid", grid)
        if self.settings.word_noise is None:  # the published figures were made without
            object.__setattr__(self, "settings", replace(self.settings, word_noise=0.0))
        for name in ("best_templates", "population"):
            at_least_one(name, getattr(self, name))

    def check(self, task: SuperGlueTask, splits: Splits) -> None:
        """Refuse what cannot be trained on a task before anything is.

        Raises:
            InputError: an encoder, or a template: no virtual token, or an unknown column.
            DataError: an example lacks a column, or there is none to train on.
        """
        for template in self.templates or task.templates:
            for encoder in self.grid["encoder"]:
                prompt = PromptSettings(template, answer=task.answer, encoder=encoder)
            unknown = set(prompt.columns) - set(splits.train[0])
            if self.templates and unknown:
                raise InputError(
                    f"--template {template!r} names {{{min(unknown)}}}; {task.folder} has "
                    f"{', '.join(splits.train[0])}"
                )
            parts = {"training": splits.train, "dev": splits.dev, "test": splits.test}
            for name, rows in parts.items():
                check_rows(prompt, rows, f"{task.folder}, {name}", answered=False)
        if task.generates and not any(row["label"] == "true" for row in splits.train):
            raise DataError(
                f"{task.folder} is trained on its true examples, and the training file has none"
            )
