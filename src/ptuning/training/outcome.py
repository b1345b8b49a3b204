"""What a population came to: who is kept, what is known of them, and how a prompt becomes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..backbone.base_model import BaseModel
from ..prompts.label_matrix import LabelMatrix
from ..prompts.prompt import Prompt
from .ensemble import dev_figures, trained
from .folds import FoldResult
from .grid import Variant
from .learner import Learner


@dataclass
class Outcome:
    """The members of a training when it is over.

    Attributes:
        variants: all members, as they were before.
        learners: how each was trained.
        kept: the numbers of those that the prompt will be, the best first.
        folds: what chose the setting, where folds did.
        together: of several that are kept: their numbers and, with dev examples, how right they are
            together.
        refit: how they went on with all examples, if they did.
        complete: nothing was left undone for want of time.
    """

    variants: list[Variant]
    learners: list[Learner]
    kept: list[int]
    folds: FoldResult | None
    together: dict[str, Any] = field(default_factory=dict)
    refit: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def best_ones(self) -> list[tuple[Variant, Learner]]:
        """Those that are kept, the best first."""
        return [(self.variants[number], self.learners[number]) for number in self.kept]

    @property
    def shortened(self) -> int:
        """Examples that the prompt was trained on and that were cut to the length limit."""
        variant, _ = self.best_ones[0]
        seen = [*variant.examples, *(variant.dev if self.refit else [])]
        return sum(example.shortened for example in seen)

    @property
    def members(self) -> list[dict[str, Any]]:
        """What `TrainResult` tells of each member."""
        pairs = zip(self.variants, self.learners, strict=True)
        return [
            {"name": v.name, "best": x.figures(), "epochs": len(x.history), "dropped": x.dropped}
            for v, x in pairs
        ]


def figures_together(base: BaseModel, outcome: Outcome, batch_size: int) -> dict[str, Any]:
    """What `TrainResult` tells of members that answer together."""
    if len(outcome.kept) < 2:
        return {}
    figures: dict[str, Any] = {"members": outcome.kept}
    kept = outcome.best_ones
    if kept[0][0].dev:
        prompts = [trained(*one, base) for one in kept]
        figures |= dev_figures(base, [variant for variant, _ in kept], prompts, batch_size)
    return figures


def become(prompt: Prompt, outcome: Outcome, base: BaseModel) -> None:
    """The prompt gets the vectors of the best member and, of an ensemble, the others beside it;
    what it says of its training are their figures.
    """
    (variant, learner), *others = outcome.best_ones
    learner.put_best_into_model()
    prompt.become(variant.prompt)
    prompt.vectors, prompt.encoder_weights = learner.best["vectors"], learner.best["weights"]
    prompt.label_matrix = LabelMatrix.trained(learner.best.get("label_matrix"), prompt.labels)
    prompt.base_model = base.describe()
    prompt.training = {
        "learning_rate": learner.rate_as_given,
        "seed": variant.settings.seed,
        "population": len(outcome.variants),
        **learner.figures(),
    }
    if outcome.refit:
        prompt.training["refit_examples"] = outcome.refit["examples"]
    if outcome.folds:
        prompt.training |= {"folds": variant.settings.folds, **outcome.folds.best}
    prompt.others = tuple(trained(*one, base) for one in others)
    if outcome.together:
        prompt.training |= {**outcome.together, "members": len(outcome.kept)}
