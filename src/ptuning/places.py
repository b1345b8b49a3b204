"""Where files are: names from data, links, the hub; and who holds a folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import Any

from .errors import InputError, PromptFileError, excerpt

try:
    import fcntl
except ImportError:  # Windows: readers and writers of one folder do not wait for each other there
    fcntl = None  # type: ignore[assignment]


def entry(folder: Path, name: str) -> Path:
    """The path of an entry of `folder`: the one place where a name from data becomes a path.

    Raises:
        InputError: the name leads elsewhere, is hidden, or can be no file's.
    """
    try:
        fits = len(os.fsencode(name)) <= 255
    except UnicodeEncodeError:
        fits = False
    odd = name.startswith(".") or any(c in "/\\" or not c.isprintable() for c in name)
    if not name.strip() or odd or not fits or PureWindowsPath(name).drive:
        raise InputError(
            f"{name!r} cannot be the name of a file or folder in {folder}; give a name without "
            "slashes and control characters that does not begin with a dot"
        )
    return folder / name


def at_home(path: str) -> str:
    """With the home folder for ``~/`` in front, as a shell writes it: none does in ``--data=~/x``,
    in a run file or in Python, and a folder called ``~`` is not what anybody means. (``~`` alone
    may be a separator.)"""
    return os.path.expanduser(path) if path.startswith("~/") else path


def named(path: str | Path) -> Path:
    """What was given as the path of a file or folder, seen to be one; ``~`` is the home folder.

    Raises:
        InputError: it is none; or has no name: an empty one would be the working directory; or the
            system cannot have a file of that name.
    """
    if not isinstance(path, str | os.PathLike) or not str(path).strip():
        raise InputError(f"{path!r} is no path; give the name of a file or folder")
    path = at_home(os.fspath(path))
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            told = excerpt(str(path), most=200)
            raise InputError(f"{told} is too long for a file; choose a shorter name") from None
    except ValueError as error:  # a zero byte, half a surrogate pair
        raise InputError(f"{str(path)!r} can be no file's name: {error}; give another") from None
    return Path(path)


def real(path: str | Path) -> Path:
    """Absolute, and with symbolic links followed.

    Raises:
        InputError: it is no path (`named`).
    """
    return Path(os.path.realpath(named(path)))


@contextmanager
def held(folder: Path, shared: bool, wait: bool = True) -> Iterator[bool | None]:
    """Hold a folder among the processes of this computer; gives False where another has it.

    The kernel keeps the hold, so nothing stays behind. Where a system or file system has no locks
    all may, and None says that nobody knows of the others.
    """
    if fcntl is None:
        yield None
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    except OSError:  # a folder that may be entered and not listed
        yield None
        return
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    free: bool | None = True
    try:
        try:
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = None
        yield free
    finally:
        if free:
            with suppress(OSError):  # said, and not left to the close: a forked child has it too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def local_folder(
    path: str | Path, revision: str | None = None, subfolder: str | None = None, **hub: Any
) -> Path:
    """`path` itself where it is a folder, else a snapshot of that hub repository.

    Args:
        path: a folder, or a repository's name.
        revision: of the repository.
        subfolder: of either.
        hub: ``token``, ``cache_dir`` and the like.

    Raises:
        PromptFileError: neither exists.
        InputError: it is no path.
    """
    folder = named(path) / (subfolder or "")
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise PromptFileError(f"{path} is not a folder; give the folder of a saved prompt")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.md", "*.bin"]
        root = snapshot_download(str(path), revision=revision, allow_patterns=patterns, **hub)
        return Path(root) / (subfolder or "")
    except Exception as error:
        raise PromptFileError(
            f"{path} is neither a folder here nor a repository on the hub "
            f"({type(error).__name__}); check the name"
        ) from error
