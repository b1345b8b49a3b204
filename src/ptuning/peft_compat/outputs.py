"""A model's outputs, with the positions as the caller knows them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backbone.placement import Placement


def restored(output: Any, where: Placement, *, decoder: bool, text_only: bool) -> Any:
    """A model's output with its positions as the caller knows them.

    Args:
        output: a ``ModelOutput``; changed in place.
        where: the batch's placement. Padding that it moved to the right comes back to the left.
        decoder: logits and hidden states are the decoder's, which has no virtual tokens.
        text_only: leave the virtual positions out; attentions keep them.
    """
    if not text_only and not bool(where.rolled.any()):
        return output
    width = where.length + where.inserted
    names = ["start_logits", "end_logits", "encoder_last_hidden_state", "encoder_hidden_states"]
    if not decoder:
        names += ["logits", "last_hidden_state", "hidden_states"]
    attentions = ["encoder_attentions", "cross_attentions", *([] if decoder else ["attentions"])]

    def of(name: str, value: Tensor) -> Tensor:
        per_token = value.dim() > 2 or name in ("start_logits", "end_logits")
        if not per_token or value.shape[1] != width:
            return value
        return where.text_of(value) if text_only else where.unrolled(value)

    for name in names:
        value = output.get(name)
        if isinstance(value, Tensor):
            output[name] = of(name, value)
        elif isinstance(value, tuple):
            output[name] = tuple(of(name, part) for part in value)
    for name in attentions:
        if output.get(name) is not None:
            output[name] = tuple(_attention(where, part, width) for part in output[name])
    return output


def _attention(where: Placement, weights: Tensor, width: int) -> Tensor:
    """Attention ``(B, heads, queries, keys)`` with its padding on the left again."""
    for dimension in (2, 3):
        if weights.shape[dimension] == width:
            moved = weights.movedim(dimension, 1)
            weights = where.unrolled(moved).movedim(1, dimension)
    return weights
