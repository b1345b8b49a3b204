"""A server in this process, from its first request to SIGTERM.

At SIGTERM or Ctrl-C nothing new is taken, what was taken is answered, and then it ends; a second
Ctrl-C ends it at once.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn

from ..errors import InputError
from .app import application
from .asking import Desk
from .backend import Backend
from .gate import Limits
from .registry import Registry


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything large is loaded; port 0 takes a free one.

    Raises:
        InputError: the address is taken, or none of this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except (OSError, OverflowError, UnicodeError) as error:  # the last: no name, such as "a..b"
        raise InputError(
            f"cannot listen on {host} port {port}: {error}; choose with --host and --port"
        ) from None
    return made


def serve(
    backend: Backend,
    registry: Registry,
    limits: Limits,
    key: str | None,
    at: socket.socket,
    tell: Callable[[str], None],
) -> None:
    """Serve until a signal ends it.

    Args:
        backend: answers.
        registry: of its prompts.
        limits: of requests.
        key: that requests must bring.
        at: a socket that listens.
        tell: hears how it ended.

    Raises:
        KeyboardInterrupt: a second Ctrl-C came before all was answered.
    """

    def done(desk: Desk) -> None:
        tell(f"stopped: {desk.accepted} requests accepted, {desk.answered} answered")

    config = uvicorn.Config(
        application(backend, registry, limits, key, done),
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=2048,
        lifespan="on",
        timeout_graceful_shutdown=round(limits.seconds + limits.body_seconds) + 5,
    )
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:  # uvicorn raises a signal once more when all is done; that is enough
        signal.signal(number, lambda *_: None)
    server = uvicorn.Server(config)
    try:
        server.run(sockets=[at])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if server.force_exit:
        raise KeyboardInterrupt
