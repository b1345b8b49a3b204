"""Plain steps on compiled layers, on a CPU (`forward.compiled_on_cpu`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..forward.engine import LayersOnCpu
from .cuda_graphs import T
from .steps import Later, MicroBatches, PlainSteps


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
