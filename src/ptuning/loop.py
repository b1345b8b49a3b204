"""The training loop: one, and always over a population. One prompt is a population of one.

    for each epoch, for each optimizer step:
        micro-batches of every active member's next examples -> losses -> gradients
        each member: clip, optimizer step, schedule
    dev result -> best so far -> early stop

The base model never changes. On the CPU a run that is interrupted anywhere and resumed ends with
the numbers of an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from . import checkpoint
from .base_model import describe
from .collate import Batch
from .errors import InputError, TrainingError
from .learner import Learner
from .population import Member, Population
from .prefix import PrefixStore
from .prompt import Prompt
from .render import Rendered, Renderer
from .score import batch_for, model_device, score
from .settings import TrainSettings


@dataclass(frozen=True)
class Progress:
    """What a listener hears: after each optimizer step, and with `record` after each epoch."""

    step: int
    steps: int
    epoch: int
    loss: float
    record: dict[str, float] | None = None


@dataclass
class Loop:
    """One training with all that it needs; `train` is its only entry."""

    model: nn.Module
    tokenizer: Any
    prompt: Prompt
    renderer: Renderer
    examples: list[Rendered]
    dev: list[Rendered]
    settings: TrainSettings
    output: Path | None
    listener: Callable[[Progress], None]

    def train(self, resume: bool) -> Learner:
        """Train from the start, or from the newest checkpoint; gives the best member."""
        first_in_process = not AcceleratorState._shared_state
        self.accelerator = _accelerator(self.settings, self.output)
        try:
            self._prepare(resume)
            owner = self.renderer.owner if self.renderer.compares else None
            with Population(
                self.model, self.tokenizer, self.members, owner, self.prefix
            ) as population:
                self.population = population
                self._epochs()
        finally:
            self.accelerator.end_training()
            if first_in_process:  # so that the next training may use another precision
                AcceleratorState._reset_state()
        return self.learners[0]

    def _prepare(self, resume: bool) -> None:
        settings = self.settings
        self.device = _place(self.model, self.accelerator)
        words = [word for group in self.renderer.groups for word in group]
        member = Member(self.prompt, self.model, settings.seed, words).to(self.device)
        per_step = settings.batch_size * settings.gradient_accumulation
        self.steps_per_epoch = -(-len(self.examples) // per_step)
        self.steps = self.steps_per_epoch * settings.epochs
        self.members = [member]
        self.learners = [
            Learner(member, self.prompt.encoder, settings, self.steps, self.accelerator)
        ]
        causal, cache = self.renderer.kind == "causal", settings.prefix_cache
        self.prefix = PrefixStore(self.model, cache) if causal and cache != "off" else None
        self.identity = self._identity()
        self.step, self.epoch_loss = 0, 0.0
        if resume and self.output is not None:
            self._resume()

    def _identity(self) -> dict[str, str]:
        """All that the numbers of this run depend on."""
        chosen = {**asdict(self.settings), **self.prompt.settings()}
        for name in ("tracker", "checkpoint_seconds", "prefix_cache"):
            del chosen[name]
        start = self.prompt.vectors
        chosen["the prompt to begin from"] = None if start is None else start.double().sum().item()
        chosen["the base model"] = describe(self.model, self.tokenizer)["embedding"]["values"]
        return checkpoint.fingerprint(chosen, [*self.examples, *self.dev])

    def _epochs(self) -> None:
        self._saved_at = time.monotonic()
        while self.step < self.steps and any(learner.active for learner in self.learners):
            epoch, done = divmod(self.step, self.steps_per_epoch)
            orders = [learner.order(epoch, len(self.examples)) for learner in self.learners]
            for position in range(done, self.steps_per_epoch):
                self.population.train()
                loss = self._optimizer_step(orders, position)
                self.step += 1
                self.epoch_loss += loss / self.steps_per_epoch
                self._report(epoch, loss)
                ends_epoch = position == self.steps_per_epoch - 1
                if not ends_epoch:
                    self._save_if_due()
            self._end_epoch(epoch)

    def _optimizer_step(self, orders: list[list[int]], position: int) -> float:
        """One optimizer step of every active member; gives the mean loss of the first."""
        per_step = self.settings.batch_size * self.settings.gradient_accumulation
        chosen = [order[position * per_step : (position + 1) * per_step] for order in orders]
        weights = [sum(self.examples[i].weight for i in indices) for indices in chosen]
        divisor = torch.tensor(weights, dtype=torch.float32, device=self.device)
        total = torch.zeros(len(self.learners), device=self.device)
        for start in range(0, per_step, self.settings.batch_size):
            batch = self._batch([c[start : start + self.settings.batch_size] for c in chosen])
            if batch is None:
                continue
            with self.accelerator.autocast():
                losses = self.population.step(batch) / divisor
            self.accelerator.backward(losses.sum())
            total += losses.detach()
        total = self.accelerator.reduce(total, "sum")
        if not bool(torch.isfinite(total).all()):
            raise TrainingError(self._not_finite(f"the loss is {float(total[0])}"))
        if not all([learner.update() for learner in self.learners]):
            raise TrainingError(self._not_finite("the gradient is not finite"))
        return float(total[0])

    def _batch(self, chosen: list[list[int]]) -> Batch | None:
        """One micro-batch: this process's share of every active member's examples."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        pairs = [
            (index, number)
            for number, indices in enumerate(chosen)
            if self.learners[number].active
            for index in indices[process::processes]
        ]
        if not pairs:
            return None
        first_ids = self.population.first_ids()
        batch = batch_for(
            self.model,
            self.renderer,
            [self.examples[index] for index, _ in pairs],
            [first_ids[number] for _, number in pairs],
        )
        return replace(batch, member=torch.tensor([n for _, n in pairs])).to(self.device)

    def _end_epoch(self, epoch: int) -> None:
        for number, learner in enumerate(self.learners):
            if not learner.active:
                continue
            record = {"epoch": epoch + 1, "loss": self.epoch_loss}
            if self.dev:
                record |= self._dev_result(number)
            learner.note(record)
        self.epoch_loss = 0.0
        record = self.learners[0].history[-1]
        self.accelerator.log(record, step=self.step)
        self._save()
        self.listener(Progress(self.step, self.steps, epoch + 1, record["loss"], record))

    def _dev_result(self, number: int) -> dict[str, float]:
        self.population.eval()
        self.population.write_tables()
        accuracy, loss = score(
            self.model,
            self.renderer,
            self.dev,
            self.population.first_ids()[number],
            2 * self.settings.batch_size,
            self.accelerator.autocast,
            self.prefix,
        )
        return {"dev_accuracy": accuracy, "dev_loss": loss}

    def _report(self, epoch: int, loss: float) -> None:
        self.accelerator.log({"train_loss": loss}, step=self.step)
        self.listener(Progress(self.step, self.steps, epoch + 1, loss))

    def _save_if_due(self) -> None:
        if time.monotonic() - self._saved_at >= self.settings.checkpoint_seconds:
            self._save()

    def _save(self) -> None:
        if self.output is None or not self.accelerator.is_main_process:
            return
        state = {
            "identity": self.identity,
            "step": self.step,
            "epoch_loss": self.epoch_loss,
            "answer_tokens": self.prompt.answer_tokens,
            "learners": [learner.state() for learner in self.learners],
        }
        checkpoint.save(self.output, self.step, state)
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        assert self.output is not None
        state = checkpoint.load_newest(self.output)
        if state is None:
            return
        checkpoint.check_same_run(state["identity"], self.identity)
        self.step, self.epoch_loss = state["step"], state["epoch_loss"]
        for learner, saved in zip(self.learners, state["learners"], strict=True):
            learner.load(saved)

    def _not_finite(self, fault: str) -> str:
        best = self.learners[0].best
        kept = (
            f"the best result so far is epoch {best['epoch']}'s" if best else "nothing was learned"
        )
        rate = self.settings.rate_for(self.prompt.encoder)
        where = f"; the last checkpoint in {self.output} is good" if self.output else ""
        return (
            f"{fault} at step {self.step + 1} of {self.steps}: training stopped ({kept}"
            f"{where}). Use a lower learning rate than {rate:g}, or a base model in bfloat16 or "
            "float32 instead of float16"
        )


def _accelerator(settings: TrainSettings, output: Path | None) -> Accelerator:
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            log_with=settings.tracker,
            project_dir=None if output is None else str(output),
        )
    except (ValueError, ImportError) as error:
        raise InputError(
            f"accelerate cannot be set up ({error}); a Trainer or Accelerator of another precision "
            "in this process, or a tracker that is not installed, is the usual reason"
        ) from error
    if settings.tracker:
        plain = {k: v for k, v in asdict(settings).items() if v is not None}
        accelerator.init_trackers("ptuning", config=plain)
    return accelerator


def _place(model: nn.Module, accelerator: Accelerator) -> torch.device:
    """Move the model to accelerate's device, unless it has been spread or placed already."""
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False):
        return model_device(model)
    model.to(accelerator.device)
    return accelerator.device
