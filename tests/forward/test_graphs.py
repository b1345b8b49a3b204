"""Captures that fail: nothing of them stays. A stand-in has the state that torch leaves then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ptuning.forward.graphs import CudaGraph, Pool

HERE = torch.device("cpu")


class Stream:
    device, device_index = HERE, 0

    def wait_stream(self, other: Any) -> None:
        pass


class Torch:
    """Of torch 2.11 what captures change; a failed one takes nothing back.

    Attributes:
        users: how many graphs hold a pool.
        underway: pools that allocations go to.
        draws: numbers can be drawn.
        current: the stream.
    """

    def __init__(self, patch: pytest.MonkeyPatch, ends_itself: bool):
        self.users: Counter[int] = Counter()
        self.underway: set[int] = set()
        self.draws, self.ends_itself = True, ends_itself
        self.default = self.current = Stream()
        self._made = 0
        for name, value in {
            "Stream": Stream, "stream": lambda stream: nullcontext(), "device": nullcontext,
            "current_stream": lambda: self.current, "set_stream": self._set,
            "graph_pool_handle": self._handle, "graph": self._capture,
            "CUDAGraph": lambda: SimpleNamespace(pool=None, reset=lambda: None),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        for name, call in (("endAllocateTo", self._end), ("release", self._release)):
            patch.setattr(torch._C, f"_cuda_{name}Pool", call, raising=False)
        patch.setattr(CudaGraph, "_streams", {})

    def _set(self, stream: Stream) -> None:
        self.current = stream

    def _handle(self) -> int:
        self._made += 1
        return self._made

    def _end(self, device: int, pool: int) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def _release(self, device: int, pool: int) -> None:
        self.users[pool] -= 1

    def _capture(self, graph: Any, stream: Stream, pool: int = 0, **_: Any) -> Any:
        outer = self

        class Capture:
            def __enter__(self) -> None:
                assert not outer.underway, "captures_underway.empty() INTERNAL ASSERT FAILED"
                outer.current, outer.draws = stream, False
                outer.users[pool] += 1
                outer.underway.add(pool)

            def __exit__(self, kind: Any, *_: Any) -> None:
                if kind is not None:
                    if outer.ends_itself:
                        outer.underway.remove(pool)
                        outer.users[pool] -= 1
                    raise RuntimeError("operation failed due to a previous error during capture")
                outer.underway.remove(pool)
                outer.current, outer.draws = outer.default, True

        return Capture()


def broken() -> Any:
    """Runs, but for a capture."""
    calls: list[int] = []

    def function() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    return function


@pytest.mark.parametrize("ends_itself", [False, True])
def test_a_failed_capture_leaves_nothing(
    ends_itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaGraph, "_libraries_are_up", False)
    state, pool = Torch(monkeypatch, ends_itself), Pool()
    used = pool.handle
    CudaGraph(pool, HERE).capture(lambda: None)
    monkeypatch.setattr(CudaGraph, "_libraries_are_up", False)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        CudaGraph(pool, HERE).capture(broken())
    assert state.users[used] == 1 and not state.underway
    assert state.draws and state.current is state.default
    CudaGraph(pool, HERE).capture(lambda: None)
    assert pool.handle != used and state.users[pool.handle] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_failed_capture_leaves_nothing() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    numbers, pool = torch.ones(2**24, device=device), Pool()

    def fitting() -> Any:
        return numbers + 1

    def looking() -> Any:
        return (numbers + 1).sum().item()

    def captured(function: Callable[[], Any]) -> CudaGraph:
        graph = CudaGraph(pool, device)
        graph.capture(function)
        return graph

    kept = captured(fitting)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    with pytest.raises(RuntimeError):
        captured(looking)
    assert torch.rand(3, device=device).isfinite().all()
    assert captured(fitting).replay().eq(2).all() and kept.replay().eq(2).all()
    if torch.__version__ < "2.13":  # which ends the capture, and still counts its graph
        del kept
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved(device) <= before
