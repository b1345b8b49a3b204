"""Noise on the vectors of words in training: a prompt learns what holds for words nearby, too.

    E[id] + s a(t) r B[(id + t) mod K]        of an ordinary word in step t
    E[id]                                     of a special token; virtual tokens have none

B ``(K, width)`` are standard normal numbers, r is the size of words' vectors (root mean square), s
the share that is asked for. a rises from 0 to 1 between 0.15 and 0.4 of all steps: with noise from
the start a prompt learns late.

The idea is NEFTune's (arXiv 2310.05914), which draws anew for each place and gives language models
in fine-tuning the noise from the first step. Here a word has the same noise wherever it stands in a
step, in every row and for every member, so that all ways to compute a step see the same, and a
resumed training what an undisturbed one has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.lookups import input_embedding, looks_up_on
from ..backbone.word_size import ordinary, word_size
from ..prompts.prompt import Prompt
from ..prompts.template import Virtual
from .settings import TrainSettings

USUAL = 0.5
"""Chosen on four tables that decided nothing else (benchmarks/README.md, "Noise on words")."""
_BEGINS, GROWN = 0.15, 0.4
"""Of all steps: until when there is none, and from when on it has its size."""
_DRAWN = 4093
"""Vectors of noise. Words whose ids are alike modulo this have the same: a pair in ten texts of 30
words."""


def settled_noise(
    settings: TrainSettings, prompts: Iterable[Prompt], taught: bool = False
) -> float:
    """The share of a training, as it is asked for or as it is usual: for labels behind virtual
    tokens, since no keys and values are kept there that noise would forbid to keep.

    Args:
        settings: of the training.
        prompts: of all its members, which share batches, and so the noise.
        taught: they learn what a teacher says.
    """
    if settings.word_noise is not None:
        return float(settings.word_noise)
    usual = not taught and not settings.tune_model and all(map(_begins_virtual, prompts))
    return USUAL if usual else 0.0


def _begins_virtual(prompt: Prompt) -> bool:
    """Labels are asked for, and no ordinary token stands before the first virtual one."""
    if prompt.template is None or not prompt.labels or prompt.chat:
        return False
    return isinstance(prompt.parsed.pieces[0], Virtual)


class WordNoise:
    """What words' vectors are in a step.

    Args:
        model: the base model.
        tokenizer: the model's, whose special tokens keep their vectors.
        share: of the size of words' vectors, above 0.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, share: float):
        embedding = input_embedding(model)
        device = looks_up_on(embedding)
        self._full = share * word_size(embedding, tokenizer)
        draw = torch.Generator().manual_seed(0)
        drawn = torch.randn(_DRAWN, embedding.embedding_dim, generator=draw, dtype=torch.float32)
        self._drawn = drawn.to(device)
        self._ordinary = ordinary(embedding, tokenizer).to(device, torch.float32)
        # Tensors, so that a captured graph reads what they are in its step.
        self._step = torch.zeros((), dtype=torch.long, device=device)
        self._size = torch.zeros((), dtype=torch.float32, device=device)

    def at(self, step: int, of: int, grown: bool = False) -> None:
        """From now on it is step so many of all; or `grown`, so that it has its size already."""
        share = 1.0 if grown else (step / of - _BEGINS) / (GROWN - _BEGINS)
        self._step.fill_(step)
        self._size.fill_(self._full * min(1.0, max(0.0, share)))

    def __call__(self, ids: Tensor, vectors: Tensor) -> Tensor:
        """The vectors ``(…, width)`` of words ``(…)`` with their noise."""
        noise = self._drawn[(ids + self._step) % _DRAWN]
        size = (self._ordinary[ids] * self._size).unsqueeze(-1)
        return vectors + (size * noise).to(vectors.dtype)
