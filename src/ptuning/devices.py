"""Which device: the one that is asked for, or what is found."""

from __future__ import annotations

import os

import torch

from .errors import InputError


def chosen_device() -> torch.device | None:
    """The device that ``PTUNING_DEVICE`` (``--device``) names; None where it is to be found.

    Raises:
        InputError: there is no such device here.
    """
    name = os.environ.get("PTUNING_DEVICE")
    if not name:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device is {name!r}; give cpu, cuda, cuda:1, mps or xpu") from None
    if device.type == "cpu":
        return device
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if found else 0
    if found is None or found.type != device.type or (device.index or 0) >= count:
        here = ", ".join(["cpu", *(f"{found}:{n}" for n in range(count))])
        raise InputError(f"the device {name} is not here; there is {here}")
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)  # accelerate takes the current one
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
