"""`SuperGlueOptions`: what a population of prompts for one task is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...prompts.prompt_settings import PromptSettings
from ...training.settings import TrainSettings

if TYPE_CHECKING:
    from .examples import Splits
    from .tasks import SuperGlueTask


@dataclass(frozen=True)
class SuperGlueOptions:
    """What a population of prompts is made of.

    Args:
        templates: of prompts; by default the task's own.
        best: how many of the task's own, those whose words alone are best on dev.
        grid: what members differ in beside it: ``encoder`` and others of `train`'s keys.
        population: seeds of each template and encoder.
        settings: how to train.
    """

    templates: tuple[str, ...]
    best: int
    grid: dict[str, list[Any]]
    population: int
    settings: TrainSettings

    def check(self, task: SuperGlueTask, splits: Splits) -> None:
        """Refuse what cannot be trained on a task before anything is.

        Raises:
            InputError: an encoder, or a template: no virtual token, or an unknown column.
        """
        for template in self.templates or task.templates:
            for encoder in self.grid["encoder"]:
                prompt = PromptSettings(template, answer=task.answer, encoder=encoder)
                unknown = set(prompt.parsed.fields) - set(splits.train[0])
                if unknown:
                    raise InputError(
                        f"--template {template!r} names {{{min(unknown)}}}; {task.folder} has "
                        f"{', '.join(splits.train[0])}"
                    )
