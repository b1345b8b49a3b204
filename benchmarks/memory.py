"""Peak memory of a training above the loaded model, each side in a process of its own.

    python benchmarks/memory.py ours|peft      prints {"peak": bytes}

The model is loaded, what was freed goes back to the system, and the mark of the highest resident
size is reset; then the side trains two epochs of a few batches, the prompt after the text, the
store of kept keys and values included. Linux only, where the kernel keeps that mark.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

BATCHES, ROWS, TOKENS = 3, 8, 128


def peaks(threads: int) -> dict[str, int]:
    """Bytes of both sides, each measured in a fresh process with the same threads."""
    found = {}
    for side in ("ours", "peft"):
        ran = subprocess.run(
            [sys.executable, __file__, side],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
        if ran.returncode:
            raise RuntimeError(f"measuring the memory of {side} failed:\n{ran.stderr[-2000:]}")
        found[side] = json.loads(ran.stdout.splitlines()[-1])["peak"]
    return found


def training(side: str, base: Any) -> None:
    """Two epochs of `BATCHES` steps."""
    from sides import Ours, Theirs, rendered
    from workloads import texts

    from ptuning.forward.prefix_store import PrefixStore

    batches = [texts(base, ROWS, TOKENS) for _ in range(BATCHES)]
    if side == "peft":
        theirs = Theirs(base)
        steps = [theirs.step(ids) for ids in batches]
    else:
        ours, store = Ours(base), PrefixStore(base)
        steps = [ours.step(rendered(ids, after=True), lambda: store) for ids in batches]
    for _ in range(2):
        for step in steps:
            step()


def _status(name: str) -> int:
    """A line of the process's status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def _measure(side: str) -> int:
    from ptuning import load_model
    from ptuning.backbone.fetched import fetch

    base, _ = load_model(str(fetch("smollm2")))
    for parameter in base.parameters():  # weights that are mapped from the file: read them now
        parameter.data = parameter.data.clone()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    training(side, base)
    return _status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("side", choices=["ours", "peft"])
    side = parser.parse_args().side
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print(json.dumps({"peak": _measure(side)}))


if __name__ == "__main__":
    main()
