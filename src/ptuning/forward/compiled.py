"""The frozen model's repeated layer compiled, once for all of them: small kernels melt together.

    plain     each layer's operations one by one, keys and values repeated for each query head
    here      the layer as torch.compile makes it, forward and backward; on a GPU that has it,
              cuDNN's attention, which reads groups of query heads as they are, behind a mask too;
              no mask where no row has padding; the last layer's answer columns alone

A compilation takes as long as hundreds of steps save: `layers_worth_it` weighs it. Layers run so
with gradients, inside the block alone (`own_forwards`); their weights and their class stay as they
are. Who uses this holds its numbers against the plain layers' first.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache

from ..backbone.base_model import device_of
from ..backbone.traits import layer_weights, repeated_layers
from ..backbone.upstream import CACHE
from .attention import grouped_on_gpu
from .own_forwards import own_forwards

DYNAMIC = True
_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Attention's, in this order: the others serve what cuDNN does not."""


class Work(NamedTuple):
    """What decides whether layers are compiled.

    Attributes:
        setting: ``on``, ``off``, or ``auto`` to weigh gain and cost.
        tokens: that a step computes.
        steps: to come.
        seconds: that they may take at most.
    """

    setting: str
    tokens: float
    steps: int
    seconds: float = math.inf


class _Cost(NamedTuple):
    """What a compilation is weighed by, of a kind of device.

    Attributes:
        seconds: that compiling costs, with the shapes that come later.
        saves: the part of a step that compiled layers save at least.
        rate: floating-point operations per second to reckon a step's time with, a high guess.
        least: seconds that a step takes however small it is.
    """

    seconds: float
    saves: float
    rate: float
    least: float


_GPU = _Cost(25.0, 0.3, 3e14, 0.01)
"""Measured: 12 seconds, 0.3 to 0.6 of a step."""
_CPU, _CPU_IN_HALF = _Cost(90.0, 0.05, 1e11, 0.0), _Cost(90.0, 0.1, 3e11, 0.0)
"""Measured: 30 to 60 seconds (7 where the compiler's own cache has the layer), and 0.05 to 0.12 of
a step in float32, 0.05 to 0.2 in bfloat16."""


class CompiledLayers:
    """A model's repeated layer, compiled when it first runs.

    Args:
        model: frozen.
        layers: its `repeated_layers`.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module]):
        self.model, self.layers = model, layers
        forwards = dict.fromkeys(type(layer).forward for layer in self.layers)
        self._compiled = {plain: torch.compile(plain, dynamic=DYNAMIC) for plain in forwards}
        self._here = threading.local()

    @contextmanager
    def __call__(self, causal: bool = False) -> Iterator[None]:
        """The layers run compiled meanwhile, in this thread.

        Args:
            causal: no row has padding in front: attention needs no mask but its own.
        """
        layers = enumerate(self.layers)
        forwards = {layer: partial(self._forward, number, layer) for number, layer in layers}
        self._here.causal, self._here.keep = causal, None
        with (
            own_forwards(forwards),
            grouped_on_gpu(self.model) as grouped,
            sdpa_kernel(_KERNELS, set_priority=True) if grouped else nullcontext(),
        ):
            yield

    def give_only(self, columns: Tensor) -> None:
        """The last layer gives these columns ``(K,)`` and no others, within the block."""
        self._here.keep = columns

    def _forward(self, number: int, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain: Callable[..., Any] = type(layer).forward
        if not torch.is_grad_enabled():
            return plain(layer, *args, **kwargs)
        args = tuple(_own(value, number) for value in args)
        kwargs = {name: _own(value, number) for name, value in kwargs.items()}
        if number == len(self.layers) - 1 and self._here.keep is not None and len(args) == 1:
            return _last(partial(plain, layer), args[0], kwargs, self._here.keep)
        if self._here.causal:
            kwargs["attention_mask"] = None
        return self._compiled[plain](layer, *args, **kwargs)


def _last(run: Callable[..., Any], hidden: Tensor, kwargs: dict[str, Any], keep: Tensor) -> Any:
    """What a model's last layer makes of some columns: keys and values are needed of all, the rest
    of the layer is not.

    Args:
        run: the layer.
        hidden: ``(R, T, width)``.
        kwargs: of the layer, rotary positions and a mask among them.
        keep: ``(K,)`` the columns.
    """
    taken = _Taken(kwargs.get(CACHE))
    with suppress(_Enough):
        run(hidden, **{**kwargs, CACHE: taken, "use_cache": True})
    mask = kwargs.get("attention_mask")
    if mask is None:
        known = taken.keys.shape[2] - hidden.shape[1]
        mask = torch.arange(taken.keys.shape[2], device=keep.device) <= keep[:, None] + known
        mask = mask[None, None]
    else:
        mask = mask[:, :, keep]
    chosen = {
        "attention_mask": mask,
        CACHE: taken,
        "position_ids": kwargs["position_ids"][:, keep],
        "position_embeddings": tuple(part[:, keep] for part in kwargs["position_embeddings"]),
    }
    # Few queries: cuDNN's kernels are not made for them.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return run(hidden[:, keep], **{**kwargs, **chosen})


class _Enough(Exception):
    """The layer has made its keys and values."""


class _Taken:
    """The part of a cache that a layer reads, which takes its keys and values and stops it; when it
    runs again it gives them."""

    def __init__(self, behind: Any):
        self.behind = behind
        self.keys: Any = None
        self.values: Any = None

    def update(
        self, keys: Tensor, values: Tensor, *others: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """As `Cache.update`."""
        if self.keys is None:
            given = (keys, values) if self.behind is None else self.behind.update(keys, values)
            self.keys, self.values = given
            raise _Enough
        return self.keys, self.values


class OneLayer:
    """The part of a cache that a layer reads, so that all layers are given the same kind of thing:
    the layer's number would be compiled in."""

    def __init__(self, layer: Any):
        self.layer = layer

    def update(
        self, keys: Tensor, values: Tensor, *others: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """As `Cache.update`, whichever the layer."""
        return self.layer.update(keys, values)

    def get_seq_length(self, *others: Any) -> int:
        """As `Cache.get_seq_length`."""
        return int(self.layer.get_seq_length())


def _own(value: Any, number: int) -> Any:
    return OneLayer(value.layers[number]) if isinstance(value, Cache) else value


def layers_worth_it(model: nn.Module, work: Work) -> list[nn.Module]:
    """The model's repeated layers, if a training gains more by compiling them than it costs."""
    layers = [] if work.setting == "off" else repeated_layers(model)
    if not layers or work.setting == "on":
        return layers
    cost = _cost(model)
    if cost is None:
        return []
    step = max(cost.least, 4 * layer_weights(model) * work.tokens / cost.rate)
    seconds = min(work.steps * step, work.seconds)
    return layers if seconds * cost.saves >= cost.seconds else []


def _cost(model: nn.Module) -> _Cost | None:
    """Of compiling on the model's device; None where that is not known."""
    kind = device_of(model).type
    if kind == "cpu":
        return _CPU_IN_HALF if getattr(model, "dtype", None) == torch.bfloat16 else _CPU
    return _GPU if kind == "cuda" else None
