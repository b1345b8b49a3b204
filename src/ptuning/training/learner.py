"""One member's own optimizer, schedule, order of examples and best result so far.

Members of a population never touch each other: nothing here is shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW

from ..backbone.upstream import skip_failed_steps
from ..prompts.encoder_config import PromptEncoderReparameterizationType
from .label_matrix import RATE
from .population import Member
from .rates import usual_rate
from .settings import TrainSettings
from .word_noise import GROWN


class Learner:
    """Drives one member, and the base model where it is trained with it.

    Args:
        member: what is trained.
        settings: the member's own.
        steps: of the whole training.
        accelerator: has the scale of fp16's losses.
        model: the base model, if its weights are trained too.

    Attributes:
        rate: the highest learning rate, in the encoder's unit.
        active: still in training.
        dropped: the epoch at whose end it fell out of a population, or None.
        best: the best record so far, with the ``vectors``, ``label_matrix`` and ``weights`` of its
            epoch, and the ``model``'s where they are trained; empty before the first.
        history: one record per epoch.
    """

    def __init__(
        self,
        member: Member,
        settings: TrainSettings,
        steps: int,
        accelerator: Accelerator,
        model: nn.Module | None = None,
    ):
        self.member, self.settings, self.accelerator = member, settings, accelerator
        self.model = model
        self.rate = settings.learning_rate or usual_rate(member.encoder)
        if settings.label_matrix:
            member.add_matrix(RATE / usual_rate(member.encoder))
        groups: list[dict[str, Any]] = [{"params": list(member.parameters())}]
        if weights := list(self._model_weights().values()):
            groups.append({"params": weights, "lr": settings.model_learning_rate})
        self.optimizer = AdamW(groups, lr=self.rate, weight_decay=settings.weight_decay)
        self._highest = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.steps, self.steps_taken = steps, 0
        self._steps_per_epoch = steps // settings.settled_epochs
        self.active = True
        self.dropped: int | None = None
        self.best: dict[str, Any] = {}
        self.history: list[dict[str, float]] = []
        self.without_gain = 0

    def order(self, epoch: int, count: int) -> list[int]:
        """The order of the examples in an epoch, a function of seed and epoch alone."""
        if not self.settings.shuffle:
            return list(range(count))
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        return torch.randperm(count, generator=generator).tolist()

    @property
    def rate_as_given(self) -> float:
        """The highest learning rate as a user would give it: of vectors without a network theirs,
        in no unit."""
        encoder = self.member.encoder
        alone = encoder.encoder_type == PromptEncoderReparameterizationType.NONE
        return self.rate * encoder.unit if alone else self.rate

    def rates(self) -> list[float]:
        """The learning rates of the next step, of the encoder and of the model if it is trained."""
        warmup = round(self.settings.warmup * self.steps)
        factor = _rate_factor(self.steps_taken, warmup, self.steps, self.settings.schedule)
        return [rate * factor for rate in self._highest]

    def update_unseen(self, rate: Tensor, failed: Tensor) -> None:
        """Let the optimizer run where nobody looks at its numbers, such as in a CUDA graph.

        Args:
            rate: ``()`` on the device, the learning rate of each step.
            failed: likewise; while it is 1 a step changes nothing.
        """
        state = self.optimizer.state_dict()
        settings: dict[str, Any] = {"lr": rate, "weight_decay": self.settings.weight_decay}
        self.optimizer = AdamW(self.parameters(), **settings, fused=True, capturable=True)
        self._load_optimizer(state)
        (group,) = self.optimizer.param_groups
        group["lr"] = rate  # which loading has copied
        skip_failed_steps(self.optimizer, failed)

    def clip(self) -> Tensor:
        """Clip the gradient; gives its norm ``()`` before."""
        return nn.utils.clip_grad_norm_(self.parameters(), self.settings.max_grad_norm)

    def update(self, finite: bool = True) -> bool:
        """Clip, take one optimizer step, and clear the gradient.

        Args:
            finite: the loss was; otherwise no step is taken.

        Returns:
            False where the gradient was not finite: then no step was taken. (In fp16 the scaler
            skips such steps by itself; who drives the members updates its scale, once for all.)
        """
        if self.active and finite:
            scaler = self.accelerator.scaler
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            norm = self.clip()
            finite = scaler is not None or bool(torch.isfinite(norm))
            if finite:
                for group, rate in zip(self.optimizer.param_groups, self.rates(), strict=True):
                    group["lr"] = rate
                if scaler is None:
                    self.optimizer.step()
                else:  # without accelerate, which would change the scale between two members
                    scaler.step(self.optimizer)
                self.steps_taken += 1
        self.optimizer.zero_grad()
        return finite

    def note(self, record: dict[str, float]) -> str | None:
        """Take in an epoch's record, and keep the weights if it is the best so far.

        Without dev figures the latest is the best.

        Returns:
            what is not finite, or None: such a record is never the best.
        """
        self.history.append(record)
        if not math.isfinite(record.get("dev_loss", 0.0)):
            return f"the dev loss is {record['dev_loss']}"
        made = self.made()
        if not all(torch.isfinite(tensor).all() for tensor in made.values()):
            return "virtual tokens are not finite"
        latest = not self.best or "dev_loss" not in record
        gain = latest or self._is_gain(record)
        if latest or self.rank(record) > self.rank(self.best):
            self._keep(record, made)
        solved = self.best.get("dev_accuracy") == 1
        waits = gain or (self._noise_grows and not solved)
        self.without_gain = 0 if waits else self.without_gain + 1
        patience = self.settings.patience_for(self._steps_per_epoch, solved)
        self.active = not patience or self.without_gain < patience
        return None

    @property
    def _noise_grows(self) -> bool:
        """What is learnt becomes harder: that dev results stand still says nothing yet."""
        return bool(self.settings.word_noise) and self.steps_taken < GROWN * self.steps

    def _is_gain(self, record: dict[str, float]) -> bool:
        """Worth training on for: a better result. By default that of a task that is solved is none
        any more: its loss falls on for ever."""
        solved = self.settings.patience is None and self.best["dev_accuracy"] == 1
        return not solved and self.rank(record) > self.rank(self.best)

    def rank(self, record: dict[str, Any]) -> tuple[float, float]:
        """What a record is compared by, higher is better: dev accuracy, then loss; or the other way
        round (``choose_by``). Without dev figures the training loss."""
        if "dev_loss" not in record:
            return 0.0, -record["loss"]
        accuracy, loss = record["dev_accuracy"], record["dev_loss"]
        return (accuracy, -loss) if self.settings.choose_by == "accuracy" else (-loss, accuracy)

    def note_start(self, figures: dict[str, float]) -> None:
        """Take in the dev figures before the first step: the best so far, as epoch 0."""
        if math.isfinite(figures["dev_loss"]):
            self._keep({"epoch": 0, **figures}, self.made())

    def _keep(self, record: dict[str, float], made: dict[str, Tensor]) -> None:
        self.best = {**record, "weights": _copy(self.weights()), **made}
        if self.model is not None:
            self.best["model"] = _copy(self._model_weights())

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.member.parameters(), *self._model_weights().values()]

    def _model_weights(self) -> dict[str, nn.Parameter]:
        named = () if self.model is None else self.model.named_parameters()
        return {name: weight for name, weight in named if weight.is_floating_point()}

    def put_best_into_model(self) -> None:
        """Give the base model the weights that belong to the best result, if it was trained."""
        if self.model is not None:
            self.model.load_state_dict(self.best["model"], strict=False)

    def figures(self) -> dict[str, float]:
        """The best record's numbers."""
        tensors = ("weights", "vectors", "label_matrix", "model")
        return {k: v for k, v in self.best.items() if k not in tensors}

    def weights(self) -> dict[str, Tensor]:
        """The encoder's weights, ``(…)`` by name."""
        return self.member.encoder.weights()

    @torch.no_grad()
    def made(self) -> dict[str, Tensor]:
        """The ``vectors`` ``(virtual tokens, width)`` that the encoder makes now, without dropout,
        and the ``label_matrix`` ``(W, W)`` if there is one, on the CPU."""
        member, training = self.member, self.member.training
        member.eval()
        try:
            table = member.table().float().cpu()
        finally:
            member.train(training)
        made = {"vectors": table[: member.encoder.total_virtual_tokens].clone()}
        if member.matrix is not None:
            made["label_matrix"] = member.matrix_in(table).clone()
        return made

    def state(self) -> dict[str, Any]:
        """All that training depends on, for a checkpoint."""
        more: dict[str, Any] = {} if self.model is None else {"model": dict(self._model_weights())}
        if self.member.matrix is not None:
            more["matrix"] = self.member.matrix
        return {
            **more,
            "encoder": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.steps_taken,
            "random_state": self.member.random_state,
            "active": self.active,
            "dropped": self.dropped,
            "best": self.best,
            "history": self.history,
            "without_gain": self.without_gain,
        }

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Take over an optimizer's numbers; how it computes stays this one's."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state, "param_groups": groups})

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.member.encoder.load_weights(state["encoder"])
        if self.model is not None:
            self.model.load_state_dict(state["model"], strict=False)
        if self.member.matrix is not None:
            self.member.matrix.data.copy_(state["matrix"])
        self._load_optimizer(state["optimizer"])
        self.steps_taken = state["schedule"]
        self.member.random_state = state["random_state"]
        self.active, self.dropped = state["active"], state["dropped"]
        self.best = state["best"]
        self.history = state["history"]
        self.without_gain = state["without_gain"]


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def halve(learners: Sequence[Learner], epoch: int, epochs: int) -> None:
    """At the rungs of a population drop the half that is behind, but not of those who answer
    together (``ensemble``).

    Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): N members have log2(N)
    rungs, or one for each three epochs if that is fewer, evenly spread over the epochs; behind the
    r-th there are N / 2^r. Without dev figures nobody is behind.
    """
    rungs = min(len(learners).bit_length() - 1, epochs // 3)
    passed = sum(epoch >= round(epochs * r / (rungs + 1)) for r in range(1, rungs + 1))
    staying = max(math.ceil(len(learners) / 2**passed), learners[0].settings.ensemble)
    active = [learner for learner in learners if learner.active and "dev_loss" in learner.best]
    for learner in sorted(active, key=lambda x: x.rank(x.best), reverse=True)[staying:]:
        learner.active, learner.dropped = False, epoch


def _rate_factor(step: int, warmup: int, steps: int, schedule: str) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
