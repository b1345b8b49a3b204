"""Where a training runs: accelerate's devices, precision and trackers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from .. import distributed
from ..backbone.base_model import device_of
from ..errors import InputError
from .settings import TrainSettings


def make_accelerator(settings: TrainSettings, output: Path | None) -> Accelerator:
    """Accelerate, set up as the settings say; of several processes the main one has trackers.

    Raises:
        InputError: it cannot be, for instance since a tracker is not installed.
    """
    if not distributed.state().is_main_process:
        output = None  # accelerate would make the folder
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            log_with=settings.tracker,
            project_dir=None if output is None else str(output),
        )
    except (ValueError, ImportError) as error:
        raise InputError(
            f"accelerate cannot be set up ({error}); a Trainer or Accelerator of another precision "
            "in this process, or a tracker that is not installed, is the usual reason"
        ) from error
    if settings.tracker:
        plain = {k: v for k, v in asdict(settings).items() if v is not None}
        accelerator.init_trackers("ptuning", config=plain)
    return accelerator


def finish_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write what they have.

    `Accelerator.end_training` would also part the processes, which may have more to do together.
    """
    for tracker in accelerator.trackers:
        tracker.finish()


def move_model(model: nn.Module, accelerator: Accelerator) -> torch.device:
    """Move the model to accelerate's device, unless it has been spread or quantized."""
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False):
        return device_of(model)
    model.to(accelerator.device)
    return accelerator.device
