"""A function on fixed tensors as one CUDA graph: no kernel waits for Python.

What takes a step or a prediction apart into such functions (`training.cuda_graphs`,
`graphed_scores`) holds what a graph gives against the plain computation before it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, Protocol

import torch

from ..backbone.upstream import end_capture_pool

MOST = 32
"""Graphs of one training or prediction: each has memory of its own."""
_WARM_UPS = 3


class Graph(Protocol):
    """Records what a function does to fixed tensors, and does it again."""

    def capture(self, function: Callable[[], Any]) -> None:
        """Record."""

    def replay(self) -> Any:
        """Do it again; the outputs are the same tensors each time."""


class Pool:
    """Memory of the graphs of one training or prediction.

    They may share it since each replay's outputs are used before the next replay.

    Attributes:
        handle: torch's name for it.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Graphs to come have other memory: where a capture has failed torch may take no other."""
        self.handle = torch.cuda.graph_pool_handle()


class CudaGraph:
    """`torch.cuda.CUDAGraph`.

    Of the threads of a process one captures at a time: a capture has the device's random state.

    Args:
        pool: of memory.
        device: on which the function computes; it need not be the current one.
    """

    _libraries_are_up = False
    capturing = threading.Lock()
    _streams: ClassVar[dict[torch.device, Any]] = {}
    """Of each device one: memory of a pool is reused on the stream that it was taken on."""

    def __init__(self, pool: Pool, device: torch.device):
        self._pool, self._device = pool, device
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Any]) -> None:
        """Record, after runs on another stream: some that set libraries up, later one."""
        with CudaGraph.capturing, torch.cuda.device(self._device):
            self._capture(function)

    def _capture(self, function: Callable[[], Any]) -> None:
        stream = CudaGraph._streams.setdefault(self._device, torch.cuda.Stream())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(1 if CudaGraph._libraries_are_up else _WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        outer = torch.cuda.current_stream()
        try:
            options: Any = {"pool": self._pool.handle, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(self._graph, stream=stream, **options):
                self._outputs = function()
        except Exception:  # torch stays on the capture's stream then, and in its pool
            with suppress(RuntimeError):
                self._graph.reset()  # not while another thread captures
            end_capture_pool(outer.device_index, self._pool.handle)
            self._pool.renew()
            _capture_nothing(stream)
            torch.cuda.set_stream(outer)
            raise
        CudaGraph._libraries_are_up = True

    def replay(self) -> Any:
        """Do it again."""
        self._graph.replay()
        return self._outputs


def give_back_memory() -> None:
    """What torch keeps for later goes to all; while a thread captures torch refuses that."""
    with CudaGraph.capturing:
        torch.cuda.empty_cache()


def _capture_nothing(stream: Any) -> None:
    """A capture that ends: before torch 2.13 one that failed keeps the device's generator, so that
    nobody could draw numbers there any more."""
    graph: Any = torch.cuda.graph(
        torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"
    )
    with suppress(RuntimeError), graph:
        torch.zeros((), device=stream.device)
