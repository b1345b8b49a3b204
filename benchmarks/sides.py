"""The two sides of every comparison: PEFT's P-tuning and ours, on equal encoder weights.

Each side has a copy of the base model, or the model to itself. A step of either is forward,
backward, clipping and AdamW, as its training loop does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from accelerate import Accelerator
from torch import Tensor

from ptuning import Prompt, TrainSettings
from ptuning.backbone.base_model import BaseModel
from ptuning.forward.engine import Engine, Work
from ptuning.forward.prefix_store import PrefixStore
from ptuning.rendering.collate import Batch
from ptuning.rendering.layout import Sequence
from ptuning.rendering.render import Rendered
from ptuning.training.cuda_graphs import GraphedStep, graphs_or_plain
from ptuning.training.learner import Learner
from ptuning.training.population import Member, Population
from ptuning.training.steps import Later, steps_of

VIRTUAL = 20
RATE = 1e-3
Step = Callable[[], Any]


class Theirs:
    """PEFT's prompt encoder on a base model: virtual tokens in front of everything."""

    def __init__(self, base: Any):
        config = peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=VIRTUAL,
            encoder_hidden_size=base.config.hidden_size,
        )
        self.model = peft.get_peft_model(base, config)
        self.model.to(base.device)
        self.encoder: Any = self.model.prompt_encoder["default"]

    def loss(self, ids: Tensor) -> Tensor:
        """Of the last token of each row ``(R, T)`` behind the others."""
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    def step(self, ids: Tensor) -> Step:
        """A training step on rows whose last id is the answer."""
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

        def run() -> None:
            self.loss(ids).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return run

    @torch.no_grad()
    def last_logits(self, text: Tensor) -> Tensor:
        """Logits ``(R, vocabulary)`` behind the texts ``(R, T)``."""
        self.model.eval()
        return self.model(input_ids=text, attention_mask=torch.ones_like(text)).logits[:, -1]


class Ours:
    """One or several prompts on a base model.

    Args:
        base: the model.
        weights: of the encoder, given to every member; None leaves each its own.
        members: how many prompts.
    """

    def __init__(self, base: Any, weights: dict[str, Tensor] | None = None, members: int = 1):
        self.base, self.device = base, base.device
        prompt = Prompt(f"{{text}}[P*{VIRTUAL}][MASK]", encoder="mlp")
        made = [Member(prompt, base, seed, [None] * VIRTUAL) for seed in range(members)]
        settings = TrainSettings(epochs=1, learning_rate=RATE, schedule="constant", warmup=0.0)
        accelerator = Accelerator(cpu=base.device.type == "cpu")
        self.learners = []
        for member in made:
            if weights is not None:
                member.encoder.load_state_dict(weights)
            member.to(self.device)
            self.learners.append(Learner(member, settings, 10**6, accelerator))
        self.engine = Engine(BaseModel.of(base, None), 0)
        self.population = Population(self.engine, made)
        self.accelerator, self.settings, self.prompt = accelerator, settings, prompt
        self.notes: list[str] = []

    def batch(self, rows: list[tuple[Rendered, int]]) -> Batch:
        """Examples, each with its member, as one batch on the device."""
        return self.engine.batch(rows, self.population.first_ids())

    def keep_in(self, store: PrefixStore | None) -> None:
        """The store of frozen prefixes; without one every row is computed as a whole."""
        self.engine.store, self.engine.shares = store, store is not None

    def rows(self, examples: list[Rendered]) -> list[tuple[Rendered, int]]:
        """The same examples for every member."""
        return [(e, number) for number in range(len(self.learners)) for e in examples]

    @torch.no_grad()
    def losses(self, examples: list[Rendered], store: PrefixStore | None) -> Tensor:
        """Each member's mean loss ``(members,)``."""
        self.keep_in(store)
        return self.population.step(self.batch(self.rows(examples))) / len(examples)

    def step(self, examples: list[Rendered], store: Callable[[], PrefixStore | None]) -> Step:
        """A training step of every member on the examples, in parts as the training loop cuts them.

        Args:
            examples: of each member.
            store: gives the store that the step uses.
        """

        def plain(batch: Batch, divisor: Tensor) -> Tensor:
            losses = self.population.losses(batch) / divisor
            losses.sum().backward()
            return losses.detach()

        self.keep_in(store())
        step = graphs_or_plain(
            self.population,
            plain,
            self.settings,
            self.accelerator,
            self.notes.append,
        )
        if isinstance(step, GraphedStep) and self.device.type == "cuda":  # a long training's choice
            step.compile_layers(Work("auto", 10**3, 10**6))
        take = steps_of(self.population, self.learners, step, self.accelerator)
        divisor = [float(len(examples))] * len(self.learners)
        pending: list[Later] = []

        def run() -> None:
            self.population.train()
            self.keep_in(store())
            first_ids = self.population.first_ids()
            parts = self.engine.batches(self.rows(examples), first_ids, take.device)
            pending.append(take([parts], divisor))
            if len(pending) > 1:  # as the loop does: its numbers are read one step late
                pending.pop(0)()

        return run


def rendered(ids: Tensor, after: bool) -> list[Rendered]:
    """Rows ``(R, T)`` of text whose last id is the answer, virtual tokens in front or behind."""
    virtual = tuple(-1 - i for i in range(VIRTUAL))
    examples = []
    for row in ids.tolist():
        text = tuple(row[:-1])
        whole = (*text, *virtual) if after else (*virtual, *text)
        opening = 0 if after else VIRTUAL
        examples.append(Rendered((Sequence(whole, len(whole), (row[-1],), opening),)))
    return examples
