"""The arithmetic limit: what must be computed, over how fast this machine multiplies matrices.

    forward    2 x weights of the layers x tokens  +  attention  +  2 x vocabulary x width x logits
    backward   the same for the layers' inputs (the weights are frozen), twice for attention

The rate is measured at the model's own shapes, in the same rounds as the two sides.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Part:
    """Tokens that go through the model together.

    Attributes:
        tokens: of all rows.
        keys: how many keys a token attends to, on average.
        logits: positions that get logits.
        backward: with the gradient of the inputs.
    """

    tokens: int
    keys: float
    logits: int
    backward: bool


def flops(model: Any, parts: list[Part]) -> float:
    """Floating-point operations of the frozen model for the parts."""
    config = model.config
    layers = sum(linear.weight.numel() for linear in _linears(model, config.num_hidden_layers))
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    attention = 4 * config.num_hidden_layers * width
    total = 0.0
    for part in parts:
        products = 2 * layers * part.tokens + 2 * head * part.logits
        scores = attention * part.keys * part.tokens
        total += products * (2 if part.backward else 1) + scores * (3 if part.backward else 1)
    return total


class MatmulRate:
    """Measures how fast the products of the model's layers run.

    Args:
        model: gives shapes, dtype and device.
        tokens: rows of the left matrix, as many as one forward of ours has.
        backward: with the products of the backward pass.
    """

    def __init__(self, model: Any, tokens: int, backward: bool):
        self.backward, self.device = backward, model.device
        # Several layers: the weights come from memory, as in the model.
        self.pairs = [
            (_random(tokens, linear.in_features, linear), linear.weight.detach())
            for linear in _linears(model, min(4, model.config.num_hidden_layers))
        ]
        self.gradients = [_random(tokens, weight.shape[0], weight) for _, weight in self.pairs]
        self.work = sum(2 * tokens * weight.numel() for _, weight in self.pairs)
        self()

    @torch.no_grad()
    def __call__(self) -> float:
        """FLOP/s of one pass over the layers."""
        synchronize(self.device)
        start = time.perf_counter()
        for left, weight in self.pairs:
            F.linear(left, weight)
        if self.backward:
            for gradient, (_, weight) in zip(self.gradients, self.pairs, strict=True):
                gradient @ weight
        synchronize(self.device)
        return self.work * (2 if self.backward else 1) / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _linears(model: Any, layers: int) -> list[nn.Linear]:
    found = model.model.layers[:layers].modules()
    return [module for module in found if isinstance(module, nn.Linear)]


def _random(rows: int, columns: int, like: Any) -> torch.Tensor:
    weight = like.weight if isinstance(like, nn.Linear) else like
    return torch.randn(rows, columns, dtype=weight.dtype, device=weight.device)
