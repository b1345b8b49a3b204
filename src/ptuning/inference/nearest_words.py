"""What a prompt looks like from the vocabulary: the nearest words of each virtual token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backbone.identity import check_same
from ..backbone.lookups import check_width, input_embedding, looks_up_on
from ..backbone.tokens import check_tokenizer
from ..prompts.consistency import check_kind
from ..prompts.prompt import Prompt
from ..prompts.task import at_least_one


@dataclass(frozen=True)
class Neighbours:
    """One virtual token beside the vocabulary.

    Attributes:
        norm: length of its vector.
        words: nearest words by cosine, nearest first, with the cosine.
    """

    norm: float
    words: tuple[tuple[str, float], ...]


@torch.no_grad()
def nearest_words(
    model: nn.Module, tokenizer: Any, prompt: Prompt, count: int = 5
) -> tuple[list[Neighbours], float]:
    """The nearest words of each virtual token, and the mean norm of the vocabulary's vectors.

    The vocabulary is read through the embedding module, so scaled embeddings compare rightly.

    Raises:
        InputError, PromptFileError: the prompt has no vectors, or some of another width than the
            model's.
    Warns:
        UserWarning: the prompt was trained on another model.
    """
    check_kind(prompt, Prompt)
    at_least_one("count", count)
    embedding = input_embedding(model)
    check_tokenizer(tokenizer)
    vectors = prompt.trained_vectors().float().cpu()
    check_same(prompt.base_model, model, tokenizer)
    check_width(vectors, embedding.embedding_dim)
    size = min(embedding.num_embeddings, len(tokenizer))
    ids = torch.arange(size, device=looks_up_on(embedding))
    vocabulary = torch.cat([embedding(part).float().cpu() for part in ids.split(8192)])
    norms = vocabulary.norm(dim=1).clamp(min=1e-12)
    lengths = vectors.norm(dim=1).clamp(min=1e-12)
    cosines = (vectors / lengths[:, None]) @ (vocabulary / norms[:, None]).T
    best = cosines.topk(min(count, size), dim=1)
    neighbours = [
        Neighbours(
            float(length),
            tuple(
                (tokenizer.decode([index]).strip() or repr(tokenizer.decode([index])), value)
                for index, value in zip(indices, values, strict=True)
            ),
        )
        for length, indices, values in zip(
            lengths, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
    return neighbours, float(norms.mean())
