"""Free answers: the most likely tokens behind each row, chosen one by one.

`generate` of transformers does the steps; what is kept of each is a number for each row, not its
logits over the vocabulary (256 tokens of 32 rows and 150,000 words would be 5 GB).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from ..backbone.base_model import BaseModel
from ..backbone.traits import first_position
from ..backbone.upstream import CACHE, forget_rows, uncompiled
from ..rendering.collate import Batch
from . import plain
from .attention import own_attention
from .together import Together, first_rows


def continue_greedily(
    base: BaseModel,
    batch: Batch,
    limit: int,
    ends: list[int],
    watch: Callable[[Tensor, Tensor], Tensor] | None = None,
    sizes: Sequence[int] | None = None,
    cache: Cache | None = None,
) -> tuple[Tensor, Tensor]:
    """The most likely tokens behind each row of a causal or encoder-decoder model.

    Args:
        base: the model.
        batch: without answers, on the model's device.
        limit: tokens at most.
        ends: tokens that end an answer.
        watch: is shown each new token ``(R,)`` of the rows and its log-probability ``(R,)``, and
            says which rows ``(R,)`` have enough; what a row is given after that means nothing.
        sizes: rows that answer together (`together`); by default each answers alone. Then there are
            as many of each as groups: R is their number here.
        cache: keys and values of what the rows begin with.

    Returns:
        ids ``(R, S)`` and their log-probabilities ``(R, S)``, 0 behind the end and behind what was
        enough.
    """
    model, pad = base.model, base.tokenizer.pad_token_id
    sizes = sizes or [1] * len(batch.input_ids)
    alone = len(sizes) == len(batch.input_ids)
    first = torch.tensor(first_rows(sizes), device=batch.input_ids.device)
    counts = torch.tensor(sizes, device=first.device)
    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad if pad == base.pad_id else next(iter(ends), None),
    )
    more: dict[str, Any] = {} if cache is None else {CACHE: cache}
    if begins := first_position(model):  # transformers would count from 0
        more["position_ids"] = plain.position_ids(batch.attention_mask) + begins
    spoken = _Spoken(first)
    over: list[Tensor] = []
    if watch is not None:

        def enough(ids: Tensor, _: Any) -> Tensor:
            over.append(watch(ids[first, -1], spoken.scores[-1]).clone())
            return over[-1].repeat_interleave(counts)

        more["stopping_criteria"] = StoppingCriteriaList([enough])
    forget_rows(model)
    with own_attention(model):
        sequences = _without_own_settings(model).generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([*([] if alone else [Together(sizes)]), spoken]),
            **more,
        )
    chosen = sequences[first, spoken.begins :]
    steps = chosen.shape[1]  # a step more was computed where transformers looks a step late (MPS)
    scores = torch.stack(spoken.scores[:steps], dim=1)
    # What is filled in after the end has no probability of its own.
    ended = torch.isin(chosen, torch.tensor(ends, device=chosen.device, dtype=chosen.dtype))
    if over:
        ended |= torch.stack(over[:steps], dim=1)
    return chosen, scores.masked_fill(ended.long().cumsum(1) - ended.long() > 0, 0.0)


class _Spoken(LogitsProcessor):
    """The last look at each step's logits: how likely the likeliest token is, which is chosen.

    Args:
        rows: ``(R,)`` that are looked at.

    Attributes:
        begins: tokens that stood there before the first one was chosen.
        scores: log-probabilities ``(R,)`` of each step.
    """

    def __init__(self, rows: Tensor):
        self.rows = rows
        self.begins = 0
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``(rows, vocabulary)`` as they are."""
        if not self.scores:
            self.begins = input_ids.shape[1]
        looked_at = scores[self.rows].float()
        self.scores.append(looked_at.amax(1) - looked_at.logsumexp(1))
        return scores


def _without_own_settings(model: nn.Module) -> Any:
    """The same model without generation settings of its own, which would fill what is not named.

    Such as penalties, suppressed tokens or a kind of cache; with which token decoding starts stays.
    """
    twin: Any = copy(uncompiled(model))
    before = twin.generation_config
    twin.generation_config = GenerationConfig(
        bos_token_id=before.bos_token_id,
        decoder_start_token_id=before.decoder_start_token_id,
        forced_bos_token_id=before.forced_bos_token_id,
        forced_eos_token_id=before.forced_eos_token_id,
    )
    return twin
