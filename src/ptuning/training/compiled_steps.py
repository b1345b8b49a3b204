"""Plain steps on compiled layers, on a CPU (`forward.compiled_on_cpu`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..backbone.eight_bits import frozen_format
from ..forward.engine import LayersOnCpu, Work
from .cuda_graphs import T, obstacle
from .settings import TrainSettings
from .steps import Later, MicroBatches, PlainSteps, ReplayedSteps


class CompiledSteps:
    """Plain steps whose frozen layers run compiled while they agree with the layers as they are.

    Args:
        plain: the steps.
        layers: the model's.
        say: hears once that layers run compiled, and why they do not any more.

    Attributes:
        late: as of `PlainSteps`.
        device: likewise.
    """

    late = False

    def __init__(self, plain: PlainSteps, layers: LayersOnCpu, say: Callable[[str], None]):
        self.plain, self.layers, self.say = plain, layers, say
        self.device = plain.device
        self._said = False

    def with_room(self, run: Callable[[], T]) -> T:
        """As `PlainSteps`."""
        return run()

    def __call__(self, micro_batches: MicroBatches, divisor: Sequence[float]) -> Later:
        """As `PlainSteps`."""
        if self.layers.fault is not None:
            return self.plain(micro_batches, divisor)
        with self.layers():
            later = self.plain(micro_batches, divisor)
        if self.layers.fault is not None:
            self.say(f"compiled layers are off: {self.layers.fault}; the layers run as they are")
        elif self.layers.ran and not self._said:
            self._said = True
            self.say("compiled layers: they agree with the layers as they are")
        return later


def on_compiled(
    steps: PlainSteps | ReplayedSteps,
    settings: TrainSettings,
    work: Work,
    say: Callable[[str], None],
) -> PlainSteps | ReplayedSteps | CompiledSteps:
    """Plain steps of a CPU take the layers compiled, where that is possible and worth it; a GPU's
    have them in their graphs."""
    if not isinstance(steps, PlainSteps) or steps.device.type != "cpu":
        return steps
    model = steps.population.base
    why = obstacle(model, steps.accelerator)
    if settings.tune_model:
        why = "the model is trained too"
    elif frozen_format(model):
        why = "layers in eight bits are not compiled on a CPU"
    if why is not None:
        if settings.compile == "on":
            say(f"compiled layers are off: {why}")
        return steps
    layers = steps.population.engine.layers_on_cpu(work)
    return steps if layers is None else CompiledSteps(steps, layers, say)
