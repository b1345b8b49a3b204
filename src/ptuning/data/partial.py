"""What is there of an output while it is made: a file of JSON lines beside it.

`answers.csv.1f0c9a2e.partial` has a whole line for each row that is done, written block by block,
so that a kill costs one block; a last line that was cut off is dropped. The digits stand for what
the rows depend on (prompt, model, options), so that rows of two runs never mix. When all rows are
there it becomes the output by one rename.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..errors import DataError, InputError, PtuningError
from ..places import held, real
from .rows import Row
from .sources import JSON_LINES, KINDS
from .writing import json_line


class Output:
    """A file to which rows are written.

    Args:
        path: ends in one of `sources.KINDS`; a device or pipe gets JSON lines under any name.

    Attributes:
        asked: the path as it was given, for messages.
        path: where the file truly is, links followed.
        special: no regular file, so it is written as it is and never replaced.
        kind: its ending.

    Raises:
        InputError: it is a folder, or its ending says no kind.
        PtuningError: nothing can be written there.
    """

    def __init__(self, path: Path):
        self.asked, self.path = path, real(path)
        with refused(path):
            mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise InputError(
                f"--output {path} is a folder; give a file in it, such as {path / 'answers.jsonl'}"
            )
        self.special = not stat.S_ISREG(mode)
        if self.special:
            self.path = path  # a pipe's real path is no file's
        self.kind = JSON_LINES[0] if self.special else self.path.suffix.lower()
        if self.kind not in KINDS:
            raise InputError(
                f"--output {path} has an unknown ending; give .jsonl, .csv, .tsv or .parquet"
            )

    def partials(self) -> list[Path]:
        """What interrupted runs left beside it."""
        pattern = f"{glob.escape(self._stem())}.{'[0-9a-f]' * 8}.partial"
        return sorted(Path(name) for name in glob.glob(pattern))

    def partial(self, settings: dict[str, Any]) -> Path:
        """Where the rows of a run with these settings gather."""
        text = json.dumps(settings, sort_keys=True, default=str).encode("utf-8", "backslashreplace")
        return Path(f"{self._stem()}.{hashlib.sha256(text).hexdigest()[:8]}.partial")

    def _stem(self) -> str:
        name = os.fsencode(self.path.name)[:220].decode("utf-8", "ignore")  # file names have 255
        return str(self.path.with_name(name))


class Partial:
    """The rows that are done (`begun` makes one).

    Attributes:
        path: of the file.
    """

    def __init__(self, output: Output, path: Path, file: IO[bytes]):
        self.path, self._output, self._file = path, output, file

    def take_up(self, rows: Iterator[Row], added: str) -> int:
        """Keep what is there of an earlier run; gives how many rows that is.

        Args:
            rows: the data from its beginning; so many of them are used up.
            added: the first column that stands behind a row's own.

        Raises:
            DataError: a row there is none of the data.
        """
        done, good = self._compare(rows, added)
        self._file.truncate(good)
        return done

    def check(self, rows: Iterator[Row], added: str) -> None:
        """Refuse data that have changed while their rows were answered.

        Args:
            rows: the data from its beginning, read again.
            added: as for `take_up`.

        Raises:
            DataError: a row there is none of the data.
        """
        self._compare(rows, added)

    def _compare(self, rows: Iterator[Row], added: str) -> tuple[int, int]:
        """How many whole rows are there, and in how many bytes."""
        done, good = 0, 0
        with open(self.path, "rb") as kept:
            while (line := kept.readline()).endswith(b"\n"):
                row = next(rows, None)
                if row is None or not line.startswith(_before(row, added)):
                    raise DataError(
                        f"row {done + 1} of {self.path.name} is not row {done + 1} of the data, "
                        "which has changed since; begin again (--overwrite)"
                    )
                done, good = done + 1, kept.tell()
        return done, good

    def add(self, rows: Sequence[Row]) -> None:
        """Hand a block of rows to the operating system.

        Raises:
            PtuningError: it cannot be written; what was written before stays.
        """
        with refused(self._output.asked):
            rest = memoryview(b"".join(map(json_line, rows)))
            while rest:
                rest = rest[self._file.write(rest) :]

    def finish(self, convert: Callable[[Path], None]) -> None:
        """All rows are there: make the output of them.

        Args:
            convert: writes a file of the output's kind, where that is not JSON lines.
        """
        output, made = self._output, self.path
        with refused(output.asked):
            os.fsync(self._file.fileno())
            self._file.close()  # Windows moves no open file
            if output.kind not in JSON_LINES:
                made = Path(f"{self.path}.made")
                try:
                    convert(made)
                    with open(made, "r+b") as file:  # on the disk before the rows are removed
                        os.fsync(file.fileno())
                except BaseException:
                    made.unlink(missing_ok=True)
                    raise
            if output.path.exists():
                os.chmod(made, stat.S_IMODE(output.path.stat().st_mode))
            os.replace(made, output.path)
            if made != self.path:
                self.path.unlink()


@contextmanager
def begun(output: Output, settings: dict[str, Any], resume: bool, anew: bool) -> Iterator[Partial]:
    """The partial file of a run, new or gone on with; it is this process's alone.

    Args:
        output: what it becomes.
        settings: all that its rows depend on, but for the data.
        resume: go on with it.
        anew: without `resume`, begin again even where rows are there.

    Raises:
        InputError: there is an output or a partial one and it is not said what shall become of it;
            another run is at it; there is nothing to go on with.
        PtuningError: nothing can be written there.
    """
    path, others = output.partial(settings), output.partials()
    if resume:
        if path not in others:
            raise InputError(_nothing_to_resume(output, others))
    elif not anew:
        with_rows = [other for other in others if other.stat().st_size]
        if with_rows:
            raise InputError(
                f"an interrupted run left {with_rows[0].name} beside --output {output.asked}; go "
                "on with it (--resume, everything else as it was), or begin again (--overwrite)"
            )
        if output.path.exists():
            raise InputError(f"--output {output.asked} exists; choose another file, or --overwrite")
    with ExitStack() as stack:
        with refused(output.asked):
            output.path.parent.mkdir(parents=True, exist_ok=True)
            for other in others if not resume else ():
                with held(other, shared=False, wait=False) as free:
                    _check_free(free, output)
                    other.unlink()
            file = stack.enter_context(open(path, "ab" if resume else "xb", buffering=0))
        free = stack.enter_context(held(path, shared=False, wait=False))
        _check_free(free and _is_at(path, file), output)
        try:
            yield Partial(output, path, file)
        except BaseException:
            with suppress(OSError):
                if not path.stat().st_size:  # a run that never began leaves nothing
                    path.unlink()
            raise


@contextmanager
def refused(place: Path) -> Iterator[None]:
    """Say in one line what the operating system does not let us write.

    Raises:
        PtuningError: for each OSError.
    """
    try:
        yield
    except OSError as error:
        what = "choose another place"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what += ", or free space there"
        raise PtuningError(f"cannot write to {place}: {error.strerror or error}; {what}") from error


def _before(row: Row, added: str) -> bytes:
    """How the line of a row begins, up to the value of the first column that is added to it."""
    return json_line({**row, added: None}).removesuffix(b"null}\n")


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """An open file still has its path: a run that began at the same moment may have removed it,
    before it was held, and made its own."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _check_free(free: bool | None, output: Output) -> None:
    if free is False:
        raise InputError(f"another run is writing to --output {output.asked}; wait for it")


def _nothing_to_resume(output: Output, others: list[Path]) -> str:
    if others:
        return (
            f"{others[0].name} beside --output {output.asked} was made with another prompt, model "
            "or option; --resume needs the same ones, and --overwrite begins again"
        )
    there = "it is complete" if output.path.exists() else "it is not there either"
    return (
        f"there is nothing to resume: no interrupted run stands beside --output {output.asked}, "
        f"and {there}; leave --resume out"
    )
