"""Which number format to load a model in: the one that this machine multiplies fastest in.

    GPU    bfloat16 where the GPU has it
    CPU    a measurement of milliseconds at the model's own shapes, kept in the cache: processors
           with matrix units for bfloat16 are several times as fast in it, others half as fast
    small  float32: what takes the time there is not multiplication

Prompts, their gradients and the optimizer are float32 in every format (`injection`). Commands
choose so by default: figures differ as they do between seeds (benchmarks/README.md).
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import nn

from ..errors import PtuningError
from ..formats import pack_json, read_json
from ..storage import write_file
from .eight_bits import OWN
from .traits import layer_weights, repeated_layers

FULL, HALF = "float32", "bfloat16"
_SMALL = 4_000_000
"""Weights of the layers below which nothing is to be gained."""
_GAIN = 2.0
"""How many times as fast products must be: what stands between them is no faster."""
_TOKENS, _WIDEST, _ROUNDS = 128, 2048, 5


class Choice(NamedTuple):
    """A number format.

    Attributes:
        dtype: its name.
        why: in words; empty where the user named it.
    """

    dtype: str
    why: str = ""

    def told(self, model: str, frozen: str) -> str:
        """A line for people: what is loaded in which format, and why.

        Args:
            model: its name.
            frozen: the layers' format, ``own`` where they have the model's.
        """
        layers = "" if frozen == OWN else f", its layers in {frozen}"
        return f"loading {model} in {self.dtype}{layers}{f': {self.why}' if self.why else ''}"


def fastest(model: nn.Module, device: torch.device, cache: Path) -> Choice:
    """The format for a model on a device.

    Args:
        model: gives shapes; its weights are not looked at.
        device: that will compute it.
        cache: folder in which measurements are kept.
    """
    if layer_weights(model) < _SMALL:
        return Choice(FULL, "a model this small gains nothing by another format")
    if device.type != "cpu":
        return _on_gpu(device)
    found = _kept(_shape(model), cache)
    ratio = found[FULL] / found[HALF]
    if ratio < _GAIN:
        return Choice(FULL, f"this processor multiplies {ratio:.1f} times as fast in {HALF}")
    return Choice(HALF, f"this processor multiplies {ratio:.1f} times as fast in it as in {FULL}")


def _on_gpu(device: torch.device) -> Choice:
    name = device.type.upper()
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch asks the current one, and others may be older
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return Choice(HALF, "the GPU has it")
    return Choice(FULL, f"{HALF} is for CUDA devices that have it; this is {name}")


def _shape(model: nn.Module) -> tuple[int, int]:
    """Of the matrix in the layers that most of the work is with, cut to a size that is quickly
    multiplied."""
    layers = repeated_layers(model) or [model]
    sizes = [(max(p.shape), min(p.shape)) for x in layers for p in x.parameters() if p.dim() == 2]
    counts = Counter(sizes or [(_WIDEST, _WIDEST)])
    high, wide = max(counts, key=lambda size: counts[size] * size[0] * size[1])
    return min(high, _WIDEST), min(wide, _WIDEST)


def _kept(shape: tuple[int, int], cache: Path) -> dict[str, float]:
    """Seconds of each format, measured once for a processor, torch, shape and number of threads."""
    key = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {shape}"
    path = cache / "number_formats.json"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".number_formats.lock"):
            known = _read(path)
            if not _is_measurement(known.get(key)):
                known[key] = measured(shape)
                write_file(path, pack_json(known))
            return known[key]
    except (OSError, PtuningError):  # a cache that cannot be written
        return measured(shape)


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        return read_json(path)
    except PtuningError:  # none yet, or a damaged one
        return {}


def _is_measurement(found: object) -> bool:
    if not isinstance(found, dict):
        return False
    return all(isinstance(found.get(f), float) and found[f] > 0 for f in (FULL, HALF))


def measured(shape: tuple[int, int]) -> dict[str, float]:
    """Seconds of a product forward and backward in each format, in turn; the best of some rounds.

    Args:
        shape: of a weight, rows and columns.
    """
    runs = {dtype: _product(shape, getattr(torch, dtype)) for dtype in (FULL, HALF)}
    best = dict.fromkeys(runs, float("inf"))
    for number in range(_ROUNDS + 1):
        for dtype, run in runs.items():
            start = time.perf_counter()
            run()
            if number:  # the first sets libraries up
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best


def _product(shape: tuple[int, int], dtype: torch.dtype) -> Callable[[], None]:
    """With a frozen weight: forward, and backward to what it multiplied."""
    weight = torch.ones(shape, dtype=dtype)
    inputs, gradient = (torch.ones(_TOKENS, size, dtype=dtype) for size in reversed(shape))

    def run() -> None:
        with torch.no_grad():
            torch.mm(inputs, weight.T)
            torch.mm(gradient, weight)

    return run


def _processor() -> str:
    """Its name and a hash of its features: virtual machines give many processors one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    told = {name.strip(): value.strip() for name, value in told.items()}
    features = hashlib.sha256(told.get("flags", told.get("Features", "")).encode()).hexdigest()
    return f"{told.get('model name', platform.machine())} {features[:8]}"
