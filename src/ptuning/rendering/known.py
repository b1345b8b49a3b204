"""What is tokenized already: the strings of many rows in one call of the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

Tokenize = Callable[[list[str]], list[Any]]
"""Strings -> what each is tokenized to."""


class Known:
    """Remembers strings by who tokenizes them.

    Example:
        >>> known = Known()
        >>> known.ahead([(tokenize, text) for text in texts])
        >>> known(tokenize, texts[0])
        [12, 40]
    """

    def __init__(self) -> None:
        self._found: dict[Tokenize, dict[str, Any]] = {}

    def ahead(self, wanted: Iterable[tuple[Tokenize, str]]) -> None:
        """Tokenize strings together that will be asked for."""
        texts: dict[Tokenize, dict[str, None]] = {}
        for tokenize, text in wanted:
            texts.setdefault(tokenize, {})[text] = None
        for tokenize, distinct in texts.items():
            with suppress(Exception):  # whoever asks for the string at fault meets it again
                found = tokenize(list(distinct))
                self._found[tokenize] = dict(zip(distinct, found, strict=True))

    def __call__(self, tokenize: Tokenize, text: str) -> Any:
        """What a string is tokenized to; in a call of its own where it is not known."""
        found = self._found.setdefault(tokenize, {})
        if text not in found:
            (found[text],) = tokenize([text])
        return found[text]
