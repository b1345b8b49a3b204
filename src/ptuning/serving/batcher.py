"""One thread that owns the model, and the queue before it.

Questions wait in the order in which they come. Whenever the model is free, all that wait, up to
`most`, go as one batch, so batches grow with the load and a lone question waits for nothing. Brief
questions overtake, and jobs, which touch nothing that is asked (attach a prompt, take one off that
nobody asks): between two tokens of a long answer they are let in. And an answer that is not over
yet can be put back in front, to go on in one batch with what waits.

Knows nothing of HTTP, prompts or models.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ..errors import PtuningError


class Overloaded(PtuningError):
    """More waits than is allowed."""


class Stopping(PtuningError):
    """The server takes no more questions."""


class TooLate(PtuningError):
    """A question's time is over."""


GOES_ON: Any = object()
"""Instead of a result: the question is asked again in the next batch, first of all."""


@dataclass(eq=False)
class Item:
    """A question that waits.

    Attributes:
        question: for the function that answers.
        deadline: of `time.monotonic`.
        brief: it is answered in a moment, so it need not wait for others' long answers.
        answer: comes here.
        abandoned: nobody wants the answer any more.
    """

    question: Any
    deadline: float
    brief: bool = False
    answer: Future[Any] = field(default_factory=Future)
    abandoned: bool = False

    @property
    def over(self) -> bool:
        """It need not be answered."""
        return self.abandoned or self.answer.cancelled() or time.monotonic() > self.deadline


class Batcher:
    """Answers questions in batches, in a thread of its own.

    Args:
        answer: gives items with their results, as they are known, or with `GOES_ON`; an exception
            as a result is that item's. Called in the thread only.
        most: questions of a batch.
        waiting: questions that may wait.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Item]], Iterator[tuple[Item, Any]]],
        most: int = 32,
        waiting: int = 1024,
    ):
        self._answer, self._most, self._waiting = answer, most, waiting
        self._queue: deque[Item] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = self._ended = False
        self._brief = 0  # of those that wait
        self._interrupted, self._next_time = False, 0.0
        self.sizes: Callable[[int], None] = lambda size: None
        """Hears the size of each batch."""
        self._thread = threading.Thread(target=self._work, name="ptuning model", daemon=True)
        self._thread.start()

    def ask(self, items: Sequence[Item]) -> None:
        """Queue questions, all or none.

        Raises:
            Overloaded: too many wait.
            Stopping: `close` was called.
        """
        with self._changed:
            if self._closing:
                raise Stopping("the server is stopping; ask another, or again later")
            if len(self._queue) + len(items) > self._waiting:
                raise Overloaded(
                    f"{len(self._queue)} questions wait, and {self._waiting} may; ask again in a "
                    "moment"
                )
            self._queue.extend(items)
            self._brief += sum(item.brief for item in items)
            self._changed.notify()

    def let_in(self) -> None:
        """Do jobs, and answer brief questions that wait; for who answers to call, in the middle of
        a batch.

        They get as much time as the batch itself: after a second of theirs none come in for one.
        """
        waits = self._brief or self._jobs
        if self._interrupted or not waits or time.monotonic() < self._next_time:
            return
        with self._changed:
            jobs = [*self._jobs]
            self._jobs.clear()
            items = list(islice((item for item in self._queue if item.brief), self._most))
            for item in items:
                self._queue.remove(item)
            self._brief -= len(items)
        self._interrupted, begun = True, time.monotonic()
        try:
            for job in jobs:
                job()
            self._serve(items)
        finally:
            now = time.monotonic()
            self._interrupted, self._next_time = False, now + (now - begun)

    @property
    def others_wait(self) -> bool:
        """A question waits that is not let in."""
        with self._changed:
            return self._brief < len(self._queue)

    def run(self, job: Callable[[], Any]) -> Any:
        """Run a job in the thread, in front of what waits and between two tokens of a long answer.

        Args:
            job: takes no arguments, and changes nothing that questions need.

        Returns:
            Its result; its error is raised.
        """
        return self.begin(job).result()

    def begin(self, job: Callable[[], Any]) -> Future[Any]:
        """As `run`, without waiting for it.

        Raises:
            Stopping: the thread has ended.
        """
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)

        with self._changed:
            if self._ended:
                raise Stopping("the server has stopped")
            self._jobs.append(run)
            self._changed.notify()
        return done

    @property
    def depth(self) -> int:
        """How much waits."""
        return len(self._queue) + len(self._jobs)

    @property
    def alive(self) -> bool:
        """The thread works."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Answer what waits, take nothing more, end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self.depth and not self._closing:
                    self._changed.wait()
                if not self.depth:
                    self._ended = True
                    return
                work = self._take()
            if callable(work):
                work()
            else:
                self._serve(work)

    def _take(self) -> Callable[[], None] | list[Item]:
        """A job, or as many questions as a batch has."""
        if self._jobs:
            return self._jobs.popleft()
        taken = [self._queue.popleft() for _ in range(min(self._most, len(self._queue)))]
        self._brief -= sum(item.brief for item in taken)
        return taken

    def _serve(self, items: list[Item]) -> None:
        for item in items:
            if item.over:
                settle(item, TooLate("the answer's time was over before its turn came"))
        going_on = self._attempt([item for item in items if not item.answer.done()])
        for item in items:  # a batch that failed: each alone, so that one fault stays alone
            if not item.answer.done() and item not in going_on:
                going_on += self._attempt([item], last=True)
        with self._changed:
            self._queue.extendleft(reversed(going_on))
            self._brief += sum(item.brief for item in going_on)

    def _attempt(self, items: list[Item], last: bool = False) -> list[Item]:
        """Gives those that go on."""
        going_on: list[Item] = []
        if not items:
            return going_on
        self.sizes(len(items))
        try:
            for item, result in self._answer(items):
                if result is GOES_ON:
                    going_on.append(item)
                    continue
                settle(item, result)
        except BaseException as error:
            if last or len(items) == 1:
                for item in items:
                    settle(item, error)
        return going_on


def settle(item: Item, result: Any) -> None:
    """A result, which may come too late, or a fault; it can be told before its batch is over."""
    if item.over and not isinstance(result, BaseException):
        result = TooLate("the answer took too long")
    with suppress(InvalidStateError):  # its asker may have cancelled it
        if isinstance(result, BaseException):
            item.answer.set_exception(result)
        else:
            item.answer.set_result(result)
