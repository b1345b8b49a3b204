"""Words for labels whose names say nothing, such as 0 and 1: those that the frozen model says
behind one label's examples more than behind the others'.

    t(word, label) = (mean of log p(word | its examples) - mean of the others') / their error

As in automatic verbalizers (arXiv 2010.13641), with a t statistic for the ratio, behind the
template without its virtual tokens. They are taken only where, found on one half of the examples,
they tell those of the other half apart better than the names do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..backbone.base_model import BaseModel
from ..backbone.modes import eval_mode
from ..backbone.traits import counts_columns, sees_padding
from ..forward.engine import Engine
from ..prompts.label_names import as_verbalizer
from ..prompts.prompt import Prompt
from ..rendering.example import Example
from ..rendering.render import render_all
from ..rendering.short_words import ids_as_answer, settle_words
from .members import answers_of

_EXAMPLES = 400
"""That are looked at; more tell little more."""
_WORDS = 4
"""Of each label."""
_LIKELY = 1e-6
"""What a word must be likely in the mean of all examples."""
_ERROR = 0.05
"""Beside the error of the means: what all examples say alike tells nothing."""
_LOOKED_AT = 300
"""Tokens of which the words of a label are chosen."""
_SHORTEST = 3
"""Letters."""


def find_words(base: BaseModel, prompt: Prompt, rows: Sequence[Example]) -> None:
    """Give a prompt whose labels' names say nothing (`Prompt.nameless`) words for them, if the
    examples tell some; afterwards its words stand fast.

    Args:
        base: the frozen model.
        prompt: whose label words are their names.
        rows: training examples: column -> value.
    """
    if not prompt.nameless or prompt.vectors is not None:
        return
    prompt.nameless = False
    settle_words(prompt, base.tokenizer, base.kind)
    words = distributed.from_main(lambda: _words(base, prompt, rows))
    if words is not None:
        prompt.set_words(as_verbalizer(words))


def _words(base: BaseModel, prompt: Prompt, rows: Sequence[Example]) -> dict[str, list[str]] | None:
    """Label -> its words, if the examples tell some that tell more than the names."""
    tokens = ids_as_answer(prompt, base.tokenizer, base.kind)
    whole = [tokens(words[0]) for words in prompt.labels.values()]
    names = [list(ids[:1]) for ids in whole]
    if not all(names):
        return None
    if len(rows) > _EXAMPLES:  # tables may be sorted
        rows = random.Random(0).sample(rows, _EXAMPLES)
    labels = list(prompt.labels)
    own = torch.tensor([labels.index(answer) for answer in answers_of(prompt, rows)])
    said = _said(base, prompt, rows)

    def words_of(some: Tensor) -> list[list[int]]:
        found = _telling(said[some], own[some], len(labels), base.tokenizer, tokens)
        return [its or name for its, name in zip(found, names, strict=True)]

    halves = torch.zeros(len(rows), dtype=torch.bool)
    for label in range(len(labels)):
        halves[(own == label).nonzero()[::2]] = True
    gain = 0
    for half in (halves, ~halves):
        gain += _right(said[~half], own[~half], words_of(half))
        gain -= _right(said[~half], own[~half], names)
    found = words_of(halves | ~halves)
    of_several = any(
        its == name and len(ids) > 1 for its, name, ids in zip(found, names, whole, strict=True)
    )
    if gain <= 0 or of_several:
        return None
    spelled = [[_text(base.tokenizer, token) for token in its] for its in found]
    return dict(zip(labels, spelled, strict=True))


@torch.no_grad()
def _said(base: BaseModel, prompt: Prompt, rows: Sequence[Example]) -> Tensor:
    """Log-probabilities ``(N, vocabulary)`` of the first word behind each row, in half precision:
    400 rows of 150,000 words are 120 MB."""
    engine = Engine(base, 0)
    task = replace(prompt.manual(), verbalizer=None, answer_tokens=1)
    renderer = engine.renderer(task)
    examples = render_all(renderer, rows, "training", answered=False)
    said: list[Any] = [None] * len(rows)
    alone = counts_columns(base.model) or sees_padding(base.model)
    with eval_mode(base.model):
        for chunk in engine.chunks(examples, 1 if alone else None):
            batch = engine.prediction_batch([(examples[n], 0) for n in chunk], [0])
            one = batch.answers.new_zeros(len(chunk), 1)
            logits = engine.logits(replace(batch, answers=one))[:, 0].float()
            for number, row in zip(chunk, logits.log_softmax(-1).half().cpu(), strict=True):
                said[number] = row
    return torch.stack(said)


def _telling(
    said: Tensor,
    own: Tensor,
    count: int,
    tokenizer: Any,
    tokens: Callable[[str], tuple[int, ...]],
) -> list[list[int]]:
    """The ids of each label's words, those first that tell most; none for a label without examples.

    Args:
        said: ``(N, vocabulary)`` log-probabilities.
        own: ``(N,)`` the examples' labels.
        count: of the labels.
        tokenizer: gives a token's text.
        tokens: a word's ids as an answer.
    """
    numbers = said.float()
    unlikely = numbers.logsumexp(0) < math.log(_LIKELY * len(said))
    spread, total = numbers.std(0).nan_to_num(), numbers.sum(0)
    scores = []
    for label in range(count):
        mine = numbers[own == label]
        others = len(said) - len(mine)
        if not len(mine) or not others:
            scores.append(torch.full_like(spread, -torch.inf))
            continue
        error = spread * math.sqrt(1 / len(mine) + 1 / others)
        score = (mine.mean(0) - (total - mine.sum(0)) / others) / (error + _ERROR)
        scores.append(score.masked_fill(unlikely, -torch.inf))
    best = torch.stack(scores).argmax(0)
    taken, found = set[str](), list[list[int]]()
    for label, score in enumerate(scores):
        its: list[int] = []
        for token in score.topk(min(_LOOKED_AT, len(score))).indices.tolist():
            word = _text(tokenizer, token)
            is_word = word.isalpha() and len(word) >= _SHORTEST and word.casefold() not in taken
            if is_word and best[token] == label and score[token] > 0 and tokens(word) == (token,):
                taken.add(word.casefold())
                its.append(token)
            if len(its) == _WORDS:
                break
        found.append(its)
    return found


def _right(said: Tensor, own: Tensor, words: list[list[int]]) -> int:
    """How many examples their label's words name, where on average no label is likelier."""
    scores = torch.stack([said[:, its].float().logsumexp(1) for its in words], 1)
    return int(((scores - scores.mean(0)).argmax(1) == own).sum())


def _text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token])).strip()
