"""How the command line speaks: results on stdout, everything else on stderr in single lines.

What is printed may come from a shared prompt, a data file or a model's name. `safe` makes it
harmless here, the only place that prints.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import PtuningWarning
from ..reporting import json_text, safe
from ..reporting import percent as percent
from ..training.progress import Progress, in_words, shown

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

_LONGEST = 1200
"""Letters of an error: what a file holds may be quoted in it."""


def quiet_libraries() -> None:
    """Keep the libraries' notices away, and their bars where nobody looks at them; our own warnings
    become single lines. Libraries heed it that are imported afterwards."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not err.is_terminal or {"-q", "--quiet"} & {*sys.argv}:  # a download's bar is for its user
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")

    def show(message: Any, category: type, *rest: Any) -> None:
        if issubclass(category, PtuningWarning):
            warn(str(message))

    warnings.showwarning = show  # type: ignore[assignment]


def write_to_any_stdout() -> None:
    """What the encoding of stdout does not have is written as an escape, as on stderr: a file that
    output goes to has on Windows that of the country. Nor is anything lost unheard where Python has
    no buffer (PYTHONUNBUFFERED, as in containers): what a disk has no room for is written again."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
        buffer: Any = sys.stdout.buffer
        if isinstance(buffer, io.FileIO):  # its owner, such as a test's capture, may need it later
            raw = io.FileIO(buffer.fileno(), "w", closefd=False)
            sys.stdout = io.TextIOWrapper(
                io.BufferedWriter(raw), sys.stdout.encoding, sys.stdout.errors, line_buffering=True
            )


def drop_stdout() -> None:
    """What stdout still holds goes nowhere: it takes no more, and at the end Python would try."""
    with suppress(io.UnsupportedOperation):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def program() -> str:
    """How this program is typed here: it may not be on the path."""
    typed = sys.argv[0]
    here = Path(typed).name == "ptuning" and not shutil.which("ptuning")
    return typed if here else "ptuning"


def command(*words: object) -> str:
    """A command of this program as it can be typed."""
    return shlex.join([program(), *map(str, words)])


def speak_if(main: bool) -> None:
    """Of several processes only the main one speaks."""
    out.quiet = err.quiet = not main


def be_quiet(wanted: bool) -> None:
    """What ``--quiet`` does: no bars and no notes; results, warnings and errors stay."""
    global _quiet
    _quiet = wanted


_quiet = False


stopped: Callable[[], str]
"""What to say now that the command was stopped."""


def on_stop(say_how: Callable[[], str]) -> None:
    """What is said from here on where Ctrl-C ends the command: what is kept, how to go on."""
    global stopped
    stopped = say_how


def say(text: str) -> None:
    """A note on stderr."""
    if not _quiet:
        err.print(safe(text), markup=False)


def warn(text: str) -> None:
    """A warning on stderr."""
    err.print(f"warning: {safe(text)}", style="yellow", markup=False)


def complain(text: str) -> None:
    """An error on stderr; of a long one the beginning and the end."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    err.print(f"error: {safe(text)}", style="red", markup=False)


def tell(text: str) -> None:
    """A line of the result on stdout, as it is."""
    out.print(safe(text), markup=False)


def print_json(value: Any, indent: int | None = 2) -> None:
    """A JSON document on stdout; with `indent` None on one line."""
    text = json_text(value, indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, default=str)  # escapes all that is not ASCII
    sys.stdout.write(text + "\n")


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; all columns but the first stand right."""
    made = Table(title=Text(safe(title)), title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        made.add_column(Text(safe(name)), justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*[Text(safe(cell)) for cell in row])
    out.print(made)


def _shows_bars() -> bool:
    return err.is_terminal and not _quiet


def training_bar() -> AbstractContextManager[Callable[[Progress], None]]:
    """A bar on a terminal and a line per epoch; gives the listener that a training wants."""
    return shown(err, say, bar=_shows_bars())


@contextmanager
def rows_bar(total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar over rows on a terminal, else a line now and then; gives what hears how many are done.

    Args:
        total: all rows.
        done: those that an earlier run has done.
    """
    columns = [bars.TextColumn("{task.completed} of {task.total} rows"), bars.BarColumn()]
    times = [bars.TimeElapsedColumn(), bars.TimeRemainingColumn()]
    bar = bars.Progress(*columns, *times, console=err, transient=True, disable=not _shows_bars())
    started = said = time.monotonic()
    with bar:
        task = bar.add_task("", total=total, completed=done)

        def tell(now: int) -> None:
            nonlocal said
            bar.update(task, completed=now)
            if not err.is_terminal and time.monotonic() - said > _SILENCE and now < total:
                said = time.monotonic()
                left = (said - started) / (now - done) * (total - now)
                say(f"{now} of {total} rows, about {in_words(left)} left")

        yield tell


_SILENCE = 30
"""Seconds between two lines where there is no terminal for a bar."""


class PartsBar:
    """A bar over the parts of an experiment: done, now, and the time that is left.

    Use as a context manager. `begin` names the part that runs now, `listener` is for its training,
    `end` prints its line.
    """

    def __init__(self, parts: int):
        columns = [bars.TextColumn("{task.description}", markup=False), bars.BarColumn()]
        columns += [bars.TextColumn("{task.percentage:.0f}%"), bars.TimeElapsedColumn()]
        columns += [bars.TimeRemainingColumn()]
        self._bar = bars.Progress(*columns, console=err, transient=True, disable=not _shows_bars())
        self._task = self._bar.add_task("", total=parts)
        self._parts, self._done, self._measured = parts, 0, 0
        self._started = time.monotonic()
        self._notes: set[str] = set()

    def __enter__(self) -> PartsBar:
        self._bar.start()
        return self

    def __exit__(self, *rest: object) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """A part begins."""
        self._bar.update(self._task, description=safe(name))

    def listener(self, heard: Progress) -> None:
        """Moves the bar within a part, and says a training's note where none has said it."""
        if heard.note and heard.note not in self._notes:
            self._notes.add(heard.note)
            say(heard.note)
        self._bar.update(self._task, completed=self._done + heard.step / heard.steps)

    def end(self, line: str, measured: bool = True) -> None:
        """A part is done; `measured` says that it ran now and was not taken from an earlier run."""
        self._done += 1
        self._measured += measured
        self._bar.update(self._task, completed=self._done)
        left = ""
        if measured and self._done < self._parts:
            each = (time.monotonic() - self._started) / self._measured
            left = f"  (about {in_words(each * (self._parts - self._done))} left)"
        say(line + left)
