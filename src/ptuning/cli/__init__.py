"""The command line ``ptuning``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from .app import main as run

        run()
    except KeyboardInterrupt:  # before there was a command that could say how to go on
        sys.stderr.write("stopped\n")
        sys.exit(130)
