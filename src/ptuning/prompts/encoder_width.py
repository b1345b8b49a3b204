"""How wide a prompt's network is where nobody says it: as it was, else as the embedding up to a
limit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .encoder_config import PromptEncoderReparameterizationType as Kind

WIDEST = 1024
"""Networks of 2,048 and 4,096 hidden units learn far less from a table than those of 576 and 1,024
(`benchmarks/README.md`), and those of 4,096 are 200 MB."""
_MIXED = 128
_TELL = (("lstm_head.weight_hh_l0", 1), ("residual_head.0.weight", 0), ("mlp_head.0.weight", 0))
"""Weights that have the width of their network, and in which direction."""


def hidden_size(
    kind: Kind, token_dim: int, count: int | None, weights: Mapping[str, Tensor] | None
) -> int:
    """The ``encoder_hidden_size`` of an encoder.

    Both directions of an LSTM together are as wide as an MLP, and a residual network is half as
    wide. Of a mixture it is the number of words.

    Args:
        kind: of the encoder.
        token_dim: width of the embedding.
        count: virtual tokens, if that is known.
        weights: of a saved encoder, whose width they tell: its file need not name it, and networks
            once were as wide as any embedding.
    """
    if kind is Kind.MIXTURE:
        return max(_MIXED, count or 1)
    for name, axis in _TELL:
        weight = (weights or {}).get(name)
        if weight is not None and weight.dim() == 2:
            return weight.shape[axis]
    widest = min(token_dim, WIDEST)
    return max(1, widest // 2) if kind in (Kind.LSTM, Kind.RESIDUAL) else widest
