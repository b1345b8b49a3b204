"""``generate`` with prompts, for every decoding strategy that a causal model has.

The generation loop sees the text's ids alone, so lengths, processors, streamers and candidates are
those of the text. Only what the model itself reads has the prompt in it: a *view* of the base model
(its weights, its hooks, its settings) prepares each step's inputs with the virtual ids placed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.placement import Placement
from ..errors import InputError


@dataclass(frozen=True)
class Start:
    """A generation's text as the model reads it.

    Attributes:
        ids: ``(B, P)``, virtual ids placed.
        mask: ``(B, P)``, or None where there is no padding.
        where: the placement.
        positions: whether the model is given positions; the reference gives none.
    """

    ids: Tensor
    mask: Tensor | None
    where: Placement
    positions: bool

    def continued(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Ids, mask and positions when the text has grown to ``(B, T + new)``."""
        length = self.where.length
        ids = torch.cat([self.ids, text[:, length:]], dim=1)
        column = torch.arange(ids.shape[1], device=ids.device)
        positions = (column - self.where.lead.unsqueeze(1)).clamp(min=0)
        if self.mask is None:
            return ids, None, positions
        new = self.mask.new_ones(text[:, length:].shape) if mask is None else mask[:, length:]
        return ids, torch.cat([self.mask, new.to(self.mask.dtype)], dim=1), positions


Begin = Callable[[Tensor, Tensor | None], Start]


def view(model: nn.Module, begin: Begin, length: int, inserted: int) -> Any:
    """A view of a causal model that reads prompts in front of what it generates.

    The model itself is not changed, so several threads may generate from it.

    Args:
        model: the base model.
        begin: gives the start of the generation from the text's ids and mask ``(B * beams, T)``.
        length: T.
        inserted: how many tokens the prompt adds to a row.
    """
    model_class: Any = type(model)
    result: Any = object.__new__(_prompted(model_class))
    result.__dict__.update(model.__dict__)
    result.__dict__.update(_begin=begin, _length=length, _inserted=inserted, _start=None)
    return result


@functools.cache
def _prompted(model_class: Any) -> type:
    class Prompted(model_class):
        _start: Start | None
        _begin: Begin
        _length: int
        _inserted: int

        def prepare_inputs_for_generation(
            self,
            input_ids: Tensor,
            next_sequence_length: int | None = None,
            past_key_values: Any = None,
            attention_mask: Tensor | None = None,
            is_first_iteration: bool | None = False,
            **kwargs: Any,
        ) -> dict[str, Any]:
            if self._start is None:
                mask = None if attention_mask is None else attention_mask[:, : self._length]
                self._start = self._begin(input_ids[:, : self._length], mask)
            ids, mask, positions = self._start.continued(input_ids, attention_mask)
            if not self._start.positions:
                kwargs.pop("position_ids", None)
            elif kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = positions
            if next_sequence_length is not None:
                next_sequence_length = ids.shape[1] - int(past_key_values.get_seq_length())
            return super().prepare_inputs_for_generation(
                ids,
                next_sequence_length=next_sequence_length,
                past_key_values=past_key_values,
                attention_mask=mask,
                is_first_iteration=is_first_iteration,
                **kwargs,
            )

        def _prepare_cache_for_generation(self, *args: Any) -> Any:
            *others, length = args  # a static cache must have room for the virtual tokens too
            return super()._prepare_cache_for_generation(*others, length + self._inserted)

    Prompted.__name__, Prompted.__qualname__ = model_class.__name__, model_class.__qualname__
    Prompted.__module__ = model_class.__module__
    return Prompted


def check_options(generation_config: Any, options: dict[str, Any]) -> None:
    """Refuse what would read the text past the prompt.

    Raises:
        InputError: an option that prompts cannot go with.
    """
    given = options.get("generation_config") or generation_config

    def value(name: str) -> Any:
        return options.get(name, getattr(given, name, None))

    reasons = {
        "prefill_chunk_size": "the prompt is placed in the whole input at once",
        "token_healing": "it cuts the input behind which the prompt was placed",
    }
    for name, reason in reasons.items():
        if value(name):
            raise InputError(f"generate with {name} does not go with a prompt: {reason}")
    if value("cache_implementation") == "paged":
        raise InputError(
            "continuous batching (cache_implementation='paged') reads plain ids only; generate "
            "without it, or attach the prompts with ptuning.attach"
        )
