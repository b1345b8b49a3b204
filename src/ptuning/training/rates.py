"""At what rate and in what unit a prompt learns, so that one default holds for models of any size.

    vectors = unit * encoder(...)
    rate    = 1e-3 * min(1, 576 / inputs of its widest layer)         of an MLP, by default

The rates were measured with SmolLM2, whose words' vectors have 576 components of the size 0.135.

Another model may have words a fiftieth as large, so that each step leaps over all of them, or
a hundred times, so that none moves: the same function then learns nothing (benchmarks/README.md,
"Models of other sizes"). So vectors are made in units of its words' size, a power of two of
SmolLM2's, by which weights are multiplied and divided without rounding. The unit is 1 where an MLP
or LSTM begins as it makes its vectors (``init``: ``encoder``), as in the paper and PEFT, for
mixtures of words, and where the user gives the rate of vectors without a network.

With Adam each weight moves by the rate in a step, so what a layer gives moves by as much more as it
has more inputs; hence rates in inverse proportion to them (Yang et al. 2022, arXiv 2203.03466).
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..backbone.lookups import input_embedding
from ..backbone.word_size import word_size
from ..prompts.encoder import PromptEncoder
from .settings import AT_WORDS, TrainSettings

_RATES = {"MLP": 1e-3, "LSTM": 2e-3, "NONE": 1e-2, "RESIDUAL": 2e-3, "MIXTURE": 1e-2}
"""By encoder type; the smaller the network before the vectors, the larger the rate."""
_WORD_SIZE, _INPUTS = 0.135, 576
"""With which they were measured."""


def usual_rate(encoder: PromptEncoder) -> float:
    """The default learning rate of an encoder, in its unit."""
    layers = (module for module in encoder.modules() if isinstance(module, nn.Linear))
    inputs = max((layer.in_features for layer in layers), default=0)
    return _RATES[encoder.encoder_type] * min(1.0, _INPUTS / max(1, inputs))


def unit_for(
    model: nn.Module, tokenizer: Any, encoder: str, settings: TrainSettings, given_rate: bool
) -> float:
    """The unit of a member.

    Args:
        model: the base model.
        tokenizer: the model's.
        encoder: type of it.
        settings: the member's own, which say where it begins.
        given_rate: the user's, not the usual one.
    """
    if encoder == "mixture" or (encoder == "none" and given_rate):
        return 1.0
    if encoder not in AT_WORDS and settings.start_for(encoder) == "encoder":
        return 1.0
    return _nearest_power(word_size(input_embedding(model), tokenizer) / _WORD_SIZE)


def _nearest_power(size: float) -> float:
    """The power of two that is nearest by its ratio; 1 of what has no size."""
    return 2.0 ** round(math.log2(size)) if 0 < size < math.inf else 1.0
