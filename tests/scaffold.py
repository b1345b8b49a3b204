"""What tests of several rooms do in the same way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

Run = Callable[..., tuple[int, str, str]]
"""A command: from its arguments to exit code, stdout and stderr."""


class Stopped(Exception):
    """What a listener raises to stop a training."""


def stop_after(steps: int) -> Callable[[Any], None]:
    """A listener that stops a training behind so many optimizer steps, of all its parts."""
    heard = 0

    def listener(progress: Any) -> None:
        nonlocal heard
        heard += progress.record is None
        if heard == steps:
            raise Stopped

    return listener


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    """The folder, with a model and its tokenizer in it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hooks_of(model: nn.Module) -> int:
    """How many forward hooks are on a model's modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@contextmanager
def changing_threads_often() -> Iterator[None]:
    """Python goes from thread to thread after ten microseconds, so that what can clash does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(*works: Callable[[], Any], beside: Callable[[], Any] | None = None) -> list[Any]:
    """Each work in a thread of its own, all at once: their results, or the first one's error.

    Args:
        works: what must end.
        beside: done again and again in one more thread until they have.
    """
    results: list[Any] = [None] * (len(works) + 1)
    errors: list[BaseException] = []
    ended = threading.Event()

    def caught(number: int, work: Callable[[], Any]) -> None:
        try:
            results[number] = work()
        except BaseException as error:
            errors.append(error)

    def again_and_again() -> None:
        while beside and not ended.is_set() and not errors:
            beside()

    threads = [threading.Thread(target=caught, args=item) for item in enumerate(works)]
    other = threading.Thread(target=caught, args=(len(works), again_and_again))
    with changing_threads_often():
        for thread in (other, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        ended.set()
        other.join()
    if errors:
        raise errors[0]
    return results[:-1]


_CHANGES = (
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.chmod", "os.utime", "os.truncate"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def killed_at(number: int, place: Path, work: Callable[[], Any]) -> bool:
    """Do something in a child that is killed at its so-manieth change of a file in `place`; False
    where it came to its end before."""
    code = in_child(work, number, place)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def in_child(work: Callable[[], Any], number: int = 0, place: Path | None = None) -> int | None:
    """Do something in a child, killed as `killed_at` says; gives its exit code."""

    def child() -> None:
        seen = [0]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                changes = isinstance(arguments[2], int) and bool(arguments[2] & _WRITING)
            else:
                changes = event in _CHANGES
            if changes and any(str(place) in path for path in _paths(arguments)):
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        if number:
            sys.addaudithook(hook)
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def _paths(arguments: tuple[Any, ...]) -> list[str]:
    """What an audit event names; `shutil.rmtree` names entries of a folder that it has open."""
    named = [os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)]
    opened = [a for a in arguments[1:] if type(a) is int and a > 2]
    folders = [Path("/proc/self/fd") / str(number) for number in opened]
    return named + [os.readlink(folder) for folder in folders if folder.is_symlink()]
