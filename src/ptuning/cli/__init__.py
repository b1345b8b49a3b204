"""The command line ``ptuning``."""

from .app import main

__all__ = ["main"]
