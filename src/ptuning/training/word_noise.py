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

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backbone.base_model import device_of
from ..backbone.injection import input_embedding, vectors_of
from ..prompts.prompt import Prompt
from ..prompts.template import Virtual

USUAL = 0.5
"""Chosen on tables that are in no figure of ours (benchmarks/README.md, "Noise on words")."""
_BEGINS, GROWN = 0.15, 0.4
"""Of all steps: until when there is none, and from when on it has its size."""
_DRAWN = 4093
"""Vectors of noise, a prime number: words of one text seldom share one."""
_SAMPLE = 2000
"""Words whose vectors are looked at for their size."""


def usual_noise(prompt: Prompt) -> float:
    """The share where the user says none: for labels behind a template that begins with virtual
    tokens, as a made one does, whose keys and values cannot be kept anyway; else 0."""
    if prompt.template is None or not prompt.labels:
        return 0.0
    return USUAL if isinstance(prompt.parsed.pieces[0], Virtual) else 0.0


class WordNoise:
    """What words' vectors are in a step.

    Args:
        model: the base model.
        special: ids that keep their vectors.
        share: of the size of words' vectors, above 0.
    """

    def __init__(self, model: nn.Module, special: Sequence[int], share: float):
        embedding, device = input_embedding(model), device_of(model)
        words = embedding.num_embeddings
        vectors = vectors_of(embedding, torch.arange(0, words, max(1, words // _SAMPLE)))
        self._full = share * float(vectors.pow(2).mean().sqrt())
        draw = torch.Generator().manual_seed(0)
        self._drawn = torch.randn(_DRAWN, vectors.shape[1], generator=draw).to(device)
        ordinary = torch.ones(words)
        ordinary[[id for id in special if id < words]] = 0.0
        self._ordinary = ordinary.to(device)
        # Tensors, so that a captured graph reads what they are in its step.
        self._step = torch.zeros((), dtype=torch.long, device=device)
        self._size = torch.zeros((), device=device)

    def at(self, step: int, of: int) -> None:
        """From now on it is step so many of all."""
        grown = (step / of - _BEGINS) / (GROWN - _BEGINS)
        self._step.fill_(step)
        self._size.fill_(self._full * min(1.0, max(0.0, grown)))

    def __call__(self, ids: Tensor, vectors: Tensor) -> Tensor:
        """The vectors ``(…, width)`` of words ``(…)`` with their noise."""
        noise = self._drawn[(ids + self._step) % _DRAWN]
        size = (self._ordinary[ids] * self._size).unsqueeze(-1)
        return vectors + (size * noise).to(vectors.dtype)
