"""The training loop: one, and always over a population. One prompt is a population of one.

    for each epoch, for each optimizer step:
        micro-batches of every active member's next examples -> losses -> gradients
        each member: clip, optimizer step, schedule
    dev result -> best so far -> early stop

The base model never changes. On the CPU a run that is interrupted anywhere and resumed ends with
the numbers of an undisturbed one (to rounding, where keys and values of prefixes are kept: they are
computed in other batches then; or where layers run compiled, but in one part of it alone).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from .. import distributed
from ..backbone.base_model import BaseModel
from ..errors import PromptFileError, TrainingError, in_one_line, warn
from ..forward.engine import Engine, Work
from ..forward.scoring import sums
from ..rendering.render import Rendered
from . import checkpoint
from .accelerator import accelerated, current, move_model
from .clock import Clock
from .compiled_steps import on_compiled
from .cuda_graphs import GraphedStep, graphs_or_plain
from .grid import Variant
from .learner import Learner, halve
from .population import Member, Population
from .progress import Progress
from .settings import TrainSettings
from .steps import Later, plain_part, steps_of


class _Pending(NamedTuple):
    """A step whose numbers are not read yet, and its share of the epoch's answers, by member."""

    step: int
    epoch: int
    outcome: Later
    share: Tensor


_CAPTURING = 8
"""Steps behind the first one in which CUDA graphs are usually captured."""


@dataclass
class Loop:
    """One training with all that it needs; `train` is its only entry.

    Attributes:
        output: where its checkpoints are; None for none.
        listener: hears how it goes, in the main process.
        until: the epoch after which it ends, before the schedule does.
        teacher: what is said of the one whose answers the examples have, if there is one.
        goes_on: what was trained before trains on; noise on words has its size from the first step.
    """

    base: BaseModel
    variants: list[Variant]
    output: Path | None
    listener: Callable[[Progress], None]
    until: int | None = None
    teacher: dict[str, Any] | None = None
    goes_on: bool = False

    def train(self, resume: bool) -> list[Learner]:
        """Train from the start, or from the newest checkpoint; gives the members' learners."""
        with accelerated(self.settings, self.output) as accelerator:
            self._prepare(accelerator)
            with current(self.device), self.population:
                self._resume(resume)  # who has left may have vectors that no model takes
                self._choose_steps()
                self._epochs()
        return self.learners

    @property
    def settings(self) -> TrainSettings:
        """What all members share: epochs, batches, precision."""
        return self.variants[0].settings

    @property
    def _per_step(self) -> int:
        """Examples of an optimizer step."""
        return self.settings.batch_size * self.settings.gradient_accumulation

    def _steps_behind(self) -> float:
        """What a refit of those that are kept takes, in steps of this training."""
        if not self.settings.refit or self.goes_on:
            return 0.0
        first, kept = self.variants[0], min(1.0, self.settings.ensemble / len(self.variants))
        more = 1 + len(first.dev) / len(first.examples)
        return self.settings.refit_epochs * self.steps_per_epoch * more * kept

    def _work(self) -> Work:
        """What decides on compiled layers."""
        tokens = self.engine.tokens(self.variants[0].examples) * len(self.variants)
        minutes = self.settings.max_minutes
        return Work(
            self.settings.compile,
            tokens * self._per_step,
            self.last - self.step,
            math.inf if minutes is None else 60 * minutes,
        )

    def _prepare(self, accelerator: Accelerator) -> None:
        """What a training has before its first step; the population's hooks are on the model."""
        settings, first = self.settings, self.variants[0]
        self.accelerator = accelerator
        self.device = move_model(self.base.model, accelerator)
        self.steps_per_epoch = settings.steps_per_epoch(len(first.examples))
        self.steps = self.steps_per_epoch * settings.settled_epochs
        self.epochs = self.until or settings.settled_epochs
        self.last = self.steps_per_epoch * self.epochs
        members = [
            Member(v.prompt, self.base.model, v.settings.seed, v.words, v.unit).to(self.device)
            for v in self.variants
        ]
        tuned = self.base.model if settings.tune_model else None
        self.learners = [
            Learner(member, v.settings, self.steps, accelerator, tuned)
            for member, v in zip(members, self.variants, strict=True)
        ]
        whole_rows = settings.prefix_cache == "off" or settings.tune_model
        noise = settings.word_noise or 0.0
        kept_bytes = 0 if noise else settings.prefix_bytes  # what is kept has no noise
        self.engine = Engine(self.base, kept_bytes, plain=whole_rows)
        self.engine.expect(example for v in self.variants for example in (*v.examples, *v.dev))
        self.identity = checkpoint.identity_of(self.variants, self.base, self.teacher)
        self.notes: list[str] = []
        self.step, self.stopped = 0, False
        self._pending: list[_Pending] = []
        self.epoch_loss = torch.zeros(len(self.learners), dtype=torch.float32)
        self.weight = _weights([variant.examples for variant in self.variants])
        words = first.renderer.owner if first.renderer.compares else None
        self.population = Population(self.engine, members, words, settings.tune_model, noise)

    def _choose_steps(self) -> None:
        """How the steps that are left are taken, and the clock that they go by."""
        population, accelerator, say = self.population, self.accelerator, self.notes.append
        plain = plain_part(population, accelerator)
        part = graphs_or_plain(population, plain, self.settings, accelerator, say)
        work = self._work()
        if isinstance(part, GraphedStep):
            part.compile_layers(work)
        steps = steps_of(population, self.learners, part, accelerator)
        self.take_step = on_compiled(steps, self.settings, work, say)
        epochs = self.epochs - self.step // self.steps_per_epoch
        dev_steps = len(self.variants[0].dev) / self._per_step
        prepares = _CAPTURING if steps.late else 0
        limit, behind = self.settings.max_minutes, self._steps_behind()
        self.clock = Clock(limit, epochs, dev_steps, prepares, behind)

    def _epochs(self) -> None:
        self._saved_at = time.monotonic()
        self._note_start()
        count = len(self.variants[0].examples)
        while self.step < self.last and any(learner.active for learner in self.learners):
            epoch, done = divmod(self.step, self.steps_per_epoch)
            orders = [learner.order(epoch, count) for learner in self.learners]
            for position in range(done, self.steps_per_epoch):
                self.population.train()
                self.step += 1
                chosen = self._chosen(orders, slice(position, position + 1))
                outcome = self._optimizer_step(chosen)
                self._pending.append(_Pending(self.step, epoch, outcome, self._share(chosen)))
                ends_epoch = position == self.steps_per_epoch - 1
                saves = time.monotonic() - self._saved_at >= self.settings.checkpoint_seconds
                # The numbers of a step that still runs are read when the next one waits behind it.
                self._settle(leave=int(self.take_step.late and not (ends_epoch or saves)))
                if not any(learner.active for learner in self.learners):
                    self._save()
                    return
                if note := self.clock.stepped(self.last - self.step):
                    self.notes.append(note)
                self.stopped = self.step < self.last and self.clock.is_over()
                if saves and not ends_epoch:
                    self._save()
                if self.stopped and not ends_epoch:
                    self._stop(epoch, self._share(self._chosen(orders, slice(position + 1))))
                    return
            self._end_epoch(epoch)
            self.stopped &= any(learner.active for learner in self.learners)
            if self.stopped:
                return

    def _chosen(self, orders: list[list[int]], steps: slice) -> list[list[Rendered]]:
        """Each member's examples of some steps of an epoch."""
        start, end = (steps.start or 0) * self._per_step, steps.stop * self._per_step
        pairs = zip(self.variants, orders, strict=True)
        return [[variant.examples[i] for i in order[start:end]] for variant, order in pairs]

    def _share(self, chosen: list[list[Rendered]]) -> Tensor:
        """Of all answers of an epoch ``(members,)``."""
        return _weights(chosen) / self.weight

    def _optimizer_step(self, chosen: list[list[Rendered]]) -> Later:
        """One optimizer step of every active member."""
        if self.population.noise is not None:
            self.population.noise.at(self.step, self.steps, grown=self.goes_on)
        first_ids, micro_batches = self.population.first_ids(), []
        for start in range(0, len(chosen[0]), self.settings.batch_size):
            rows = self._rows([c[start : start + self.settings.batch_size] for c in chosen])
            micro_batches.append(self.engine.batches(rows, first_ids, self.take_step.device))
        return self.take_step(micro_batches, _weights(chosen).tolist())

    def _settle(self, leave: int) -> None:
        """Take in what became of all steps but the last `leave`; a member that is no longer finite
        leaves."""
        while len(self._pending) > leave:
            step, epoch, outcome_of, share = self._pending.pop(0)
            outcome = outcome_of()
            for number, learner in enumerate(self.learners):
                if learner.active and not outcome.stepped[number]:
                    loss = float(outcome.losses[number])
                    finite = math.isfinite(loss)
                    fault = "the gradient is not finite" if finite else f"the loss is {loss}"
                    self._leave(number, fault, step)
            self.epoch_loss += outcome.losses * share
            self._report(step, epoch, outcome.losses)
            if not any(learner.active for learner in self.learners):
                self._pending.clear()

    def _leave(self, number: int, fault: str, step: int) -> None:
        """A member ends its training; its best result so far stays.

        Raises:
            TrainingError: no member has a result or can still have one.
        """
        self.learners[number].active = False
        if not any(learner.active or learner.best for learner in self.learners):
            raise TrainingError(self._not_finite(number, fault, step))
        if not any(learner.active for learner in self.learners):
            warn(self._not_finite(number, fault, step))

    def _rows(self, chosen: list[list[Rendered]]) -> list[tuple[Rendered, int]]:
        """This process's share of every active member's examples, each with its member."""
        rows = [
            (example, number)
            for number, examples in enumerate(chosen)
            if self.learners[number].active
            for example in examples
        ]
        return distributed.share(rows)

    def _note_start(self) -> None:
        """Members that begin as something (trained weights, words) may turn out best as they are:
        their result before the first step is epoch 0's."""
        begun = [n for n, variant in enumerate(self.variants) if variant.has_start]
        if self.step == 0 and begun and self.variants[0].dev:
            for number, figures in zip(begun, self._dev_results(begun), strict=True):
                self.learners[number].note_start(figures)

    def _stop(self, epoch: int, share: Tensor) -> None:
        """The time is over in the middle of an epoch: what it has brought may be the best. The
        checkpoint is from before that look, so that a run that goes on is an undisturbed one."""
        self._settle(leave=0)
        self._save()
        self.epoch_loss /= share
        self._end_epoch(epoch)

    def _end_epoch(self, epoch: int) -> None:
        records = []
        active = [number for number, learner in enumerate(self.learners) if learner.active]
        for number, figures in zip(active, self._dev_results(active), strict=True):
            record = {"epoch": epoch + 1, "loss": float(self.epoch_loss[number]), **figures}
            fault = self.learners[number].note(record)
            if fault:
                self._leave(number, fault, self.step)
            else:
                records.append(record)
        self.epoch_loss.zero_()
        whole = self.step % self.steps_per_epoch == 0
        if not records:
            self._save()
            return
        if self.settings.halving and whole:
            halve(self.learners, epoch + 1, self.settings.settled_epochs)
        record = max(records, key=self.learners[0].rank)
        self.accelerator.log(record, step=self.step)
        if whole:
            self._save()
        self._tell(self.step, epoch, record["loss"], record)

    def _dev_results(self, numbers: list[int]) -> list[dict[str, float]]:
        """Dev figures of some members, in shared batches; each process computes its share."""
        if not self.variants[0].dev:
            return [{} for _ in numbers]
        since = self.clock.time
        self.population.eval()
        self.population.write_tables()
        rows = [(example, number) for number in numbers for example in self.variants[number].dev]
        parts = self.engine.parts(distributed.share(rows))
        first_ids, words = self.population.first_ids(), self.population.words

        def look() -> Tensor:
            batches = (self.engine.batch(part, first_ids) for part in parts)
            return sums(self.engine, batches, len(self.variants), words, self.accelerator.autocast)

        (found,) = distributed.add_up([self.take_step.with_room(look)])
        self.clock.looked(since)
        weights = [sum(example.weight for example in self.variants[n].dev) for n in numbers]
        return [
            {"dev_accuracy": right / len(self.variants[0].dev), "dev_loss": loss / weight}
            for (right, loss), weight in zip(found[numbers].tolist(), weights, strict=True)
        ]

    def _report(self, step: int, epoch: int, losses: Tensor) -> None:
        active = [n for n, learner in enumerate(self.learners) if learner.active]
        loss = float(losses[active].mean()) if active else float("nan")
        self.accelerator.log({"train_loss": loss}, step=step)
        self._tell(step, epoch, loss)

    def _tell(
        self, step: int, epoch: int, loss: float, record: dict[str, float] | None = None
    ) -> None:
        members, of = sum(learner.active for learner in self.learners), len(self.learners)
        note = self.notes.pop(0) if self.notes else ""
        heard = Progress(step, self.last, epoch + 1, loss, record, members, of, note, self.epochs)
        if self.accelerator.is_main_process:
            self.listener(heard)

    def _save(self) -> None:
        if self.output is None or not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "identity": self.identity,
            "step": self.step,
            "epoch_loss": self.epoch_loss,
            "learners": [learner.state() for learner in self.learners],
            "scaler": scaler.state_dict() if scaler else None,
        }
        checkpoint.save(self.output, self.step, state)
        self._saved_at = time.monotonic()

    def _resume(self, resume: bool) -> None:
        folder = self.output if resume else None
        state = checkpoint.load_for_all(folder, self.identity)
        if state is None:
            return
        try:
            self.step, self.epoch_loss = state["step"], state["epoch_loss"]
            for learner, saved in zip(self.learners, state["learners"], strict=True):
                learner.load(saved)
            if state.get("scaler") and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            reason = in_one_line(error)
            raise PromptFileError(
                f"cannot resume: the newest checkpoint in {self.output} is not of such a training "
                f"({reason}); remove it, or start anew with --overwrite"
            ) from error

    def _not_finite(self, number: int, fault: str, step: int) -> str:
        learner = self.learners[number]
        best, rate = learner.best, learner.rate_as_given
        kept = (
            f"the best result so far is epoch {best['epoch']}'s" if best else "nothing was learned"
        )
        saved = self.output is not None and checkpoint.is_there(self.output)
        where = f"; the last checkpoint in {self.output} is good" if saved else ""
        return (
            f"{fault} at step {step} of {self.last}: training stopped ({kept}"
            f"{where}). Use a lower learning rate than {rate:g}, or a base model in bfloat16 or "
            "float32 instead of float16"
        )


def _weights(chosen: list[list[Rendered]]) -> Tensor:
    """Answers, or tokens of them, in each member's examples: what its loss is divided by."""
    counts = [sum(example.weight for example in examples) for examples in chosen]
    return torch.tensor(counts, dtype=torch.float32)
