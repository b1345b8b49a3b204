"""A frozen model's layers in eight bits, quantized once, multiplied in eight bits both ways.

    plain     y = x Wᵀ                        dx = g W
    here      y = s_x s_w (x₈ W₈ᵀ)            dx = s (g s_w)₈ W₈

``W₈`` has one scale for each row; rows of the input and of the gradient are quantized as they
come. Since the scales of ``W₈`` go into the gradient before it is quantized, one matrix serves both
directions, and what is trained gets the gradient of the model that is there. Embedding, output
head, norms and what attention multiplies by itself stay as they are.

    int8   whole numbers up to 127
    fp8    floating point, four bits of exponent (e4m3), up to 448: CUDA devices of capability 8.9
           and above (Ada, Hopper), and the CPU, where it is slow

Left as they are: layers of images and sounds, adapters, mixers of state-space models, which read
their matrices themselves, experts that are one tensor, and sizes that kernels are not made for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, warn
from .upstream import float_product, has_hooks, is_offloaded, whole_product

OWN = "own"


class Format(NamedTuple):
    """Of eight bits.

    Attributes:
        dtype: torch's.
        largest: number in it.
    """

    dtype: torch.dtype
    largest: float


FORMATS = {"int8": Format(torch.int8, 127.0), "fp8": Format(torch.float8_e4m3fn, 448.0)}
FROZEN = (OWN, *FORMATS)
_MULTIPLE = 16
"""Rows and columns that kernels of eight bits are made for."""
_CAPABLE = (8, 9)
_MOST = 0.5
"""Of the layers' weights: where fewer are in plain linear layers it is said."""
_LEFT = ("visual", "vision", "image", "audio", "lora_")
"""In the names of modules whose layers stay."""


class GoneWeight(NamedTuple):
    """What is left of a weight for those who ask what it is like; nobody can compute with it."""

    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


class EightBitLinear(nn.Module):
    """A frozen linear layer in eight bits.

    Attributes:
        values: ``(N, K)`` in eight bits.
        scales: ``(N,)`` float32; ``values * scales`` is the weight.
        turned: ``(K, N)``, the values as the backward product reads them; None: made when needed.

    Raises:
        InputError: the model was converted to another number format.
    """

    scales: Tensor
    turned: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Format, gradients: bool):
        super().__init__()
        values, scales = quantized(weight.detach(), kind)
        self.values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scales", scales[:, 0])
        self.register_buffer("turned", values.T.contiguous() if gradients else None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._was, self._formats = weight.dtype, (values.dtype, torch.float32)

    @property
    def weight(self) -> GoneWeight:
        """What it was like."""
        return GoneWeight(self._was, self.values.shape, self.values.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(…, K)`` -> ``(…, N)``."""
        if (self.values.dtype, self.scales.dtype) != self._formats:
            raise InputError(
                "this model's layers are in eight bits and were converted to another number format "
                "behind that; load it in that one (dtype=), and then put it into eight bits"
            )
        place = hidden.device.type
        if torch.is_autocast_enabled(place):
            hidden = hidden.to(torch.get_autocast_dtype(place))
        found: Tensor = _Product.apply(hidden, self.values, self.scales, self.turned)
        return found if self.bias is None else found + self.bias.to(found.dtype)

    def extra_repr(self) -> str:
        """The shape as `nn.Linear` tells it."""
        rows, columns = self.values.shape
        return f"in_features={columns}, out_features={rows}, {self.values.dtype}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(hidden: Tensor, values: Tensor, scales: Tensor, turned: Tensor | None) -> Tensor:
        found = _times(hidden.reshape(-1, hidden.shape[-1]), values, scales)
        return found.reshape(*hidden.shape[:-1], len(values))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, values, scales, turned = inputs
        ctx.save_for_backward(values, scales, turned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        values, scales, turned = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).float() * scales
        found = _times(rows, values.T.contiguous() if turned is None else turned, None)
        return (
            found.reshape(*gradient.shape[:-1], values.shape[1]).to(gradient.dtype),
            None,
            None,
            None,
        )


def _times(rows: Tensor, values: Tensor, scales: Tensor | None) -> Tensor:
    """``rows @ (values * scales).T``.

    Args:
        rows: ``(M, K)`` floating point, quantized here.
        values: ``(N, K)`` in eight bits.
        scales: ``(N,)``; None: 1.
    """
    kind = FORMATS["int8" if values.dtype == torch.int8 else "fp8"]
    small, of_rows = quantized(rows, kind)
    if kind.dtype == torch.int8:
        found = whole_product(small, values).float() * of_rows
        return (found if scales is None else found * scales).to(rows.dtype)
    if scales is None:
        scales = torch.ones(len(values), device=rows.device)
    return float_product(small, values, of_rows, scales[None]).to(rows.dtype)


def quantized(matrix: Tensor, kind: Format) -> tuple[Tensor, Tensor]:
    """A matrix in eight bits, and the scale of each row.

    Args:
        matrix: ``(M, K)``.
        kind: of the eight bits.

    Returns:
        ``(M, K)`` and ``(M, 1)`` float32.
    """
    rows = matrix.float()
    least = torch.finfo(torch.float32).tiny  # gradients are small, and rows may be zeros
    scales = (rows.abs().amax(1, keepdim=True) / kind.largest).clamp(min=least)
    rows = rows / scales
    return (rows.round() if kind.dtype == torch.int8 else rows).to(kind.dtype), scales


def quantize(model: nn.Module, frozen: str, *, gradients: bool = True) -> int:
    """Put the linear layers of a frozen model's stacks into eight bits, in place.

    Args:
        model: whose weights are not needed any more as they were: it can be neither trained nor
            converted nor saved or merged afterwards, and prompts are trained for it as before.
        frozen: ``int8`` or ``fp8``; ``own`` leaves the model as it is.
        gradients: prompts are trained: the matrices are kept for the backward product too, which
            takes as much memory again; without, it is made then.

    Returns:
        How many layers were quantized.

    Raises:
        InputError: no such format, a device without it, or a model without such layers.
    Warns:
        UserWarning: most of the weights are elsewhere and stay.
    """
    check_frozen(frozen)
    if frozen == OWN:
        return 0
    if already := frozen_format(model):
        raise InputError(f"this model is in {already} already; load it anew")
    check_frozen(frozen, next(model.parameters()).device)
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    stacks = [stack for name, stack in named if not any(part in name for part in _LEFT)]
    sizes = {id(p): p.numel() for stack in stacks for p in stack.parameters()}
    found = list({id(x[2]): x for stack in stacks for x in _linear_layers(stack)}.values())
    count, quantized_weights = len(found), sum(child.weight.numel() for _, _, child in found)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no layers here that {frozen} is made for: plain linear "
            f"ones with sizes that are multiples of {_MULTIPLE}, on one device and not quantized; "
            "leave frozen out (--frozen own)"
        )
    if quantized_weights < _MOST * sum(sizes.values()):
        warn(
            f"{quantized_weights / sum(sizes.values()):.0%} of the layers' weights are put into "
            f"{frozen}; the others stand in layers that it is not made for and stay as they are"
        )
    while found:  # one after the other: the plain ones make room
        module, name, child = found.pop()
        weight = child.weight.T if isinstance(child, Conv1D) else child.weight
        made = EightBitLinear(weight, child.bias, FORMATS[frozen], gradients)
        setattr(module, name, made.train(child.training))
        del weight, child
    vars(model)["save_pretrained"] = _refuse_to_save
    return count


def frozen_format(model: nn.Module) -> str | None:
    """The eight bits that `quantize` has put the model's layers into; None: it has not."""
    for module in model.modules():
        if isinstance(module, EightBitLinear):
            return "int8" if module.values.dtype == torch.int8 else "fp8"
    return None


def check_frozen(frozen: str, device: torch.device | None = None) -> None:
    """Refuse a name that is none of `FROZEN`, or that a device is not made for.

    Raises:
        InputError: it is.
    """
    if frozen not in FROZEN:
        raise InputError(f"frozen is {frozen!r}; expected one of {', '.join(FROZEN)}")
    if frozen == OWN or device is None:
        return
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{frozen} is for CPUs and CUDA devices; this is {device.type}")
    if frozen == "fp8" and device.type == "cuda":
        here = torch.cuda.get_device_capability(device)
        if here < _CAPABLE or torch.version.hip:
            raise InputError(
                f"fp8 needs a CUDA device of capability {_CAPABLE[0]}.{_CAPABLE[1]} or above; this "
                f"is {torch.cuda.get_device_name(device)}: take int8, or leave it out"
            )


def _linear_layers(stack: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Modules, and the names and layers in them that can be quantized."""
    for path, module in stack.named_modules():
        mixes = hasattr(module, "A_log")  # of a state-space model
        if mixes or any(part in path for part in _LEFT):
            continue
        for name, child in module.named_children():
            if _fits(child) and not any(part in name for part in _LEFT):
                yield module, name, child


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear and type(module) is not Conv1D:
        return False
    if is_offloaded(module) or has_hooks(module):
        return False
    weight: Any = module.weight
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta
    return plain and not any(size % _MULTIPLE for size in weight.shape)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise InputError(
        "this model's layers are in eight bits, which transformers cannot write; save the prompt "
        "(prompt.save), and load the model anew to save or merge it"
    )
