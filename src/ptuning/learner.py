"""One member's own optimizer, schedule, order of examples and best result so far.

Members of a population never touch each other: nothing here is shared.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from .population import Member
from .settings import TrainSettings


class Learner:
    """Drives one member.

    Attributes:
        active: still in training.
        best: epoch, ``accuracy``, ``loss`` and weights of the best dev result so far; empty before
            the first.
        history: one record per epoch.
    """

    def __init__(
        self,
        member: Member,
        encoder_type: str,
        settings: TrainSettings,
        steps: int,
        accelerator: Accelerator,
    ):
        self.member, self.settings, self.accelerator = member, settings, accelerator
        rate = settings.rate_for(encoder_type)
        optimizer = AdamW(member.parameters(), lr=rate, weight_decay=settings.weight_decay)
        warmup = round(settings.warmup * steps)
        schedule = LambdaLR(optimizer, lambda s: _rate_factor(s, warmup, steps, settings.schedule))
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.schedule = schedule
        self.active = True
        self.best: dict[str, Any] = {}
        self.history: list[dict[str, float]] = []
        self.without_gain = 0

    def order(self, epoch: int, count: int) -> list[int]:
        """The order of the examples in an epoch, a function of seed and epoch alone."""
        if not self.settings.shuffle:
            return list(range(count))
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        return torch.randperm(count, generator=generator).tolist()

    def update(self) -> bool:
        """Clip, take one optimizer step, and clear the gradient.

        Returns:
            False where the gradient was not finite: then no step was taken. (In fp16 accelerate's
            scaler skips such steps by itself and lowers its scale.)
        """
        finite = True
        if self.active:
            parameters = list(self.member.parameters())
            if self.accelerator.num_processes > 1:
                for parameter in parameters:  # a process without an example adds nothing
                    grad = parameter.grad if parameter.grad is not None else parameter * 0
                    parameter.grad = self.accelerator.reduce(grad.detach(), "sum")
            self.accelerator.unscale_gradients(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
            finite = self.accelerator.scaler is not None or bool(torch.isfinite(norm))
            if finite:
                self.optimizer.step()
                self.schedule.step()
        self.optimizer.zero_grad()
        return finite

    def note(self, record: dict[str, float]) -> bool:
        """Take in an epoch's record; True where it is the best so far.

        Without dev figures the latest is the best. With them accuracy decides, then loss.
        """
        self.history.append(record)
        better = not self.best or "dev_loss" not in record or _rank(record) > _rank(self.best)
        if better:
            weights = {k: v.detach().cpu().clone() for k, v in self.weights().items()}
            self.best = {**record, "weights": weights, "vectors": self.vectors()}
            self.without_gain = 0
        else:
            self.without_gain += 1
            patience = self.settings.patience
            self.active = patience is None or self.without_gain < patience
        return better

    def weights(self) -> dict[str, Tensor]:
        """The encoder's state dict."""
        return self.member.encoder.state_dict()

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """The vectors that the encoder makes now, without dropout, on the CPU."""
        training = self.member.training
        self.member.eval()
        try:
            return self.member.table().float().cpu().clone()
        finally:
            self.member.train(training)

    def state(self) -> dict[str, Any]:
        """All that training depends on, for a checkpoint."""
        return {
            "encoder": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.last_epoch,
            "random_state": self.member.random_state,
            "active": self.active,
            "best": self.best,
            "history": self.history,
            "without_gain": self.without_gain,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.member.encoder.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]
        self.member.random_state = state["random_state"]
        self.active = state["active"]
        self.best = state["best"]
        self.history = state["history"]
        self.without_gain = state["without_gain"]


def _rank(record: dict[str, Any]) -> tuple[float, float]:
    return record["dev_accuracy"], -record["dev_loss"]


def _rate_factor(step: int, warmup: int, steps: int, schedule: str) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
