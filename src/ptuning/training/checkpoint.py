"""Checkpoints of a running training: what is needed to go on with the same numbers.

``checkpoints/step-00000120/`` holds ``state.pt`` (tensors and plain values, read with
``weights_only=True``) and ``DONE``, which has the state's SHA-256 and counts the saves: the newest
is the one with the highest number, whatever the clock says. A folder without ``DONE``, or one that
cannot be read, is skipped for the one before. (In older releases ``DONE`` is empty; among those the
highest step is the newest.)
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import distributed, formats, storage
from ..backbone.base_model import BaseModel
from ..backbone.eight_bits import frozen_format
from ..backbone.identity import sample_of
from ..backbone.lookups import input_embedding
from ..errors import InputError, PromptFileError, warn
from ..prompts.encoder_width import WIDEST
from .grid import Variant
from .settings import CHANGE_NO_RESULT, LATER

FOLDER, FOLD, REFIT = "checkpoints", "fold-", "refit"
_KEPT = 2
_FORMAT = "dtype"
_BESIDE = "the data that other templates read"
_STATE, _DONE = "state.pt", "DONE"


def save(output: Path, step: int, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically and delete all but the newest two."""
    content = io.BytesIO()
    torch.save(state, content)
    packed = content.getvalue()
    number = 1 + max((_number(folder) for folder in _folders(output)), default=0)
    done = {"number": number, "sha256": {_STATE: formats.sha256(packed)}}
    folder = output / FOLDER / f"step-{step:08d}"
    storage.write_folder(folder, {_STATE: packed, _DONE: formats.pack_json(done)})
    for old in _folders(output)[:-_KEPT]:
        storage.remove_own(old, (_DONE, _STATE))


def load_newest(output: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint's state, or None where there is none."""
    for folder in reversed(_folders(output)):
        if not (folder / _DONE).exists():
            continue
        try:
            with storage.reading(folder):
                return _read(folder)
        except Exception as error:  # torch raises several kinds for a damaged file
            warn(f"{folder} cannot be read and is skipped: {error}")
    return None


def _read(folder: Path) -> dict[str, Any]:
    known = _done(folder).get("sha256", {}).get(_STATE)
    if known is not None and known != formats.sha256(folder / _STATE):
        raise PromptFileError(f"the SHA-256 of {_STATE} is not the one in {_DONE}: it is damaged")
    state = torch.load(folder / _STATE, weights_only=True, map_location="cpu")
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise PromptFileError(f"{_STATE} is no state of a training")
    return state


def _done(folder: Path) -> dict[str, Any]:
    """What the marker says; nothing in older releases."""
    path = folder / _DONE
    return formats.read_json(path) if path.exists() and path.stat().st_size else {}


def is_there(output: Path) -> bool:
    """A running training has saved something."""
    return bool(_folders(output))


def load_for_all(output: Path | None, identity: dict[str, str]) -> dict[str, Any] | None:
    """What the main process finds in its `output` to go on with, given to all processes.

    Args:
        output: None to begin anew.
        identity: of this process's run (`fingerprint`).

    Raises:
        InputError: the checkpoint is another run's, or the processes' runs differ.
    """

    def read() -> tuple[dict[str, str], dict[str, Any] | None]:
        state = load_newest(output) if output is not None else None
        if state is not None:
            saved = state.get("identity")
            if not isinstance(saved, dict):
                raise PromptFileError(
                    f"the newest checkpoint in {output} does not say what run it is of; remove it, "
                    "or start anew with --overwrite"
                )
            check_same_run(saved, identity)
        return identity, state

    main, state = distributed.from_main(read)
    differing = [key for key in {**main, **identity} if main.get(key) != identity.get(key)]
    if differing:
        raise InputError(
            f"{differing[0]} differs between this process and the main one; start all processes "
            "with the same settings and data"
        )
    return state


def check_same_folds(output: Path, folds: int) -> None:
    """Refuse to go on with a run of other folds before anything is trained: the part that trains
    first may have no checkpoint to compare.

    Args:
        output: of the run.
        folds: of this one; 0 for none.

    Raises:
        InputError: the checkpoints are of a run with more or fewer.
    """
    for part in [output] if folds else (output / FOLDER).glob(f"{FOLD}*"):
        if (state := load_newest(part)) is not None:
            saved = state.get("identity") or {}
            then = {"folds": saved["folds"]} if "folds" in saved else {}
            check_same_run(then, {"folds": json.dumps(folds)} if folds else {})


def delete_all(output: Path) -> None:
    """Remove the checkpoints of a run that is over or starts anew."""
    parts = [*(output / FOLDER).glob(f"{FOLD}*"), output / FOLDER / REFIT]
    for part in filter(Path.exists, parts):
        delete_all(part)
        storage.remove_own(part)
    for folder in _folders(output):
        storage.remove_own(folder, (_DONE, _STATE))
    storage.remove_own(output / FOLDER)


def _folders(output: Path) -> list[Path]:
    """From the oldest to the newest."""
    found = (output / FOLDER).glob("step-*")
    return sorted(found, key=lambda folder: (_number(folder), folder.name))


def _number(folder: Path) -> int:
    try:
        return int(_done(folder).get("number", 0))
    except (PromptFileError, TypeError, ValueError):
        return 0


def identity_of(
    variants: Sequence[Variant], base: BaseModel, teacher: dict[str, Any] | None = None
) -> dict[str, str]:
    """All that the numbers of a run depend on."""
    first = variants[0]
    dtype = str(getattr(base.model, "dtype", None)).removeprefix("torch.")
    chosen = {_FORMAT: dtype, **asdict(first.settings), **first.prompt.settings()}
    if frozen := frozen_format(base.model):
        chosen["frozen"] = frozen
    for name in (*CHANGE_NO_RESULT, "refit"):  # which comes behind this, or is it
        del chosen[name]
    for name, default in LATER.items():  # older releases' checkpoints do not name them
        if chosen[name] == default:
            del chosen[name]
    chosen["patience"] = chosen["patience"] or None  # both were "never" in the first release
    if chosen.get("init") == "encoder":  # older releases do not name the start, and had no other
        del chosen["init"]
    start = first.prompt.vectors
    chosen["the prompt to begin from"] = None if start is None else start.double().sum().item()
    if (matrix := first.prompt.label_matrix) is not None:  # older releases have none
        chosen["the label matrix to begin from"] = matrix.numbers.double().abs().sum().item()
    chosen["the base model"] = sample_of(base.model)["values"]
    if teacher is not None:  # the examples have its answers: another one's are other data
        chosen["the teacher"] = teacher
    chosen["the population"] = [variant.name for variant in variants]
    units = [variant.unit for variant in variants]
    if set(units) != {1.0}:  # older releases know none
        chosen["the size of words' vectors"] = units
    if input_embedding(base.model).embedding_dim > WIDEST:  # older releases know no limit
        by_default = [v.prompt for v in variants if v.prompt.encoder_hidden_size is None]
        if any(prompt.encoder in ("mlp", "lstm", "residual") for prompt in by_default):
            chosen["the width of encoders"] = WIDEST
    others = {variant.prompt.template: variant for variant in variants}
    del others[first.prompt.template]
    if others:  # which may name other columns
        chosen[_BESIDE] = _digest(e for v in others.values() for e in (*v.examples, *v.dev))
    return fingerprint(chosen, [*first.examples, *first.dev])


def fingerprint(settings: dict[str, Any], examples: Iterable[Any]) -> dict[str, str]:
    """What a run depends on, to be compared on resume: each setting, and a hash of the data."""
    values = {key: json.dumps(value, default=str) for key, value in settings.items()}
    return {**values, "the data": _digest(examples)}


def _digest(examples: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def check_same_run(saved: dict[str, str], current: dict[str, str]) -> None:
    """Raise InputError naming what differs between a checkpoint's run and this one."""
    unnamed = {name: json.dumps(default) for name, default in LATER.items()}
    untold = {n: current.get(n) for n in (_FORMAT, _BESIDE) if n not in saved}  # by older releases
    told = {**saved, **untold}
    differing = [key for key in {**told, **current} if told.get(key) != current.get(key)]
    if differing:
        key = differing[0]
        named = key.startswith("the ")
        then, now = ({**unnamed, **known}.get(key) for known in (saved, current))
        detail = "" if named else f" (then {then}, now {now})"
        raise InputError(
            f"cannot resume: {key} differs from the interrupted run{detail}; give the same "
            "settings and data, or start anew with --overwrite"
        )
