"""How large a model's word vectors are: models differ in it by orders of magnitude."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .lookups import vectors_of
from .tokens import first_free_id

_SAMPLE = 2000
"""Words whose vectors are looked at."""


def ordinary(embedding: nn.Embedding, tokenizer: Any) -> Tensor:
    """``(rows of the embedding,)`` bool: those of words, which are neither special tokens nor
    behind the vocabulary."""
    found = torch.zeros(embedding.num_embeddings, dtype=torch.bool)
    found[: first_free_id(tokenizer)] = True
    found[[id for id in _special(tokenizer) if id < len(found)]] = False
    return found


def word_size(embedding: nn.Embedding, tokenizer: Any) -> float:
    """The root mean square of the components of what the embedding gives for words; 0 without
    words."""
    words = ordinary(embedding, tokenizer).nonzero().flatten()
    if not len(words):
        return 0.0
    vectors = vectors_of(embedding, words[:: max(1, len(words) // _SAMPLE)])
    return float(vectors.pow(2).mean().sqrt())


def _special(tokenizer: Any) -> set[int]:
    """Ids of special tokens, those without a role too, such as the marks of a chat's turns."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
