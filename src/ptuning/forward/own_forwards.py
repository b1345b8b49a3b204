"""Modules of a frozen model that run a function of ours, in one thread and for the time of a block.

    module.forward    put on the instance by the first block of any thread, taken off by the last
    a call            goes to the function of the caller's block, or to the class's own forward

What others have put on an instance since (a kernel, a hook) stays, and serves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..threads import CHANGING

_here = threading.local()
_blocks: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def own_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """This thread's calls of the modules go to these functions meanwhile.

    Args:
        forwards: module -> what takes its arguments and gives what it gives; it may call
            ``type(module).forward``. No instance has a forward of its own when its first block
            begins.
    """
    before = _of_this_thread()
    _here.forwards = {**before, **forwards}
    _count(forwards, 1)
    try:
        yield
    finally:
        _count(forwards, -1)
        _here.forwards = before


def _of_this_thread() -> dict[nn.Module, Callable[..., Any]]:
    return getattr(_here, "forwards", {})


def _count(modules: Iterable[nn.Module], change: int) -> None:
    with CHANGING:
        for module in modules:
            before = _blocks.get(module, 0)
            _blocks[module] = before + change
            put = vars(module).get("forward")
            if not before and put is None:
                module.forward = partial(_forward, module)
            elif not before + change and getattr(put, "func", None) is _forward:
                del module.forward


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    ours = _of_this_thread().get(module)
    return type(module).forward(module, *args, **kwargs) if ours is None else ours(*args, **kwargs)
