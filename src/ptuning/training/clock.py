"""How long a training will take, and whether its time is over."""

from __future__ import annotations

import time
from collections.abc import Callable

from .. import distributed
from .progress import in_words

_WORTH_SAYING = 60.0
"""Seconds below which nobody plans."""


class Clock:
    """The time of one call of a training.

    Args:
        limit: minutes that it may take, or None.
        epochs: at the most.
        dev_steps: what looking at dev takes, in steps, before it was done once.
        now: seconds.
    """

    def __init__(
        self,
        limit: float | None,
        epochs: int,
        dev_steps: float,
        now: Callable[[], float] = time.monotonic,
    ):
        self._now, self._began = now, now()
        self._seconds = None if limit is None else 60 * limit
        self._epochs, self._dev_steps = epochs, dev_steps
        self._first: float | None = None
        self._step = 0.0
        self._dev: float | None = None

    def stepped(self, left: int) -> str | None:
        """A step is done, and so many are left; with the second one it is known what all take, as a
        line for the user. The first one's time is not like the others': much is prepared in it."""
        if self._first is None:
            self._first = self._now()
        elif not self._step:
            self._step = self._now() - self._first
            return self._estimate(left)
        return None

    def _estimate(self, left: int) -> str | None:
        seconds = left * self._step + self._epochs * self._dev_seconds()
        if seconds < _WORTH_SAYING:
            return None
        line = f"{self._epochs} epochs take about {in_words(seconds)}"
        if self._dev_steps:
            line += ", if dev does not stop earlier"
        if self._seconds is not None and self._seconds < seconds:
            line += f"; the time given is over after {in_words(self._seconds)}"
        return line

    def looked(self, since: float) -> None:
        """Looking at dev took from `since`, a time of this clock, until now."""
        self._dev = self._now() - since

    @property
    def time(self) -> float:
        """Seconds."""
        return self._now()

    def _dev_seconds(self) -> float:
        return self._step * self._dev_steps if self._dev is None else self._dev

    def is_over(self) -> bool:
        """There is no time for a further step and a look at dev; one answer for all processes."""
        if self._seconds is None:
            return False
        limit = self._seconds - self._step - self._dev_seconds()
        return distributed.from_main(lambda: self._now() - self._began >= limit)
