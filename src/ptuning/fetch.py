"""The path of `fetch` in the documentation: ``from ptuning.fetch import fetch``."""

from .backbone.fetched import SOURCES, fetch

__all__ = ["SOURCES", "fetch"]
