"""The command line ``ptuning``."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    _open_what_is_closed()
    try:
        with at_ctrl_c(_stop):
            from . import console

            console.quiet_libraries()
            from .app import main as run

        run()
    except KeyboardInterrupt:  # before there was a command that could say how to go on
        sys.stderr.write("stopped\n")
        sys.exit(130)
    finally:
        atexit.register(_end_at_ctrl_c)  # the last to be registered, and so the first to be called


def _open_what_is_closed() -> None:
    """Where stdin, stdout or stderr is closed (``>&-``, Windows' pythonw) Python has none: it is
    empty then, or leads nowhere. A file of ours would get its number, and what libraries write."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


@contextmanager
def at_ctrl_c(hear: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Ctrl-C calls `hear` meanwhile, unless somebody else has a say in it."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_: object) -> None:
    """Nothing is begun yet: libraries that are being imported take Ctrl-C's exception for a fault
    of another library, and fail in their own way (torch at numpy)."""
    os.write(2, b"stopped\n")
    os._exit(130)


def _end_at_ctrl_c() -> None:
    """All is said and done, and torch takes seconds to end: Ctrl-C ends them, without Python's
    traceback of where it was."""
    with suppress(OSError, ValueError):  # Python's own end tries again, and complains
        sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
