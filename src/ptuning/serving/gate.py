"""What stands in front of every request: the key, and a body that is whole, small and JSON.

An ASGI middleware. Bodies are read here, with limits of size and time, and handed on whole, so that
nothing behind it waits for a client. Refusals have OpenAI's form of an error.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..formats import distinct, levels

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/docs")
"""Paths without a key or a count: two pages without data, and whether the server lives."""
METRICS = "/metrics"
"""A path without a count."""
_LEVELS = 64
_LARGE = 2**16
"""Bytes of a body."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask of the server.

    Attributes:
        body: bytes of a request's body.
        body_seconds: in which it must have come.
        seconds: in which a request is answered.
        rows: of a request.
        waiting: rows that may wait.
        batch: rows of a batch.
        tokens: of a free answer.
    """

    body: int = 2**20
    body_seconds: float = 10.0
    seconds: float = 60.0
    rows: int = 256
    waiting: int = 1024
    batch: int = 32
    tokens: int = 1024

    @property
    def requests(self) -> int:
        """That are worked on at once: with one row each all that may wait, and a batch."""
        return max(512, self.waiting + self.batch)


class Refused(Exception):
    """A request that is not let in.

    Args:
        status: of HTTP.
        message: what came, what was expected.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status in (401, 403):
        kind = "authentication_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Gate:
    """Lets requests in.

    Args:
        app: the application behind.
        key: that requests must bring as ``Authorization: Bearer KEY``; None lets all in.
        limits: of size and time.
        ended: hears path, status and seconds of each request; the path is its route's, so that no
            client makes up names.
    """

    def __init__(
        self,
        app: Application,
        key: str | None,
        limits: Limits,
        ended: Callable[[str, int, float], None] = lambda path, status, seconds: None,
    ):
        self._app, self._limits, self._ended = app, limits, ended
        self._key = None if key is None else key.encode()
        self._inside = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, whole = time.monotonic(), 0, False

        async def heard() -> Message:
            nonlocal whole
            message = await receive()
            whole = not message.get("more_body")
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._let_in(scope, heard, noted)
        except Refused as error:
            if not status:
                left = started + self._limits.body_seconds - time.monotonic()
                await _refuse(noted, error, None if whole else heard, left)
        except Exception as error:  # nobody has a word for it: the log has the whole
            traceback.print_exception(error, file=sys.stderr)
            if not status:
                await _refuse(noted, Refused(500, f"the server failed ({type(error).__name__})"))
        finally:
            path = getattr(scope.get("route"), "path", "(none)")
            self._ended(path, status, time.monotonic() - started)

    async def _let_in(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["path"] not in OPEN:
            self._check_key(scope)
        # Always: a probe that is refused would end a busy server, and metrics tell why it is full.
        if scope["path"] in (*OPEN, METRICS):  # and they wait for no body
            await self._app(scope, _handed_on(b"", receive), send)
            return
        if self._inside >= self._limits.requests:
            raise Refused(429, f"{self._inside} requests are worked on; ask again", retry_after="1")
        self._inside += 1
        try:
            body = await self._body(scope, receive)
            await _while_awaited(self._app(scope, _handed_on(body, receive), send), receive)
        finally:
            self._inside -= 1

    def _check_key(self, scope: Message) -> None:
        if self._key is None:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, value = given.partition(b" ")
        # Both are looked at always, so that the time tells nothing.
        fits = hmac.compare_digest(value.strip(), self._key)
        if scheme.lower() != b"bearer" or not fits:
            what = "another API key than the server's" if given else "no API key"
            raise Refused(
                401,
                f"{what} came; send 'Authorization: Bearer KEY'",
                www_authenticate="Bearer",
            )

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        most, parts, size = self._limits.body, list[bytes](), 0
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        too_large = f"the body is larger than {most} bytes; send fewer or shorter rows"
        if length.isdigit() and int(length[:20]) > most:
            raise Refused(413, too_large)
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the body ended before it was whole")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise Refused(413, too_large)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise Refused(
                408, f"the body was not whole after {self._limits.body_seconds:g} seconds"
            ) from None
        body = b"".join(parts)
        if scope["method"] in ("POST", "PUT", "PATCH") and body:
            kind = headers.get(b"content-type", b"")
            if len(body) > _LARGE:  # a megabyte is read for half a second: others go on meanwhile
                await asyncio.to_thread(check_json, body, kind)
            else:
                check_json(body, kind)
        return body


async def _while_awaited(work: Awaitable[None], receive: Receive) -> None:
    """A request's work, which is given up when the client has gone: else those who lose patience
    and ask again hold up everybody.

    Raises:
        Refused: it has; nobody hears it but the metrics.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and leaving.result()["type"] == "http.disconnect":
            raise Refused(499, "the client has left")
        await working
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _refuse(
    send: Send, error: Refused, receive: Receive | None = None, seconds: float = 0.0
) -> None:
    """Answer with an error. What still comes of the body is heard, for some seconds, and dropped:
    were the connection closed on it, a client that sends all before it listens would not hear why.
    """
    content = json.dumps(error_body(error.status, str(error))).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content))}
    headers |= {"connection": "close", **error.headers}
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    if receive is not None:
        await send({"type": "http.response.body", "body": content, "more_body": True})
        content = b""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while (await receive()).get("more_body"):
                    pass
    await send({"type": "http.response.body", "body": content})


def check_json(body: bytes, content_type: bytes) -> None:
    """Refuse a body that is no JSON.

    Raises:
        Refused: with the place of the fault.
    """
    kind = content_type.split(b";")[0].strip().lower()
    if kind != b"application/json":
        shown = kind.decode("ascii", "backslashreplace")[:100] or "nothing"
        raise Refused(415, f"content-type is {shown}; send application/json")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(
            400, f"the body is no UTF-8: byte {error.start} is 0x{body[error.start]:02x}"
        ) from None
    try:
        value = json.loads(text, parse_constant=no_constant, object_pairs_hook=distinct)
    except json.JSONDecodeError as error:
        raise Refused(
            400, f"the body is no JSON: line {error.lineno} column {error.colno}: {error.msg}"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise Refused(400, f"the body is no JSON that can be read: {reason}") from None
    if not isinstance(value, dict):
        name = "null" if value is None else type(value).__name__
        raise Refused(422, f"the body is a JSON {name}; send an object")
    if next(islice(levels(value), _LEVELS, None), None) is not None:
        raise Refused(400, f"the body is nested deeper than {_LEVELS} levels")
    if "\\ud" in text.lower():
        _check_pairs(value)


def _check_pairs(value: Any) -> None:
    """Refuse half a surrogate pair, which JSON can say, also in names, and no tokenizer reads."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise Refused(422, f"the body has half a surrogate pair, {half}; send whole text") from None


def no_constant(name: str) -> None:
    """Refuse NaN and infinities, for `json.loads`.

    Raises:
        ValueError: names what came.
    """
    raise ValueError(f"{name} is no JSON number")


def _handed_on(body: bytes, receive: Receive) -> Receive:
    """The body as one message; then what the server says, such as that the client has gone."""
    given = False

    async def whole() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return whole
