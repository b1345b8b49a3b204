"""Answers of a model with a prompt: labels by comparison, free answers by greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.base_model import context_length, eval_mode, task_kind
from ..errors import InputError
from ..forward.grouped_queries import grouped_queries
from ..forward.label_words import label_word_scores
from ..forward.plain import answer_logits, by_label, first_position, position_ids
from ..forward.prefix_store import PrefixStore, for_prediction, in_common
from ..forward.scoring import batch_for, model_device
from ..prompts.task import Task
from ..rendering.collate import Batch
from ..rendering.render import Example, Rendered, Renderer, render_all
from .attachment import placed

_KEPT = 64 * 2**20
"""What one prompt's prediction keeps of the parts that its rows share."""


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        answer: a label of the verbalizer, a candidate, or free text.
        probability: of the label among the labels, or of the free answer's tokens.
        probabilities: label -> probability; empty for free answers.
    """

    answer: str
    probability: float
    probabilities: dict[str, float] = field(default_factory=dict)


def predict(
    model: nn.Module,
    tokenizer: Any,
    prompt: Task | Sequence[Task],
    rows: Iterable[Example],
    *,
    candidates: Sequence[str] | None = None,
    answer_tokens: int | None = None,
    batch_size: int = 32,
) -> list[Any]:
    """The answer to each row; `predict_details` also gives probabilities.

    Args:
        model: the frozen base model.
        tokenizer: the model's.
        prompt: a trained prompt, attached or not; or a manual `Task`. Or several: then the result
            has a list for each, and text in front of their virtual tokens, as far as it is the same
            (one document, many tasks), is computed once for a causal model.
        rows: examples, column -> value; the answer column is not needed.
        candidates: choose among these answers.
        answer_tokens: longest free answer in tokens; by default the training's.
        batch_size: rows per forward.

    Returns:
        a string for each row; for several prompts a list of strings for each prompt.

    Raises:
        InputError, DataError: prompt, model or rows do not fit together.

    Example:
        >>> predict(model, tokenizer, prompt, [{"country": "France"}])
        ['Paris']
    """
    options: Any = {"candidates": candidates, "answer_tokens": answer_tokens}
    details: Any = predict_details(model, tokenizer, prompt, rows, **options, batch_size=batch_size)
    if isinstance(prompt, Task):
        return [prediction.answer for prediction in details]
    return [[prediction.answer for prediction in of_one] for of_one in details]


@torch.no_grad()
def predict_details(
    model: nn.Module,
    tokenizer: Any,
    prompt: Task | Sequence[Task],
    rows: Iterable[Example],
    *,
    candidates: Sequence[str] | None = None,
    answer_tokens: int | None = None,
    batch_size: int = 32,
) -> list[Any]:
    """Like `predict`, with probabilities."""
    tasks, rows = [prompt] if isinstance(prompt, Task) else list(prompt), list(rows)
    kind, context = task_kind(model), context_length(model, tokenizer)
    store = PrefixStore(model, _KEPT if len(tasks) == 1 else None) if kind == "causal" else None
    choices = list(candidates) if candidates else None
    asked = []
    for task in tasks:
        settled = task if answer_tokens is None else replace(task, answer_tokens=answer_tokens)
        renderer = Renderer(tokenizer, settled, kind, context, choices)
        renderer.compares = bool(renderer.labels)
        asked.append(_Asked(renderer, render_all(renderer, rows, "prediction", answered=False)))
    common = in_common([one.examples for one in asked]) if store and len(tasks) > 1 else None
    share = partial(for_prediction, common=common) if store else None
    results: list[list[Prediction]] = [[] for _ in tasks]
    with eval_mode(model), ExitStack() as attached:
        for task, question in zip(tasks, asked, strict=True):
            question.first_id = attached.enter_context(placed(model, tokenizer, task))
        for together in _in_one_batch(asked):
            group = [asked[number] for number in together]
            answers = _answers(model, group, len(rows), batch_size, store, share)
            for number, of_one in zip(together, answers, strict=True):
                results[number] = of_one
    return results[0] if isinstance(prompt, Task) else results


@dataclass
class _Asked:
    """One task on all rows, and the id of its first virtual token."""

    renderer: Renderer
    examples: list[Rendered]
    first_id: int = 0


def _in_one_batch(asked: list[_Asked]) -> list[list[int]]:
    """The numbers of tasks whose rows may share batches: those that compare as many words."""
    groups: dict[Any, list[int]] = {}
    for number, question in enumerate(asked):
        renderer = question.renderer
        key = len(renderer.owner) if renderer.compares else (number,)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _answers(
    model: nn.Module,
    asked: list[_Asked],
    count: int,
    batch_size: int,
    store: PrefixStore | None,
    share: Callable[[Batch], Batch] | None,
) -> list[list[Prediction]]:
    """The tasks' answers, in batches of rows of like length; a row's tasks stand together."""
    results = [[Prediction("", 0.0)] * count for _ in asked]
    renderer = asked[0].renderer
    order = sorted(range(count), key=lambda i: len(asked[0].examples[i].sequences[0].ids))
    answer = _compare if renderer.compares else _decode
    rows = max(1, batch_size // len(asked))
    for start in range(0, count, rows):
        places = [(t, i) for i in order[start : start + rows] for t in range(len(asked))]
        chunk = [asked[t].examples[i] for t, i in places]
        batch = batch_for(model, renderer, chunk, [asked[t].first_id for t, _ in places])
        batch = share(batch) if share else batch
        renderers = [asked[t].renderer for t, _ in places]
        answers = answer(model, renderers, batch.to(model_device(model)), store)
        for (task, index), prediction in zip(places, answers, strict=True):
            results[task][index] = prediction
    return results


def _compare(
    model: nn.Module, renderers: list[Renderer], batch: Batch, store: PrefixStore | None
) -> list[Prediction]:
    words = len(renderers[0].owner)
    scores = label_word_scores(model, batch, words, store)
    predictions = []
    for row, renderer in zip(scores, renderers, strict=True):
        owner = torch.tensor(renderer.owner, device=row.device)
        shares = by_label(row[None], owner)[0].softmax(0).tolist()
        labels = list(renderer.labels)
        best = max(range(len(shares)), key=shares.__getitem__)
        named = dict(zip(labels, shares, strict=True))
        predictions.append(Prediction(labels[best], shares[best], named))
    return predictions


def _decode(
    model: nn.Module, renderers: list[Renderer], batch: Batch, store: PrefixStore | None
) -> list[Prediction]:
    renderer = renderers[0]
    if renderer.kind == "masked":
        count = renderer.task.answer_tokens or 1
        empty = batch.answers.new_zeros(len(batch.input_ids), count)
        logits = answer_logits(model, replace(batch, answers=empty))
        best = logits.float().log_softmax(-1).max(-1)
        return _texts(renderer.tokenizer, best.indices, best.values)
    return _generate(model, renderer, batch, store)


def _generate(
    model: Any, renderer: Renderer, batch: Batch, store: PrefixStore | None
) -> list[Prediction]:
    from transformers import GenerationConfig

    limit = renderer.task.answer_tokens
    if limit is None:
        raise InputError(
            "how long may a free answer be? Give answer_tokens (--answer-tokens N), or candidates"
        )
    tokenizer = renderer.tokenizer
    pad = tokenizer.pad_token_id
    end = tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end if pad is None else pad,
        return_dict_in_generate=True,
        output_logits=True,
    )
    shared = store.cache(batch) if store else None
    more: dict[str, Any] = {} if shared is None else {"past_key_values": shared}
    if first := first_position(model):  # transformers would count from 0
        more["position_ids"] = position_ids(batch.attention_mask) + first
    with grouped_queries(model):
        made = _greedy(model).generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=config,
            **more,
        )
    steps = len(made.logits)
    chosen = made.sequences[:, -steps:]
    logits = torch.stack(made.logits, dim=1).float().log_softmax(-1)
    scores = logits.gather(2, chosen.unsqueeze(-1)).squeeze(-1)
    if end is not None:  # what is filled in after the end has no probability of its own
        ends = (chosen == end).long()
        scores = scores.masked_fill(ends.cumsum(1) - ends > 0, 0.0)
    return _texts(tokenizer, chosen, scores)


def _greedy(model: Any) -> Any:
    """The same model without generation settings of its own, which would fill what is not named.

    Such as penalties, suppressed tokens or a kind of cache; with which token decoding starts stays.
    """
    from transformers import GenerationConfig

    twin = copy(getattr(model, "_orig_mod", model))
    own = model.generation_config
    twin.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        forced_bos_token_id=own.forced_bos_token_id,
        forced_eos_token_id=own.forced_eos_token_id,
    )
    return twin


def _texts(tokenizer: Any, ids: Tensor, scores: Tensor) -> list[Prediction]:
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    probabilities = scores.sum(1).exp().tolist()
    return [
        Prediction(text.strip(), probability)
        for text, probability in zip(texts, probabilities, strict=True)
    ]
