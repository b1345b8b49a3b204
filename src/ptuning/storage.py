"""Safe writing and reading of small folders: atomic, never pickle, clear about damage.

A folder that does not exist yet appears as a whole by one rename. Into an existing folder the
files go one by one by rename, in the order given, and foreign files there stay. Either way a crash,
a full disk or a kill leaves each file old or new, never half.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .errors import PromptFileError, PtuningError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def write_folder(
    folder: str | Path, files: Mapping[str, bytes], remove: Sequence[str] = ()
) -> None:
    """Write `files` (name -> content) into `folder`; then delete those named in `remove`.

    Raises:
        PtuningError: the disk is full, the place is read-only, or `folder` is a file; what stood
            there before still loads.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise PromptFileError(f"{folder} is a file; give a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside a new folder, inside one that is there: it may be a mounted one.
        place = folder if folder.exists() else folder.parent
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=place))
        try:
            for name, content in files.items():
                with open(staged / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _put_in_place(staged, folder, list(files))
            for name in remove:
                (folder / name).unlink(missing_ok=True)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise PtuningError(
            f"cannot write to {folder}: {error.strerror or error}; free space there or choose "
            "another folder (the saved prompt there still loads)"
        ) from error


def write_file(path: Path, content: bytes) -> None:
    """Write one file atomically; its folder is made if need be."""
    write_folder(path.absolute().parent, {path.name: content})


def check_writable(folder: str | Path) -> None:
    """Find out before long work whether `folder` can be written.

    Raises:
        PtuningError: it cannot.
    """
    folder = Path(folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".try-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise PtuningError(
            f"cannot write to {folder}: {error.strerror or error}; free space there or choose "
            "another folder"
        ) from error


def _put_in_place(staged: Path, folder: Path, names: list[str]) -> None:
    staged.chmod(0o777 & ~_umask())
    _sync_folder(staged)
    if folder.exists():
        for name in names:
            os.replace(staged / name, folder / name)
        _sync_folder(folder)
    else:
        os.rename(staged, folder)
        _sync_folder(folder.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack_tensors(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a safetensors file."""
    return safetensors.torch.save({k: v.contiguous().cpu() for k, v in tensors.items()}, metadata)


def pack_json(value: Any) -> bytes:
    """Indented JSON, non-ASCII text as it is."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        PromptFileError: the file is missing, truncated, damaged, or a pickle.
    """
    if not path.is_file():
        pickles = [p.name for pattern in _PICKLES for p in path.parent.glob(pattern)]
        if pickles:
            raise PromptFileError(
                f"{path.parent} holds {pickles[0]} and no {path.name}: a pickle can run any code "
                "when it is read, so it is refused; convert it to safetensors where it was made"
            )
        raise PromptFileError(f"{path} does not exist; give the folder of a saved prompt")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        with open(path, "rb") as raw:
            start = raw.read(2)
        if start[:1] == b"\x80" or start == b"PK":
            raise PromptFileError(
                f"{path} is a pickle under a safetensors name; it is refused because reading it "
                "can run any code"
            ) from error
        raise PromptFileError(
            f"{path} is truncated or damaged ({error}); copy it again or retrain"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PromptFileError: missing, not JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PromptFileError(f"{path} does not exist; give the folder of a saved prompt") from None
    except (ValueError, OSError) as error:
        raise PromptFileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise PromptFileError(f"{path} holds no JSON object")
    return value


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
    """
    folder = Path(path) / (subfolder or "")
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
