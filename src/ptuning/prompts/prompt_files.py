"""``prompt.json`` and ``prompt.safetensors``, written and read; what they mean is `prompt`'s.

``prompt.json`` has the tensors' SHA-256, and the tensors' file a copy of the description, so damage
of either is noticed. Releases before the checksum could be cut off between the two files: then the
copy counts.

A folder says the lowest version whose readers give its answers: 3 where label words have a matrix,
2 where several members answer together (their vectors are ``member.N.vectors``) or labels have a
bias, else 1.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from .. import formats, places
from ..errors import InputError, PromptFileError, warn
from .label_matrix import LabelMatrix, Labels, check_matrix
from .model_card import HEADING, model_card

FORMAT_VERSION = 3
"""The newest that is read."""
ENSEMBLE = "ensemble"
"""Key of ``prompt.json``: the settings of each further member."""
BIAS = "label_bias"
"""Key of ``prompt.json``: what is added to the labels' log-probabilities."""
_SINCE_2 = (ENSEMBLE, BIAS)
_MATRIX = "label_matrix"
_DESCRIPTION, _TENSORS = "prompt.json", "prompt.safetensors"
CARD = "README.md"
NAMES = (_TENSORS, _DESCRIPTION, CARD)
OF_FILES = ("format_version", "save_id", "sha256")
"""Keys of ``prompt.json`` that tell of the files, not of the prompt."""


def pack(description: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """The files of a saved prompt, with its model card: name -> content.

    Raises:
        PromptFileError: a number is not finite.
    """
    _check_tensors(tensors, "the prompt")
    version = 2 if any(key in description for key in _SINCE_2) else 1
    version = 3 if any(name.endswith(_MATRIX) for name in tensors) else version
    whole = {"format_version": version, "save_id": uuid.uuid4().hex, **description}
    metadata = {"format": "pt", "prompt": json.dumps(whole, ensure_ascii=False)}
    packed = formats.pack_tensors(tensors, metadata)
    return {
        _TENSORS: packed,
        _DESCRIPTION: formats.pack_json({**whole, "sha256": {_TENSORS: formats.sha256(packed)}}),
        CARD: model_card(whole).encode("utf-8", "backslashreplace"),
    }


def has_other_card(folder: Path) -> bool:
    """There is a README.md that no save has written."""
    try:
        text = (folder / CARD).read_text("utf-8", errors="replace")
    except OSError:
        return False
    return HEADING not in text


def are_in(folder: Path) -> bool:
    """The folder holds a prompt of this package."""
    return any((folder / name).exists() for name in (_DESCRIPTION, _TENSORS))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Description and tensors of a saved prompt; ``vectors`` ``(virtual tokens, width)`` is among
    them, in float32.

    Returns:
        with the two the description's copy beside the vectors.

    Raises:
        PromptFileError: missing, damaged, or of a newer format.
    """
    if not are_in(folder):
        _check_other(folder)
    tensors, metadata = formats.read_tensors(folder / _TENSORS)
    copy = formats.parse_json(metadata.get("prompt", "{}"), f"the description in {_TENSORS}")
    description = _description(folder, copy)
    version = description.get("format_version")
    known_version = isinstance(version, int) and 1 <= version <= FORMAT_VERSION
    if version is True or not known_version:
        raise PromptFileError(
            f"{folder} has format version {version!r}, and this ptuning reads up to "
            f"{FORMAT_VERSION}: upgrade ptuning, or copy the prompt again"
        )
    tables = {"vectors": description, **_members(folder, description)}
    for name, of_one in tables.items():
        _check_table(folder, name, tensors.get(name), of_one)
    _check_tensors(tensors, f"{folder}/{_TENSORS}")
    known = description.get("sha256") or {}
    known = known.get(_TENSORS) if isinstance(known, dict) else known
    if known and known != formats.sha256(folder / _TENSORS):
        raise PromptFileError(
            f"{folder}/{_TENSORS} is truncated or damaged (its SHA-256 is not the one in "
            f"{_DESCRIPTION}); copy it again or retrain"
        )
    tensors |= {name: tensors[name].float() for name in tables}
    return description, tensors, copy


def edited(description: dict[str, Any], copy: dict[str, Any]) -> list[str]:
    """The keys in which a description differs from its copy beside the vectors."""
    texts = {
        key: (json.dumps(value), json.dumps(description.get(key))) for key, value in copy.items()
    }
    return [key for key, (one, other) in texts.items() if one != other]


def beside(vectors: Tensor, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """An encoder's weights that say more than the vectors: without a network they are the same."""
    weights = weights or {}
    same = [torch.equal(one.float().cpu(), vectors.float().cpu()) for one in weights.values()]
    return {} if same == [True] else weights


def of_member(number: int) -> str:
    """The tensor that holds the vectors of an ensemble's further member, counted from 1."""
    return f"member.{number}.vectors"


def matrices(each: Sequence[tuple[LabelMatrix | None, Labels]]) -> dict[str, Tensor]:
    """The tensors that hold label matrices, of a prompt and of further members; beside each are the
    labels whose order it is written in."""
    return {
        _matrix_of(number): matrix.of(labels).float().clone()
        for number, (matrix, labels) in enumerate(each)
        if matrix is not None
    }


def matrix(
    folder: Path,
    tensors: Mapping[str, Tensor],
    number: int,
    labels: Labels,
    copy: Mapping[str, Any],
) -> LabelMatrix | None:
    """The label matrix of a member, counted from 0, in float32; None without.

    Args:
        folder: of the prompt.
        tensors: all of it.
        number: the member.
        labels: the member's, as the description has them: in any order.
        copy: the description beside the tensors, whose words the matrix is of.

    Raises:
        PromptFileError: it is not of these labels' words.
    """
    found = tensors.get(_matrix_of(number))
    if found is None:
        return None
    try:
        before = [copy, *copy.get(ENSEMBLE, [])][number]["verbalizer"] if copy else labels
        read = LabelMatrix.trained(found.float(), before)
    except (AttributeError, IndexError, KeyError, TypeError, InputError):
        raise PromptFileError(
            f"{folder}/{_TENSORS} does not say of which label words its label matrix is; copy it "
            "again or retrain"
        ) from None
    try:
        check_matrix(read, labels)
    except InputError:
        raise PromptFileError(
            f"{folder}/{_DESCRIPTION} has other label words than the label matrix in {_TENSORS}: "
            "give those again, or train again with these"
        ) from None
    return read


def _matrix_of(number: int) -> str:
    return f"member.{number}.{_MATRIX}" if number else _MATRIX


def starting(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors ``(…)`` whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def seen_from(folder: Path, base_model: dict[str, Any]) -> dict[str, Any]:
    """What ``prompt.json`` says of a base model: one in the prompt's own folder, such as a model
    that was trained with the prompt, is named from there, so that the folder can be moved."""
    path, home = Path(str(base_model.get("name") or "")), places.real(folder)
    if not path.is_absolute() or not places.real(path).is_relative_to(home):
        return base_model
    inner = places.real(path).relative_to(home).as_posix()
    known = {k: v for k, v in base_model.items() if k != "tuned_from"}
    return {**known, "name": base_model.get("tuned_from") or path.name, "folder": inner}


def found_in(folder: Path, base_model: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `seen_from`: the base model's name is a path again.

    Raises:
        PromptFileError: it leads outside the folder.
    """
    if "folder" not in base_model:
        return base_model
    path = places.real(folder)
    try:
        for part in PurePosixPath(base_model["folder"]).parts:
            path = places.entry(path, part)
    except (InputError, TypeError) as error:
        raise PromptFileError(f"{folder}/{_DESCRIPTION}: base_model's folder: {error}") from None
    known = {k: v for k, v in base_model.items() if k != "folder"}
    return {**known, "name": str(path), "tuned_from": base_model.get("name")}


def _members(folder: Path, description: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of an ensemble's further members the tensor's name and the settings."""
    found = description.get(ENSEMBLE, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise PromptFileError(
            f"{folder}/{_DESCRIPTION}: {ENSEMBLE} is no list of members' settings; copy it again "
            "or retrain"
        )
    return {of_member(number): one for number, one in enumerate(found, 1)}


def _check_table(
    folder: Path, name: str, vectors: Tensor | None, description: dict[str, Any]
) -> None:
    """A prompt's template and vectors are there and belong together."""
    if "template" not in description:
        raise PromptFileError(
            f"{folder}/{_DESCRIPTION} has no template (null: virtual tokens in front of "
            "everything); copy it again or retrain"
        )
    if vectors is None or vectors.dim() != 2:
        raise PromptFileError(
            f"{folder}/{_TENSORS} has no table of {name}; copy it again or retrain"
        )
    if len(vectors) != description.get("num_virtual_tokens"):
        raise PromptFileError(
            f"{folder}: prompt.json names {description.get('num_virtual_tokens')} virtual "
            f"tokens, prompt.safetensors holds {len(vectors)}; copy both again or retrain"
        )


def _check_tensors(tensors: dict[str, Tensor], place: str) -> None:
    for name, tensor in tensors.items():
        module = name.startswith("module.")  # may have counters and the like
        formats.check_numbers(tensor, f"{place}: {name}", floats_only=not module)


_UNFINISHED = (
    "holds a training that has not come to its end, and no prompt yet; wait for it, or, if it was "
    "stopped, go on with it by --resume"
)
_OTHERS = {
    "prompts.json": "is a merged model, and no saved prompt; give the folder of a prompt that was "
    "merged into it, or ask it through a server (ptuning serve --backend vllm)",
    "config.json": "is a model, and no saved prompt; give the folder of a prompt",
    "checkpoints": _UNFINISHED,
    "run.yaml": _UNFINISHED,
}
"""What else a folder may be by what lies in it, and what to do then."""


def _check_other(folder: Path) -> None:
    for name, what in _OTHERS.items():
        if (folder / name).exists():
            raise PromptFileError(f"{folder} {what}")


def _description(folder: Path, copy: dict[str, Any]) -> dict[str, Any]:
    """``prompt.json``, or the copy inside the tensors where the two are of different saves."""
    if not (folder / _DESCRIPTION).is_file() and copy:
        return copy
    description = formats.read_json(folder / _DESCRIPTION)
    if copy and copy.get("save_id") != description.get("save_id"):
        warn(
            f"{folder}/prompt.json belongs to another save than prompt.safetensors (a save was cut "
            "off); the description inside prompt.safetensors is used"
        )
        return copy
    return description
