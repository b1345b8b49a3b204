"""A micro-step as one CUDA graph: where shapes repeat, no kernel waits for Python.

    first batch of a shape    plain step
    second                    plain step; beside it the graph is captured, replayed and compared
    later ones                batch and table into static buffers, replay, gradient to the table

Keys and values of the frozen prefix go into static buffers too (`static_shapes`). Only causal
models; what does not fit, or cannot be captured, takes the plain step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..backbone.traits import (
    ModelKind,
    checkpoints_gradients,
    is_spread,
    kind_of,
    looks_at_lengths,
)
from ..backbone.upstream import end_capture_pool
from ..forward.chunked import reads_in_chunks
from ..forward.kv_cache import cache_of
from ..forward.plain import Shortened
from ..rendering.collate import Batch
from .population import Population
from .settings import TrainSettings
from .static_shapes import GIVEN, SUFFIXES, buffers_for, fill, shape_of, tensors_of, widened

MicroStep = Callable[[Batch, Tensor], Tensor]
"""From a batch and each member's divisor to its share of the mean loss; its gradient is added to
the table of the population's micro-batch."""
Outputs = tuple[Tensor, Tensor]
"""Losses ``(members,)`` and the table's gradient."""
_MOST, _WARM_UPS = 32, 3


class Graph(Protocol):
    """Records what a function does to fixed tensors, and does it again."""

    def capture(self, function: Callable[[], Outputs]) -> None:
        """Record."""

    def replay(self) -> Outputs:
        """Do it again; the outputs are the same tensors each time."""


class CudaGraph:
    """`torch.cuda.CUDAGraph`; all of one training share a memory pool.

    That is safe since each replay's outputs are used before the next replay.
    """

    def __init__(self, pool: Any):
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Outputs]) -> None:
        """Record, after some runs on another stream that set libraries up."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        outer = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                self._outputs = function()
        except Exception:  # torch stays on the capture's stream then, and in its pool
            torch.cuda.set_stream(outer)
            end_capture_pool(outer.device_index, self._pool)
            raise

    def replay(self) -> Outputs:
        """Do it again."""
        self._graph.replay()
        return self._outputs


class GraphedStep:
    """A micro-step that replays graphs, and takes the plain step where there is none.

    Args:
        population: in training.
        plain: the step as it is without graphs.
        autocast: accelerate's mixed precision.
        new_graph: makes a `Graph`.
        tolerance: how far loss and gradient may be from the plain step's, as a share of its norm.
        say: hears once that graphs run, or why they do not.
    """

    def __init__(
        self,
        population: Population,
        plain: MicroStep,
        autocast: Callable[[], AbstractContextManager[Any]],
        new_graph: Callable[[], Graph],
        tolerance: float,
        say: Callable[[str], None],
    ):
        self.population, self.plain, self.autocast = population, plain, autocast
        self.new_graph, self.tolerance, self.say = new_graph, tolerance, say
        self.shapes: dict[Any, tuple[dict[str, Tensor], Graph]] = {}
        self.replays = 0
        self._seen: set[Any] = set()
        self._plain_shapes: set[Any] = set()
        self._refused = False
        self.store = population.engine.store
        if self.store is not None:
            self.store.multiple = SUFFIXES

    def __call__(self, batch: Batch, divisor: Tensor) -> Tensor:
        """As `MicroStep`."""
        wide = widened(batch)
        seen = shape_of(wide)
        if self._refused or seen in self._plain_shapes or seen not in self._seen:
            self._seen.add(seen)
            return self._plain(batch, divisor)
        with self.autocast():
            given = self.store(wide) if self.store is not None else None
        shape = (given is None, *seen)
        if shape not in self.shapes and not self._can_hold(wide, given):
            self._plain_shapes.add(seen)
            return self._plain(batch, divisor)
        table = self.population.table
        tensors = tensors_of(wide, divisor, table, given)
        if shape not in self.shapes:
            return self._first(batch, divisor, shape, wide, given, tensors)
        buffers, graph = self.shapes[shape]
        fill(buffers, tensors)
        losses, gradient = graph.replay()
        table.grad = gradient.clone() if table.grad is None else table.grad.add_(gradient)
        self.replays += 1
        return losses.clone()

    def _can_hold(self, wide: Batch, given: Shortened | None) -> bool:
        """A graph of the step is possible, and of use."""
        packed = given is not None and given.inputs["attention_mask"].dim() > 2  # never twice
        return (
            not packed
            and len(self.shapes) < _MOST
            and not reads_in_chunks(self.population.base, wide)
        )

    def _plain(self, batch: Batch, divisor: Tensor) -> Tensor:
        """The plain step; where memory is short it gets that of the graphs."""
        try:
            return self.plain(batch, divisor)
        except torch.OutOfMemoryError:
            if not self.shapes:
                raise
        self._refuse("they leave too little memory")
        return self.plain(batch, divisor)

    def _first(
        self,
        batch: Batch,
        divisor: Tensor,
        shape: Any,
        wide: Batch,
        given: Shortened | None,
        tensors: dict[str, Tensor],
    ) -> Tensor:
        """The plain step, and beside it a graph that is kept if it gives the same."""
        table = self.population.table
        before = torch.zeros_like(table) if table.grad is None else table.grad.clone()
        expected = self._plain(batch, divisor)
        if self._refused:
            return expected
        assert table.grad is not None
        gradient = table.grad - before
        try:
            buffers = buffers_for(tensors, len(wide.member))
            buffers["table"].requires_grad_()
            fill(buffers, tensors)
            graph = self.new_graph()
            graph.capture(partial(self._run, wide, given, buffers))
            losses, got = graph.replay()
            off = max(_distance(expected, losses, 0.1), _distance(gradient, got, 1e-12))
        except Exception as error:  # whatever a model does that a graph cannot hold
            while error.__context__ is not None and isinstance(error.__context__, Exception):
                error = error.__context__  # what broke the capture; its end fails too
            fault = (str(error) or type(error).__name__).splitlines()[0]
            self._refuse(f"capturing the step failed ({fault})")
            return expected
        if not off <= self.tolerance:  # also where it is not a number
            if self.shapes:  # others agree: this one rounds too differently
                self._plain_shapes.add(shape[1:])
            else:
                self._refuse(f"the captured step is off by {off:.1e} of the plain one")
            return expected
        if not self.shapes:
            self.say("CUDA graphs: steps of repeated shapes are replayed; the first one agrees")
        self.shapes[shape] = buffers, graph
        return expected

    def _run(self, wide: Batch, given: Shortened | None, buffers: dict[str, Tensor]) -> Outputs:
        """The micro-step on the static buffers."""
        own: dict[str, Any] = {name: buffers[name] for name in vars(wide) if name in buffers}
        static = replace(wide, **own)

        def prefix(_: Batch) -> Shortened | None:
            if given is None:
                return None
            inputs: dict[str, Any] = {
                name.removeprefix(GIVEN): value
                for name, value in buffers.items()
                if name.startswith(GIVEN)
            }
            layers = range(len(given.inputs["past_key_values"].layers))
            kept = [(buffers[f"keys {i}"], buffers[f"values {i}"]) for i in layers]
            return Shortened({**inputs, "past_key_values": cache_of(kept)}, given.rows)

        table = buffers["table"]
        with self.population.written(table), self.autocast():
            losses = self.population.losses(static, prefix) / buffers["divisor"]
        (gradient,) = torch.autograd.grad(losses.sum(), table)
        return losses.detach(), gradient

    def _refuse(self, why: str) -> None:
        self._refused = True
        self.shapes.clear()
        torch.cuda.empty_cache()
        self.say(f"CUDA graphs are off: {why}; every step runs plain")


def graphs_or_plain(
    population: Population,
    plain: MicroStep,
    settings: TrainSettings,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> MicroStep:
    """The micro-step to train with; `say` hears why it is the plain one where that may surprise."""
    if settings.graphs == "off" or accelerator.device.type != "cuda":
        return plain
    why = obstacle(population.base, accelerator)
    if settings.tune_model:
        why = "the model is trained too"
    if why is not None:
        say(f"CUDA graphs are off: {why}; every step runs plain")
        return plain
    base: Any = population.base
    exact = base.dtype == torch.float32 and accelerator.mixed_precision == "no"
    # Half precision rounds differently in the kernels of another shape.
    tolerance = 1e-3 if exact else 0.1
    new_graph = partial(CudaGraph, torch.cuda.graph_pool_handle())
    return GraphedStep(population, plain, accelerator.autocast, new_graph, tolerance, say)


def obstacle(model: nn.Module, accelerator: Accelerator) -> str | None:
    """Why steps of this training cannot be captured, or None."""
    if accelerator.num_processes > 1:
        return "several processes train together"
    if accelerator.scaler is not None:
        return "fp16 scales its loss anew in each step"
    if looks_at_lengths(model):
        return "FlashAttention looks at the lengths of rows"
    if checkpoints_gradients(model):
        return "gradient checkpointing runs layers again"
    if is_spread(model):
        return "the model is spread over devices"
    return None if kind_of(model) is ModelKind.CAUSAL else "the model is not a causal one"


def _distance(expected: Tensor, got: Tensor, least: float) -> float:
    """Norm of the difference over the norm of what is expected, or `least` where that is smaller:
    a loss near zero is made of logits whose rounding is not near zero."""
    wanted = expected.detach().float()
    return float((got.detach().float() - wanted).norm() / wanted.norm().clamp(min=least))
