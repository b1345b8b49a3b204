"""PEFT's two files of a P-tuned prompt, read and written without PEFT.

``adapter_config.json`` holds exactly PEFT's keys; ``adapter_model.safetensors`` holds
``prompt_embeddings`` ``(virtual tokens x submodules, width)`` and, as ``base_model.<name>``, the
tensors of modules trained besides. They mean virtual tokens in front of
the whole input and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import formats
from ..errors import PromptFileError, warn
from .encoder_config import CONFIG_NAME, PromptEncoderConfig, TaskType
from .label_matrix import LabelMatrix

WEIGHTS_NAME = "adapter_model.safetensors"
_OLD_NAME = "adapter_model.bin"
_MODULE = "base_model."
NAMES = (WEIGHTS_NAME, CONFIG_NAME)
TASK_TYPES = {"causal": TaskType.CAUSAL_LM, "seq2seq": TaskType.SEQ_2_SEQ_LM}
"""PEFT has no P-tuning for masked LMs, and without a task type it leaves the prompt out."""


def tell_of_labels(bias: Mapping[str, float] | None, matrix: LabelMatrix | None) -> None:
    """Warn that PEFT's files say nothing of a label bias or a label matrix."""
    if matrix is not None:
        warn(
            "PEFT's files have no place for the prompt's label matrix, so its labels are compared "
            "without, and fewer answers are right; train with label_matrix=False "
            "(--no-label-matrix) for PEFT, or apply prompt.label_matrix.numbers yourself"
        )
    if bias:
        warn(
            "PEFT's files have no place for the prompt's label bias, so its labels are compared "
            "without; add prompt.label_bias to their log-probabilities yourself"
        )


def pack(
    rows: Tensor,
    config: PromptEncoderConfig,
    kind: str | None,
    modules: Mapping[str, Tensor] | None = None,
) -> dict[str, bytes]:
    """The two files' contents. PEFT wants inference mode set in a saved adapter.

    Args:
        rows: ``(virtual tokens x submodules, width)``.
        config: the encoder's.
        kind: `kinds.kind_of` the model, for a configuration without a task type; None leaves it.
        modules: tensors of further trained modules, by their names in the base model.
    """
    saved = config.replace(inference_mode=True)
    if kind is not None and config.task_type is None:
        saved.task_type = TASK_TYPES.get(kind, TaskType.FEATURE_EXTRACTION)
    tensors = {"prompt_embeddings": rows}
    tensors |= {_MODULE + name: tensor for name, tensor in (modules or {}).items()}
    _check(tensors, "the prompt")
    return {
        WEIGHTS_NAME: formats.pack_tensors(tensors, {"format": "pt"}),
        CONFIG_NAME: saved.to_json().encode(),
    }


def read(
    folder: Path, *, old_releases: bool = False
) -> tuple[Tensor, PromptEncoderConfig, dict[str, Tensor]]:
    """The rows, the configuration and the further trained modules of a PEFT folder.

    PEFT keeps a row ``(width,)`` per virtual token and transformer submodule, and uses the first
    ``num_virtual_tokens`` of them.

    Args:
        folder: of an adapter.
        old_releases: read ``adapter_model.bin`` too, its tensors only and none of its code.

    Raises:
        PromptFileError: another method, missing, extra or mis-shaped tensors, an unsafe pickle.
    """
    config = PromptEncoderConfig.from_pretrained(folder)
    name, tensors = _tensors(folder, old_releases)
    rows = tensors.pop("prompt_embeddings", None)
    if rows is None:
        raise PromptFileError(
            f"{folder / name} has no tensor 'prompt_embeddings'; it holds {sorted(tensors)}"
        )
    extra = sorted(key for key in tensors if not key.startswith(_MODULE))
    if extra:
        raise PromptFileError(
            f"{folder / name} also holds {extra}, which belong to no P-tuned adapter; was it saved "
            "by another method?"
        )
    count = config.num_virtual_tokens
    expected = None if count is None else count * (config.num_transformer_submodules or 1)
    if rows.dim() != 2 or len(rows) != expected:
        raise PromptFileError(
            f"{folder / name}: 'prompt_embeddings' has shape {tuple(rows.shape)}, and "
            f"{CONFIG_NAME} asks for {expected} rows"
        )
    if config.token_dim not in (None, rows.shape[1]):
        raise PromptFileError(
            f"{folder / name}: 'prompt_embeddings' is {rows.shape[1]} wide, and "
            f"{CONFIG_NAME} says {config.token_dim}"
        )
    _check({"prompt_embeddings": rows, **tensors}, str(folder / name))
    modules = {key.removeprefix(_MODULE): tensor for key, tensor in tensors.items()}
    return rows.float(), config, modules


def _check(tensors: Mapping[str, Tensor], place: str) -> None:
    for name, tensor in tensors.items():
        floats_only = not name.startswith(_MODULE)
        formats.check_numbers(tensor, f"{place}: {name}", floats_only)


def _tensors(folder: Path, old_releases: bool) -> tuple[str, dict[str, Tensor]]:
    old = old_releases and (folder / _OLD_NAME).is_file()
    if (folder / WEIGHTS_NAME).is_file() or not old:
        return WEIGHTS_NAME, formats.read_tensors(folder / WEIGHTS_NAME)[0]
    try:
        tensors = torch.load(folder / _OLD_NAME, map_location="cpu", weights_only=True)
        if not all(isinstance(t, Tensor) for t in tensors.values()):
            raise TypeError("no dictionary of tensors")
    except Exception as error:
        raise PromptFileError(
            f"{folder / _OLD_NAME} holds more than tensors, or is damaged; a pickle can run any "
            f"code when it is read, so it is refused: {error}"
        ) from None
    return _OLD_NAME, dict(tensors)
