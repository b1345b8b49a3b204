"""Rows: read from files and the hub, taken from tables in memory, written as they were."""

from .rows import Row
from .sources import read_examples, stream_examples
from .tables import Rows, as_rows, optional_rows

__all__ = ["Row", "Rows", "as_rows", "optional_rows", "read_examples", "stream_examples"]
