"""A teacher's answers on disk while a distillation runs: one that was stopped does not ask again.

``checkpoints/teacher/<SHA-256>.safetensors`` has what the teacher says to some texts
(`teaching.Said`). The name is a hash of all that it depends on: model, number format, the tokens
that are asked. So a file is right for whoever finds it, and one that nobody asks for does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import formats, storage
from ..backbone.base_model import BaseModel
from ..backbone.eight_bits import frozen_format
from ..backbone.identity import sample_of
from ..errors import PromptFileError
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..rendering.render import Rendered
from ..training import checkpoint
from .prediction import members_of
from .teaching import LIKELIEST, Said

_FOLDER, _ENDING = "teacher", ".safetensors"


class KeptAnswers:
    """What a teacher has said, as `ask` takes it.

    Args:
        output: the folder of the run.
        base: the frozen model.
        teacher: of the run.
        ends: the tokens that end what it says (`Engine.ends`).
    """

    def __init__(self, output: Path, base: BaseModel, teacher: Task, ends: Sequence[int]):
        self._folder = output / checkpoint.FOLDER / _FOLDER
        self._facts = {
            "model": sample_of(base.model)["values"],
            "dtype": str(getattr(base.model, "dtype", None)),
            "frozen": frozen_format(base.model),
            "ends": ends,
            "likeliest": LIKELIEST,
            "members": [_told(member) for member in members_of(teacher)],
        }

    def __call__(self, examples: Sequence[Rendered], ask: Callable[[], Said]) -> Said:
        """What is said to these, found or asked for and kept.

        Raises:
            PtuningError: it cannot be written.
        """
        depends_on = checkpoint.fingerprint(self._facts, examples)
        name = formats.sha256(formats.pack_json(depends_on)) + _ENDING
        try:
            return formats.read_tensors(self._folder / name)[0]
        except PromptFileError:  # it is not there, or damaged
            said = ask()
        storage.write_file(self._folder / name, formats.pack_tensors(said, {}))
        return said


def _told(member: Task) -> dict[str, Any]:
    """What its answers depend on."""
    if not isinstance(member, Prompt):
        return member.settings()
    tensors = {"vectors": member.trained_vectors()}
    if member.label_matrix is not None:
        tensors["label_matrix"] = member.label_matrix.of(member.labels)
    return {**member.settings(), "vectors": formats.sha256(formats.pack_tensors(tensors, {}))}


def delete_all(output: Path) -> None:
    """Remove the answers of a run that is over."""
    folder = output / checkpoint.FOLDER / _FOLDER
    storage.remove_own(folder, [path.name for path in folder.glob(f"*{_ENDING}")])
