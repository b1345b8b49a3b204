"""Rows that answer together: the members of an ensemble on one example.

    log p(w) = mean over the members m of log p_m(w), normalised again

The members' rows stand one behind the other in a batch, so that they share what is the same in
them, such as the keys and values of a document in front of the virtual tokens. Free answers are
written together too: each next token is chosen from the mean, and all members go on behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import LogitsProcessor


def mean_log_probabilities(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """What the members say together: log-probabilities ``(G, …, W)``.

    Args:
        scores: ``(R, …, W)`` logits, or log-probabilities up to a constant of each row.
        sizes: of each of the G groups how many rows, one behind the other, answer together.
    """
    each = scores.float().log_softmax(-1)
    if len(sizes) == len(scores):
        return each
    means = torch.stack([rows.mean(0) for rows in each.split(list(sizes))])
    return means.log_softmax(-1)


def biased(log_probabilities: Tensor, bias: Sequence[float] | None) -> Tensor:
    """Labels' log-probabilities ``(…, labels)`` with a bias (`Task.label_bias`), normalised."""
    if bias is None:
        return log_probabilities
    return (log_probabilities + log_probabilities.new_tensor(bias)).log_softmax(-1)


class Together(LogitsProcessor):
    """While tokens are chosen one by one, each row has the log-probabilities of its group.

    Args:
        sizes: as for `mean_log_probabilities`.
    """

    def __init__(self, sizes: Sequence[int]):
        self.sizes = list(sizes)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Of scores ``(R, vocabulary)`` as many log-probabilities."""
        means = mean_log_probabilities(scores, self.sizes)
        return means.repeat_interleave(torch.tensor(self.sizes, device=means.device), dim=0)


def first_rows(sizes: Sequence[int]) -> list[int]:
    """The number of each group's first row."""
    return list(accumulate(sizes, initial=0))[:-1]
