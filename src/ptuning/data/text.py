"""The one reader of text files: compression, encoding, byte-order mark, line ends, limits.

What a file is called says how its rows are written; how it is packed and encoded its first bytes
say. A small file that unpacks to something huge is refused while it unpacks.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..errors import DataError, unreadable

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of packed files; they stand behind the ending of the kind, as in ``rows.csv.gz``."""
LONGEST_CELL = 4 * 2**20
"""Characters of one cell: more than any model reads."""
LONGEST_ROW = 8 * LONGEST_CELL
_PLENTY = 64 * 2**20
_SWELLS = 1000
"""A file may hold so many times its own size, or `_PLENTY` bytes; text packs to a tenth or so."""
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Swelling:
    """Counts what comes out of a file, and refuses what is out of all proportion to its size."""

    def __init__(self, path: Path):
        self._path, self._count = path, 0
        self._most = max(_PLENTY, _SWELLS * path.stat().st_size)

    def add(self, count: int) -> None:
        """So many more bytes came out.

        Raises:
            DataError: that is too much.
        """
        self._count += count
        if self._count > self._most:
            raise DataError(
                f"{self._path} is small and holds more than {self._most // 2**20} MiB when it is "
                "unpacked; if that is meant, unpack it first"
            )


@contextmanager
def opened(path: Path, newline: str | None = None, encoding: str | None = None) -> Iterator[TextIO]:
    """A text file to read from; its faults become errors that name it.

    Args:
        path: of the file, packed or not.
        newline: None makes every line end ``\\n``, the empty text leaves them as they are.
        encoding: of a file without a byte-order mark; by default UTF-8.

    Raises:
        DataError: it cannot be read, is damaged or is no text.
    """
    used = encoding or "utf-8"
    try:
        with _unpacked(path) as stream:
            used = _marked(stream) or used
            if used == "utf-8" and _is_utf_16(stream.peek(64)[:64]):
                raise DataError(
                    f"{path} has a zero byte beside each letter, as UTF-16 without a byte-order "
                    "mark has; save the file as UTF-8, or name its encoding (encoding=, "
                    "--encoding utf-16-le)"
                )
            yield io.TextIOWrapper(stream, used, newline=newline)
    except UnicodeError as error:
        line = _line_of_fault(path, used)
        name = used.removesuffix("-sig").upper()
        raise DataError(
            f"{path} line {line}: no valid {name}; save the file as UTF-8, or name its encoding "
            "(encoding=, --encoding cp1252 for one of Windows)"
        ) from error
    except OSError as error:
        raise DataError(unreadable(path, error)) from error


def lines(path: Path, newline: str | None = None, encoding: str | None = None) -> Iterator[str]:
    """The lines of a text file with their ends; a line separator inside a text is none.

    Raises:
        DataError: as `opened`; or a line is longer than `LONGEST_ROW`.
    """
    with opened(path, newline, encoding) as stream:
        number = 1
        while line := stream.readline(LONGEST_ROW + 1):
            if len(line) > LONGEST_ROW:
                raise DataError(
                    f"{path} line {number} is longer than {LONGEST_ROW // 2**20} million "
                    "characters; give each row a line"
                )
            yield line
            number += 1


def read_text(path: Path, most: int = LONGEST_CELL) -> str:
    """A whole small text file.

    Raises:
        DataError: as `opened`; or it has more than `most` characters.
    """
    with opened(path) as stream:
        text = stream.read(most + 1)
    if len(text) > most:
        raise DataError(f"{path} is longer than {most:,} characters; is it the right file?")
    return text


def _marked(stream: io.BufferedReader) -> str | None:
    """The encoding that a byte-order mark names."""
    start = stream.peek(4)[:4]
    return next((name for mark, name in _ENCODINGS if start.startswith(mark)), None)


def _is_utf_16(begin: bytes) -> bool:
    """Every other byte of a beginning is zero (or three of four, in UTF-32)."""
    one, other = begin[::2], begin[1::2]
    return len(begin) >= 8 and any(begin) and not (any(one) and any(other))


def _line_of_fault(path: Path, encoding: str) -> int:
    """The line of the first bytes that are no text; seldom needed, so the file is read again."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with _unpacked(path) as stream:
        while True:
            chunk = stream.read(2**16)
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                return line + error.object[: error.start].count(b"\n")
            except UnicodeError:  # of all bytes: UTF-16 and UTF-32 without a mark
                return line
            if not chunk:
                return line


@contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedReader]:
    with open(path, "rb") as file:
        start = file.read(10)
        file.seek(0)
        packed = _unpacker(file, start)
        if packed is None:
            yield file
        else:
            with packed:
                # The buffer is large because each of its fillings is a call of Python.
                yield io.BufferedReader(_Unpacked(packed, path), 2**18)


def _unpacker(file: BinaryIO, start: bytes) -> Any:
    """What unpacks a file that begins so, or None for a plain one."""
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if start.startswith(b"BZh") and start[4:] == b"1AY&SY"[: len(start) - 4]:
        return bz2.BZ2File(file)
    if start.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(file)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return pyarrow.CompressedInputStream(file, "zstd")
    return None


class _Unpacked(io.RawIOBase):
    """Unpacked bytes, counted; damage is an error that names the file."""

    def __init__(self, source: Any, path: Path):
        self._source, self._path, self._swelling = source, path, Swelling(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._source.read(len(buffer))
        except Exception as error:  # each library has kinds of its own
            raise DataError(
                f"{self._path} is damaged or cut off ({error}); pack it again"
            ) from error
        self._swelling.add(len(content))
        buffer[: len(content)] = content
        return len(content)
