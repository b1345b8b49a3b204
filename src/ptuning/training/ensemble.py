"""The best members of a population become one prompt, which answers with all of them.

An ensemble swings less with the seed than any of its members, and than the best one by dev: what a
member got wrong by chance the others outvote (Hansen and Salamon 1990). How the members' answers
become one is `forward.together`'s.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from ..backbone.base_model import BaseModel
from ..errors import InputError
from ..forward.engine import Engine
from ..forward.scoring import score_together
from ..prompts.label_matrix import LabelMatrix
from ..prompts.prompt import Prompt
from .calibration import attached
from .grid import Variant
from .learner import Learner
from .result import TrainResult

_NEAR = 1.2
"""A member whose dev loss is more than this many times the least has no say (`drop_far`)."""


def check_ensemble(count: int, members: int) -> None:
    """Refuse an ensemble of more members than there are.

    Raises:
        InputError: says how to have enough.
    """
    if count > members:
        raise InputError(
            f"an ensemble of {count} needs as many prompts to choose from, and {members} is "
            f"trained; give a population (or a grid) of at least {count}"
        )


def best_members(learners: Sequence[Learner], count: int) -> list[int]:
    """The numbers of the members with the best results, the best first; of equals the first."""
    known = [number for number, learner in enumerate(learners) if learner.best]
    known.sort(key=lambda n: learners[n].rank(learners[n].best), reverse=True)
    return known[:count]


def trained(variant: Variant, learner: Learner, base: BaseModel) -> Prompt:
    """A member as a prompt of its own, without the encoder's weights."""
    prompt = copy.copy(variant.prompt)
    prompt.vectors, prompt.encoder_weights = learner.best["vectors"], None
    prompt.label_matrix = LabelMatrix.trained(learner.best.get("label_matrix"), prompt.labels)
    prompt.base_model = base.describe()
    prompt.training = {"seed": variant.settings.seed, **learner.figures()}
    return prompt


def dev_figures(
    base: BaseModel, variants: Sequence[Variant], members: Sequence[Prompt], batch_size: int
) -> dict[str, float]:
    """``dev_accuracy`` and ``dev_loss`` of members that answer together.

    Args:
        base: the frozen model.
        variants: the members', with their dev examples.
        members: trained.
        batch_size: rows of a forward.
    """
    engine = Engine(base)
    renderers = [engine.renderer(member) for member in members]
    examples = [v.dev for v in variants]
    with attached(base, members) as first_ids:
        accuracy, loss = score_together(engine, renderers, examples, first_ids, batch_size)
    return {"dev_accuracy": accuracy, "dev_loss": loss}


def drop_far(prompt: Prompt, result: TrainResult) -> None:
    """Members of a trained ensemble that are far worse on dev than its best have no say any more;
    the first one stays. The dev figures of all together then stand for nobody."""
    if not prompt.others:
        return
    losses = [result.members[n]["best"]["dev_loss"] for n in result.ensemble["members"]]
    most = _NEAR * min(losses)
    others = zip(prompt.others, losses[1:], strict=True)
    near = tuple(member for member, loss in others if loss <= most)
    if len(near) == len(prompt.others):
        return
    prompt.others = near
    known = {k: v for k, v in prompt.training.items() if k not in ("dev_accuracy", "dev_loss")}
    prompt.training = {**known, "members": len(prompt.members)}
