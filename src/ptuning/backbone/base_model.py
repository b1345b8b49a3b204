"""`BaseModel`: the frozen model with its tokenizer, made once and handed on.

Everything that asks "which kind, how long, on what device, padded with what" asks it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError, a_kind
from .identity import check_same, describe
from .kinds import ModelKind, kind_of
from .lookups import input_embedding, looks_up_on
from .tokens import check_tokenizer
from .traits import context_length, decoder_length
from .upstream import is_offloaded


@dataclass(frozen=True)
class BaseModel:
    """A frozen language model and its tokenizer.

    Attributes:
        model: a causal, masked or encoder-decoder language model.
        tokenizer: the model's.
        kind: how the model gives an answer.
        context: the longest input in tokens, or None.
    """

    model: nn.Module
    tokenizer: Any
    kind: ModelKind
    context: int | None

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any) -> BaseModel:
        """Read off what a model and its tokenizer are.

        Args:
            model: a loaded one.
            tokenizer: the model's; None where nothing is rendered.

        Raises:
            InputError: one of them is none, the model has no output head over a vocabulary, or it
                has a prompt in front of all that it reads.
        """
        kind = kind_of(model)
        _check_bare(model)
        if tokenizer is not None:
            check_tokenizer(tokenizer)
        return cls(model, tokenizer, kind, context_length(model, tokenizer))

    @property
    def longest_answer(self) -> int | None:
        """In tokens, where a decoder of its own limits it."""
        return decoder_length(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs now: models are moved."""
        return device_of(self.model)

    @property
    def pad_id(self) -> int:
        """An id for padded positions, which are masked: any that the embedding has a row for will
        do, and a tokenizer's may have been added to it alone."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if isinstance(pad, int) and 0 <= pad < self.known_tokens else 0

    @property
    def known_tokens(self) -> int:
        """How many ids the embedding has rows for; a tokenizer may have more, or fewer."""
        return input_embedding(self.model).num_embeddings

    @property
    def decoder_start_id(self) -> int:
        """The first id of an encoder-decoder model's decoder."""
        config: Any = self.model.config
        start = getattr(config, "decoder_start_token_id", None)
        return start if isinstance(start, int) else self.pad_id

    def check_same(self, saved: dict[str, Any]) -> None:
        """As `identity.check_same`."""
        check_same(saved, self.model, self.tokenizer)

    def describe(self) -> dict[str, Any]:
        """As `identity.describe`."""
        return describe(self.model, self.tokenizer)


def _check_bare(model: nn.Module) -> None:
    adapters = getattr(model, "peft_config", None)
    of_prompts = adapters.values() if isinstance(adapters, dict) else ()
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in of_prompts):
        raise InputError(
            f"model is {a_kind(model)}, which puts a prompt of its own in front of all "
            "that it reads; call it itself, or give the model in it (get_base_model())"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs."""
    device = getattr(model, "device", None)
    if not isinstance(device, torch.device):
        device = next(model.parameters()).device
    offloaded = device.type == "meta" and is_offloaded(model)
    return looks_up_on(input_embedding(model)) if offloaded else device
