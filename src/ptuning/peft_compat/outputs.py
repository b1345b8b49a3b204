"""Outputs with the text's positions only, as if there were no virtual tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..placement import Placement


def shift_answer_positions(inputs: dict[str, Any], where: Placement) -> None:
    """Start and end of an answer in the text ``(B,)`` become columns of the placed input."""
    for name in ("start_positions", "end_positions"):
        if name in inputs:
            at = inputs[name].view(-1, 1)
            column = where.columns.gather(1, at.clamp(0, where.length - 1))
            outside = (at < 0) | (at >= where.length)
            inputs[name] = column.masked_fill(outside, where.length + where.inserted).squeeze(1)


def without_virtual(output: Any, where: Placement, *, decoder: bool) -> Any:
    """A model's output with the text's positions only.

    Args:
        output: a ``ModelOutput``; changed in place.
        where: the batch's placement.
        decoder: logits and hidden states are the decoder's, which has no virtual tokens.
    """
    width = where.length + where.inserted
    names = ["start_logits", "end_logits", "encoder_last_hidden_state", "encoder_hidden_states"]
    if not decoder:
        names += ["logits", "last_hidden_state", "hidden_states"]

    def cut(name: str, value: Tensor) -> Tensor:
        per_token = value.dim() > 2 or name in ("start_logits", "end_logits")
        return where.text_of(value) if per_token and value.shape[1] == width else value

    for name in names:
        value = output.get(name)
        if isinstance(value, Tensor):
            output[name] = cut(name, value)
        elif isinstance(value, tuple):
            output[name] = tuple(cut(name, part) for part in value)
    return output
