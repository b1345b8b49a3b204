"""What one free answer says, token by token, and when its batch makes room for others.

A batch of free answers may stop for a moment, so that what waits can join it: its rows are read
again then, with what they have said so far, and go on as if nothing had been.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Self

from .backend import cut_at
from .batcher import Item

_NEAR = 16
"""Tokens in front of what is said that decide how it is spelled: a space, half a character."""
_WORTH = 2.0
"""As many times as long as reading its rows took a batch goes on before it lets others join."""


class Listener:
    """Hears the tokens of one free answer: passes its text on, and ends it at a stop or in time.

    Args:
        item: what was asked.
        tokenizer: of the model.
        ends: tokens that end the answer, and are none of it.
        limit: tokens at most.
        before: the ids of a text that it goes on with, to the last space; None for an answer.

    Attributes:
        tokens: said so far.
        score: their log-probability.
        complete: it ended by itself, and not at the limit.
    """

    def __init__(
        self,
        item: Item,
        tokenizer: Any,
        ends: Sequence[int],
        limit: int,
        before: tuple[int, ...] | None = None,
    ):
        self._item, self._tokenizer = item, tokenizer
        self._ends, self._limit = ends, limit
        self._goes_on = before is not None
        self._ids = list((before or ())[-_NEAR:])
        self._before = self._decoded(self._ids)
        self._stop: tuple[str, ...] = item.question.wish.stop
        self._heard: Callable[[str], None] | None = item.question.heard
        self._settled, self._from, self._to = "", 0, len(self._ids)
        self.tokens: list[int] = []
        self.score = 0.0
        self.complete = False

    def __call__(self, token: int, score: float) -> bool:
        """A token and its log-probability; says whether it is enough."""
        self.tokens.append(token)
        self._ids.append(token)
        self.score += score
        if token in self._ends:
            self.complete = True
        elif self._stop or self._heard:
            text = self._text()
            whole = cut_at(text, self._stop)
            self.complete = len(whole) < len(text)
            if self._heard is not None:
                self._heard(self._certain(whole))
        return self.enough

    @property
    def enough(self) -> bool:
        """There is no more to say, or nobody to hear it."""
        return self.complete or len(self.tokens) >= self._limit or self._item.over

    def again(self) -> Self:
        """The same, to go on with."""
        twin = copy(self)
        twin.tokens, twin._ids = [*self.tokens], [*self._ids]
        return twin

    @property
    def whole(self) -> str:
        """All that was said, up to an end or a stop."""
        ended = bool(self.tokens) and self.tokens[-1] in self._ends
        text = self._decoded(self._ids[: len(self._ids) - ended])[len(self._before) :]
        text = cut_at(text, self._stop)
        return text if self._goes_on else text.strip()

    def _text(self) -> str:
        """All that was said; of a long answer only the last tokens are decoded again.

        Those in front of `_to` are settled: their text stays what it is whatever comes. Decoding
        begins at `_from`, some tokens before, since spelling depends on what stands in front.
        """
        ids = self._ids
        settled, text = self._decoded(ids[self._from : self._to]), self._decoded(ids[self._from :])
        if (to := len(ids) - _NEAR) >= self._to + _NEAR:
            more = self._decoded(ids[self._from : to])
            if text.startswith(more):  # not in the middle of a character, or of a tidied space
                self._settled += more[len(settled) :]
                self._from, self._to, settled = self._to, to, more
        return self._settled + text[len(settled) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        clean = {"clean_up_tokenization_spaces": False} if self._goes_on else {}
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, **clean))

    def _certain(self, text: str) -> str:
        """What is certain of the text: not half a character, half a stop or its last spaces."""
        certain = text.rstrip("\ufffd")
        if not self.complete and self._stop:
            certain = certain[: max(0, len(certain) - max(map(len, self._stop)) + 1)]
        return certain if self._goes_on else certain.strip()


class Turn:
    """How long free answers that are asked for together go on before they make room for others.

    They may be too many for one batch, as the rows of ensembles are: then the batches take turns.

    Args:
        waits: somebody waits that could join.
    """

    def __init__(self, waits: Callable[[], bool]):
        self._waits = waits
        self._away = set[Item]()
        self._since, self._end, self._begins = time.monotonic(), 0.0, False

    def add(self, item: Item) -> None:
        """One more free answer that is asked for."""
        self._away.add(item)

    def hear(self, item: Item) -> None:
        """A token of one has come: with the first ones of a batch its rows have been read."""
        now, first = time.monotonic(), item in self._away
        if first and not self._begins:
            self._end = now + _WORTH * (now - self._since)
        self._since, self._begins = now, first
        self._away.discard(item)

    def over(self, item: Item) -> bool:
        """Asked behind each token that is not the last: the answer goes on in another batch, since
        it is worth it now to read its rows once more."""
        if self._begins or time.monotonic() < self._end or not (self._away or self._waits()):
            return False
        self._away.add(item)
        return True
