"""Several processes that train together: what they add up, tell each other, and leave to one.

Every process runs the same code on its share of the examples; the main one alone writes and speaks.
Nobody waits for a process that has failed: before each exchange of numbers all say how it goes.

    with together():                 where one fails, all raise
        state = from_main(read)      the main process reads, all get it
        losses = add_up([losses])    sums over the processes, in one message
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.state import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed

from . import storage
from .devices import chosen_device
from .errors import InputError, PtuningError, TrainingError
from .threads import CHANGING

T = TypeVar("T")


def state() -> PartialState:
    """Accelerate's state of this process; the first call joins the others."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    asked = parse_flag_from_env("ACCELERATE_USE_CPU")
    # Without a GPU accelerate leaves processes alone unless it is told that the CPU is meant.
    cpu = asked or not (alone or torch.accelerator.is_available())
    with CHANGING:  # threads may be the first at the same time
        if not alone and not distributed.is_initialized():
            atexit.register(_leave)
        chosen = chosen_device()
        return PartialState(cpu=cpu or (chosen is not None and chosen.type == "cpu"))


def _leave() -> None:
    """Stop the threads that exchange while the interpreter lives: at its end gloo's may abort."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def count() -> int:
    """How many processes train together."""
    return state().num_processes


def share(items: Sequence[T]) -> list[T]:
    """This process's part of `items`; the parts of all are the whole."""
    return list(items[state().process_index :: count()])


def add_up(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each tensor ``(…)`` over the processes, bit for bit the same in all of them.

    Raises:
        PtuningError: another process has failed.
    """
    if count() == 1:
        return list(tensors)
    _exchange(None)
    flat = torch.cat([tensor.detach().flatten().to(state().device) for tensor in tensors])
    distributed.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [p.view_as(t).to(t.device, t.dtype) for p, t in zip(parts, tensors, strict=True)]


def add_up_gradients(parameters: Sequence[Tensor], losses: Tensor) -> Tensor:
    """Every process gets the sums of the gradients, and of the losses ``(members,)``.

    A process without a row of its own has no gradient of some; who has none anywhere stays so.
    """
    if count() == 1:
        return losses
    here = torch.tensor([float(p.grad is not None) for p in parameters])
    (anywhere,) = add_up([here])
    shared = [p for p, found in zip(parameters, anywhere.tolist(), strict=True) if found]
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
    losses, *gradients = add_up([losses, *own])
    for parameter, gradient in zip(shared, gradients, strict=True):
        parameter.grad = gradient
    return losses


def from_main(work: Callable[[], T]) -> T:
    """What `work` gives in the main process, where alone it runs.

    Raises:
        PtuningError: it failed there, or another process has failed.
    """
    if count() == 1:
        return work()
    result: list[T | None] = [None]
    with together():
        if state().is_main_process:
            result = [work()]
    distributed.broadcast_object_list(result, src=0, device=state().device)
    return result[0]  # type: ignore[return-value]


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """A block in which only this run uses `folder`; the main process holds it (`storage.locked`).

    Raises:
        InputError: another run has it.
    """
    with ExitStack() as held:
        if folder is not None:
            from_main(lambda: held.enter_context(storage.locked(folder)))
        yield


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes leave well, or all with an error.

    The error of another process arrives as one that names the process. Interrupts are not told: who
    interrupts one process interrupts them all.
    """
    try:
        yield
    except Exception as error:
        if count() > 1 and not hasattr(error, "heard_elsewhere"):
            with suppress(RuntimeError):  # the others are gone
                _exchange(error)
        raise
    if count() > 1:
        _exchange(None)


def _exchange(error: Exception | None) -> None:
    """Tell the others whether all is well here, and hear it of them.

    Raises:
        PtuningError: it is not well in another process, and well in this one.
    """
    failed = torch.tensor(float(error is not None), device=state().device)
    distributed.all_reduce(failed)
    if not failed:
        return
    told: list[tuple[type[PtuningError], str] | None] = [None] * count()
    distributed.all_gather_object(told, None if error is None else _in_words(error))
    process, words = next((n, words) for n, words in enumerate(told) if words is not None)
    if error is not None:
        _marked(error, process != state().process_index)
        return
    kind, text = words
    raise _marked(kind(f"process {process} has failed: {text}"), True)


def _marked(error: Exception, heard_elsewhere: bool) -> Exception:
    """Where another process says an error, nobody needs to here."""
    error.heard_elsewhere = heard_elsewhere  # type: ignore[attr-defined]
    return error


def _in_words(error: Exception) -> tuple[type[PtuningError], str]:
    known = isinstance(error, PtuningError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    kinds = (InputError, TrainingError, PtuningError)
    return next((kind for kind in kinds if isinstance(error, kind)), PtuningError), text
