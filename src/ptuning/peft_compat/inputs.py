"""A call's arguments with the prompts placed among them.

The rows' token ids get the adapters' virtual ids put in, and everything that has a value per token
(mask, labels, token types, positions) is spread likewise. Rows given as ``inputs_embeds`` become
virtual ids too, so there is one way in. The reference's own layout is the exception: it is
reproduced through ``inputs_embeds``, as the reference does it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..backbone.placement import Placement, padding
from ..errors import InputError
from ..prompts.encoder_config import TaskType
from .seats import Base, Seat, inserted_ids, pad_id, placement


def place(
    base: Base,
    seats: Sequence[Seat],
    inputs: dict[str, Any],
    stack: ExitStack,
    *,
    of_text: bool = False,
) -> tuple[dict[str, Any], Placement]:
    """A call's arguments with prompts in them.

    Args:
        base: the model.
        seats: for each row what is put around its text; one for all rows alike.
        inputs: the call's arguments.
        stack: holds what must be undone after the call.
        of_text: positions of answers count from the text's first token, instead of from the first
            virtual one as the reference's do.

    Returns:
        The base model's arguments, and where the text stands in them.

    Raises:
        InputError: no ids or embeddings, or both, or a mask of another shape.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    text, embedded = _text(inputs)
    rows, length = text.shape[:2]
    mask = inputs.pop("attention_mask", None)
    if mask is not None and mask.shape != (rows, length):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, and the input ({rows}, {length}): give "
            "one value per token of the text; virtual tokens are added here"
        )
    seats = list(seats) * rows if len(seats) == 1 else seats
    where = placement(base, seats, text, mask, embedded)
    if where.ragged and mask is None:
        mask = torch.ones(rows, length, dtype=torch.long, device=text.device)
    ids = inserted_ids(seats, where.inserted, text.device)
    if mask is not None:
        inputs["attention_mask"] = where(mask, 1)
    _spread(base, inputs, where, mask)
    _find_answers(inputs, where, [0 if of_text else _in_front(seat) for seat in seats])
    if base.reference_layout:
        inputs["inputs_embeds"] = _embeddings(base, where, text, ids, embedded)
        return inputs, where
    if embedded:
        span = base.injector.add(text.flatten(0, 1))
        stack.callback(base.injector.remove, span)
        text = torch.arange(span.first, span.end, device=text.device).view(rows, length)
    inputs["input_ids"] = where(text, ids.clamp(min=0), pad=pad_id(base.model))
    _add_positions(base, inputs, where, mask)
    if base.task == TaskType.SEQ_CLS and base.causal:
        _mark_padding(base, inputs, stack)
    return inputs, where


def _text(inputs: dict[str, Any]) -> tuple[Tensor, bool]:
    """The rows' ids, or their embeddings; and which of the two."""
    ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
    if (ids is None) == (embeds is None):
        raise InputError("give input_ids or inputs_embeds, one of the two")
    return (embeds, True) if ids is None else (ids, False)


def _spread(
    base: Base,
    inputs: dict[str, Any],
    where: Placement,
    mask: Tensor | None,
) -> None:
    """Spread what has a value per token over the placed columns."""
    if "token_type_ids" in inputs:
        types = inputs.pop("token_type_ids")
        dropped = base.task in (TaskType.FEATURE_EXTRACTION, TaskType.QUESTION_ANS)
        if not base.accepts("token_type_ids") or (base.reference_layout and dropped):
            warnings.warn(
                "token_type_ids are dropped: "
                + ("the reference does so" if base.reference_layout else "the model takes none"),
                stacklevel=4,
            )
        else:
            inputs["token_type_ids"] = where(types, 0)
    if "position_ids" in inputs:
        positions = inputs.pop("position_ids")
        if base.reference_layout:
            warnings.warn("position_ids are dropped, as the reference does", stacklevel=4)
        else:
            inputs["position_ids"] = _shifted(positions, where, mask, base.position_offset)
    labels = inputs.get("labels")
    per_token = base.task in (TaskType.CAUSAL_LM, TaskType.TOKEN_CLS) or (
        base.task is None and not base.encodes_and_decodes
    )
    if not per_token or labels is None or labels.dim() != 2:
        return
    if labels.shape[1] == where.length:
        inputs["labels"] = where(labels, -100, pad=-100)
    elif labels.shape[1] == where.length + where.inserted:  # as the reference wants them
        own, virtual = labels[:, where.inserted :], labels[:, : where.inserted]
        inputs["labels"] = where(own, virtual, pad=-100)
    if base.causal and base.task != TaskType.TOKEN_CLS and not base.reference_layout:
        inputs["labels"] = _without_first(inputs["labels"], where)


def _without_first(labels: Tensor, where: Placement) -> Tensor:
    """No label for a row's first token if padding is in front: alone nothing would predict it."""
    column = torch.arange(labels.shape[1], device=labels.device)
    lead = where.lead.unsqueeze(1)
    return labels.masked_fill((column == lead) & (lead > 0), -100)


def _in_front(seat: Seat) -> int:
    """How many virtual tokens the reference would count before a row's text."""
    return 0 if seat is None or seat[0].template is not None else seat[0].length


def _find_answers(inputs: dict[str, Any], where: Placement, offsets: list[int]) -> None:
    """Start and end of an answer ``(B,)``, counted from `offsets` before the text, as columns."""
    for name in ("start_positions", "end_positions"):
        if name not in inputs:
            continue
        given = inputs[name].view(-1, 1)
        at = given - torch.tensor(offsets, device=given.device).unsqueeze(1)
        column = where.columns.gather(1, at.clamp(0, where.length - 1))
        column = torch.where(at < 0, given + where.lead.unsqueeze(1), column)
        outside = (at >= where.length) | (given < 0)
        ignored = where.length + where.inserted
        inputs[name] = column.masked_fill(outside, ignored).squeeze(1)


def _shifted(positions: Tensor, where: Placement, mask: Tensor | None, offset: int) -> Tensor:
    """The user's positions of the text, with room for what was put in front of it."""
    placed = where.position_ids()
    text = torch.arange(where.length, device=positions.device)
    if mask is not None:
        text = (text - padding(mask)[0]).clamp(min=0)
    own = where(positions + where.text_of(placed) - text, 0)
    is_text = where(torch.ones_like(where.columns), 0) > 0
    return torch.where(is_text, own, placed + offset)


def _embeddings(base: Base, where: Placement, text: Tensor, ids: Tensor, embedded: bool) -> Tensor:
    embed = base.injector.modules[0]
    rows = text if embedded else embed(text)
    return where(rows, embed(ids.clamp(min=0)))


def _add_positions(
    base: Base, inputs: dict[str, Any], where: Placement, mask: Tensor | None
) -> None:
    """Positions that do not count padding, where the model's own would."""
    if "position_ids" in inputs or not base.accepts("position_ids"):
        return
    if base.position_offset or (mask is not None and bool(where.lead.any())):
        inputs["position_ids"] = where.position_ids() + base.position_offset


def _mark_padding(base: Base, inputs: dict[str, Any], stack: ExitStack) -> None:
    """Causal classifiers pool the last token that is not the padding id: let that be the mask's.

    A real token with the padding's id (often the end-of-sequence token) is written as a virtual one
    that has the same vector.
    """
    pad = base.model.config.get_text_config().pad_token_id
    if pad is None:
        return
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    same = ids == pad
    if mask is not None:
        ids = ids.masked_fill(mask == 0, pad)
        same = same & (mask != 0)
    if bool(same.any()):
        with torch.no_grad():
            vector = base.injector.modules[0](ids.new_tensor([pad]))
        span = base.injector.add(vector)
        stack.callback(base.injector.remove, span)
        ids = ids.masked_fill(same, span.first)
    inputs["input_ids"] = ids
