"""Losses against a teacher's distribution instead of one right answer: KL(teacher || student).

    labels   sum over labels      q log(q / p)
    tokens   the same over the teacher's likeliest tokens, all others together as one more

Both are 0 where the student says what the teacher says. `Batch.taught` has the q.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-6
"""Of what is left for all other tokens: below, float32's 1 - sum is rounding."""


def of_labels(scores: Tensor, taught: Tensor) -> Tensor:
    """From scores ``(N, labels)`` and a teacher's shares ``(N, labels)`` to ``(N,)``; 0 where the
    shares are all 0."""
    return _divergence(taught.float(), scores.float().log_softmax(-1))


def of_tokens(logits: Tensor, taught: Tensor, likely: Tensor) -> Tensor:
    """The divergence of each position.

    Args:
        logits: ``(…, vocabulary)``.
        taught: ``(…, k)`` a teacher's shares of its likeliest tokens; all 0: the position is none.
        likely: ``(…, k)`` their ids.
    """
    shares = taught.float()
    known = logits.float().log_softmax(-1).gather(-1, likely)
    others = (1 - shares.sum(-1)).clamp(min=0)
    left = (1 - known.exp().sum(-1)).clamp(min=_LEAST).log()
    whole = _divergence(shares, known) + torch.special.xlogy(others, others) - others * left
    return torch.where(shares.sum(-1) > 0, whole, 0.0)


def _divergence(shares: Tensor, log_probabilities: Tensor) -> Tensor:
    return (torch.special.xlogy(shares, shares) - shares * log_probabilities).sum(-1)
