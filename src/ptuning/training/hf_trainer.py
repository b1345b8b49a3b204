"""A prompt in a plain ``transformers.Trainer``, for those who have one.

    population, data, collator = ptuning.trainer_parts(model, tokenizer, prompt, rows)
    Trainer(population, args, train_dataset=data, data_collator=collator).train()
    population.finish(prompt)

``args`` needs ``remove_unused_columns=False``. Words have no noise here (``word_noise``): how far a
training has come is the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.base_model import BaseModel
from ..data import Rows, as_rows
from ..errors import InputError, warn
from ..forward.engine import Engine
from ..prompts.consistency import check_kind
from ..prompts.prompt import Prompt
from ..prompts.task import majority_answer
from ..rendering.collate import IGNORED, Batch
from ..rendering.example import answer_column
from ..rendering.render import Rendered, Renderer, render_all
from . import guidance
from .checks import check_some
from .found_words import find_words
from .members import answers_of, check_answer_lengths, learn_answer_length
from .population import Member, Population
from .rates import unit_for
from .settings import TrainSettings
from .starts import start_of

_NAMES = {"label_ids": "words", "labels": "right"}
"""Fields of `Batch` whose names mean something else to a trainer."""


class PromptModule(Population):
    """A `Population` of one prompt that hands its result over when training is done.

    Attributes:
        accepts_loss_kwargs: tells the trainer that `forward` knows what a step of several batches
            is to be divided by.
        draft: the prompt as it is trained.
        facts: of the training, for `Prompt.training`.
    """

    accepts_loss_kwargs = True

    def __init__(
        self, engine: Engine, renderer: Renderer, prompt: Prompt, seed: int, facts: dict[str, Any]
    ):
        settings = TrainSettings()
        words = start_of(renderer, (), (), settings.start_for(prompt.encoder), seed).words
        owner = renderer.owner if renderer.compares else None
        model, tokenizer = engine.base.model, engine.base.tokenizer
        unit = unit_for(model, tokenizer, prompt.encoder, settings, given_rate=True)
        member = Member(prompt, model, seed, words, unit)
        super().__init__(engine, [member], owner)
        self.draft, self.facts = prompt, facts

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        slots: Tensor,
        answers: Tensor,
        example: Tensor,
        member: Tensor,
        labels: Tensor | None = None,
        words: Tensor | None = None,
        right: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The mean loss ``()`` of a batch, from what the collator gives.

        Args:
            input_ids: this and the others but those below: the fields of `Batch`.
            labels: what counts in the loss, for the trainer: the right labels ``(N,)``, or the
                answers' tokens with -100 where there is none. (It takes each parameter with
                "label" in its name for one that must be there.)
            words: `Batch.label_ids`.
            right: `Batch.labels`.
            num_items_in_batch: how much counts in all batches of an optimizer step; by default in
                this one.
        """
        batch = Batch(
            self.engine.base.kind,
            input_ids,
            attention_mask,
            slots,
            answers,
            example,
            member,
            words,
            right,
            decoder_input_ids,
        )
        if labels is None:
            raise InputError(
                "the trainer took the labels away, as it does to smooth them; leave "
                "label_smoothing_factor out, which means nothing here"
            )
        if not self.is_open:
            raise InputError(
                "this training is finished, and the prompt is off the model; evaluate before "
                "`finish`, or use ptuning.evaluate"
            )
        count = int((labels != IGNORED).sum()) if num_items_in_batch is None else num_items_in_batch
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
        """Give `prompt` its vectors, and what belongs to them, and take the hooks off the base
        model. What an earlier training gave it beside (a label bias, members of an ensemble) goes.
        """
        self.eval()
        encoder = self.roster[0].encoder
        prompt.become(self.draft)
        prompt.others, prompt.training, prompt.label_matrix = (), dict(self.facts), None
        prompt.vectors = encoder.table().float().cpu().clone()
        weights = encoder.weights()
        prompt.encoder_weights = {k: v.detach().cpu().clone() for k, v in weights.items()}
        prompt.base_model = self.engine.base.describe()
        self.close()


@dataclass(frozen=True)
class _Collator:
    """Makes a trainer's batch of its items, in any process: a data loader's workers get it pickled
    where they are not forked."""

    batching: Callable[[Sequence[tuple[Rendered, int]], Sequence[int]], Batch]
    first_id: int

    def __call__(self, items: list[dict[str, Rendered]]) -> dict[str, Tensor]:
        batch = self.batching([(item["example"], 0) for item in items], [self.first_id])
        fields = vars(batch.to("cpu"))  # Trainer pins and moves it
        named = {_NAMES.get(k, k): v for k, v in fields.items() if isinstance(v, Tensor)}
        return {**named, "labels": named.get("right", named["answers"])}


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
        the module, a list of one-example dictionaries, and what makes a batch of them: the
        arguments of `PromptModule.forward`, such as ``input_ids`` ``(R, T)``.

    Raises:
        DataError: there is no training example.
        InputError: what is no prompt, or a model that is not the prompt's.
    """
    check_kind(prompt, Prompt)
    seed = TrainSettings(seed=seed).seed
    rows = as_rows(rows)
    check_some(rows)
    base = BaseModel.of(model, tokenizer)
    if prompt.base_model:
        base.check_same(prompt.base_model)
    draft = prompt.checked()
    if told := guidance.members_go(len(prompt.members), 1):
        warn(told)
    draft.others, draft.label_bias, draft.label_matrix = (), None, None
    draft.answer = answer_column(draft, rows[0])
    find_words(base, draft, rows)
    engine = Engine(base, plain=True)
    renderer = engine.renderer(draft)
    examples = render_all(renderer, rows, "training")
    check_answer_lengths(draft, renderer, examples, "training")
    learn_answer_length(draft, renderer, examples)
    majority = majority_answer(answers_of(draft, rows))
    facts = {"seed": seed, "examples": len(rows), "majority_answer": majority}
    module = PromptModule(engine, renderer, draft, seed, facts)
    collator = _Collator(engine.batching(), module.first_ids()[0])
    return module, [{"example": example} for example in examples], collator
