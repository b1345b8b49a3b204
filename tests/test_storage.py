from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import stat
import threading
from pathlib import Path

import pytest

from ptuning import storage
from ptuning.errors import InputError, PromptFileError, PtuningError
from ptuning.formats import parse_json
from ptuning.places import entry

from .scaffold import killed_at

OLD = {"a": b"old a", "b": b"old b", "gone": b"old"}
NEW = {"a": b"new a", "b": b"new b", "c": b"new c"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


# --- one save ---------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_a_kill_at_any_moment_leaves_all_old_or_all_new_and_no_trace(
    exists: bool, tmp_path: Path
) -> None:
    number, seen = 0, set()
    while True:
        number += 1
        folder = tmp_path / str(number) / "f"
        if exists:
            storage.write_folder(folder, OLD)
            (folder / "mine").mkdir()
            (folder / "mine" / "x").write_bytes(b"mine")
        else:
            folder.parent.mkdir()
        killed = killed_at(
            number,
            folder.parent,
            lambda: storage.write_folder(folder, NEW, ["gone"]),  # noqa: B023
        )
        if folder.exists():
            with storage.reading(folder):
                found = content(folder)
            assert found in ([OLD, NEW] if exists else [NEW])
            seen.add("new" if found == NEW else "old")
        storage.write_folder(folder, NEW, ["gone"])
        assert content(folder) == NEW and not hidden(folder.parent)
        assert not exists or (folder / "mine" / "x").read_bytes() == b"mine"
        if not killed:
            break
    assert number > 6 and seen == ({"old", "new"} if exists else {"new"})


def test_a_folder_in_a_save_replaces_one_of_its_name_as_a_whole(tmp_path: Path) -> None:
    folder, number = tmp_path / "f", 0
    while True:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        storage.write_folder(folder, {"a": b"old"})
        (folder / "model").mkdir()
        (folder / "model" / "old").write_bytes(b"old")

        def save() -> None:
            with storage.one_save(folder) as staged:
                (staged / "model").mkdir()
                (staged / "model" / "new").write_bytes(b"new")
                storage.write_all(staged, {"a": b"new"})

        killed = killed_at(number, folder, save)
        storage.settle(folder)
        kind = (folder / "a").read_text()
        assert os.listdir(folder / "model") == [kind]
        if not killed:
            break
    assert kind == "new"


def test_a_name_that_goes_with_a_save_may_be_a_folder(tmp_path: Path) -> None:
    storage.write_folder(tmp_path / "f", {"a": b""})
    (tmp_path / "f" / "model").mkdir()
    storage.write_folder(tmp_path / "f", {"a": b"1"}, remove=["model", "never there"])
    assert os.listdir(tmp_path / "f") == ["a"]


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    storage.write_folder(tmp_path / "f", OLD)

    def fail() -> None:
        with storage.one_save(tmp_path / "f") as staged:
            (staged / "a").write_bytes(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert content(tmp_path / "f") == OLD and not hidden(tmp_path)


def test_saves_of_several_threads_are_whole(tmp_path: Path) -> None:
    def save(letter: str) -> None:
        for _ in range(15):
            storage.write_folder(tmp_path / "f", {"a": letter.encode(), "b": letter.encode()})

    threads = [threading.Thread(target=save, args=(letter,)) for letter in "xyz"]
    [thread.start() for thread in threads]
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "f").exists():
            with storage.reading(tmp_path / "f"):
                assert len(set(content(tmp_path / "f").values())) == 1
    assert not hidden(tmp_path)


def test_who_is_refused_for_what_a_folder_holds_finds_it_there(tmp_path: Path) -> None:
    """Whoever reads an export knows nothing of saves."""
    saved = tmp_path / ".ptuning-saved"
    saved.mkdir()
    (saved / ".ptuning-files").write_text('{"files": ["model.gguf"], "remove": []}')
    (saved / "model.gguf").write_text("whole")
    assert storage.holds_something(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_manifest_from_elsewhere_reaches_nothing_outside(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    saved = folder / ".ptuning-saved"
    saved.mkdir(parents=True)
    (tmp_path / "precious").write_text("mine")
    manifest = '{"files": ["../new", "a"], "remove": ["../precious", ".."]}'
    (saved / ".ptuning-files").write_text(manifest)
    (saved / "a").write_text("a")
    storage.settle(folder)
    assert sorted(os.listdir(tmp_path)) == ["precious", "shared"]
    assert os.listdir(folder) == ["a"]


# --- what a file is ---------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_get_the_modes_that_the_umask_asks_for_and_it_is_never_set(
    mask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda _: pytest.fail("the umask is every thread's"))
            storage.write_folder(tmp_path / "f", OLD)
            storage.write_folder(tmp_path / "f", NEW)
            storage.write_file(tmp_path / "one", b"1")
            with storage.one_save(tmp_path / "m") as staged:
                os.close(os.open(staged / "weights", os.O_CREAT, 0o600))  # as safetensors does
    finally:
        os.umask(before)
    for path in (tmp_path / "f", tmp_path / "f" / "a", tmp_path / "one", tmp_path / "m/weights"):
        usual = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == usual & ~mask


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    storage.write_folder(tmp_path, {"a": b"1"})
    storage.write_file(tmp_path / "b", b"1")
    for name in "ab":
        (tmp_path / name).chmod(0o600)
    storage.write_folder(tmp_path, {"a": b"2"})
    storage.write_file(tmp_path / "b", b"2")
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"} == {0o600}


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("old")
    (tmp_path / "file").symlink_to(tmp_path / "far" / "file")
    (tmp_path / "folder").symlink_to(tmp_path / "far")
    storage.write_file(tmp_path / "file", b"new")
    storage.write_folder(tmp_path / "folder", {"a": b"1"})
    assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
    assert content(tmp_path / "far") == {"file": b"new", "a": b"1"}


def test_devices_and_folders_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="pipe is a device and is not replaced"):
        storage.write_file(tmp_path / "pipe", b"")
    with pytest.raises(InputError, match="is a folder and is not replaced"):
        storage.write_folder(tmp_path, {"folder": b"", "other": b""})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and (tmp_path / "folder").is_dir()
    assert not hidden(tmp_path)


def test_long_names_can_be_saved_and_too_long_ones_say_so(tmp_path: Path) -> None:
    for length in (246, 255):
        storage.write_folder(tmp_path / ("n" * length), {"a": b""})
    for name in ("n" * 256, "a\0b", "\ud800"):
        with pytest.raises(PtuningError, match=r"shorter name|can be no file's name"):
            storage.write_folder(tmp_path / name, {"a": b""})


# --- locks ------------------------------------------------------------------------------------


def test_a_folder_is_kept_for_one_run(tmp_path: Path) -> None:
    with storage.locked(tmp_path / "out"):
        (tmp_path / "out" / "result").touch()
        with (
            pytest.raises(InputError, match=rf"another run is using .*process {os.getpid()}"),
            storage.locked(tmp_path / "out"),
        ):
            pass
    assert os.listdir(tmp_path / "out") == ["result"]
    with storage.locked(tmp_path / "out"):
        pass


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with storage.locked(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_killed_runs_lock_is_free(tmp_path: Path) -> None:
    def die() -> None:
        with storage.locked(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    with storage.locked(tmp_path / "out"):
        pass
    assert not hidden(tmp_path)


def test_only_what_was_made_here_is_removed(tmp_path: Path) -> None:
    (tmp_path / "f" / "mine").mkdir(parents=True)
    (tmp_path / "f" / "a").touch()
    storage.remove_own(tmp_path / "f", ["a", "b"])
    assert os.listdir(tmp_path / "f") == ["mine"]
    (tmp_path / "f" / "mine").rmdir()
    storage.remove_own(tmp_path / "f", ["a"])
    assert not (tmp_path / "f").exists()


# --- names and JSON ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../a", "a/b", "/a", "a\\b", "C:", ".hidden", "a\0", "a\nb", "\x1b[2J",
     "\ud800", "n" * 256],
)  # fmt: skip
def test_a_name_from_data_is_one_visible_entry(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be the name of a file"):
        entry(tmp_path, name)


@pytest.mark.parametrize("name", ["P19", "place of birth", "état", "a.b", "n" * 255])
def test_an_ordinary_name_is_an_entry(name: str, tmp_path: Path) -> None:
    assert entry(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ('{"b": {"a": 1, "a": 2}}', "'a' stands there twice"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"a":' * 51 + "1" + "}" * 51, "more than 50 levels"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"\\ud800": 1}', "surrogates not allowed"),
        ("9" * 5000, "cannot be read as JSON"),
        ("[1]", "holds no JSON object"),
    ],
)
def test_json_that_means_two_things_or_nothing_is_refused(text: str, fault: str) -> None:
    with pytest.raises(PromptFileError, match=fault):
        parse_json(text, "x.json")


def test_what_was_never_a_complete_save_neither_stops_readers_nor_savers(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    storage.write_folder(folder, OLD)
    (folder / ".ptuning-saved").mkdir()
    (folder / ".ptuning-saved" / "a").write_bytes(b"half")
    with storage.reading(folder):
        assert (folder / "a").read_bytes() == b"old a"
    storage.write_folder(folder, NEW)
    assert content(folder) == OLD | NEW and not hidden(folder)


def test_where_a_file_system_has_no_locks_a_save_leaves_another_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr("fcntl.flock", unknown)
    with storage.one_save(tmp_path / "one") as staged:
        storage.write_all(staged, OLD)
        storage.write_folder(tmp_path / "other", NEW)
        assert content(staged) == OLD
    assert content(tmp_path / "one") == OLD and content(tmp_path / "other") == NEW
    dead = tmp_path / "other" / ".ptuning-01234567"
    dead.mkdir()
    os.utime(dead, (0, 0))
    storage.write_folder(tmp_path / "other", NEW)
    assert not dead.exists()
