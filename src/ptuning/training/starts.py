"""Where virtual tokens begin that the template gives no words.

    encoder    as the encoder makes them
    words      at random words of the vocabulary, where virtual tokens without a network begin
               anyway: Lester et al. 2021 (arXiv 2104.08691), "sampled vocabulary"
    labels     at the label words' tokens as answers, in order, as far as they go: the same, "class
               labels"
    examples   at the ends of some training examples, text and answer, of different answers: Lu et
               al. 2025 (CT-Prompt, arXiv 2507.04221); while an example is trained on, the virtual
               tokens that came from it are left out of its row (leave-one-out masking), so that it
               cannot read its own answer there

A start is a word for each virtual token (`Member`): the encoder is changed to give its vector.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import NamedTuple

from ..data.values import text_of
from ..errors import InputError
from ..prompts.task import Task, fill, named_fields
from ..rendering.example import Example, column_texts
from ..rendering.render import Rendered, Renderer

_LEAST = 4
"""Virtual tokens that an example has at the least."""


class Start(NamedTuple):
    """Where a prompt begins.

    Attributes:
        words: for each virtual token the id of the word that it begins at, or None.
        came_from: of training examples (their numbers) the virtual tokens that came from them.
    """

    words: list[int | None]
    came_from: dict[int, frozenset[int]]


def check_start(task: Task, init: str | None) -> None:
    """Refuse a start that the task cannot give.

    Raises:
        InputError: no labels, or words that change from row to row.
    """
    if init == "labels" and not task.labels:
        raise InputError(
            "init is labels, and there are none; give a verbalizer (--labels), or another start"
        )
    words = (word for of_label in task.labels.values() for word in of_label)
    if init == "labels" and any(map(named_fields, words)):
        raise InputError("init is labels, and the label words name columns; take another start")


def start_of(
    renderer: Renderer, rows: Sequence[Example], answers: Sequence[str], init: str, seed: int
) -> Start:
    """The start of a member.

    Args:
        renderer: of its template; words that stand there come first.
        rows: training examples.
        answers: of these.
        init: a value of the setting.
        seed: which words or examples.
    """
    words = [word for group in renderer.groups for word in group]
    free = [number for number, word in enumerate(words) if word is None]
    came_from: dict[int, frozenset[int]] = {}
    if init == "words":
        for number, word in zip(free, _drawn(renderer, len(free), seed), strict=True):
            words[number] = word
    if init == "labels":
        blank = dict.fromkeys(renderer.task.parsed.fields, "x")
        texts = [fill(of_label[0], {}) for of_label in renderer.labels.values()]
        known = chain.from_iterable(renderer.layout(blank, text).answer for text in texts)
        for number, word in zip(free, known, strict=False):
            words[number] = word
    if init == "examples" and free:
        chosen = _of_different_answers(answers, max(1, len(free) // _LEAST), seed)
        size = -(-len(free) // len(chosen))
        for place, example in enumerate(chosen):
            own = free[place * size : (place + 1) * size]
            ids = _ids(renderer, _text(renderer, rows[example], answers[example]))
            named = list(zip(reversed(own), reversed(ids), strict=False))  # the end has the answer
            for number, word in named:
                words[number] = word
            came_from[example] = frozenset(number for number, _ in named)
    return Start(words, came_from)


def left_out(examples: Sequence[Rendered], start: Start) -> list[Rendered]:
    """The training examples, each without the virtual tokens that came from it."""
    if not start.came_from:
        return list(examples)
    return [
        replace(
            one,
            sequences=tuple(s.without(start.came_from.get(number, ())) for s in one.sequences),
        )
        for number, one in enumerate(examples)
    ]


def _drawn(renderer: Renderer, count: int, seed: int) -> list[int]:
    """So many words of the vocabulary, none of them special."""
    tokenizer = renderer.tokenizer
    special, known = set(tokenizer.all_special_ids), renderer.known_tokens
    words = tokenizer.vocab_size if known is None else min(known, tokenizer.vocab_size)
    ordinary = [token for token in range(words) if token not in special]
    return random.Random(seed).choices(ordinary, k=count)


def _of_different_answers(answers: Sequence[str], count: int, seed: int) -> list[int]:
    """The numbers of some examples: one of each answer, then the second of each, and so on."""
    numbers = list(range(len(answers)))
    random.Random(seed).shuffle(numbers)
    by_answer: dict[str, list[int]] = {}
    for number in numbers:
        by_answer.setdefault(answers[number], []).append(number)
    turns = chain.from_iterable(zip_longest(*by_answer.values()))
    return [number for number in turns if number is not None][:count]


def _text(renderer: Renderer, row: Example, answer: str) -> str:
    fields = [text_of(name, row[name]) for name in renderer.task.parsed.fields]
    if renderer.labels:
        word = renderer.labels[answer][0]
        answer = fill(word, column_texts(row, named_fields(word), "verbalizer"))
    return " ".join([*fields, answer])


def _ids(renderer: Renderer, text: str) -> list[int]:
    return list(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])
