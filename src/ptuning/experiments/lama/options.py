"""`LamaOptions`: what a population of prompts for one relation is made of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import InputError
from ...prompts.prompt_settings import PromptSettings
from ...prompts.task import at_least_one
from ...training.grid import checked_grid
from ...training.settings import TrainSettings
from .relations import OBJECT, SUBJECT, Facts
from .templates import plain_template

TEMPLATES = ("own", "best", "own-words", "best-words", "plain")
_STEPS, _FEWEST, _MOST = 150, 3, 10


@dataclass(frozen=True)
class LamaOptions:
    """What a population of prompts for one relation is made of.

    Args:
        templates: ``own`` (virtual tokens among the words of LAMA's template), ``best`` (of the
            manual template that is best on dev), ``own-words`` and ``best-words`` (virtual tokens
            that begin as these words), ``plain`` (no words), or templates with ``{sub_label}``.
        grid: what members differ in beside it: ``encoder`` (by default ``none``) and others of
            `train`'s keys.
        virtual_tokens: virtual tokens of each group.
        population: seeds of each template, encoder and rate.
        together: all members that are about as good on dev as the best one answer together; else
            the best one alone.
        epochs: passes over a relation's facts; by default as many as 150 steps take, 3 to 10.
        settings: how to train otherwise.

    Raises:
        InputError: a template is neither a known form nor names the subject; or no template, or
            no encoder; or a grid of what cannot vary.
    """

    templates: tuple[str, ...] = ("own", "best")
    grid: dict[str, list[Any]] = field(default_factory=dict)
    virtual_tokens: int = 10
    population: int = 1
    together: bool = True
    epochs: int | None = None
    settings: TrainSettings = field(
        default_factory=lambda: TrainSettings(patience=0, init="encoder")
    )

    def __post_init__(self) -> None:
        grid = checked_grid(self.grid)
        grid.setdefault("encoder", ["none"])
        object.__setattr__(self, "grid", grid)
        if self.settings.word_noise is None:  # the published figures were made without
            object.__setattr__(self, "settings", replace(self.settings, word_noise=0.0))
        for name in ("virtual_tokens", "population", "epochs"):
            at_least_one(name, getattr(self, name))
        for template in self.templates:
            if template not in TEMPLATES and f"{{{SUBJECT}}}" not in template:
                raise InputError(
                    f"--template {template!r} is none of {', '.join(TEMPLATES)} and does not name "
                    f"the subject: write {{{SUBJECT}}} where it stands"
                )
        for template in (*self.own_templates, plain_template("causal", 1)):
            for encoder in self.grid["encoder"]:
                PromptSettings(template, answer=OBJECT, encoder=encoder)

    @property
    def own_templates(self) -> list[str]:
        """The templates that are no known form."""
        return [template for template in self.templates if template not in TEMPLATES]

    def settings_for(self, facts: Facts) -> TrainSettings:
        """How to train on a relation's facts."""
        if self.epochs is not None:
            return replace(self.settings, epochs=self.epochs)
        enough = round(_STEPS * self.settings.batch_size / len(facts.train))
        return replace(self.settings, epochs=min(max(enough, _FEWEST), _MOST))
