"""What a result was made with: versions, machine and date, written beside every figure."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("ptuning", "torch", "transformers", "accelerate", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Package versions, Python, processor and date as plain text."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source tree"
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return found
