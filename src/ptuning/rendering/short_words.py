"""Label words of one token each: then an example is one row of a batch, not one for every label.

A label's own name where it is one token, else the words of it that no other label has, else how it
begins. Labels that have none of these get letters. Where it does not work out for all labels their
names stay: words of several tokens are compared word by word.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from ..errors import DataError
from ..prompts.label_names import as_verbalizer, names_having
from ..prompts.prompt import Prompt
from ..prompts.task import fill
from .layout import Layout
from .virtual_ids import resolve_words

_SHORTEST = 3
"""Letters of a word that may stand for a label: "up" and "or" say little."""
_MOST = 3
"""Words of a label."""


def settle_words(prompt: Prompt, tokenizer: Any, kind: str) -> None:
    """Give a prompt whose label words are the labels' names words of one token, if there are such.

    Afterwards its words stand fast. The arguments are those of `Renderer`.
    """
    if prompt.name_words is None:
        return
    parts, prompt.name_words = prompt.name_words, None
    names = {label: fill(words[0], {}) for label, words in prompt.labels.items()}
    tokens = ids_as_answer(prompt, tokenizer, kind)

    def text(token: int) -> str:
        return str(tokenizer.decode([token])).strip()

    if words := one_token_words(names, parts, tokens, text):
        prompt.set_words(as_verbalizer(words))


def ids_as_answer(prompt: Prompt, tokenizer: Any, kind: str) -> Callable[[str], tuple[int, ...]]:
    """What makes a word's ids where a prompt's answer stands; none for what the tokenizer has not.

    The arguments are those of `Renderer`.
    """
    groups = resolve_words(tokenizer, prompt)
    layout = Layout(tokenizer, prompt, kind, [len(group) for group in groups])
    blank, special = dict.fromkeys(prompt.parsed.fields, "x"), set(tokenizer.all_special_ids)

    def tokens(word: str) -> tuple[int, ...]:
        try:
            ids = layout(blank, word).answer
        except DataError:
            return ()
        return () if special.intersection(ids) else ids  # such as [UNK], which stands for any word

    return tokens


def one_token_words(
    names: Mapping[str, str],
    parts: Mapping[str, Sequence[str]],
    tokens: Callable[[str], tuple[int, ...]],
    text: Callable[[int], str],
) -> dict[str, tuple[str, ...]] | None:
    """Words of one token for each label, no token twice; None where there are not enough.

    Args:
        names: label -> its name in words.
        parts: label -> words of its name, those first that tell most of it
            (`prompts.label_names`).
        tokens: a word's ids as an answer.
        text: an id's text.

    Example:
        >>> parts = {"a": ("lost", "card"), "b": ("card",)}
        >>> one_token_words({"a": "card lost", "b": "card"}, parts, ids_of_words, words_of_ids)
        {'a': ('lost',), 'b': ('card',)}
    """
    tokens = cache(tokens)
    known = {
        label: [part for part in of_label if len(part) >= _SHORTEST]
        for label, of_label in parts.items()
    }

    def options(label: str) -> dict[int, str]:
        """One-token words for a label by their ids, the best first."""
        forms = [(word, word.lower()) for word in (names[label], *known[label])]
        begins = [
            max((text(tokens(form)[0]) for form in both if tokens(form)), key=len, default="")
            for both in forms
        ]
        spelled = itertools.chain.from_iterable(forms)
        return _single((*spelled, *(word for word in begins if len(word) > 1)), tokens)

    whole_first = sorted(names, key=lambda label: len(tokens(names[label])) != 1)
    found = {label: options(label) for label in whole_first}
    words = _matched(found)
    taken = {tokens(word) for word in words.values()}
    letters = (
        w for w in _single(_letters(), tokens, len(names)).values() if tokens(w) not in taken
    )
    words |= zip((label for label in names if label not in words), letters, strict=False)
    if len(words) < len(names):
        return None
    longer = [label for label in names if len(tokens(names[label])) != 1]
    made = {label: [words[label]] for label in names}
    taken = {tokens(word) for word in words.values()}
    having = names_having(known)
    for label in longer:
        for part in (part for part in known[label] if having[part.casefold()] == 1):
            for more in _single((part, part.lower()), tokens, 1).values():
                if tokens(more) not in taken and len(made[label]) < _MOST:
                    made[label].append(more)
                    taken.add(tokens(more))
    return {label: tuple(of_label) for label, of_label in made.items()}


def _single(
    words: Iterable[str], tokens: Callable[[str], tuple[int, ...]], most: int | None = None
) -> dict[int, str]:
    """Those of one token by their ids, in their order; at most so many."""
    found: dict[int, str] = {}
    for word in words:
        ids = tokens(word) if word else ()
        if len(ids) == 1:
            found.setdefault(ids[0], word)
        if len(found) == most:
            break
    return found


def _letters() -> Iterator[str]:
    """A, B, … AA, AB, …: what names nothing, and so does for any label."""
    for length in (1, 2):
        yield from map("".join, itertools.product(string.ascii_uppercase, repeat=length))


def _matched(options: Mapping[str, Mapping[int, str]]) -> dict[str, str]:
    """Words of their own for as many labels as can have one, the earlier ones first (bipartite
    matching by augmenting paths, Kuhn 1955)."""
    owner: dict[int, str] = {}

    def seat(label: str, tried: set[int]) -> bool:
        for token in options[label]:
            if token not in owner:
                owner[token] = label
                return True
        for token in options[label]:
            if token not in tried:
                tried.add(token)
                if seat(owner[token], tried):
                    owner[token] = label
                    return True
        return False

    for label in options:
        seat(label, set())
    return {label: options[label][token] for token, label in owner.items()}
