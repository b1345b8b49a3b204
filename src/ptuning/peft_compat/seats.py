"""Where the prompts of a batch stand: each row's seat, and the rows' ids with prompts in them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbone.injection import Injector, Span
from ..backbone.placement import Placement
from ..errors import InputError
from ..prompts.encoder_config import TaskType
from .frame import Frame

Seat = tuple[Frame, Span] | None
"""An adapter's frame and the virtual ids of its rows; None for a row without a prompt."""


@dataclass(frozen=True)
class Base:
    """What must be known of the base model to place inputs.

    Attributes:
        model: the base model.
        injector: its hooks.
        task: what the model is used for, or None.
        causal: it reads from left to right.
        position_offset: what its position ids begin with (RoBERTa's family: behind the padding id).
        reference_layout: place virtual tokens in front of the padding, as the reference does.
    """

    model: Any
    injector: Injector
    task: TaskType | None
    causal: bool
    position_offset: int
    reference_layout: bool

    @property
    def encodes_and_decodes(self) -> bool:
        """The model has an encoder and a decoder; prompts stand in the encoder's input."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def logits_of_decoder(self) -> bool:
        """Its logits and hidden states belong to a decoder, whose input has no prompt."""
        per_input = (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
        return self.encodes_and_decodes and self.task not in per_input

    def accepts(self, name: str) -> bool:
        """Its forward has an argument of this name."""
        return name in inspect.signature(self.model.forward).parameters


def placed_ids(
    base: Base, seats: Sequence[Seat], text: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Placement]:
    """Ids and mask ``(B, P)`` of rows ``(B, T)`` with their prompts, and where the text stands."""
    where = placement(base, seats, text, mask, False)
    if where.ragged and mask is None:
        mask = torch.ones_like(text)
    ids = inserted_ids(seats, where.inserted, text.device)
    placed = where(text, ids.clamp(min=0), pad=pad_id(base.model))
    return placed, None if mask is None else where(mask, 1), where


def placement(
    base: Base, seats: Sequence[Seat], text: Tensor, mask: Tensor | None, embedded: bool
) -> Placement:
    """Where the prompts of `seats` stand in rows of `text`."""
    frames = [Frame(()) if seat is None else seat[0] for seat in seats]
    head = tail = None
    if any(frame.head or frame.tail for frame in frames):
        if embedded:
            raise InputError(
                "inputs_embeds do not show where special tokens stand, and the template's virtual "
                "tokens stand inside them; give input_ids"
            )
        head, tail = _special(frames, text, mask)
    return Placement(
        text.shape[1],
        [len(frame.before) for frame in frames],
        [len(frame.after) for frame in frames],
        mask,
        head=head,
        tail=tail,
        behind_padding=not base.reference_layout,
        pads_right=not (base.causal or base.reference_layout),
        fill_left=base.causal,
        device=text.device,
    )


def _special(frames: list[Frame], text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each row's special tokens in front and behind ``(B,)``, as its own frame has them."""
    heads, tails = text.new_zeros(len(text)), text.new_zeros(len(text))
    for frame in set(frames):
        head, tail = frame.special(text, mask)
        own = torch.tensor([other == frame for other in frames], device=text.device)
        if head is not None and tail is not None:
            heads, tails = torch.where(own, head, heads), torch.where(own, tail, tails)
    return heads, tails


def inserted_ids(seats: Sequence[Seat], width: int, device: torch.device) -> Tensor:
    """``(B, width)`` ids that are put in, -1 where a row has fewer."""
    made: dict[Seat, list[int]] = {}
    for seat in set(seats):
        frame, first = (Frame(()), 0) if seat is None else (seat[0], seat[1].first)
        ids = [first - 1 - i if i < 0 else i for i in (*frame.before, *frame.after)]
        made[seat] = ids + [-1] * (width - len(ids))
    return torch.tensor([made[seat] for seat in seats], device=device).view(len(seats), width)


def pad_id(model: Any) -> int:
    """The model's padding id, or any id where it has none."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 0 if pad is None else int(pad)
