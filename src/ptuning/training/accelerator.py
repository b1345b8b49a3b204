"""Where a training runs: accelerate's devices, precision and trackers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, tracking
from accelerate.state import is_initialized
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from .. import distributed
from ..backbone.base_model import device_of
from ..backbone.upstream import forget_accelerate, is_offloaded
from ..errors import InputError
from ..threads import CHANGING
from .settings import TrainSettings

_running = 0
_state_is_ours = False


@contextmanager
def accelerated(settings: TrainSettings, output: Path | None) -> Iterator[Accelerator]:
    """Accelerate for one training.

    Its state is one for the process. Trainings in several threads share it, and the last one lets
    go of it, so that the next may have another precision; a state that was there before stays.

    Raises:
        InputError: as for `make_accelerator`.
    """
    global _running, _state_is_ours
    with CHANGING:
        if not _running:
            _state_is_ours = not is_initialized()
        _running += 1
    try:
        accelerator = make_accelerator(settings, output)
        try:
            yield accelerator
        finally:  # `Accelerator.end_training` would part processes that have more to do together
            for tracker in accelerator.trackers:
                tracker.finish()
    finally:
        with CHANGING:
            _running -= 1
            if not _running and _state_is_ours:
                forget_accelerate()


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that would not track.

    Raises:
        InputError: accelerate does not know it, or its package is not installed.
    """
    if name is None:
        return
    known = {str(kind): kind for kind in tracking.LOGGER_TYPE_TO_CLASS}
    here = [str(kind) for kind in tracking.get_available_trackers()]
    if name not in (*known, "all"):
        raise InputError(f"tracker is {name!r}; expected one of {', '.join(known)}")
    if name not in here and not (name == "all" and here):
        raise InputError(
            f"the tracker {name!r} is not installed, so nothing would be tracked; install it, or "
            f"leave it out (installed: {', '.join(here) or 'none'})"
        )


class _WholeSteps(GradientAccumulationPlugin):
    """Accumulating is the training's own affair.

    accelerate's way to what differs from its defaults empties the process's environment for a
    moment. Other threads' subprocesses would begin without one, and native code that reads a
    variable just then, as tokenizers do with each batch, ends the process.
    """

    def to_kwargs(self) -> dict[str, Any]:
        """What differs from accelerate's defaults."""
        return {"num_steps": 1}


def make_accelerator(settings: TrainSettings, output: Path | None) -> Accelerator:
    """Accelerate, set up as the settings say; of several processes the main one has trackers.

    Raises:
        InputError: it cannot be, for instance since the process has one of another precision.
    """
    if not distributed.state().is_main_process:
        output = None  # accelerate would make the folder
    try:
        with CHANGING:
            accelerator = Accelerator(
                mixed_precision=settings.mixed_precision,
                gradient_accumulation_plugin=_WholeSteps(num_steps=1),
                log_with=settings.tracker,
                project_dir=None if output is None else str(output),
            )
    except (ValueError, ImportError) as error:
        raise InputError(
            f"accelerate cannot be set up ({error}); a training, Trainer or Accelerator of another "
            "precision in this process is the usual reason"
        ) from error
    if settings.tracker:
        plain = {k: v for k, v in asdict(settings).items() if v is not None}
        accelerator.init_trackers("ptuning", config=plain)
    return accelerator


def move_model(model: nn.Module, accelerator: Accelerator) -> torch.device:
    """Move the model to accelerate's device, unless it has been spread, offloaded or quantized, or
    stands on a device of that kind already and trains alone."""
    here, asked = device_of(model), accelerator.device
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False):
        return here
    if is_offloaded(model):
        return here
    if here.type == asked.type and accelerator.num_processes == 1:
        return here
    model.to(asked)
    return asked


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one meanwhile, on which graphs are captured and events recorded."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
