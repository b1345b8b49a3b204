"""The command line ``ptuning``."""

from __future__ import annotations

import atexit
import signal
import sys
from contextlib import suppress

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from .app import main as run

        run()
    except KeyboardInterrupt:  # before there was a command that could say how to go on
        sys.stderr.write("stopped\n")
        sys.exit(130)
    finally:
        atexit.register(_end_at_ctrl_c)  # the last to be registered, and so the first to be called


def _end_at_ctrl_c() -> None:
    """All is said and done, and torch takes seconds to end: Ctrl-C ends them, without Python's
    traceback of where it was."""
    with suppress(OSError, ValueError):  # Python's own end tries again, and complains
        sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
