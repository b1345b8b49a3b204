from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they give

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings

from . import tiny
from .scaffold import Run, saved

settings.register_profile("repeatable", derandomize=True)  # `make fuzz` looks for what is new
settings.load_profile("repeatable")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    """Each test meets no state of accelerate's: a `Trainer` leaves its own behind, with its
    device and precision, and which tests share a process differs from run to run."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, put into the user's cache by `make test`."""
    from ptuning.backbone.fetched import fetch

    return fetch("smollm2")


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> tuple[Any, Any]:
    """The real model and its tokenizer, shared by all tests: leave them as they are."""
    from ptuning import load_model

    return load_model(str(smollm2_folder), dtype="float32")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, put into the user's cache by `make test`."""
    from ptuning.backbone.fetched import fetch

    return fetch("minilm")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal model with its tokenizer, for all tests: leave it as it is."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    return saved(tiny.model("llama"), tiny.tokenizer(), folder)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `ptuning` with arguments in this process: exit code, stdout and stderr."""
    from ptuning.cli import main

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ptuning", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        heard = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, heard.out, heard.err

    return call


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


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """As `tiny.on_cpu`, for a test."""
    from .tiny import on_cpu

    with on_cpu():
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


_slow_ones: set[str] = set()
"""Slow tests that this run leaves out."""


def pytest_deselected(items: list[pytest.Item]) -> None:
    _slow_ones.update(i.nodeid.partition("[")[0] for i in items if i.get_closest_marker("slow"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes (pytest-xdist)
        session.config.workeroutput["slow ones"] = sorted(_slow_ones)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _slow_ones.update(getattr(node, "workeroutput", {}).get("slow ones", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _slow_ones or terminalreporter.config.getoption("markexpr") != "not slow":
        return
    count = len(_slow_ones)
    terminalreporter.section(f"{count} slow tests left out; run them with: make test-all")
    for path, _, name in (test.partition("::") for test in sorted(_slow_ones)):
        words = name.removeprefix("test_").replace("_", " ")
        terminalreporter.line(f"{path.removeprefix('tests/')}: {words}")
