"""A thread's block serves its own calls, and leaves the modules as they were."""

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from ptuning.forward.own_forwards import own_forwards

ONE = torch.ones(1)


@pytest.fixture
def module() -> nn.Module:
    return nn.Identity()


def in_thread(run: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_calls_go_to_the_function_inside_the_block_alone(module: nn.Module) -> None:
    with own_forwards({module: lambda x: x + 1}):
        assert module(ONE) == 2
        with own_forwards({module: lambda x: x + 2}):
            assert module(ONE) == 3
        assert module(ONE) == 2
    assert module(ONE) == 1 and "forward" not in vars(module)


def test_an_error_in_the_block_ends_it(module: nn.Module) -> None:
    with pytest.raises(ZeroDivisionError), own_forwards({module: lambda x: x / (1 // 0)}):
        module(ONE)
    assert module(ONE) == 1 and "forward" not in vars(module)


def test_threads_that_overlap_each_have_their_own(module: nn.Module) -> None:
    begun, ended = threading.Event(), threading.Event()
    seen: list[float] = []

    def longer() -> None:
        with own_forwards({module: lambda x: x + 2}):
            begun.set()
            assert ended.wait(10)
            seen.append(float(module(ONE)))

    def without() -> None:
        seen.append(float(module(ONE)))

    with own_forwards({module: lambda x: x + 1}):
        thread = in_thread(longer)
        assert begun.wait(10)
        assert module(ONE) == 2
        in_thread(without).join(10)
    assert module(ONE) == 1
    ended.set()  # the block that began first is over
    thread.join(10)
    assert seen == [1, 3] and "forward" not in vars(module)


def test_what_others_put_there_meanwhile_stays_and_serves(module: nn.Module) -> None:
    theirs = partial(torch.mul, torch.tensor(7.0))
    with own_forwards({module: lambda x: x + 1}):
        module.forward = theirs
    assert module.forward is theirs
    with own_forwards({module: lambda x: x + 1}):
        assert module(ONE) == 7
    assert module.forward is theirs
