"""``generate`` with prompts, for every decoding strategy that a model has.

The generation loop sees the text's ids alone, so lengths, processors, streamers and candidates are
those of the text. Only what the model itself reads has the prompt in it, in each step or in the
encoder (`upstream.generating_view`); the rest is done as the model does it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..backbone.placement import Placement
from ..backbone.upstream import CACHE
from ..errors import InputError
from . import arguments, continuing
from .placing import Base, Rows, inserted_ids, pad_id, place, placement
from .positions import shifted


class Prompts:
    """The prompts of one generation: what the model reads in place of the text's ids.

    Args:
        base: the model.
        rows: each row's adapter; one for all rows alike.
        ids: the text ``(B, T)``.
        given: the call's other arguments.
        stack: holds what must be undone after the generation.

    Attributes:
        read: the model has read them.
    """

    def __init__(
        self, base: Base, rows: Rows, ids: Tensor, given: dict[str, Any], stack: ExitStack
    ):
        self.base, self.rows, self.stack = base, rows, stack
        self.length = ids.shape[1]
        self.names = arguments.per_token(given, *ids.shape)
        self.inserted = max(0 if row is None else row.insertion.length for row in rows)
        self.read = False
        self._start: _Start | None = None

    def step(self, text: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What a causal model reads when the text has grown to ``(B * beams, T + new)``.

        Args:
            text: the ids.
            kwargs: what goes with them; a mask, positions and other values per token have the
                text's columns.

        Returns:
            Ids ``(B * beams, P + new)`` and what goes with them.
        """
        self.read = True
        start = self._start = self._start or self._begin(text, kwargs.get("attention_mask"))
        kwargs = dict(kwargs)
        ids = torch.cat([start.ids, text[:, self.length :]], dim=1)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if start.mask is not None:
            new = start.mask.new_ones(text[:, self.length :].shape)
            new = new if mask is None else mask[:, self.length :].to(start.mask.dtype)
            kwargs["attention_mask"] = torch.cat([start.mask, new], dim=1)
        for name in self.names:
            if kwargs.get(name) is not None:
                kwargs[name] = self._spread(start.where, name, kwargs[name])
        if self.base.reference_layout:
            kwargs.pop("position_ids", None)  # the reference gives none
        elif positions is not None:
            kwargs["position_ids"] = self._positions(start, positions)
        lengths = tuple(0 if row is None else row.insertion.length for row in self._each(text))
        held = continuing.Held(kwargs.get("attention_mask"), ids.shape[1], text.shape[1], lengths)
        continuing.note(kwargs.get(CACHE), held)
        return ids, kwargs

    def encoder(self, text: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any], str]:
        """What an encoder reads: its main input ``(B, T)``, what goes with it, and the main input's
        name."""
        self.read = True
        placed, _ = place(self.base, self.rows, {**kwargs, "input_ids": text}, self.stack)
        name = "inputs_embeds" if self.base.reference_layout else "input_ids"
        return placed.pop(name), placed, name

    def _each(self, text: Tensor) -> Rows:
        """The adapter of each row of the text, whose beams stand beside one another."""
        return [row for row in self.rows for _ in range(len(text) // len(self.rows))]

    def _begin(self, text: Tensor, mask: Tensor | None) -> _Start:
        rows = self._each(text)
        text = text[:, : self.length]
        mask = None if mask is None else mask[:, : self.length]
        where = placement(self.base, rows, text, mask)
        if where.ragged and mask is None:
            mask = torch.ones_like(text)
        ids = inserted_ids(rows, where.inserted, text.device)
        placed = where(text, ids.clamp(min=0), pad=pad_id(self.base) or 0)
        return _Start(placed, None if mask is None else where(mask, 1), where, mask)

    def _spread(self, where: Placement, name: str, value: Tensor) -> Tensor:
        """Values of the text's tokens with room for the prompt, and then those of new tokens."""
        if value.shape[1] < self.length:  # the model keeps those of the last token alone
            return value
        fill = arguments.FILLERS.get(name, 0)
        placed = where(value[:, : self.length], fill, pad=fill)
        new = value[:, self.length :]
        return torch.cat([placed, new.expand(len(placed), *new.shape[1:])], dim=1)

    def _positions(self, start: _Start, positions: Tensor) -> Tensor:
        """Positions ``(…, B, T + new)`` with room for the prompt; new tokens go on counting."""
        text, new = positions[..., : self.length], positions[..., self.length :]
        placed = shifted(text, start.where, start.text_mask, 0)
        return torch.cat([placed, placed[..., -1:] + new - text[..., -1:]], dim=-1)


class _Start:
    """A generation's text as the model reads it.

    Attributes:
        ids: ``(B, P)``, prompts placed.
        mask: ``(B, P)``, or None where there is no padding.
        where: the placement.
        text_mask: ``(B, T)``, or None.
    """

    def __init__(self, ids: Tensor, mask: Tensor | None, where: Placement, text: Tensor | None):
        self.ids, self.mask, self.where, self.text_mask = ids, mask, where, text


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
