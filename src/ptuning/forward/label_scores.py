"""From what the model says of label words to labels.

    s'(w)        = s(w) + sum over the words v of M[w, v] (s(v) - mean of s)   with a label matrix
    score(label) = log sum over its words of exp s'(w)
    label loss   = -log softmax(score)[right one]; of a teacher's distribution: `divergence`

s are the words' log-probabilities, up to one constant per example. M ``(words, words)`` is trained
with a prompt's virtual tokens (`training.label_matrix`): matrix scaling (Guo et al. 2017, arXiv
1706.04599, section 4.2) around the identity. What is trained is the mean of the loss with M and the
one without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import divergence


@dataclass(frozen=True)
class Words:
    """The words that label comparison compares.

    Attributes:
        owner: ``(W,)`` the label of each, on the CPU.
        matrices: ``(members, W, W)`` the members' label matrices, or None where nobody has one.
    """

    owner: Tensor
    matrices: Tensor | None = None

    @classmethod
    def of(cls, owner: Sequence[int]) -> Words:
        """Words without a matrix, from the label of each."""
        return cls(torch.tensor(owner))

    def __len__(self) -> int:
        return len(self.owner)


def matrices_of(each: Sequence[Tensor | None]) -> Tensor | None:
    """Label matrices ``(members, W, W)``, zeros of members without one; None where all are."""
    one = next((matrix for matrix in each if matrix is not None), None)
    if one is None:
        return None
    return torch.stack([torch.zeros_like(one) if matrix is None else matrix for matrix in each])


def mixed(scores: Tensor, matrices: Tensor) -> Tensor:
    """Scores ``(N, W)`` of words by the label matrix of each row, ``(N, W, W)``, or one of all."""
    scores = scores.float()
    centred = scores - scores.mean(-1, keepdim=True)
    with torch.autocast(scores.device.type, enabled=False):  # which would round the products
        return scores + (matrices.to(scores) @ centred.unsqueeze(-1)).squeeze(-1)


def by_label(scores: Tensor, words: Tensor) -> Tensor:
    """From scores ``(N, W)`` of words, whose labels are `words`, to ``(N, labels)``."""
    owner = words.tolist()
    if max(owner) + 1 == len(owner):
        return scores
    columns = scores.unbind(1)  # not a mask: its size would have to come from the device
    pooled = [
        torch.stack([c for c, o in zip(columns, owner, strict=True) if o == label], 1).logsumexp(1)
        for label in range(max(owner) + 1)
    ]
    return torch.stack(pooled, dim=1)


def training_losses(
    scores: Tensor,
    labels: Tensor,
    words: Words,
    member: Tensor | None = None,
    taught: Tensor | None = None,
) -> Tensor:
    """The loss ``(N,)`` of each example that is trained with; the arguments are those of
    `losses_of_labels`. Where there are matrices it is the mean of that with them and that without,
    so that the virtual tokens are worth something to who leaves the matrix out, too."""
    losses = losses_of_labels(scores, labels, words, member, taught)[0]
    if words.matrices is None or member is None:
        return losses
    without = losses_of_labels(scores, labels, Words(words.owner), taught=taught)[0]
    return (losses + without) / 2


def losses_of_labels(
    scores: Tensor,
    labels: Tensor,
    words: Words,
    member: Tensor | None = None,
    taught: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """From the scores ``(N, W)`` of label words to each example's loss, and whether the best label
    is the right one.

    Args:
        scores: of the words.
        labels: ``(N,)`` the right ones.
        words: their labels, and the members' matrices.
        member: ``(N,)`` whose matrix each example has, where there are some.
        taught: ``(N, labels)`` a teacher's shares, which the loss is against then.
    """
    if words.matrices is not None and member is not None:
        scores = mixed(scores, words.matrices.index_select(0, member))
    scores = by_label(scores, words.owner)
    right = scores.argmax(1).eq(labels)
    if taught is not None:
        return divergence.of_labels(scores, taught), right
    return F.cross_entropy(scores, labels, reduction="none"), right
