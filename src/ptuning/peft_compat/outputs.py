"""A model's outputs, with the positions as the caller knows them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backbone.injection import may_look_at_values
from ..backbone.placement import Placement

# Two-axis outputs that have a value per token; all others with two axes have one per row.
_PER_TOKEN = ("start_logits", "end_logits")
# What belongs to another input than the text, or to what a decoder reads.
_OTHERS = ("decoder_", "past_", "image_", "vision_", "audio_", "video_", "rope_deltas")


def restored(output: Any, where: Placement, *, decoder: bool, text_only: bool) -> Any:
    """A model's output with its positions as the caller knows them.

    Args:
        output: a ``ModelOutput``, of P tokens; changed in place.
        where: the batch's placement. Padding that it moved to the right comes back to the left.
        decoder: logits and hidden states are the decoder's, which has no virtual tokens.
        text_only: leave the virtual positions out, so that T are left; attentions keep them.
    """
    if not text_only and not _rolled(where):
        return output
    width = where.length + where.inserted

    def of(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != width:
            return value
        if value.dim() == 2 and name not in _PER_TOKEN:
            return value
        return where.text_of(value) if text_only else where.unrolled(value)

    for name, value in list(output.items()):
        ours = name.startswith("encoder_") or name in _PER_TOKEN or not decoder
        if name.startswith(_OTHERS) or (not ours and name != "cross_attentions"):
            continue
        if name.endswith("attentions"):
            output[name] = tuple(_attention(where, part, width) for part in value)
        elif isinstance(value, tuple):
            output[name] = tuple(of(name, part) for part in value)
        else:
            output[name] = of(name, value)
    return output


def _rolled(where: Placement) -> bool:
    """Some padding was moved; where values may not be seen, it may have been."""
    rolled = where.rolled
    return where.may_roll and (not may_look_at_values(rolled) or bool(rolled.any()))


def _attention(where: Placement, weights: Tensor, width: int) -> Tensor:
    """Attention ``(B, heads, queries, keys)`` with its padding on the left again."""
    for dimension in (2, 3):
        if weights.shape[dimension] == width:
            moved = weights.movedim(dimension, 1)
            weights = where.unrolled(moved).movedim(1, dimension)
    return weights
