"""A part of a step as one CUDA graph: where shapes repeat, no kernel waits for Python.

    first batch of a shape    plain step
    second                    plain step; beside it the graph is captured, replayed and compared
    later ones                inputs into their static buffer, replay

Losses and the table's gradient add up in buffers that stand still (`steps` takes them from there).
Keys and values of the frozen prefix are read in the graph, by the slots of the store's pool. Only
causal models; what does not fit, or cannot be captured, takes the plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..backbone.base_model import device_of
from ..backbone.eight_bits import frozen_format
from ..backbone.kinds import ModelKind, kind_of
from ..backbone.traits import (
    checkpoints_gradients,
    is_spread,
    layer_weights,
    looks_at_lengths,
    packs_rows,
)
from ..backbone.upstream import has_foreign_hooks
from ..errors import in_one_line
from ..forward.engine import CompiledLayers, Work
from ..forward.graphs import MOST, CudaGraph, Graph, Pool, give_back_memory
from ..forward.plain import Shortened, behind
from ..forward.static_shapes import Shape, StaticInputs, grain_for, shape_of
from ..rendering.collate import Batch
from .population import Population
from .settings import TrainSettings

T = TypeVar("T")
MicroStep = Callable[[Batch, Tensor], Tensor]
"""From a batch and each member's divisor to its share of the mean loss; its gradient is added to
the table that is in the population's embedding."""
Outputs = tuple[Tensor, Tensor]
"""Losses ``(members,)`` and the table's gradient."""
_MOVES = 8.0
"""In eight bits a gradient moves by half of its norm where what is quantized moves by a thousandth
(SmolLM2), three to five times as far as in bfloat16; the loss by a twentieth."""


class GraphedStep:
    """Parts of a step by replayed graphs, or by the plain step where there is none.

    Args:
        population: in training.
        plain: the step as it is without graphs.
        autocast: accelerate's mixed precision.
        new_graph: makes a `Graph`.
        tolerance: how far loss and gradient may be from the plain step's, as a share of its norm.
        say: hears once that graphs run, or why they do not.

    Attributes:
        table: what the encoders made ``(virtual tokens, width)``, read by every part.
        gradient: of the table, and
        losses: of the members ``(members,)``: what the parts since the last `clear` add up to.
        replays: how many parts were replayed.
        fast_layers: what captured steps run the layers by; None for the layers as they are.
        update: the graph of what comes behind a step's parts (`steps`), if there is one.
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
        self.fast_layers: CompiledLayers | None = None
        self._trims = False
        self.shapes: dict[Shape, tuple[StaticInputs, Graph]] = {}
        self.update: Graph | None = None
        self.replays = 0
        self.table = population.tables().detach().clone()
        self.device = self.table.device
        self.gradient = torch.zeros_like(self.table)
        self.losses = torch.zeros(len(population.members), dtype=torch.float32, device=self.device)
        self._seen: set[Shape] = set()
        self._plain_shapes: set[Shape] = set()
        self._weights = layer_weights(population.base)
        self._agreed = self._refused = False
        self._moves = _MOVES if frozen_format(population.base) else 1.0
        self._pool_version = -1

    def compile_layers(self, work: Work) -> None:
        """Capture compiled layers, if that is worth it (`compiled.layers_worth_it`)."""
        base, engine = self.population.base, self.population.engine
        self.fast_layers = engine.compiled_layers(work)
        # Rotary positions and full attention: what the last layer gives can be chosen.
        self._trims = self.fast_layers is not None and packs_rows(base)

    def clear(self) -> None:
        """Begin to add up anew."""
        self.gradient.zero_()
        self.losses.zero_()

    def __call__(self, batch: Batch, divisor: Sequence[float]) -> None:
        """Add a part to `losses` and `gradient`.

        Args:
            batch: on the CPU.
            divisor: of each member's losses.
        """
        kept = self.population.engine.serves_kept(batch)
        full = self._trims and not kept and len(set(batch.lengths)) == 1
        shape = shape_of(batch, grain_for(batch, self._weights, kept), kept, full)
        if self._refused or shape in self._plain_shapes or shape not in self._seen:
            self._seen.add(shape)
            self._plain(batch, divisor)
            return
        if shape not in self.shapes and not self._can_hold(batch, shape):
            self._plain_shapes.add(shape)
            self._plain(batch, divisor)
            return
        slots = None
        if shape in self.shapes:
            slots = self.with_room(partial(self._slots, batch, shape))
        if shape not in self.shapes:  # or not any more
            self._first(batch, divisor, shape)
            return
        inputs, graph = self.shapes[shape]
        inputs.fill(batch, divisor, slots)
        graph.replay()
        self.replays += 1

    def _can_hold(self, batch: Batch, shape: Shape) -> bool:
        """A graph of the step is possible, and there is room for it."""
        padded = shape.examples / len(batch.member)
        return len(self.shapes) < MOST and self.population.engine.stands_still(batch, padded)

    def _slots(self, batch: Batch, shape: Shape) -> Any:
        """Of the batch's kept columns, as the store's `slots` gives them; None without such."""
        if not shape.kept:
            return None
        store = self.population.engine.store
        assert store is not None
        counts = [max(0, length - (shape.columns - shape.kept)) for length in batch.lengths]
        with self.autocast():
            slots = store.slots(batch.prefixes, counts, shape.kept, self.device)
        assert store.pool is not None
        if store.pool.version != self._pool_version:  # captured graphs read where it was
            self._pool_version = store.pool.version
            self._forget(kept=True)
        return slots

    def with_room(self, run: Callable[[], T]) -> T:
        """What `run` gives; where memory is short it gets that of the graphs."""
        try:
            return run()
        except torch.OutOfMemoryError:
            if not self.shapes:
                raise
        self._refuse("they leave too little memory")
        return run()

    def _plain(self, batch: Batch, divisor: Sequence[float]) -> Outputs:
        """The plain step."""
        return self.with_room(partial(self._plainly, batch, divisor))

    def _plainly(self, batch: Batch, divisor: Sequence[float]) -> Outputs:
        table = self.table.detach().clone().requires_grad_()
        divisors = torch.tensor(divisor, dtype=torch.float32, device=self.device)
        with self.population.written(table):
            losses = self.plain(batch.to(self.device), divisors)
        assert table.grad is not None
        self.losses += losses
        self.gradient += table.grad
        return losses, table.grad

    def _first(self, batch: Batch, divisor: Sequence[float], shape: Shape) -> None:
        """The plain step, and beside it a graph that is kept if it gives the same."""
        expected = self._plain(batch, divisor)
        if self._refused:
            return
        off = self._capture(batch, divisor, shape, expected)
        while self.fast_layers is not None and not self._agrees(off):
            self.shapes.pop(shape, None)
            if self._trims:
                self._trims, shape = False, shape._replace(full=False)
                self.shapes = {s: held for s, held in self.shapes.items() if not s.full}
            else:
                fault = off if isinstance(off, str) else f"they are off by {off:.1e}"
                self.say(f"compiled layers are off: {fault}; the layers run as they are")
                self.fast_layers = None
            off = self._capture(batch, divisor, shape, expected)
        if isinstance(off, str):
            self._refuse(f"capturing the step failed ({off})")
        elif self._agrees(off):
            if not self._agreed:
                self.say(
                    "CUDA graphs: steps of repeated shapes are replayed; the first one agrees"
                    + (", with compiled layers" if self.fast_layers else "")
                )
            self._agreed = True
        else:  # also where it is not a number
            del self.shapes[shape]
            if self._agreed:  # others do: this one rounds too differently
                self._plain_shapes.add(shape)
            else:
                self._refuse(f"the captured step is off by {off:.1e} of the plain one")

    def _agrees(self, off: float | str) -> bool:
        return not isinstance(off, str) and off <= self.tolerance

    def _capture(
        self, batch: Batch, divisor: Sequence[float], shape: Shape, expected: Outputs
    ) -> float | str:
        """A graph of a part, into `shapes`; gives how far off it is, or what went wrong."""
        added = self.losses.clone(), self.gradient.clone()
        try:
            slots = self._slots(batch, shape)
            inputs = StaticInputs(batch, shape, len(self.losses), self.device)
            inputs.fill(batch, divisor, slots)
            graph = self.new_graph()
            graph.capture(partial(self._run, batch, inputs.tensors))
            self.shapes[shape] = inputs, graph
            return _distances(expected, graph.replay(), self._moves)
        except Exception as error:  # whatever a model does that a graph cannot hold
            return _cause(error)
        finally:  # what was captured has added its own meanwhile
            self.losses.copy_(added[0])
            self.gradient.copy_(added[1])

    def _run(self, batch: Batch, inputs: dict[str, Tensor]) -> Outputs:
        """The part on the static inputs."""
        given: dict[str, Any] = {name: inputs[name] for name in vars(batch) if name in inputs}
        static = replace(batch, **given)
        table = self.table.detach().requires_grad_()
        fast = self.fast_layers("keep" in inputs) if self.fast_layers else nullcontext()
        with self.population.written(table), self.autocast(), fast:
            shorten = partial(self._shortened, inputs=inputs)
            losses = self.population.losses(static, shorten) / inputs["divisor"].float()
        (gradient,) = torch.autograd.grad(losses.sum(), table)
        self.losses += losses.detach()
        self.gradient += gradient
        return losses.detach(), gradient

    def _shortened(self, static: Batch, inputs: dict[str, Tensor]) -> Shortened:
        """What is to compute: all columns, or those behind kept ones."""
        slots, columns, cache = inputs.get("slots"), static.input_ids.shape[1], None
        if slots is not None:
            columns, cache = columns - slots.shape[1], self.population.engine.kept_at(slots)
        shortened = behind(self.population.base, static, columns, cache)
        asked = shortened.inputs
        if "keep" in inputs and "logits_to_keep" in asked:
            asked["logits_to_keep"] = inputs["keep"]
        if self.fast_layers and self._trims and "logits_to_keep" in asked:
            self.fast_layers.give_only(asked.pop("logits_to_keep"))
        return shortened

    def _forget(self, kept: bool) -> None:
        """Let captured graphs go; all, or those that read kept keys and values."""
        for shape, (inputs, _) in list(self.shapes.items()):
            if not kept or "slots" in inputs.tensors:
                del self.shapes[shape]

    def _refuse(self, why: str) -> None:
        self._refused = True
        self._forget(kept=False)
        self.update = None  # a pool is given back when none of its graphs is left
        give_back_memory()
        self.say(f"CUDA graphs are off: {why}; every step runs plain")


def graphs_or_plain(
    population: Population,
    plain: MicroStep,
    settings: TrainSettings,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> MicroStep | GraphedStep:
    """What computes the parts of a step; `say` hears why it is the plain one where that may
    surprise."""
    if settings.graphs == "off" or accelerator.device.type != "cuda":
        return plain
    why = obstacle(population.base, accelerator)
    if settings.tune_model:
        why = "the model is trained too"
    elif has_foreign_hooks(population.base):
        why = "the model has hooks, which a replay would not call"
    if why is not None:
        say(f"CUDA graphs are off: {why}; every step runs plain")
        return plain
    base: Any = population.base
    exact = base.dtype == torch.float32 and accelerator.mixed_precision == "no"
    # Half precision rounds differently in the kernels of another shape.
    tolerance = 1e-3 if exact and not frozen_format(base) else 0.1
    new_graph = partial(CudaGraph, Pool(), device_of(base))
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


def _distances(expected: Outputs, got: Outputs, moves: float) -> float:
    """How far losses and gradient are from what is expected, the larger of the two; of the gradient
    one part of `moves`."""
    (losses, gradient), (got_losses, got_gradient) = expected, got
    # A loss near zero is made of logits whose rounding is not near zero.
    return max(_distance(losses, got_losses, 0.1), _distance(gradient, got_gradient, 1e-12) / moves)


def _distance(expected: Tensor, got: Tensor, least: float) -> float:
    """Norm of the difference over the norm of what is expected, or `least` where that is less."""
    wanted = expected.detach().float()
    return float((got.detach().float() - wanted).norm() / wanted.norm().clamp(min=least))


def _cause(error: Exception) -> str:
    """A line of what broke a capture; its end fails too."""
    while error.__context__ is not None and isinstance(error.__context__, Exception):
        error = error.__context__
    return in_one_line(error)
