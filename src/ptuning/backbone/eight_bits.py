"""A frozen model's layers in eight bits, quantized once, multiplied in eight bits both ways.

    plain     y = x Wᵀ                        dx = g W
    here      y = s_x s_w (x₈ W₈ᵀ)            dx = s (g s_w)₈ W₈

``W₈`` has one scale for each row; rows of the input and of the gradient are quantized as they
come. Since the scales of ``W₈`` go into the gradient before it is quantized, one matrix serves both
directions, and what is trained gets the gradient of the model that is there. Embedding, output
head, norms and attention stay as they are.

    int8   whole numbers up to 127
    fp8    floating point, four bits of exponent (e4m3), up to 448: CUDA devices of capability 8.9
           and above (Ada, Hopper), and the CPU, where it is slow
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from .traits import repeated_layers
from .upstream import float_product, is_offloaded, whole_product

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


class EightBitLinear(nn.Module):
    """A frozen linear layer in eight bits.

    Attributes:
        values: ``(N, K)`` in eight bits.
        scales: ``(N,)`` float32; ``values * scales`` is the weight.
        turned: ``(K, N)``, the values as the backward product reads them; None: made when needed.
        weight: tells shape and number format of the weight that was; it has no values.
    """

    scales: Tensor
    turned: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Format, gradients: bool):
        super().__init__()
        self.kind = kind
        values, scales = quantized(weight.detach(), kind)
        self.values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scales", scales[:, 0])
        self.register_buffer("turned", values.T.contiguous() if gradients else None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")

    def forward(self, hidden: Tensor) -> Tensor:
        """``(…, K)`` -> ``(…, N)``."""
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
    if scales is None:
        scales = torch.ones(len(values), device=rows.device)
    if kind.dtype == torch.int8:
        return (whole_product(small, values).float() * of_rows * scales).to(rows.dtype)
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
    scales = (rows.abs().amax(1, keepdim=True) / kind.largest).clamp(min=1e-12)
    rows = rows / scales
    return (rows.round() if kind.dtype == torch.int8 else rows).to(kind.dtype), scales


def quantize(model: nn.Module, frozen: str, *, gradients: bool = True) -> int:
    """Put the linear layers of a frozen model's repeated layers into eight bits, in place.

    Args:
        model: whose weights are not needed any more as they were: it can be neither trained nor
            saved or merged afterwards, and prompts are trained for it as before.
        frozen: ``int8`` or ``fp8``; ``own`` leaves the model as it is.
        gradients: prompts are trained: the matrices are kept for the backward product too, which
            takes as much memory again; without, it is made then.

    Returns:
        How many layers were quantized.

    Raises:
        InputError: no such format, a device without it, or a model without such layers.
    """
    check_frozen(frozen)
    if frozen == OWN:
        return 0
    found: list[tuple[nn.Module, str, Any]] = [
        (module, name, child)
        for layer in repeated_layers(model)
        for module in layer.modules()
        for name, child in module.named_children()
        if _fits(child)
    ]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no plain linear layers that {frozen} is made for (it may "
            "be quantized already); leave frozen at 'own'"
        )
    _check_device(frozen, next(model.parameters()).device)
    for module, name, child in found:
        weight = child.weight.T if isinstance(child, Conv1D) else child.weight
        made = EightBitLinear(weight, child.bias, FORMATS[frozen], gradients)
        setattr(module, name, made.train(child.training))
    return len(found)


def in_eight_bits(model: nn.Module) -> bool:
    """`quantize` has been here."""
    return any(isinstance(module, EightBitLinear) for module in model.modules())


def check_frozen(frozen: str) -> None:
    """Refuse a name that is none of `FROZEN`.

    Raises:
        InputError: it is none.
    """
    if frozen not in FROZEN:
        raise InputError(f"frozen is {frozen!r}; expected one of {', '.join(FROZEN)}")


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear and type(module) is not Conv1D:
        return False
    weight: Any = module.weight
    plain = weight.is_floating_point() and not weight.is_meta and not is_offloaded(module)
    return plain and not any(size % _MULTIPLE for size in weight.shape)


def _check_device(frozen: str, device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{frozen} is for CPUs and CUDA devices; this is {device.type}")
    if frozen == "fp8" and device.type == "cuda":
        here = torch.cuda.get_device_capability(device)
        if here < _CAPABLE:
            raise InputError(
                f"fp8 needs a CUDA device of capability {_CAPABLE[0]}.{_CAPABLE[1]} or above; this "
                f"one has {here[0]}.{here[1]}: give int8, or leave it at 'own'"
            )
