"""What tests of several rooms do in the same way."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

Run = Callable[..., tuple[int, str, str]]
"""A command: from its arguments to exit code, stdout and stderr."""


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
