"""The errors and warnings a user can meet. Each says what came, what was expected and what to do.

Wrong input also is a ``ValueError``, so callers need not know this package to catch it.
The command line turns every ``PtuningError`` into one line and the exit code given here.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from types import FrameType

_BETWEEN = ("ptuning", "torch", "contextlib")
"""Packages whose lines say nothing to a caller: this one, and what stands between its functions."""


class PtuningError(Exception):
    """Base of all errors of this package; on the command line a failure (exit code 1)."""

    exit_code = 1


class InputError(PtuningError, ValueError):
    """The caller gave something that cannot be used (exit code 2)."""

    exit_code = 2


class TemplateError(InputError):
    """A template that does not follow the template language.

    Args:
        message: what is wrong and what was expected.
        template: the whole template text.
        column: position of the fault, counted from 1.
    """

    def __init__(self, message: str, template: str, column: int):
        shown = excerpt(template, column - 1)
        super().__init__(f"template column {column}: {message}, in: {shown}")
        self.template = template
        self.column = column


class PtuningWarning(UserWarning):
    """Of this package; on the command line a line on stderr."""


def warn(text: str) -> None:
    """Warn at the line that called this package, however deep in it the reason was found."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and _package_of(frame) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, PtuningWarning, stacklevel=level)


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def excerpt(text: str, at: int = 0, most: int = 300) -> str:
    """A long text's part around a place, for a message."""
    if len(text) <= most:
        return text
    start = max(0, min(at - most // 2, len(text) - most))
    end = start + most
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"


def briefly(value: object) -> str:
    """What came, for a message: on one line, and of a long one the beginning."""
    return excerpt(" ".join(repr(value).split()), most=100)


def a_kind(value: object) -> str:
    """Of what kind a thing is that came, for a message: "an int"."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def counted(number: int, what: str) -> str:
    """So many of something, for a message: "1 row", "2 rows"."""
    return f"{number} {what}{'s' * (number != 1)}"


def in_one_line(error: BaseException) -> str:
    """What an error of somebody else says first, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def unreadable(path: object, error: OSError) -> str:
    """That the system lets nobody read a file or folder, or not this user, for a message."""
    remedy = {
        PermissionError: "; let this user read it",
        IsADirectoryError: "; give a file",
    }.get(type(error), "")
    return f"{path} cannot be read: {error.strerror or error}{remedy}"


def repeated(names: Iterable[str]) -> str | None:
    """The first name that has stood before; None where all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


class DataError(InputError):
    """A data file or an example that cannot be used."""


class PromptFileError(InputError):
    """A saved prompt or checkpoint that is damaged, unsafe, or made for another model."""


class TrainingError(PtuningError, RuntimeError):
    """Training cannot go on; what was saved before stays good."""
