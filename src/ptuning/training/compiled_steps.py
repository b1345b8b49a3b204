"""Steps on a CPU whose frozen layers run compiled, once the first one gave the same.

first step    its losses and gradient plain and compiled, beside each other
all           the plain step, the layers compiled (`forward.compiled`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator

from ..forward.engine import CompiledLayers
from ..rendering.collate import Batch
from .rounding import Outputs, cause_of, distance_of, tolerance_of
from .steps import Later, MicroBatches, PlainSteps


def compiled_or_plain(
    plain: PlainSteps,
    layers: CompiledLayers | None,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> PlainSteps | CompiledSteps:
    """The steps on compiled layers, where there are any; the arguments are `CompiledSteps`'."""
    return plain if layers is None else CompiledSteps(plain, layers, accelerator, say)


class CompiledSteps:
    """Plain steps on compiled layers; on the layers as they are where these do not agree.

    Args:
        plain: the steps.
        layers: the model's.
        accelerator: of the training.
        say: hears that compiled layers run, or why they do not.

    Attributes:
        late: as of `PlainSteps`.
        device: likewise.
    """

    late = False

    def __init__(
        self,
        plain: PlainSteps,
        layers: CompiledLayers,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ):
        self.plain, self.accelerator, self.say = plain, accelerator, say
        self.device = plain.device
        self._layers: CompiledLayers | None = layers
        self._compared = False

    def __call__(self, micro_batches: MicroBatches, divisor: Sequence[float]) -> Later:
        """As `PlainSteps`."""
        if not self._compared and any(micro_batches):
            self._compare(next(parts for parts in micro_batches if parts))
        with nullcontext() if self._layers is None else self._layers():
            return self.plain(micro_batches, divisor)

    def _compare(self, parts: Sequence[Batch]) -> None:
        """Keep compiled layers if they give what the layers as they are give."""
        self._compared = True
        assert self._layers is not None
        here = [part.to(self.device) for part in parts]
        model = self.plain.population.base
        expected = self._outputs(here)
        try:
            with self._layers():
                off = distance_of(model, expected, self._outputs(here))
        except Exception as error:  # whatever a compiler cannot do with a model, or has not got
            self._refuse(cause_of(error))
            return
        if off <= tolerance_of(model, self.accelerator):
            self.say("compiled layers: the first step agrees")
        else:  # also where it is not a number
            self._refuse(f"they are off by {off:.1e}")

    def _refuse(self, why: str) -> None:
        self._layers = None
        self.say(f"compiled layers are off: {why}; the layers run as they are")

    def _outputs(self, parts: Sequence[Batch]) -> Outputs:
        """Losses and the table's gradient, with nobody trained by them."""
        population = self.plain.population
        population.eval()  # no member draws a number
        try:
            table = population.tables().detach().requires_grad_()
        finally:
            population.train()
        autocast, engine = self.accelerator.autocast, population.engine
        with population.written(table), engine.sharing(parts, autocast), autocast():
            losses = torch.stack([population.losses(part) for part in parts]).sum(0)
            losses.sum().backward()
        assert table.grad is not None
        return losses.detach(), table.grad
