"""Nothing mixes tensors of the CPU with those of the device that a model is on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import other_device

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="a real device is here")


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What each case gives, in a process whose torch knows the device."""
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.other_device"],
        cwd=here, capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", other_device.CASES)
def test_a_device_gives_what_the_cpu_gives(case: str, found: dict[str, dict[str, Any]]) -> None:
    line = found[case]
    for where in ("cpu", other_device.NAME):
        assert not isinstance(line[where], str), line[where]
    assert _agree(line[other_device.NAME], line["cpu"]), line


def _agree(got: Any, expected: Any) -> bool:
    """The same but for rounding."""
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(_agree, got, expected))
    if isinstance(expected, float):
        return bool(got == pytest.approx(expected, rel=1e-4, abs=1e-6))
    return bool(got == expected)
