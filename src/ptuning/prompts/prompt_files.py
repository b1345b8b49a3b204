"""``prompt.json`` and ``prompt.safetensors``, written and read; what they mean is `prompt`'s.

The tensors' file has a copy of the description, so a save that was cut off between the two files
is noticed and harmless.
"""

from __future__ import annotations

import json
import uuid
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import storage
from ..errors import PromptFileError
from .model_card import model_card

FORMAT_VERSION = 1


def pack(description: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """The files of a saved prompt, with its model card: name -> content."""
    whole = {"format_version": FORMAT_VERSION, "save_id": uuid.uuid4().hex, **description}
    metadata = {"format": "pt", "prompt": json.dumps(whole, ensure_ascii=False)}
    return {
        "prompt.safetensors": storage.pack_tensors(tensors, metadata),
        "prompt.json": storage.pack_json(whole),
        "README.md": model_card(whole).encode(),
    }


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a saved prompt; ``vectors`` is among them.

    Raises:
        PromptFileError: missing, damaged, or of a newer format.
    """
    tensors, metadata = storage.read_tensors(folder / "prompt.safetensors")
    description = _description(folder, metadata)
    version = description.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise PromptFileError(
            f"{folder} has format version {version!r}, and this ptuning reads up to "
            f"{FORMAT_VERSION}: upgrade ptuning"
        )
    vectors = tensors.get("vectors")
    if vectors is None or vectors.dim() != 2:
        raise PromptFileError(f"{folder}/prompt.safetensors has no table of vectors")
    if len(vectors) != description.get("num_virtual_tokens"):
        raise PromptFileError(
            f"{folder}: prompt.json names {description.get('num_virtual_tokens')} virtual "
            f"tokens, prompt.safetensors holds {len(vectors)}"
        )
    return description, tensors


def starting(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _description(folder: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """``prompt.json``, or the copy inside the tensors where a save was cut off between the two."""
    try:
        copy = json.loads(metadata.get("prompt", "{}"))
    except ValueError:
        copy = None
    if not isinstance(copy, dict):
        raise PromptFileError(
            f"{folder}/prompt.safetensors holds a damaged description; copy it again or retrain"
        )
    if not (folder / "prompt.json").is_file() and copy:
        return copy
    description = storage.read_json(folder / "prompt.json")
    if copy and copy.get("save_id") != description.get("save_id"):
        warnings.warn(
            f"{folder}/prompt.json belongs to another save than prompt.safetensors (a save was cut "
            "off); the description inside prompt.safetensors is used",
            stacklevel=4,
        )
        return copy
    return description
