"""A micro-step as one CUDA graph: where shapes repeat, no kernel waits for Python.

    first batch of a shape    plain step
    second                    plain step; beside it the graph is captured, replayed and compared
    later ones                batch and table into static buffers, replay, gradient to the table

Keys and values of the frozen prefix go into static buffers too (`static_shapes`). Only causal
models; what does not fit, or cannot be captured, takes the plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .collate import Batch
from .fast.kept_cache import cache_of
from .fast.prefix import PrefixStore
from .loss import Shortened
from .population import Population
from .prompt import Prompt
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
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            self._outputs = function()

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
        self._refused = False
        if isinstance(population.prefix, PrefixStore):
            population.prefix.multiple = SUFFIXES

    def __call__(self, batch: Batch, divisor: Tensor) -> Tensor:
        """As `MicroStep`."""
        wide = widened(batch)
        shape = shape_of(wide)
        if self._refused or shape not in self._seen:
            self._seen.add(shape)
            return self.plain(batch, divisor)
        given = self.population.prefix(wide) if self.population.prefix else None
        shape = (given is None, *shape)
        if given is not None and given.inputs["attention_mask"].dim() > 2:  # packed: never twice
            return self.plain(batch, divisor)
        table = self.population.table
        tensors = tensors_of(wide, divisor, table, given)
        if shape not in self.shapes and len(self.shapes) >= _MOST:
            return self.plain(batch, divisor)
        if shape not in self.shapes:
            return self._first(batch, divisor, shape, wide, given, tensors)
        buffers, graph = self.shapes[shape]
        fill(buffers, tensors)
        losses, gradient = graph.replay()
        table.grad = gradient.clone() if table.grad is None else table.grad.add_(gradient)
        self.replays += 1
        return losses.clone()

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
        expected = self.plain(batch, divisor)
        assert table.grad is not None
        gradient = table.grad - before
        try:
            buffers = buffers_for(tensors, len(wide.member))
            buffers["table"].requires_grad_()
            fill(buffers, tensors)
            graph = self.new_graph()
            graph.capture(partial(self._run, wide, given, buffers))
            losses, got = graph.replay()
            off = max(_distance(expected, losses), _distance(gradient, got))
        except Exception as error:  # whatever a model does that a graph cannot hold
            fault = (str(error) or type(error).__name__).splitlines()[0]
            self._refuse(f"capturing the step failed ({fault})")
            return expected
        if not off <= self.tolerance:  # also where it is not a number
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
        with self.population.written(table, self.population.table), self.autocast():
            losses = self.population.losses(static, prefix) / buffers["divisor"]
        (gradient,) = torch.autograd.grad(losses.sum(), table)
        return losses.detach(), gradient

    def _refuse(self, why: str) -> None:
        self._refused = True
        self.shapes.clear()
        self.say(f"CUDA graphs are off: {why}; every step runs plain")


def graphs_or_plain(
    population: Population,
    plain: MicroStep,
    prompts: Sequence[Prompt],
    settings: TrainSettings,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> MicroStep:
    """The micro-step to train with; `say` hears why it is the plain one where that may surprise."""
    if settings.graphs == "off" or accelerator.device.type != "cuda":
        return plain
    why = obstacle(population.base, prompts, accelerator)
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


def obstacle(model: nn.Module, prompts: Sequence[Prompt], accelerator: Accelerator) -> str | None:
    """Why steps of this training cannot be captured, or None."""
    config: Any = model.config
    if accelerator.num_processes > 1:
        return "several processes train together"
    if accelerator.scaler is not None:
        return "fp16 scales its loss anew in each step"
    if any(prompt.encoder == "lstm" and prompt.encoder_dropout > 0 for prompt in prompts):
        return "the LSTM's dropout draws new numbers in each step"
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing runs layers again"
    if getattr(model, "hf_device_map", None):
        return "the model is spread over devices"
    causal = not config.is_encoder_decoder and getattr(model, "can_generate", lambda: False)()
    return None if causal else "the model is not a causal one"


def _distance(expected: Tensor, got: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    wanted = expected.detach().float()
    return float((got.detach().float() - wanted).norm() / wanted.norm().clamp(min=1e-12))
