"""What all addresses share: finding a prompt, checking rows, asking, telling."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, PromptFileError, briefly
from .backend import Answer, Backend, Gone, Row, Unreachable, Wish
from .batcher import Overloaded, Stopping, TooLate
from .gate import Limits, Refused
from .metrics import Metrics
from .registry import Registry, Served


@dataclass
class Desk:
    """A server's parts.

    Attributes:
        accepted: requests whose rows were taken.
        answered: those of them that were answered, or told why not.
    """

    backend: Backend
    registry: Registry
    limits: Limits
    metrics: Metrics
    accepted: int = 0
    answered: int = 0

    def served(self, name: str) -> Served:
        """The prompt of a name.

        Raises:
            Refused: there is none.
        """
        found = self.registry.served.get(name)
        if found is None:
            why = self.registry.refused.get(name)
            if why is not None:
                raise Refused(404, f"the prompt {name!r} cannot be served: {why}")
            raise Refused(
                404, f"there is no prompt {briefly(name)} here; GET /v1/models lists them"
            )
        return found

    def wish(
        self, virtual: bool = True, limit: int | None = None, stop: str | list[str] | None = None
    ) -> Wish:
        """What a request wishes, within the limits.

        Raises:
            Refused: more tokens or other stops than are served.
        """
        if limit is not None and limit > self.limits.tokens:
            raise Refused(422, f"max_tokens is {limit}; at most {self.limits.tokens} are written")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if len(stops) > 4 or any(not s or len(s) > 100 for s in stops):
            raise Refused(422, "stop: at most 4 texts of 1 to 100 characters")
        deadline = time.monotonic() + self.limits.seconds
        return Wish(deadline, virtual, limit, stops, self.limits.tokens)

    def check_count(self, rows: Sequence[Row]) -> None:
        """Refuse more rows than may come at once, or than could ever wait."""
        most = min(self.limits.rows, self.limits.waiting)
        if len(rows) > most:
            raise Refused(413, f"{len(rows)} rows came; at most {most} may at once")

    def check_rows(self, served: Served, rows: Sequence[Row], named: bool) -> None:
        """Refuse rows that the prompt does not take.

        Args:
            served: the prompt.
            rows: of a request.
            named: they came as a list, so that the fault's row is told.
        """
        self.check_count(rows)
        for number, row in enumerate(rows):
            where = f"rows.{number}: " if named else ""
            takes = f"the prompt {served.name!r} takes {', '.join(map(repr, served.fields))}"
            if missing := [name for name in served.fields if name not in row]:
                raise Refused(422, f"{where}the field {missing[0]!r} is missing; {takes}")
            if unknown := [name for name in row if name not in served.fields]:
                raise Refused(422, f"{where}there is no field {unknown[0]!r}; {takes}")

    async def answer(self, name: str, handle: Any, rows: Sequence[Row], wish: Wish) -> list[Answer]:
        """An answer for each row.

        Raises:
            Refused: and why.
        """
        self.accepted += 1
        try:
            answers = await self._answers(name, handle, rows, wish)
        except Exception as error:
            raise _told(error) from error
        finally:
            self.answered += 1
        self.metrics.rows.labels(name).inc(len(rows))
        return answers

    async def _answers(
        self, name: str, handle: Any, rows: Sequence[Row], wish: Wish
    ) -> list[Answer]:
        try:
            return await self.backend.answer(handle, rows, wish)
        except Gone:  # another thread has renewed it since it was looked up, or taken it off
            return await self.backend.answer(self.served(name).handle, rows, wish)

    async def nearest(self, served: Served) -> list[dict[str, Any]] | None:
        """Nearest words of a prompt's virtual tokens; None where nobody here has the model.

        Raises:
            Refused: and why.
        """
        try:
            deadline = time.monotonic() + self.limits.seconds
            return await self.backend.nearest(served.handle, deadline)
        except Exception as error:
            raise _told(error) from error

    async def stream(
        self, name: str, handle: Any, row: Row, wish: Wish
    ) -> AsyncIterator[str | Answer | Refused]:
        """Parts of an answer and the whole; a fault comes as the last part."""
        self.accepted += 1
        try:
            async for part in self._parts(name, handle, row, wish):
                yield part
            self.metrics.rows.labels(name).inc()
        except Exception as error:
            yield _told(error)
        finally:
            self.answered += 1

    async def _parts(
        self, name: str, handle: Any, row: Row, wish: Wish
    ) -> AsyncIterator[str | Answer]:
        try:
            async for part in self.backend.stream(handle, row, wish):
                yield part
        except Gone:  # as in `_answers`; nothing was said yet
            async for part in self.backend.stream(self.served(name).handle, row, wish):
                yield part


async def begun(
    parts: AsyncIterator[str | Answer | Refused],
) -> AsyncIterator[str | Answer | Refused]:
    """A stream whose first part has come: a fault before it is the answer to the request, with a
    status that clients know what to do with.

    Raises:
        Refused: that fault.
    """
    first = await anext(parts)
    if isinstance(first, Refused):
        raise first

    async def all_of_them() -> AsyncIterator[str | Answer | Refused]:
        yield first
        async for part in parts:
            yield part

    return all_of_them()


def _told(error: Exception) -> Refused:
    refused = refusal(error)
    if refused.status == 500:
        traceback.print_exception(error, file=sys.stderr)
    return refused


def refusal(error: Exception) -> Refused:
    """The status and the words that an error has for a client."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Overloaded):
        return Refused(429, str(error), retry_after="1")
    if isinstance(error, Stopping):
        return Refused(503, str(error), retry_after="1")
    if isinstance(error, TooLate):
        return Refused(504, f"{error}; send fewer rows, or ask again")
    if isinstance(error, Gone):
        return Refused(404, str(error))
    if isinstance(error, Unreachable):
        return Refused(502, str(error))
    if isinstance(error, PromptFileError):
        return Refused(500, str(error))
    if isinstance(error, InputError):
        return Refused(422, str(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Refused(503, "the model has no memory left for this; send shorter rows")
    return Refused(500, f"the answer failed ({type(error).__name__}); the server's log says more")
