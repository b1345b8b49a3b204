"""Which device: the one that is asked for, or what is found; to it and back without waiting."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .errors import InputError

P = ParamSpec("P")
T = TypeVar("T")


def on_cpu_by_default(function: Callable[P, T]) -> Callable[P, T]:
    """What the function makes without naming a device is on the CPU, whatever
    ``torch.set_default_device`` says; it moves what belongs elsewhere itself."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return wrapped


def chosen_device() -> torch.device | None:
    """The device that ``PTUNING_DEVICE`` (``--device``) names; None where it is to be found.

    Raises:
        InputError: there is no such device here.
    """
    name = os.environ.get("PTUNING_DEVICE")
    device = device_called(name) if name else None
    if device is not None and device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)  # accelerate takes the current one
    return device


def device_called(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        InputError: it is no device's name, or there is no such device here.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device is {name!r}; give cpu, cuda, cuda:1, mps or xpu") from None
    if device.type == "cpu":
        return device
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if found else 0
    if found is None or found.type != device.type or (device.index or 0) >= count:
        here = ", ".join(["cpu", *(f"{found}:{n}" for n in range(count))])
        raise InputError(f"the device {name} is not here; there is {here}")
    return device


def best_device() -> torch.device:
    """The accelerator (CUDA, MPS, XPU) where there is one, else the CPU.

    ``PTUNING_DEVICE`` names another. Of several processes on a machine each has one of its own.
    """
    if chosen := chosen_device():
        return chosen
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    own = int(os.environ.get("LOCAL_RANK", 0))
    if found is not None and 0 < own < torch.accelerator.device_count():
        return torch.device(found.type, own)
    return found or torch.device("cpu")


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on the device, without waiting for what that computes now."""
    # Of one that is gone by then MPS would copy whatever stands there (pytorch#139550).
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def fetched(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to bring a tensor to the CPU; what waits until it is there.

    A GPU goes on with what it is asked for meanwhile.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    here.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        done.synchronize()
        return here

    return wait
