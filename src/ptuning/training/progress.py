"""`Progress`: what a training tells its listener; `shown`: the listener that shows it to people."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_SILENCE = 60.0
"""Seconds without a line where there is no bar to look at."""


@dataclass(frozen=True)
class Progress:
    """What a listener hears: after each optimizer step, and with `record` after each epoch; and
    before the first one, with `before`, after each 64 texts that a teacher has read.

    Attributes:
        step: steps done, or texts read.
        steps: all of them.
        loss: mean over the members in training.
        record: of the member that is best so far.
        members: how many are in training.
        of: how many there were.
        note: what the user should know, said once.
        epochs: how many there are at the most.
        before: what is done before the training; empty in it.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    record: dict[str, float] | None = None
    members: int = 1
    of: int = 1
    note: str = ""
    epochs: int = 0
    before: str = ""


def telling_once(listener: Callable[[Progress], None], what: str) -> Callable[[Progress], None]:
    """The same listener, which is told `what` at first: which part of a training begins."""
    told = False

    def tell(heard: Progress) -> None:
        nonlocal told
        note = "" if told else what
        told = True
        listener(replace(heard, note="; ".join(filter(None, [note, heard.note]))))

    return tell


class Pace:
    """The time that is left, by the pace since a training, or a part of it, was first heard.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._last = 0

    def left(self, heard: Progress) -> float | None:
        """Seconds to the last step; None where nothing is known yet, or nothing is left."""
        now = self._clock()
        if self._first is None or heard.step < self._last:
            self._first = heard.step, now
        self._last = heard.step
        step, since = self._first
        if heard.step == step or heard.step >= heard.steps:
            return None
        return (now - since) / (heard.step - step) * (heard.steps - heard.step)


def in_words(seconds: float) -> str:
    """A duration for people: ``40 s``, ``4 min``, ``1 h 5 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def epoch_line(heard: Progress, left: float | None) -> str:
    """An epoch's figures and the time that is left."""
    record = heard.record or {}
    line = f"{_epoch(heard)}  loss {record['loss']:.4f}"
    if "dev_accuracy" in record:
        accuracy, loss = record["dev_accuracy"], record["dev_loss"]
        line += f"  dev {100 * accuracy:.1f} %  dev loss {loss:.4f}"
    if heard.of > 1:
        line += f"  (the best of this epoch; {heard.members} of {heard.of} members go on)"
    return line + _left(left)


def _epoch(heard: Progress) -> str:
    if not heard.epochs:
        return f"epoch {heard.epoch}"
    return f"epoch {heard.epoch:>{len(str(heard.epochs))}} of {heard.epochs}"


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", about {in_words(seconds)} left"


@contextmanager
def shown(
    console: Console | None = None, say: Callable[[str], None] | None = None, bar: bool = True
) -> Iterator[Callable[[Progress], None]]:
    """Show a training: a line for each epoch, and a bar where there is a terminal.

    Args:
        console: where the bar is; by default stderr, or a notebook's cell.
        say: what says a line; by default the console.
        bar: False shows no bar.

    Yields:
        the listener.
    """
    from rich import progress as bars
    from rich.console import Console

    console = console or Console(stderr=True, soft_wrap=True, highlight=False)
    say = say or (lambda line: console.print(line, markup=False))
    text = [bars.TextColumn("{task.description}"), bars.TextColumn("{task.percentage:.0f}%")]
    times = [bars.TimeElapsedColumn(), bars.TimeRemainingColumn()]
    columns = (text[0], bars.BarColumn(), text[1], *times)
    looked_at = bar and (console.is_terminal or console.is_jupyter)
    drawn = bars.Progress(*columns, console=console, transient=True, disable=not looked_at)
    pace, said = Pace(), time.monotonic()

    with drawn:
        task = drawn.add_task("reading examples", total=None)

        def listener(heard: Progress) -> None:
            nonlocal said
            left = pace.left(heard)
            drawn.update(task, completed=heard.step, total=heard.steps)
            if heard.note:
                say(heard.note)
            if heard.record:
                say(epoch_line(heard, left))
                said = time.monotonic()
                return
            part = heard.before or _epoch(heard)
            loss = "" if heard.before else f", loss {heard.loss:.3f}"
            drawn.update(task, description=f"{part}{loss}")
            if not looked_at and time.monotonic() - said > _SILENCE:
                say(f"{part}, {100 * heard.step / heard.steps:.0f} %{_left(left)}")
                said = time.monotonic()

        yield listener
