"""PEFT's two files of a P-tuned prompt, read and written without PEFT.

``adapter_config.json`` holds exactly PEFT's keys; ``adapter_model.safetensors`` holds
``prompt_embeddings`` ``(virtual tokens x submodules, width)``. They mean virtual tokens in front of
the whole input and nothing else.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from . import files
from .config import CONFIG_NAME, PromptEncoderConfig, TaskType
from .errors import PromptFileError

WEIGHTS_NAME = "adapter_model.safetensors"
NAMES = (WEIGHTS_NAME, CONFIG_NAME)
TASK_TYPES = {"causal": TaskType.CAUSAL_LM, "seq2seq": TaskType.SEQ_2_SEQ_LM}
"""PEFT has no P-tuning for masked LMs, and without a task type it leaves the prompt out."""


def pack(vectors: Tensor, config: PromptEncoderConfig, kind: str) -> dict[str, bytes]:
    """The two files' contents, for a model of `kind` (`task_kind`).

    PEFT wants inference mode set in a saved adapter.
    """
    task_type = TASK_TYPES.get(kind, TaskType.FEATURE_EXTRACTION)
    saved = dataclasses.replace(config, inference_mode=True, task_type=task_type)
    return {
        WEIGHTS_NAME: files.pack_tensors({"prompt_embeddings": vectors}, {"format": "pt"}),
        CONFIG_NAME: saved.to_json().encode(),
    }


def read(folder: Path) -> tuple[Tensor, PromptEncoderConfig]:
    """The vectors ``(virtual tokens, width)`` and configuration of a PEFT folder.

    PEFT keeps one row per virtual token and transformer submodule, and uses the first
    ``num_virtual_tokens`` of them; so do we.

    Raises:
        PromptFileError: another method, a pickle, missing, extra or mis-shaped tensors.
    """
    config = PromptEncoderConfig.from_pretrained(folder)
    tensors, _ = files.read_tensors(folder / WEIGHTS_NAME)
    vectors = tensors.pop("prompt_embeddings", None)
    if vectors is None:
        raise PromptFileError(
            f"{folder / WEIGHTS_NAME} has no tensor 'prompt_embeddings'; it holds {sorted(tensors)}"
        )
    if tensors:
        raise PromptFileError(
            f"{folder / WEIGHTS_NAME} also holds {sorted(tensors)}: further trained modules "
            "(modules_to_save) cannot be used as a prompt alone"
        )
    count = config.num_virtual_tokens
    expected = None if count is None else count * (config.num_transformer_submodules or 1)
    if vectors.dim() != 2 or len(vectors) != expected:
        raise PromptFileError(
            f"{folder / WEIGHTS_NAME}: 'prompt_embeddings' has shape {tuple(vectors.shape)}, and "
            f"{CONFIG_NAME} asks for {expected} rows"
        )
    if config.token_dim not in (None, vectors.shape[1]):
        raise PromptFileError(
            f"{folder / WEIGHTS_NAME}: 'prompt_embeddings' is {vectors.shape[1]} wide, and "
            f"{CONFIG_NAME} says {config.token_dim}"
        )
    return vectors[:count].float(), config
