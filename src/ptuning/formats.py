"""JSON and safetensors, packed and read: never pickle, clear about damage, and with limits."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import PromptFileError, repeated, unreadable

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_MOST_BYTES, _MOST_LEVELS = 64 * 2**20, 50
"""Of a JSON file; what this package writes has a few kilobytes and six levels."""


def sha256(content: bytes | Path) -> str:
    """SHA-256 of bytes or of a file, in hexadecimal digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack_tensors(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a safetensors file of tensors ``(…)`` by name."""
    return safetensors.torch.save({k: v.contiguous().cpu() for k, v in tensors.items()}, metadata)


def pack_json(value: Any) -> bytes:
    """Indented JSON; text as it is, but for halves of surrogate pairs, which UTF-8 has not."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors ``(…)`` by name, and metadata, of a safetensors file.

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
            # Copies: a tensor of safetensors is a view of the file, whatever becomes of that.
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return found, metadata
    except (safetensors.SafetensorError, OSError) as error:
        try:
            with open(path, "rb") as raw:
                start = raw.read(3)
        except OSError as refused:
            raise PromptFileError(unreadable(path, refused)) from None
        # A pickle's protocol, and its first instruction. A damaged safetensors file begins with its
        # header's length, which may look like the protocol; its third byte is far below "(".
        if start[:2] == b"PK" or (start[:1] == b"\x80" and start[2:] >= b"("):
            raise PromptFileError(
                f"{path} is a pickle under a safetensors name; it is refused because reading it "
                "can run any code"
            ) from error
        raise PromptFileError(
            f"{path} is truncated or damaged ({error}); copy it again or retrain"
        ) from error


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_numbers(tensor: Tensor, what: str, floats_only: bool = True) -> None:
    """Refuse a tensor that no vectors or weights can be.

    Args:
        tensor: ``(…)`` of a file, or to be written.
        what: names it.
        floats_only: refuse whole numbers too.

    Raises:
        PromptFileError: other numbers than floats, such that are not finite in float32, or none.
    """
    if tensor.dtype in _FLOATS:
        if floats_only and not tensor.numel():
            raise PromptFileError(f"{what} has the shape {tuple(tensor.shape)}: it holds nothing")
        if not torch.isfinite(tensor.float()).all():
            raise PromptFileError(
                f"{what} has numbers that are not finite in float32 (NaN, infinity); copy it again "
                "or retrain"
            )
    elif floats_only or tensor.is_floating_point() or tensor.is_complex():
        raise PromptFileError(
            f"{what} has numbers of the kind {str(tensor.dtype).removeprefix('torch.')}; expected "
            "float32, float64, bfloat16 or float16"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PromptFileError: missing, or as `parse_json`.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a device may never end, a pipe never begin
            raise ValueError("it is no regular file")
        if about.st_size > _MOST_BYTES:
            raise ValueError(f"it has {about.st_size:,} bytes; is it another file?")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise PromptFileError(f"{path} does not exist; give the folder of a saved prompt") from None
    except OSError as error:
        raise PromptFileError(unreadable(path, error)) from error
    except ValueError as error:
        raise PromptFileError(f"{path} cannot be read as JSON: {error}{_ANEW}") from error
    return parse_json(text, str(path), _ANEW)


_ANEW = "; copy it again, or make it anew"


def parse_json(text: str, place: str, remedy: str = "") -> dict[str, Any]:
    """A JSON object.

    Args:
        text: of it.
        place: where it stands, for a message.
        remedy: what to do where it is none, for a message.

    Raises:
        PromptFileError: no JSON, no object, a key twice, deeper than `_MOST_LEVELS`, or text that
            no file can hold.
    """
    try:
        value = json.loads(text, object_pairs_hook=distinct)
        if not isinstance(value, dict):
            raise PromptFileError(f"{place} holds no JSON object{remedy}")
        _check_nested(value)
    except (ValueError, RecursionError) as error:
        if isinstance(error, PromptFileError):
            raise
        raise PromptFileError(f"{place} cannot be read as JSON: {error}{remedy}") from error
    return value


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of JSON's pairs, for `json.loads`.

    Raises:
        ValueError: a key stands there twice: the last would win.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = repeated(key for key, _ in pairs)
        raise ValueError(f"the key {twice!r} stands there twice; keep one of them")
    return found


def levels(value: Any) -> Iterator[list[Any]]:
    """The values of JSON level by level, the outermost first; keys stand beside their values."""
    level = [value]
    while level:
        yield level
        inner = [v if isinstance(v, list) else [*v, *v.values()] for v in level
                 if isinstance(v, list | dict)]  # fmt: skip
        level = [v for values in inner for v in values]


def _check_nested(value: dict[str, Any]) -> None:
    for number, level in enumerate(levels(value)):
        if number == _MOST_LEVELS:
            raise ValueError(f"more than {_MOST_LEVELS} levels")
        "".join(v for v in level if isinstance(v, str)).encode()  # raises for half a surrogate pair
