"""Which prompts are offered while folders and devices go wrong."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ptuning import Prompt
from ptuning.errors import InputError, PromptFileError
from ptuning.serving.asking import Desk
from ptuning.serving.gate import Limits, Refused
from ptuning.serving.metrics import Metrics
from ptuning.serving.registry import NoPrompt, Registry

from . import servers


class Backend:
    """Takes on what `fails` lets it."""

    def __init__(self) -> None:
        self.fails: Callable[[str], Exception | None] = lambda name: None
        self.taken: list[str] = []
        self.let_go: list[Any] = []
        self.told: list[str] = []

    def take_on(self, name: str, prompt: Prompt) -> str:
        self.taken.append(name)
        if error := self.fails(name):
            raise error
        return name

    def registry(self, *folders: Path | str) -> Registry:
        texts = [str(folder) for folder in folders]
        return Registry(texts, self.take_on, self.let_go.append, self.told.append)


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "prompts", tmp_path / "prompts")
    return tmp_path / "prompts"


def _unreadable(monkeypatch: pytest.MonkeyPatch, place: Path, number: int) -> None:
    """What is in a folder cannot be read, as with chmod 000, whoever runs the tests."""
    for name in ("stat", "listdir"):
        real = getattr(os, name)

        def refusing(path: Any, *a: Any, real: Any = real, **o: Any) -> Any:
            inside = not isinstance(path, int) and Path(path).is_relative_to(place)
            if inside and (real.__name__ == "listdir" or Path(path) != place):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *a, **o)

        monkeypatch.setattr(os, name, refusing)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), MemoryError(), OSError(5, "EIO")])
def test_a_prompt_that_the_device_fails_is_refused_alone_and_tried_again(
    backend: Backend, folder: Path, error: Exception
) -> None:
    backend.fails = lambda name: error if name == "capital" else None
    registry = backend.registry(folder)
    for _ in range(2):
        registry.rescan()
        assert set(registry.served) == {"mood", "pair"} and set(registry.refused) == {"capital"}
    assert backend.taken.count("capital") == 2 and backend.taken.count("mood") == 1
    assert len([line for line in backend.told if "refused" in line]) == 1
    backend.fails = lambda name: None
    registry.rescan()
    assert set(registry.served) == set(servers.PROMPTS) and registry.refused == {}


def test_a_file_that_cannot_be_read_once_is_read_again(
    backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> Any:
        try:
            raise OSError(errno.ESTALE, "Stale file handle")
        except OSError as error:  # as `formats` does
            raise PromptFileError(f"{path} cannot be read: {error.strerror}") from None

    registry = backend.registry(folder)
    with monkeypatch.context() as patched:
        patched.setattr(Prompt, "load", stale)
        registry.rescan()
    assert registry.served == {} and "Stale" in registry.refused["mood"]
    registry.rescan()
    assert set(registry.served) == set(servers.PROMPTS)


def test_a_damaged_prompt_is_not_read_again_until_it_changes(
    backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = folder / "capital" / "prompt.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-40])
    (folder / "pair" / "prompt.safetensors").unlink()
    registry, real, read = backend.registry(folder), Prompt.load, list[str]()
    monkeypatch.setattr(Prompt, "load", lambda path: read.append(path.name) or real(path))
    registry.rescan()
    registry.rescan()
    assert read == ["capital", "mood", "pair"]
    tensors.write_bytes(whole)
    registry.rescan()
    assert "capital" in registry.served


@pytest.mark.parametrize("where", ["", "mood"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_what_cannot_be_read_for_a_while_is_served_on(
    backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    registry = backend.registry(folder)
    registry.rescan()
    before = registry.served
    with monkeypatch.context() as patched:
        _unreadable(patched, folder / where, number)
        registry.rescan()
        assert registry.served == before
        assert os.strerror(number) in registry.refused["mood"]
        assert "is served on" in registry.refused["mood"]
    registry.rescan()
    assert registry.served == before and registry.refused == {} and backend.let_go == []
    shutil.rmtree(folder / "mood")
    registry.rescan()
    assert set(registry.served) == {"capital", "pair"}
    assert "mood: taken off: its files are gone" in backend.told


def test_a_folder_that_cannot_be_read_at_the_start_is_refused(
    backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _unreadable(monkeypatch, folder, errno.EACCES)
    with pytest.raises(InputError, match="Permission denied"):
        backend.registry(folder)


def test_a_second_prompt_of_one_name_is_told(backend: Backend, folder: Path) -> None:
    other = folder.parent / "other"
    shutil.copytree(folder / "mood", other / "mood")
    registry = backend.registry(folder, other)
    registry.rescan()
    assert registry.served["mood"].folder == folder / "mood"
    assert "have one name, 'mood'" in registry.refused["mood"]
    registry.rescan()
    assert len([line for line in backend.told if "have one name" in line]) == 1
    shutil.rmtree(other / "mood")
    registry.rescan()
    assert registry.refused == {} and backend.taken.count("mood") == 1
    named = backend.registry(folder, f"mood={folder / 'pair'}")
    named.rescan()
    assert named.served["mood"].folder == folder / "pair"
    assert "have one name, 'mood'" in named.refused["mood"]
    (folder.parent / "link").symlink_to(folder / "mood")
    for again in (folder / "mood", f"mood={folder.parent / 'link'}"):
        same = backend.registry(folder, again)
        same.rescan()
        assert same.refused == {}


def test_the_first_prompt_that_was_given_says_which_model_it_is(
    backend: Backend, folder: Path
) -> None:
    for name in servers.PROMPTS:
        prompt = Prompt.load(folder / name)
        prompt.base_model = {**prompt.base_model, "name": f"model of {name}"}
        prompt.save(folder / name)
    more = folder.parent / "more"
    shutil.move(folder / "pair", more / "pair")
    for folders, first in [
        ([folder / "mood", folder / "capital"], "mood"),
        ([f"z={folder / 'mood'}", f"a={folder / 'capital'}"], "mood"),
        ([more, folder / "capital"], "pair"),
        ([folder, more], "capital"),
        ([more, folder], "pair"),
    ]:
        assert backend.registry(*folders).base_model() == f"model of {first}"


def test_a_folder_without_prompts_is_told_where_no_model_was_named(
    backend: Backend, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no saved prompt in .*empty; give one or more .*--model"):
        backend.registry(tmp_path / "empty").base_model()


def test_clients_see_no_paths_of_the_server(backend: Backend, folder: Path) -> None:
    tensors = folder / "mood" / "prompt.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-40])
    (folder / "link").symlink_to(folder.parent)
    reason = "this prompt was trained on '/srv/models/one', and '/srv/models/two' has other weights"
    backend.fails = lambda name: InputError(reason) if name == "pair" else None
    registry = backend.registry(folder, f"broken={folder / 'mood'}")
    registry.rescan()
    assert set(registry.served) == {"capital"}
    assert set(registry.refused) == {"mood", "broken", "pair", "link"}
    assert "mood/prompt.safetensors is truncated" in registry.refused["mood"]
    assert "trained on 'one', and 'two' has" in registry.refused["pair"]
    desk = Desk(SimpleNamespace(), registry, Limits(), Metrics())  # type: ignore[arg-type]
    said = list(registry.refused.values())
    for name in registry.refused:
        with pytest.raises(Refused) as refused:
            desk.served(name)
        said.append(str(refused.value))
    for name in ("nobody", "mood", "link", ".."):
        with pytest.raises(InputError) as wrong:
            registry.put(name)
        said.append(registry.shown(str(wrong.value)))
        assert isinstance(wrong.value, NoPrompt) == (name == "nobody")
    for text in said:
        assert str(folder.parent) not in text and "/srv" not in text, text
    assert any(str(tensors) in line for line in backend.told)  # whoever runs it is told the whole


def test_a_prompt_that_was_taken_off_stays_off_until_it_is_put_again(
    backend: Backend, folder: Path
) -> None:
    registry = backend.registry(folder)
    registry.rescan()
    registry.drop("mood")
    (folder / "mood" / "README.md").write_text("changed")
    registry.rescan()
    assert set(registry.served) == {"capital", "pair"} and backend.let_go == ["mood"]
    with pytest.raises(NoPrompt):
        registry.drop("mood")
    assert registry.put("mood") is registry.served["mood"]
    registry.rescan()
    assert set(registry.served) == set(servers.PROMPTS) and backend.taken.count("mood") == 2


def test_of_a_prompt_that_was_taken_off_nothing_is_refused(backend: Backend, folder: Path) -> None:
    registry = backend.registry(folder)
    registry.rescan()
    (folder / "mood" / "prompt.safetensors").write_bytes(b"cut off")
    registry.rescan()
    assert "is served on" in registry.refused["mood"]
    registry.drop("mood")
    assert registry.refused == {} and backend.let_go == ["mood"]


def test_a_prompt_is_renewed_where_its_files_or_its_folder_are_others(
    backend: Backend, folder: Path
) -> None:
    other = folder.parent / "other"
    shutil.copytree(folder / "mood", other / "mood")
    registry = backend.registry(folder, other)
    registry.rescan()
    tensors = folder / "mood" / "prompt.safetensors"
    before = os.stat(tensors)
    tensors.rename(tensors.with_suffix(".old"))
    shutil.copy(tensors.with_suffix(".old"), tensors)
    os.utime(tensors, ns=(before.st_atime_ns, before.st_mtime_ns))  # of as many bytes as well
    registry.rescan()
    assert backend.taken.count("mood") == 2 and backend.let_go == ["mood"]
    os.utime(tensors, ns=(before.st_atime_ns, before.st_mtime_ns + 100))
    registry.rescan()
    assert backend.taken.count("mood") == 3
    shutil.rmtree(folder / "mood")
    registry.rescan()
    assert registry.served["mood"].folder == other / "mood"
    assert backend.let_go == ["mood"] * 3


def test_a_refused_prompt_that_is_removed_is_told_of_no_more(
    backend: Backend, folder: Path
) -> None:
    backend.fails = lambda name: InputError("of another model") if name == "mood" else None
    registry = backend.registry(folder)
    registry.rescan()
    assert set(registry.refused) == {"mood"}
    kept = shutil.copytree(folder / "mood", folder.parent / "kept")
    shutil.rmtree(folder / "mood")
    registry.rescan()
    assert registry.refused == {}
    shutil.move(kept, folder / "mood")  # back as it was, and looked at anew
    backend.fails = lambda name: None
    registry.rescan()
    assert "mood" in registry.served


def test_hidden_folders_are_no_prompts_and_told_of_by_nobody(
    backend: Backend, folder: Path
) -> None:
    shutil.copytree(folder / "mood", folder / ".trash")
    registry = backend.registry(folder)
    registry.rescan()
    assert set(registry.served) == set(servers.PROMPTS) and registry.refused == {}


def test_two_changes_at_once_take_on_no_prompt_twice(backend: Backend, folder: Path) -> None:
    overlapping: list[str] = []
    inside = threading.Lock()

    def slow(name: str) -> None:
        if not inside.acquire(blocking=False):
            overlapping.append(name)
            return
        time.sleep(0.1)  # enough for the others to come in, if they could
        inside.release()

    backend.fails = slow
    registry = backend.registry(folder)
    changes = [threading.Thread(target=registry.rescan) for _ in range(3)]
    for one in changes:
        one.start()
    for one in changes:
        one.join(60)
    assert overlapping == [] and sorted(backend.taken) == sorted(servers.PROMPTS)
