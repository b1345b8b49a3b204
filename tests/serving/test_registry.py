"""The prompts that a server offers, without a server: what is found, kept, refused and told."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ptuning.serving.registry import Absent, Registry

from . import servers


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "prompts", tmp_path / "prompts")
    return tmp_path / "prompts"


class Backend:
    """Takes prompts on, unless it is told to fail."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.gone: list[Any] = []

    def take_on(self, name: str, prompt: Any) -> str:
        if self.error is not None:
            raise self.error
        return name

    def registry(self, *folders: Path) -> Registry:
        return Registry([str(folder) for folder in folders], self.take_on, self.gone.append)


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("odd"), OSError(5, "EIO")]
)
def test_a_prompt_that_could_not_be_taken_on_is_tried_again(
    folder: Path, backend: Backend, error: Exception
) -> None:
    registry = backend.registry(folder)
    backend.error = error
    registry.rescan()
    assert not registry.served and set(registry.refused) == set(servers.PROMPTS)
    assert type(error).__name__ in registry.refused["mood"]
    backend.error = None
    registry.rescan()
    assert set(registry.served) == set(servers.PROMPTS) and not registry.refused


@pytest.mark.parametrize("which", ["", "mood", "mood/prompt.json"])
def test_what_cannot_be_read_for_a_while_is_served_on(
    folder: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    registry = backend.registry(folder)
    registry.rescan()
    before = dict(registry.served)
    _make_unreadable(folder / which, monkeypatch)
    registry.rescan()
    assert registry.served == before and not backend.gone
    monkeypatch.undo()
    registry.rescan()
    assert set(registry.served) == set(before) and not registry.refused
    shutil.rmtree(folder / "mood")
    registry.rescan()
    assert set(registry.served) == {"capital", "pair"} and backend.gone


def _make_unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network's file system that hangs: root, who may run the tests, reads everything else."""

    def refused(function: Any) -> Any:
        def called(place: Any, *rest: Any, **more: Any) -> Any:
            inside = isinstance(place, str | Path) and Path(place).is_relative_to(path)
            if inside and (Path(place) != path or path.suffix or function is os.scandir):
                raise PermissionError(13, "Permission denied")
            return function(place, *rest, **more)

        return called

    for name in ("stat", "open", "scandir", "listdir"):
        monkeypatch.setattr(os, name, refused(getattr(os, name)))
    for name in ("stat", "iterdir", "is_file", "read_bytes"):
        monkeypatch.setattr(Path, name, refused(getattr(Path, name)))
    monkeypatch.setattr("builtins.open", refused(open))


def test_a_name_that_two_folders_have_is_told(folder: Path, backend: Backend) -> None:
    other = folder.parent / "others"
    shutil.copytree(folder / "mood", other / "mood")
    registry = backend.registry(folder, other)
    registry.rescan()
    assert registry.served["mood"].folder == folder / "mood"
    assert "rename one of them" in registry.refused["others/mood"]
    shutil.rmtree(other)
    registry.rescan()
    assert not registry.refused


def test_clients_are_not_told_where_files_are(folder: Path, backend: Backend) -> None:
    told: list[str] = []
    registry = Registry([str(folder)], backend.take_on, backend.gone.append, told.append)
    (folder / "mood" / "prompt.safetensors").write_bytes(b"nothing")
    registry.rescan()
    assert "damaged" in registry.refused["mood"] and str(folder) not in registry.refused["mood"]
    assert any(str(folder) in line for line in told)
    with pytest.raises(Absent):
        registry.put("nobody")


def test_the_base_model_is_that_of_the_first_folder_that_was_given(
    place: Path, folder: Path, backend: Backend
) -> None:
    prompt = servers.prompt(place, "mood")
    prompt.base_model = {**prompt.base_model, "name": "first/model"}
    prompt.save(folder.parent / "zeta")
    assert backend.registry(folder.parent / "zeta", folder / "mood").base_model() == "first/model"
