from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they give

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, put into the user's cache by `make test`."""
    from ptuning.backbone.fetched import fetch

    return fetch("smollm2")


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> tuple[Any, Any]:
    """The real model and its tokenizer, shared by all tests: leave them as they are."""
    from ptuning import load_model

    return load_model(str(smollm2_folder))


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, put into the user's cache by `make test`."""
    from ptuning.backbone.fetched import fetch

    return fetch("minilm")


@pytest.fixture
def ctrl_c_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Sets behind which checkpoint a training is stopped; None: behind none any more."""
    from ptuning.training import checkpoint

    save, left = checkpoint.save, [None]

    def stop(*args: Any) -> None:
        save(*args)
        if left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop)
    return lambda count: left.__setitem__(0, count)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
