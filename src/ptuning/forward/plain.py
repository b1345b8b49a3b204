"""Answer-only logits and losses: the vocabulary is computed where the answer is and nowhere else.

vocabulary loss   -log p(answer token | before it)             summed over answer tokens
label loss        -log softmax(score of each label)[right one] one per example
                  (`label_scores`)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from ..backbone.traits import first_position, forward_parameters
from ..backbone.upstream import CACHE
from ..errors import InputError
from ..rendering.collate import IGNORED, Batch
from . import divergence
from .attention import own_attention
from .label_scores import Words, losses_of_labels, training_losses
from .norms import own_norms


@dataclass(frozen=True)
class Shortened:
    """A causal batch without the columns whose keys and values are known.

    Attributes:
        inputs: the model's arguments.
        rows: from the model's logits, or what stands before its head, to those ``(R, K, …)`` of the
            batch's rows.
    """

    inputs: dict[str, Any]
    rows: Callable[[Tensor], Tensor]


Shortener = Callable[[Batch], Shortened | None]
"""Says what is left to compute of a causal batch, or None where nothing is saved."""


def behind(model: nn.Module, batch: Batch, columns: int, cache: Cache | None) -> Shortened:
    """The last columns of a causal batch, whose others are in the cache; None: it has no others."""
    count = batch.answers.shape[1]
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids[:, -columns:],
        "attention_mask": batch.attention_mask,
        "use_cache": cache is not None,
        **positions(model, batch.attention_mask, columns, count),
    }
    if cache is not None:
        inputs[CACHE] = cache
    return Shortened(inputs, lambda logits: logits[:, -count:])


def answer_logits(model: nn.Module, batch: Batch, shortener: Shortener | None = None) -> Tensor:
    """Logits ``(R, K, vocabulary)`` at the K positions that predict `batch.answers`.

    Args:
        model: the base model.
        batch: its inputs.
        shortener: of a fast path of causal models (`engine`); None computes whole rows.
    """
    logits, rows = answer_outputs(model, batch, shortener)
    return rows(logits)


def answer_outputs(
    model: nn.Module, batch: Batch, shortener: Shortener | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The model's logits, and from them, or what stands before its head, to ``(R, K, …)``.

    The arguments are those of `answer_logits`.
    """
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
    }
    count = batch.answers.shape[1]
    with own_attention(model), own_norms(model):
        if batch.kind == "seq2seq":
            inputs["decoder_input_ids"] = batch.decoder_input_ids
            return model(**inputs, use_cache=False).logits, _all
        if batch.kind == "masked":
            return _masked_outputs(model, batch.slots, count, inputs)
        shortened = shortener(batch) if shortener else None
        if shortened is not None:
            return model(**shortened.inputs).logits, shortened.rows
        inputs |= positions(model, batch.attention_mask, batch.input_ids.shape[1], count)
        return model(**inputs, use_cache=False).logits, lambda logits: logits[:, -count:]


def _all(logits: Tensor) -> Tensor:
    return logits


def positions(model: nn.Module, mask: Tensor, columns: int, count: int) -> dict[str, Tensor]:
    """A causal model's position ids for the last `columns`, and the columns that get logits.

    Args:
        model: takes only what its forward has.
        mask: ``(R, T)`` of the whole input.
        columns: how many of its last columns are computed.
        count: how many of these get logits.
    """
    accepted = forward_parameters(model)
    result = {}
    if "position_ids" in accepted:
        result["position_ids"] = position_ids(mask)[:, -columns:] + first_position(model)
    if "logits_to_keep" in accepted:
        # Indices, not a count: a slice is not contiguous, and the head far slower with it.
        result["logits_to_keep"] = torch.arange(columns - count, columns, device=mask.device)
    return result


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions ``(R, T)`` from a mask ``(R, T)``: only real tokens count, so that left padding
    shifts nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _masked_outputs(
    model: nn.Module, slots: Tensor, count: int, inputs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Only the masks' hidden states reach the language-model head.

    The hook serves this thread's call alone, so other threads may use the model meanwhile.
    """
    base = getattr(model, "base_model", model)
    positions = slots.unsqueeze(1) + torch.arange(count, device=slots.device)
    positions = positions.clamp(max=inputs["input_ids"].shape[1] - 1)

    def at_masks(values: Tensor) -> Tensor:
        return values.gather(1, positions.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    if base is model:
        return model(**inputs).logits, at_masks
    caller = threading.get_ident()

    def keep_answers(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != caller:
            return output
        kept = at_masks(output[0])
        if isinstance(output, tuple):
            return (kept, *output[1:])
        output.last_hidden_state = kept
        return output

    handle = base.register_forward_hook(keep_answers)
    try:
        return model(**inputs).logits, _all
    finally:
        handle.remove()


def answer_nll(logits: Tensor, answers: Tensor) -> Tensor:
    """Negative log-likelihood ``(R, K)`` of each answer token in float32, 0 where there is none.

    Raises:
        InputError: logits and answers have not as many positions.
    """
    if logits.shape[1] != answers.shape[1]:
        raise InputError(f"{logits.shape[1]} answer positions, {answers.shape[1]} answer tokens")
    flat = F.cross_entropy(
        logits.flatten(0, 1).float(), answers.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(answers.shape)


def word_scores(logits: Tensor, batch: Batch, words: int) -> Tensor:
    """Scores ``(N, words)`` of the label words that each example compares: log-probabilities, up
    to one constant per example.

    Args:
        logits: ``(R, K, vocabulary)``.
        batch: prepared for label comparison.
        words: how many.
    """
    if batch.label_ids is not None:  # one token each: K is 1
        return logits[:, 0].float().gather(1, batch.label_ids)
    return -answer_nll(logits, batch.answers).sum(1).view(-1, words)


def example_losses(logits: Tensor, batch: Batch, words: Words | None) -> Tensor:
    """The loss ``(N,)`` of each example, a sum over its answer tokens."""
    if batch.labels is not None and words is not None:
        scores = word_scores(logits, batch, len(words))
        return training_losses(scores, batch.labels, words, batch.member, batch.taught)
    if batch.taught is not None and batch.likely is not None:
        return divergence.of_tokens(logits, batch.taught, batch.likely).sum(1)
    return answer_nll(logits, batch.answers).sum(1)


@torch.no_grad()
def examples_right(logits: Tensor, batch: Batch, words: Words | None) -> Tensor:
    """``(N,)``: the best label is the right one, or greedy decoding gives the whole answer."""
    if batch.labels is not None and words is not None:
        scores = word_scores(logits, batch, len(words))
        return losses_of_labels(scores, batch.labels, words, batch.member)[1]
    return ((logits.argmax(-1) == batch.answers) | (batch.answers == IGNORED)).all(1)
