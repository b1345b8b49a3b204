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
from .config import CONFIG_NAME, PromptEncoderConfig
from .errors import PromptFileError

WEIGHTS_NAME = "adapter_model.safetensors"


def pack(vectors: Tensor, config: PromptEncoderConfig) -> dict[str, bytes]:
    """The two files' contents. PEFT asks for inference mode to be set in a saved adapter."""
    saved = dataclasses.replace(config, inference_mode=True)
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
    return vectors[:count].float(), config
