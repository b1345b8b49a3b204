"""Positions that a caller gives for a text, with room for what is inserted into it.

    text      p[t]  ->  p[t] + tokens inserted in front of t
    inserted        ->  the column's own count, or one more than what stands in front of it

Models whose tokens have a position on several axes (Qwen2-VL: time, height, width) give
``(axes, B, T)``; inserted tokens have the same position on each, as text has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbone.injection import may_look_at_values
from ..backbone.placement import Placement, padding
from ..errors import InputError


def shifted(positions: Tensor, where: Placement, mask: Tensor | None, first: int) -> Tensor:
    """The caller's positions of the text, with room for what was inserted.

    Args:
        positions: ``(B, T)``, ``(1, T)`` or ``(axes, B, T)``, of the text alone.
        where: the batch's placement.
        mask: ``(B, T)`` of the text; None where there is no padding.
        first: the model's first position.

    Returns:
        ``(B, P)`` or ``(axes, B, P)``

    Raises:
        InputError: there are several texts in the row.
    """
    if mask is None and len(where.columns) == 1:
        _expect_one_text(positions)
    column = where.position_ids()
    rank = torch.arange(where.length, device=positions.device)
    if mask is not None:
        rank = (rank - padding(mask)[0]).clamp(min=0)
    inserted_before = where.text_of(column) - rank
    axes = positions.reshape(-1, *positions.shape[-2:])
    text = torch.stack([where(axis + inserted_before, 0) for axis in axes])
    ones = torch.ones_like(where.columns)
    is_text = where(ones, 0) > 0
    real = where(ones if mask is None else (mask != 0).long(), 0) > 0
    inserted = _behind(text.amax(0), real)
    inserted = torch.where(inserted < 0, column + first, inserted)
    return torch.where(is_text, text, inserted).view(*positions.shape[:-2], *column.shape)


def _expect_one_text(positions: Tensor) -> None:
    """Refuse positions ``(1, T)`` that begin again, by which transformers knows packed texts: it
    lets each read itself alone, so all but the first would be without the prompt."""
    if positions.shape[:-1] != (1,) or not may_look_at_values(positions):
        return
    if bool((positions.diff() < 0).any()):
        raise InputError(
            "position_ids begin again within the row: several texts in one row would share the "
            "prompt of the first; give each text a row of its own (no packing or padding_free), "
            "or, where it is one text, its attention_mask"
        )


def _behind(text: Tensor, real: Tensor) -> Tensor:
    """For each column ``(B, P)`` a position behind the text in front of it; -1 where none is."""
    column = torch.arange(text.shape[1], device=text.device).expand_as(text)
    last = column.masked_fill(~real, -1).cummax(1).values
    highest = text.masked_fill(~real, -1).cummax(1).values
    return (highest + column - last).masked_fill(last < 0, -1)
