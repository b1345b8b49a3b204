"""Caches of keys and values that already have the prompt in them.

A call that fills a cache writes down on it what the cache holds, so that a later call with that
cache inserts no second prompt, masks the padding of the first, and counts its positions on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbone.injection import may_look_at_values
from ..errors import InputError

_NOTE = "ptuning_held"


@dataclass(frozen=True)
class Held:
    """What a cache holds.

    Attributes:
        mask: ``(B, P)``; None where there is no padding.
        width: P, its tokens, the inserted ones too.
        text: T, the text's tokens among them.
        inserted: of each of B rows.
    """

    mask: Tensor | None
    width: int
    text: int
    inserted: tuple[int, ...]


def tokens_in(cache: Any) -> int:
    """How many tokens a cache holds; 0 for none."""
    count = getattr(cache, "get_seq_length", None)
    return int(count()) if count is not None else 0 if cache is None else len(cache)


def note(cache: Any, held: Held) -> None:
    """Write down what a cache holds; not while a graph is captured."""
    if hasattr(cache, "get_seq_length") and not torch.compiler.is_compiling():
        setattr(cache, _NOTE, held)


def held_by(cache: Any) -> Held:
    """What a cache holds that a call of a model with adapters has filled.

    Raises:
        InputError: another model has filled it, or it was changed since.
    """
    held = getattr(cache, _NOTE, None)
    if held is None or held.width != tokens_in(cache):
        raise InputError(
            f"past_key_values hold {tokens_in(cache)} tokens that no call of this model has read "
            "with its prompt, and a second prompt would stand behind them: give what such a call "
            "returned, or the whole text without past_key_values"
        )
    return held


def continued(
    held: Held, inputs: dict[str, Any], first: int, *, positions: bool
) -> tuple[dict[str, Any], Held]:
    """Arguments of a call that reads on behind a cache, without a prompt.

    Args:
        held: what the cache holds.
        inputs: the call's arguments; ``attention_mask`` ``(B, new)`` for the new tokens, or for the
            whole text ``(B, T + new)``, or for all that is read ``(B, P + new)``; ``position_ids``
            of the text alone.
        first: the model's first position.
        positions: the model is told positions that do not count padding.

    Returns:
        The base model's arguments, and what the cache holds afterwards.

    Raises:
        InputError: neither ids nor embeddings, another number of rows, or a mask of another width.
    """
    text = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if text is None:
        raise InputError("give input_ids or inputs_embeds, one of the two")
    rows, new = text.shape[:2]
    if rows != len(held.inserted):
        raise InputError(
            f"past_key_values hold {len(held.inserted)} rows, and the input has {rows}; give the "
            "same rows"
        )
    mask = _whole_mask(held, inputs.get("attention_mask"), rows, new)
    result, after = dict(inputs), Held(mask, held.width + new, held.text + new, held.inserted)
    if mask is not None:
        result["attention_mask"] = mask
    if inputs.get("position_ids") is not None:
        inserted = torch.tensor(held.inserted, device=text.device).unsqueeze(1)
        result["position_ids"] = inputs["position_ids"] + inserted
    elif mask is not None and positions:
        counted = ((mask != 0).long().cumsum(1) - 1).clamp(min=0)
        result["position_ids"] = counted[:, -new:] + first
    return result, after


def leave_positions_to_the_model(inputs: dict[str, Any]) -> None:
    """Let a model count on by itself that has positions on several axes.

    It counts from what its cache holds, but beside a mask over all of the mask.

    Raises:
        InputError: there is padding, and no positions are given.
    """
    mask = inputs.get("attention_mask")
    if mask is None or inputs.get("position_ids") is not None:
        return
    if bool((mask == 0).any()):
        raise InputError(
            "past_key_values of padded rows need position_ids here, since this model's tokens have "
            "positions on several axes; give them, or the whole text without past_key_values"
        )
    del inputs["attention_mask"]


def _whole_mask(held: Held, mask: Tensor | None, rows: int, new: int) -> Tensor | None:
    """The mask ``(B, P + new)`` of all that is read; None where there is no padding."""
    if mask is None:
        if held.mask is None:
            return None
        return torch.cat([held.mask, held.mask.new_ones(rows, new)], dim=1)
    widths = (new, held.text + new, held.width + new)
    if mask.dim() != 2 or len(mask) != rows or mask.shape[1] not in widths:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)} beside past_key_values of {held.text} "
            f"tokens of the text and {new} new ones; give ({rows}, {widths[1]})"
        )
    before = mask.new_ones(rows, held.width) if held.mask is None else held.mask.to(mask.dtype)
    if mask.shape[1] > new and may_look_at_values(mask):
        _check_before(held, before, mask[:, : mask.shape[1] - new])
    return torch.cat([before, mask[:, mask.shape[1] - new :]], dim=1)


def _check_before(held: Held, before: Tensor, given: Tensor) -> None:
    """Refuse a mask of what the cache holds that is not the one it was filled with."""
    tokens = (given != 0).sum(1)
    if given.shape[1] == held.text:  # of the text alone
        tokens = tokens + torch.tensor(held.inserted, device=given.device)
    if bool((tokens != (before != 0).sum(1)).any()):
        raise InputError(
            "attention_mask masks other tokens of the text than the call that filled "
            "past_key_values: give that call the mask, keep the rows in their order, or give the "
            "whole text without past_key_values"
        )
