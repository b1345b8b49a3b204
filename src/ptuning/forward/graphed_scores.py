"""Scores of label words by replayed CUDA graphs, where batches of few shapes come again and again.

    plain    each kernel of `label_word_scores` started from Python
    here     a batch into its static buffer, and one graph

A GPU computes some thousand tokens of a small model sooner than Python has started the kernels. A
shape's third batch is captured beside the plain forward, and the fourth held against it: what does
not fit, gives other numbers or cannot be captured stays plain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..backbone.base_model import device_of
from ..backbone.eight_bits import frozen_format
from ..backbone.injection import Injector
from ..backbone.kinds import ModelKind, kind_of
from ..backbone.traits import is_spread, layer_weights, looks_at_lengths
from ..backbone.upstream import has_foreign_hooks, is_compiled
from ..rendering.collate import Batch
from .graphs import MOST, CudaGraph, Graph, Pool
from .label_words import label_word_scores
from .static_shapes import LITTLE, Grain, Shape, StaticInputs, shape_of

_BEFORE = 2
"""Plain batches of a shape before it is captured, which takes as long as some more of them."""
_MUCH, _FILLED = 5e12, 1.5
"""Products of a forward in half precision from which on an H100 is busy while Python starts its
kernels; down to `LITTLE` a static batch is at most so many times as large as its content."""
_SLOWER = 16
"""How many products of half precision it has for one of float32."""
_CHANGES = 3
"""Times that graphs are made anew since prompts were attached or left."""
_STEPS = ((64, 8), (256, 16), (1024, 32))
"""Columns up to which, and what they are filled up to a multiple of."""


class GraphedScores:
    """`label_word_scores` of batches on the CPU, without gradients.

    What is attached to the model may change: a graph serves the prompts that it was captured with.

    Args:
        model: causal, on the device.
        new_graph: makes a `Graph`.
        tolerance: how far the words' shares of 1 may be from the plain ones.

    Attributes:
        replays: how many batches were replayed.
    """

    def __init__(self, model: nn.Module, new_graph: Callable[[], Graph], tolerance: float):
        self.model, self.new_graph, self.tolerance = model, new_graph, tolerance
        self._slower = _SLOWER if getattr(model, "dtype", None) == torch.float32 else 1
        self.shapes: dict[Shape, tuple[StaticInputs, Graph]] = {}
        self.replays = 0
        self._weights = layer_weights(model)
        self._seen: Counter[Shape] = Counter()
        self._trusted: set[Shape] = set()
        self._attached: object = None
        self._changes = 0
        self._refused = False

    def __call__(self, batch: Batch, words: int) -> Tensor:
        """Scores ``(N, words)`` of words of one token each, on the device."""
        self._forget_others()
        shape = self._shape(batch)
        if shape is None:
            return self._plain(batch, words)
        if shape in self._trusted:
            return self._replayed(batch, shape)
        scores = self._plain(batch, words)
        self._seen[shape] += 1
        if shape in self.shapes:
            if _difference(scores, self._replayed(batch, shape)) <= self.tolerance:
                self._trusted.add(shape)
            else:  # also where it is not a number
                self._refuse()
        elif self._seen[shape] > _BEFORE and len(self.shapes) < MOST and not self._refused:
            self._capture(batch, words, shape, scores.device)
        return scores

    def _replayed(self, batch: Batch, shape: Shape) -> Tensor:
        inputs, graph = self.shapes[shape]
        inputs.fill(batch, [1.0], None)
        self.replays += 1
        scores: Tensor = graph.replay()
        return scores[: len(batch.member)].clone()  # the next batch gets the same tensor

    def _shape(self, batch: Batch) -> Shape | None:
        """The static one that serves a batch; None where none is of use."""
        columns = batch.input_ids.shape[1]
        of = next((step for most, step in _STEPS if columns <= most), None)
        if self._refused or of is None:
            return None
        if torch.is_autocast_enabled(device_of(self.model).type):
            return None
        shape = shape_of(batch, Grain(8, of, of), kept=False)
        size = shape.examples * shape.rows * shape.columns
        work = self._slower * self._weights * size
        filled = size <= _FILLED * batch.input_ids.numel()
        return shape if work <= LITTLE or (work <= _MUCH and filled) else None

    def _plain(self, batch: Batch, words: int) -> Tensor:
        try:
            return label_word_scores(self.model, batch.to(device_of(self.model)), words)
        except torch.OutOfMemoryError:
            if not self.shapes:
                raise
        self._refuse()  # graphs have memory of their own
        return label_word_scores(self.model, batch.to(device_of(self.model)), words)

    def _capture(self, batch: Batch, words: int, shape: Shape, device: torch.device) -> None:
        if has_foreign_hooks(self.model):  # which a replay would not call
            self._refuse()
            return
        try:
            inputs = StaticInputs(batch, shape, 1, device)
            inputs.fill(batch, [1.0], None)
            given = {name: inputs.tensors[name] for name in vars(batch) if name in inputs.tensors}
            graph = self.new_graph()
            graph.capture(partial(label_word_scores, self.model, replace(batch, **given), words))
            self.shapes[shape] = inputs, graph
        except Exception:  # whatever a model does that a graph cannot hold
            self._refuse()

    def _forget_others(self) -> None:
        """Graphs read the vectors that were attached when they were captured, where they were."""
        injector = Injector.of(self.model)
        attached = None if injector is None else injector.attached
        if attached is not self._attached:
            self._attached = attached
            self._changes += bool(self.shapes)
            if self._changes > _CHANGES:
                self._refuse()
            self._forget()

    def _forget(self) -> None:
        self.shapes.clear()
        self._trusted.clear()
        self._seen.clear()

    def _refuse(self) -> None:
        self._refused = True
        self._forget()


def graphed_scores(model: nn.Module) -> GraphedScores | None:
    """For a model whose forwards a GPU can replay; None for others."""
    device = device_of(model)
    if device.type != "cuda" or kind_of(model) is not ModelKind.CAUSAL:
        return None
    if is_compiled(model) or looks_at_lengths(model) or is_spread(model):
        return None
    if device.index not in (None, torch.cuda.current_device()):
        return None
    exact = getattr(model, "dtype", None) == torch.float32 and not frozen_format(model)
    new_graph = partial(CudaGraph, Pool(), device)
    # Half precision rounds differently in the kernels of another shape.
    return GraphedScores(model, new_graph, 1e-4 if exact else 0.02)


def _difference(expected: Tensor, got: Tensor) -> float:
    """The largest between the words' shares of 1; NaN where there is one."""
    return float((expected.softmax(1) - got.softmax(1)).abs().max())
