"""Scores of single-token label words: the output head's rows of these words and no others.

    plain     head(hidden) of the whole vocabulary, then the words' columns
    here      hidden . head.weight[words]

The first time a model is met both are computed and compared; a model whose logits are made in
another way takes the plain path, `plain.word_scores` of `plain.answer_logits`.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..backbone.traits import finished_logits, output_head, vocabulary_bias
from ..backbone.upstream import is_offloaded
from ..rendering.collate import Batch
from .output_head import seeing
from .plain import Shortener, answer_logits, answer_outputs, word_scores

_alike: WeakSet[nn.Module] = WeakSet()
_other: WeakSet[nn.Module] = WeakSet()


def label_word_scores(
    model: nn.Module, batch: Batch, words: int, shortener: Shortener | None = None
) -> Tensor:
    """Scores ``(N, words)`` of the label words that each example compares, as `plain.word_scores`.

    Args:
        model: the base model.
        batch: prepared for label comparison.
        words: how many.
        shortener: as for `plain.answer_logits`.
    """
    head: Any = output_head(model)
    if batch.label_ids is None or not _serves(model, head, batch.label_ids):
        return word_scores(answer_logits(model, batch, shortener), batch, words)
    known = model in _alike
    with seeing(head, slice(0, 0) if known else slice(None)) as inputs:
        logits, rows = answer_outputs(model, batch, shortener)
    if len(inputs) != 1:  # a compiled model takes no notice of hooks
        _other.add(model)
        return word_scores(rows(logits), batch, words)
    hidden = rows(inputs[0])[:, -1 if batch.kind == "causal" else 0]
    products = (head.weight[batch.label_ids] @ hidden.unsqueeze(-1)).squeeze(-1)
    if head.bias is not None:
        products = products + head.bias[batch.label_ids]
    scores = finished_logits(model, products).float()
    if not known:
        plain = word_scores(rows(logits), batch, words)
        same = _same(scores, plain, products.dtype)
        (_alike if same else _other).add(model)
        return scores if same else plain
    return scores


def _serves(model: nn.Module, head: Any, words: Tensor) -> bool:
    """The head is a matrix of this process, and its rows are fewer than all."""
    if type(head) is not nn.Linear or model in _other or vocabulary_bias(model) is not None:
        return False
    elsewhere = head.weight.is_meta or is_offloaded(head)
    return not elsewhere and words.numel() < head.out_features


@torch.no_grad()
def _same(scores: Tensor, plain: Tensor, dtype: torch.dtype) -> bool:
    """Up to the rounding of sums in another order."""
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps)
    allowed = tolerance * plain.abs().max().clamp(min=1.0)
    finite = torch.isfinite(plain)
    return bool(((scores - plain).abs() <= allowed)[finite].all())
