"""A prompt in a plain ``transformers.Trainer``, for those who have one.

    population, data, collator = ptuning.trainer_parts(model, tokenizer, prompt, rows)
    Trainer(population, args, train_dataset=data, data_collator=collator).train()
    population.finish(prompt)

``args`` needs ``remove_unused_columns=False``. Words have no noise here (``word_noise``): how far a
training has come is the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.base_model import BaseModel
from ..data import Rows, as_rows
from ..errors import DataError, InputError
from ..forward.engine import Engine
from ..prompts.prompt import Prompt
from ..rendering.collate import IGNORED, Batch
from ..rendering.example import answer_column
from ..rendering.render import Rendered, Renderer, render_all
from .members import learn_answer_length
from .population import Member, Population
from .settings import TrainSettings
from .starts import start_of


class PromptModule(Population):
    """A `Population` of one prompt that hands its result over when training is done."""

    def __init__(self, engine: Engine, renderer: Renderer, prompt: Prompt, seed: int):
        start = TrainSettings().start_for(prompt.encoder)
        words = start_of(renderer, (), (), start, seed).words
        owner = renderer.owner if renderer.compares else None
        member = Member(prompt, engine.base.model, seed, words)
        super().__init__(engine, [member], owner)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        slots: Tensor,
        answers: Tensor,
        example: Tensor,
        member: Tensor,
        label_ids: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The mean loss ``()`` of a batch, from the fields of `Batch` that the collator gives."""
        batch = Batch(
            self.engine.base.kind,
            input_ids,
            attention_mask,
            slots,
            answers,
            example,
            member,
            label_ids,
            labels,
            decoder_input_ids,
        )
        count = len(member) if labels is not None else int((answers != IGNORED).sum())
        return {"loss": self.step(batch).sum() / count}

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what would do nothing: layers recompute in training mode alone, and the frozen
        model stays out of it.

        Raises:
            InputError: always.
        """
        raise InputError(
            "gradient_checkpointing has no effect here: the frozen model is not in training mode; "
            "leave it out, and take smaller batches where memory is short"
        )

    @torch.no_grad()
    def finish(self, prompt: Prompt) -> None:
        """Give `prompt` its vectors and take the hooks off the base model."""
        self.eval()
        encoder = self.roster[0].encoder
        prompt.vectors = encoder.table().float().cpu().clone()
        state = encoder.state_dict()
        prompt.encoder_weights = {k: v.detach().cpu().clone() for k, v in state.items()}
        prompt.base_model = self.engine.base.describe()
        self.close()


def trainer_parts(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    rows: Rows,
    *,
    seed: int = 0,
) -> tuple[PromptModule, list[dict[str, Rendered]], Callable[[list[Any]], dict[str, Tensor]]]:
    """The module, data set and collator that a ``Trainer`` takes.

    Args:
        model: the base model; only the prompt's encoder is trained.
        tokenizer: the model's.
        prompt: filled by ``PromptModule.finish``.
        rows: training examples, as `train` takes them.
        seed: of the encoder's initialisation, as in `train`.

    Returns:
        the module, a list of one-example dictionaries, and what makes a batch of them: the tensors
        of `Batch`, such as ``input_ids`` ``(R, T)``.

    Raises:
        DataError: there is no training example.
    """
    rows = as_rows(rows)
    if not rows:
        raise DataError("there is no training example; give at least one")
    prompt.answer = answer_column(prompt, rows[0])
    engine = Engine(BaseModel.of(model, tokenizer), plain=True)
    renderer = engine.renderer(prompt)
    examples = render_all(renderer, rows, "training")
    learn_answer_length(prompt, renderer, examples)
    module = PromptModule(engine, renderer, prompt, seed)
    first_id = module.first_ids()[0]

    def collator(items: list[dict[str, Rendered]]) -> dict[str, Tensor]:
        batch = engine.batch([(item["example"], 0) for item in items], [first_id])
        return {k: v for k, v in vars(batch).items() if isinstance(v, Tensor)}

    return module, [{"example": example} for example in examples], collator
