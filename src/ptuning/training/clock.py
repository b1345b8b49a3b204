"""How long a training will take, and whether its time is over."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

from .. import distributed
from .progress import in_words

_LAST = 9
"""Steps whose time counts."""
_WORTH_SAYING = 60.0
"""Seconds below which nobody plans."""
_A_STEP = 1e-6
"""Minutes that there always are, less than a step takes: each call comes a step further."""


def minutes_left(given: float | None, started: float) -> float | None:
    """What is left of the minutes that a call may take, if only for a step; one answer for all
    processes.

    Args:
        given: minutes, or None.
        started: when the call began (`time.monotonic`).
    """
    if given is None:
        return None
    left = distributed.from_main(lambda: given - (time.monotonic() - started) / 60)
    return max(left, _A_STEP)


class Clock:
    """The time of one call of a training.

    A step is taken to last as long as the middle one of the last ones: in some much is prepared
    (compilation, CUDA graphs of new shapes).

    Args:
        limit: minutes that it may take, or None.
        epochs: that are left, at the most.
        dev_steps: what looking at dev takes, in steps, before it was done once.
        prepares: so many steps behind the first one may be such.
        behind: steps of what comes when dev has chosen: on with all examples.
        now: seconds.
    """

    def __init__(
        self,
        limit: float | None,
        epochs: int,
        dev_steps: float,
        prepares: int = 0,
        behind: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ):
        self._now, self._began = now, now()
        self._seconds = None if limit is None else 60 * limit
        self._epochs, self._dev_steps = epochs, dev_steps
        self._prepares, self._behind = prepares, behind
        self._last: float | None = None
        self._steps: deque[float] = deque(maxlen=_LAST)
        self._taken = 0
        self._dev: float | None = None
        self._looked = 0.0

    def stepped(self, left: int) -> str | None:
        """A step is done, and so many are left; with the second one (where more prepare something,
        some later) it is known what all take, as a line for the user. The first one's time is not
        like the others': much is prepared in it."""
        last, self._last = self._last, self._now()
        if last is not None:
            self._steps.append(self._last - last - self._looked)
            self._taken += 1
        self._looked = 0.0
        return self._estimate(left) if self._taken == 1 + self._prepares else None

    @property
    def _step(self) -> float:
        """Seconds of a step; of few the shortest."""
        if len(self._steps) <= self._prepares:
            return min(self._steps, default=0.0)
        return median(self._steps)

    def _estimate(self, left: int) -> str | None:
        seconds = left * self._step + self._epochs * self._dev_seconds()
        behind = self._behind * self._step
        if seconds + behind < _WORTH_SAYING:
            return None
        epochs = "1 epoch takes" if self._epochs == 1 else f"{self._epochs} epochs take"
        line = f"{epochs} about {in_words(seconds)}"
        if self._dev_steps:
            line += ", if dev does not stop earlier"
        if behind:
            line += f", and {in_words(behind)} more on with all examples"
        if self._seconds is not None and self._seconds < seconds:
            line += f"; the time given is over after {in_words(self._seconds)}"
        return line

    def looked(self, since: float) -> None:
        """Looking at dev took from `since`, a time of this clock, until now."""
        self._dev = self._now() - since
        self._looked += self._dev

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
