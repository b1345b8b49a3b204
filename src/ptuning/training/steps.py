"""One optimizer step of every member in training: encoders, parts of the batch, clip, AdamW.

    plain      each operation is asked for by Python; numbers are looked at before the next step
    replayed   parts and update are CUDA graphs; the step's numbers are read while the next one runs

Both give the same numbers; a test holds them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .. import distributed
from ..errors import in_one_line
from ..forward.graphs import Graph
from ..rendering.collate import Batch
from .cuda_graphs import GraphedStep, MicroStep, T
from .learner import Learner
from .population import Population
from .update import Update


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step.

    Attributes:
        losses: each member's mean loss ``(members,)``, on the CPU.
        stepped: the members that took it: all numbers were finite.
    """

    losses: Tensor
    stepped: list[bool]


MicroBatches = Sequence[Sequence[Batch]]
"""Of each micro-batch its parts, on the CPU."""
Later = Callable[[], StepOutcome]
"""Waits for the step if it is still running."""


def plain_part(population: Population, accelerator: Accelerator) -> MicroStep:
    """Losses and gradient of a part as Python asks for them. (No method of the loop: in a circle
    with it, what a training keeps on the device would outlive it.)"""

    def part(batch: Batch, divisor: Tensor) -> Tensor:
        with accelerator.autocast():
            losses = population.losses(batch) / divisor
        accelerator.backward(losses.sum())
        return losses.detach()

    return part


class PlainSteps:
    """Steps whose every operation Python asks for.

    Args:
        population: in training.
        learners: of its members.
        part: losses and gradient of a part.
        accelerator: adds up over processes, and scales fp16's losses.

    Attributes:
        late: an outcome is best asked for when the next step has been.
        device: that parts are to keep busy.
    """

    late = False

    def __init__(
        self,
        population: Population,
        learners: Sequence[Learner],
        part: MicroStep,
        accelerator: Accelerator,
    ):
        self.population, self.learners = population, learners
        self.part, self.accelerator = part, accelerator
        self.device = population.engine.base.device

    def with_room(self, run: Callable[[], T]) -> T:
        """What `run` gives; where memory is short it gets what steps would have for later ones."""
        return run()

    def __call__(self, micro_batches: MicroBatches, divisor: Sequence[float]) -> Later:
        """Take a step.

        Args:
            micro_batches: one without rows where all are other processes'.
            divisor: of each member's losses.
        """
        divisors = torch.tensor(divisor, dtype=torch.float32, device=self.device)
        total = torch.zeros_like(divisors)
        for parts in micro_batches:
            here = [part.to(self.device) for part in parts]
            with self.population.one_table(here, self.accelerator.autocast) as table:
                for part in here:
                    total += self.part(part, divisors)
                if not here:
                    self.accelerator.backward(0 * table.sum())
        trained = [p for learner in self.learners if learner.active for p in learner.parameters()]
        total = distributed.add_up_gradients(trained, total)
        stepped = _update_each(self.learners, total, self.accelerator)
        outcome = StepOutcome(total.cpu(), stepped)
        return lambda: outcome


class ReplayedSteps:
    """Steps by CUDA graphs, whose outcome is read late.

    Members whose encoders draw random numbers make their tables, and are updated, the plain way.

    Args:
        population: in training.
        learners: of its members.
        part: computes parts.
        accelerator: of the training.
    """

    late = True
    device = torch.device("cuda")

    def __init__(
        self,
        population: Population,
        learners: Sequence[Learner],
        part: GraphedStep,
        accelerator: Accelerator,
    ):
        self.population, self.learners = population, learners
        self.part, self.accelerator = part, accelerator
        self._failed = torch.zeros_like(part.losses)
        self._update: Update | None = None
        self._captures = True
        self._of: list[int] = []
        self._reader = _Reader(part.device)
        self._rates: list[float] = []

    def with_room(self, run: Callable[[], T]) -> T:
        """As `PlainSteps`."""
        return self.part.with_room(run)

    def __call__(self, micro_batches: MicroBatches, divisor: Sequence[float]) -> Later:
        """As `PlainSteps`."""
        if any(learner.active and learner.member.draws for learner in self.learners):
            return self._with_plain_update(micro_batches, divisor)
        if self._update is None:
            self._begin()
        for parts in micro_batches:
            for part in parts:
                self.part(part, divisor)
        self._take()
        assert self._update is not None
        return self._reader.read(self._update.report)

    def _begin(self) -> None:
        self.part.clear()  # of the last plain update
        with torch.no_grad():
            self.part.table.copy_(self.population.tables())

    def _take(self) -> None:
        """Update the members: the first time plainly, the second time a graph is captured."""
        active = [number for number, learner in enumerate(self.learners) if learner.active]
        part = self.part
        if active != self._of or self._update is None:
            spans = self.population.rows_of_members()
            self._update = Update(
                self.learners, active, spans, part.table, part.gradient, part.losses, self._failed
            )
            self._of, part.update, self._rates = active, None, []
            self._set_rates()
            self._update()
        else:
            self._set_rates()
            if part.update is None and self._captures and part.shapes:
                part.update = self._captured(self._update)
            if part.update is None:
                self._update()
            else:
                part.update.replay()
        for number in active:
            self.learners[number].steps_taken += 1

    def _captured(self, update: Update) -> Graph | None:
        """The update as a graph. While it is captured all members have failed: nothing steps."""
        part = self.part
        before = [(t, t.clone()) for t in (part.gradient, part.losses, self._failed)]
        self._failed.fill_(1)
        graph = part.new_graph()
        try:
            graph.capture(update)
        except Exception as error:  # such as an encoder of a library that cannot be captured
            self._captures = False
            fault = in_one_line(error)
            part.say(f"CUDA graphs: the update of the encoders runs plain ({fault})")
            return None
        finally:
            for tensor, value in before:
                tensor.copy_(value)
        return graph

    def _set_rates(self) -> None:
        assert self._update is not None
        rates = [learner.rates()[0] for learner in self.learners]
        if rates != self._rates:
            self._update.rates.copy_(self._reader.pinned(rates), non_blocking=True)
            self._rates = rates

    def _with_plain_update(self, micro_batches: MicroBatches, divisor: Sequence[float]) -> Later:
        part, total = self.part, torch.zeros_like(self.part.losses)
        for parts in micro_batches:
            tables = self.population.tables()
            part.table.copy_(tables.detach())
            part.clear()
            for one in parts:
                part(one, divisor)
            tables.backward(part.gradient)
            total += part.losses
        outcome = StepOutcome(total.cpu(), _update_each(self.learners, total, self.accelerator))
        return lambda: outcome


class _Reader:
    """Brings small tensors from the device while it goes on computing.

    Two places in turn: the last step's numbers are read when the next one has been asked for.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._places: list[Any] = [None, None]
        self._turn = 0

    def read(self, report: Tensor) -> Later:
        """The outcome that a report ``(2, members)`` tells."""
        self._turn = 1 - self._turn
        if self._places[self._turn] is None:
            self._places[self._turn] = torch.zeros_like(
                report, device="cpu", pin_memory=self._on_gpu
            )
        place = self._places[self._turn]
        place.copy_(report, non_blocking=True)
        done = torch.cuda.Event() if self._on_gpu else None
        if done is not None:
            done.record()

        def outcome() -> StepOutcome:
            if done is not None:
                done.synchronize()
            losses, failed = place.numpy().copy()
            return StepOutcome(torch.from_numpy(losses), [not one for one in failed.tolist()])

        return outcome

    def pinned(self, numbers: Iterable[float]) -> Tensor:
        """Numbers as a tensor that can be copied without waiting."""
        tensor = torch.tensor(list(numbers), dtype=torch.float32)
        return tensor.pin_memory() if self._on_gpu else tensor


def _update_each(
    learners: Sequence[Learner], losses: Tensor, accelerator: Accelerator
) -> list[bool]:
    """Optimizer steps one after the other; gives who took one."""
    finite = torch.isfinite(losses).tolist()
    scales = any(x.active and finite[n] for n, x in enumerate(learners))
    stepped = [learner.update(finite[n]) and finite[n] for n, learner in enumerate(learners)]
    if scales and accelerator.scaler is not None:
        accelerator.scaler.update()
    return stepped


def steps_of(
    population: Population,
    learners: Sequence[Learner],
    part: MicroStep | GraphedStep,
    accelerator: Accelerator,
) -> PlainSteps | ReplayedSteps:
    """The steps that go with what computes their parts."""
    if isinstance(part, GraphedStep):
        return ReplayedSteps(population, learners, part, accelerator)
    return PlainSteps(population, learners, part, accelerator)
