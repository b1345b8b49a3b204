"""Folders written as one save, and kept for one run.

A folder that does not exist yet appears as a whole by one rename. Into one that is there (it may be
a mounted one, and foreign files in it stay) the new files come as a complete folder beside the old
ones; one rename makes it the save that counts, and then its files move to their places:

    DIR/.ptuning-1f2e3d4c/    being written; a killed save's is removed by the next one
    DIR/.ptuning-saved/       complete; whoever reads or writes DIR next finishes it (`settle`)

So a crash, a full disk or a kill at any moment leaves all files old or all new. Nothing that has a
name of its own in the folder is ever removed, unless the save says so.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import InputError, PromptFileError, PtuningError, unreadable
from .formats import pack_json, read_json
from .places import held, real

_OWN = ".ptuning-"
_SAVED = f"{_OWN}saved"
_LOCK = f"{_OWN}lock"
_MANIFEST = f"{_OWN}files"
_DEAD_AFTER = 24 * 3600
"""Seconds behind which a half-done save is thought dead where a file system has no locks."""


def write_folder(
    folder: str | Path, files: Mapping[str, bytes], remove: Sequence[str] = ()
) -> None:
    """Write `files` (name -> content) into `folder` as one save.

    Args:
        folder: made if need be; a symbolic link is followed.
        files: those of these names are replaced and keep their modes, others stay.
        remove: names of files and folders that go with this save. One that is among `files` too is
            away meanwhile, so that a reader who knows nothing of saves finds it with its fellows or
            not at all.

    Raises:
        PtuningError: the disk is full, the place is read-only, or `folder` is a file; what stood
            there before still loads.
    """
    with one_save(folder, remove) as staged:
        write_all(staged, files)


def write_all(staged: Path, files: Mapping[str, bytes]) -> None:
    """Put files into a save's new folder."""
    for name, content in files.items():
        (staged / name).write_bytes(content)


@contextmanager
def one_save(folder: str | Path, remove: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder to fill with files and folders; they are put into `folder` as one save.

    As `write_folder`. A folder replaces one of its name as a whole. Where the block raises, nothing
    is changed.
    """
    folder = real(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise PromptFileError(f"{folder} is a file; give a folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _staging(folder if folder.exists() else folder.parent) as staged:
            yield staged
            _put_in_place(staged, folder, remove)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def check_file(path: str | Path) -> None:
    """Find out before long work whether `write_file` can write `path`.

    Raises:
        PtuningError: as there.
    """
    path = real(path)
    try:
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_file(path: str | Path, content: bytes) -> None:
    """Write one file atomically; its folder is made if need be.

    A symbolic link is followed, and a file that is replaced keeps its mode.

    Raises:
        PtuningError: it cannot be written, or is a folder or a device.
    """
    path = real(path)
    try:
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _staging(path.parent) as staged:
            (staged / "file").write_bytes(content)
            _sync(staged)
            _take_mode(staged / "file", path)
            os.replace(staged / "file", path)
            _sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def remove_own(folder: Path, names: Sequence[str] = ()) -> None:
    """Remove the files of these names from a folder, in this order, and half-done saves; and the
    folder itself where nothing else is in it. What this package did not make stays."""
    if not folder.is_dir():
        return
    with suppress(OSError):
        for name in names:
            (folder / name).unlink(missing_ok=True)
        _remove_dead(folder)
        if (folder / _SAVED).exists():
            _clear(folder)
        folder.rmdir()


def settle(folder: Path) -> None:
    """Finish a save of `folder` that was cut off when it was complete; readers call this first.

    Raises:
        PromptFileError: the folder cannot be written.
    """
    if not _complete(folder):
        return
    try:
        with held(folder, shared=False):
            _move_in(folder)
    except OSError as error:
        raise PromptFileError(
            f"a save of {folder} was cut off, and it cannot be finished: {error.strerror or error};"
            " make the folder writable once, or save again elsewhere"
        ) from error


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """A block in which no save of this computer changes `folder`; one cut off is finished first."""
    with ExitStack() as stack:
        while True:
            settle(folder)
            stack.enter_context(held(folder, shared=True))
            if not _complete(folder):  # else a writer was killed in between
                break
            stack.close()
        yield


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep `folder`, made if need be, for one run; a killed run's lock is free.

    Raises:
        InputError: another run has it.
        PtuningError: it cannot be written.
    """
    folder = real(folder)
    path = folder / _LOCK
    lock = FileLock(path)
    try:
        made = not folder.exists()
        if not made and not folder.is_dir():
            raise InputError(f"{folder} is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder)
        lock.acquire(timeout=0)
        with suppress(OSError):
            path.write_text(f"{os.getpid()}\n")
    except Timeout:
        raise InputError(
            f"another run is using {folder}{_by_whom(path)}; wait until it has ended, or choose "
            "another folder"
        ) from None
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held, so that nobody waits for a file without a name
        lock.release()
        if made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def _by_whom(path: Path) -> str:
    with suppress(OSError, ValueError):
        return f" (process {int(path.read_text())})"
    return ""


def check_writable(folder: str | Path) -> None:
    """Find out before long work whether `folder` can be written.

    Raises:
        PtuningError: it cannot.
    """
    folder = real(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def holds_something(folder: str | Path) -> bool:
    """In the folder is what is no trace of a save or a run; a save cut off is finished first.

    Raises:
        PtuningError: it is a file, or cannot be looked at.
    """
    folder = real(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; give a folder")
        settle(folder)
        return folder.exists() and any(not n.startswith(_OWN) for n in os.listdir(folder))
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _check_room(folder: Path) -> None:
    with _staging(folder) as staged:
        (staged / "file").write_bytes(bytes(4096))
        _sync(staged)


def _cannot_write(place: Path, error: OSError) -> PtuningError:
    what = "choose another place (what was saved there before still loads)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"free space there or {what}"
    elif error.errno == errno.ENAMETOOLONG:
        what = "choose a shorter name"
    return PtuningError(f"cannot write to {place}: {error.strerror or error}; {what}")


@contextmanager
def _staging(place: Path) -> Iterator[Path]:
    """A new folder in `place`, with the rights that the umask gives; those of the dead go."""
    _remove_dead(place)
    with ExitStack() as stack:
        while True:
            staged = place / f"{_OWN}{secrets.token_hex(4)}"
            staged.mkdir()
            alive = stack.enter_context(held(staged, shared=False, wait=False))
            if (
                alive is not False and staged.is_dir()
            ):  # else another process has just taken it for dead
                break
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _remove_dead(place: Path) -> None:
    """Remove what killed saves left: a living one holds its folder."""
    for path in place.glob(f"{_OWN}*"):
        if len(path.name) != len(_OWN) + 8 or not path.is_dir():
            continue
        with suppress(OSError), held(path, shared=False, wait=False) as free:
            if free or (free is None and time.time() - path.stat().st_mtime > _DEAD_AFTER):
                shutil.rmtree(path, ignore_errors=True)


def _put_in_place(staged: Path, folder: Path, remove: Sequence[str]) -> None:
    _give_usual_rights(staged)
    if not folder.exists():
        _sync(staged)
        try:
            os.rename(staged, folder)
            _sync_folder(folder.parent)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # else another process has made it meanwhile
    names = [name for name in os.listdir(staged) if name != _MANIFEST]
    for name in names:
        _check_replaceable(folder / name, folders=(staged / name).is_dir())
        _take_mode(staged / name, folder / name)
    (staged / _MANIFEST).write_bytes(pack_json({"files": sorted(names), "remove": list(remove)}))
    _sync(staged)
    with held(folder, shared=False):
        _move_in(folder)
        if (folder / _SAVED).exists():  # what was never a complete save
            _clear(folder)
        os.replace(staged, folder / _SAVED)
        _sync_folder(folder)
        _move_in(folder)


def _move_in(folder: Path) -> None:
    """Put the files of the complete save in `folder`, if there is one, in their places."""
    saved = folder / _SAVED
    if not _complete(folder):
        return
    manifest = read_json(saved / _MANIFEST)
    names, remove = (list(filter(_plain, manifest.get(k, []))) for k in ("files", "remove"))
    for name in remove:
        if name not in names or (saved / name).exists():
            _take_away(folder / name, saved)
    for name in names:
        if (saved / name).exists():
            if (folder / name).is_dir():
                _take_away(folder / name, saved)
            os.replace(saved / name, folder / name)
    _sync_folder(folder)
    _clear(folder)


def _complete(folder: Path) -> bool:
    """A complete save waits in `folder`; without a list of its files it is none."""
    try:
        return (folder / _SAVED / _MANIFEST).is_file()
    except OSError as error:
        raise PromptFileError(unreadable(folder, error)) from None


def _clear(folder: Path) -> None:
    """Remove what stands where a complete save waits; at no moment half of it stands there."""
    done = folder / f"{_OWN}{secrets.token_hex(4)}"
    os.replace(folder / _SAVED, done)
    shutil.rmtree(done, ignore_errors=True)


def _take_away(path: Path, saved: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        os.replace(path, saved / f"{_OWN}{secrets.token_hex(4)}")
    else:
        path.unlink(missing_ok=True)


def _plain(name: Any) -> bool:
    """A manifest may come from anywhere: its names stay in the folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _check_replaceable(path: Path, folders: bool = False) -> None:
    """Refuse a device, and a folder in a file's place or the other way round."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISDIR(mode) if folders else stat.S_ISREG(mode)):
        kind = "a file" if stat.S_ISREG(mode) else "a folder" if stat.S_ISDIR(mode) else "a device"
        raise InputError(f"{path} is {kind} and is not replaced; choose another place")


def _give_usual_rights(staged: Path) -> None:
    """Files get what the umask gives: safetensors (0.8) writes for the owner alone, and a server
    is often somebody else."""
    mode = stat.S_IMODE(staged.stat().st_mode) & 0o666
    for place, _, names in os.walk(staged):
        for name in names:
            with suppress(OSError):  # a file system without modes
                os.chmod(Path(place) / name, mode)


def _take_mode(new: Path, old: Path) -> None:
    if new.is_file() and old.is_file():
        shutil.copymode(old, new)


def _sync(folder: Path) -> None:
    """Have all files of a folder, and what is below it, on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(Path(place) / name, "r+b" if os.name == "nt" else "rb") as file:
                os.fsync(file.fileno())  # Windows: of a file that is written
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
