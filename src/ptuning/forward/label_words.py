"""Scores of single-token label words: the output head's rows of these words and no others.

    plain     head(hidden) of the whole vocabulary, then the words' columns
    here      hidden . head.weight[words]

The first time a model is met both are computed and compared; a model whose logits are made in
another way takes the plain path, `plain.word_scores` of `plain.answer_logits`.
"""

from __future__ import annotations

from weakref import WeakSet

from torch import Tensor, nn

from ..backbone.traits import vocabulary_bias
from ..rendering.collate import Batch
from .output_head import compared, frozen_matrix, leave, logits_of_words, seeing
from .plain import Shortener, answer_outputs, word_scores
from .vocabulary import vocabulary_logits

_alike: WeakSet[nn.Module] = WeakSet()


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
    head, asked = frozen_matrix(model), batch.label_ids
    if head is None or asked is None or not _serves(model, head, asked):
        return word_scores(vocabulary_logits(model, batch, shortener), batch, words)
    known = model in _alike
    with seeing(head, slice(0, 0) if known else slice(None)) as inputs:
        logits, rows = answer_outputs(model, batch, shortener)
    if not inputs:  # a compiled model takes no notice of hooks
        leave(model)
        return word_scores(rows(logits), batch, words)
    hidden = rows(inputs[-1])[:, 0]
    scores = logits_of_words(model, head, hidden, asked).float()
    if not known:
        own = word_scores(rows(logits), batch, words)
        if not compared(model, scores, own.to(logits.dtype)):
            return own
        _alike.add(model)
    return scores


def _serves(model: nn.Module, head: nn.Linear, words: Tensor) -> bool:
    """The words are fewer than all, and nothing is added for each of the vocabulary."""
    return vocabulary_bias(model) is None and words.numel() < head.out_features
