"""The state of a model that all its users share: eval mode, and which parameters ask for gradients.

    first user    the state begins
    last user     what it was before comes back

Users are counted, so they may run in any thread and leave in any order: a prediction that ends
never puts a model back into train mode while another one runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import InputError
from ..threads import CHANGING
from .lookups import input_embedding

Undo = tuple["weakref.ref[Any]", bool]
"""A module or parameter, and the value that its flag had."""


@dataclass
class _Use:
    """A state that a model is in: how many users it has, and what it has changed."""

    users: int = 0
    changed: list[Undo] = field(default_factory=list)
    tunes: bool = False


_Uses = weakref.WeakKeyDictionary[nn.Module, _Use]
# The key is a model's input embedding, which its wrappers (a compiled model's) share.
_evaluating: _Uses = weakref.WeakKeyDictionary()
_training: _Uses = weakref.WeakKeyDictionary()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode meanwhile; when the last user leaves, each in the mode it had."""

    def change() -> list[Undo]:
        modules = [(weakref.ref(m), True) for m in model.modules() if m.training]
        model.eval()
        return modules

    with _counted(_evaluating, model, "training", change):
        yield


@contextmanager
def in_training(model: nn.Module, tunes: bool) -> Iterator[None]:
    """No parameter asks for a gradient meanwhile; where the model is tuned all do.

    Any number of trainings of prompts may use a model; one that changes its weights does so alone.

    Raises:
        InputError: `tunes` beside another training, or another training beside such a one.
    """

    def change() -> list[Undo]:
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        others = [(weakref.ref(p), p.requires_grad) for p in parameters if p.requires_grad != tunes]
        for parameter in parameters:
            parameter.requires_grad_(tunes)
        return others

    with ExitStack() as stack:
        with CHANGING:
            check_free(model, tunes)
            stack.enter_context(_counted(_training, model, "requires_grad", change, tunes))
        yield


def check_free(model: nn.Module, tunes: bool) -> None:
    """See whether a training may begin on a model.

    Raises:
        InputError: as for `in_training`.
    """
    use = _training.get(input_embedding(model))
    if use is None or not (tunes or use.tunes):
        return
    what = "its weights are being trained" if use.tunes else "prompts are being trained on it"
    wanted = "train its weights (tune_model)" if tunes else "train on it"
    raise InputError(
        f"this model is in use by another training ({what}), so this one cannot {wanted}: begin "
        "when the other has ended (`close` or `finish` what `trainer_parts` gave), or load the "
        "model a second time"
    )


@contextmanager
def _counted(
    uses: _Uses, model: nn.Module, flag: str, change: Callable[[], list[Undo]], tunes: bool = False
) -> Iterator[None]:
    """One more user of a state, until the end of the block."""
    key = input_embedding(model)
    with CHANGING:
        use = uses.get(key) or _Use()
        use.changed += change()  # where it fails there is no user
        use.users += 1
        use.tunes = tunes
        uses[key] = use
    try:
        yield
    finally:
        with CHANGING:
            use.users -= 1
            if not use.users:
                uses.pop(key, None)
                while use.changed:
                    thing, value = use.changed.pop()
                    if (alive := thing()) is not None:
                        setattr(alive, flag, value)
