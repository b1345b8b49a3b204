"""Adapters as state dicts and as folders, through the package's one writer and one reader.

A folder holds the reference's two files, which the reference reads without a warning, and beside
them this package's own (`prompt`): with the encoder's weights, so that training can go on. An
adapter with a template has only the latter, since the reference would put its tokens in front.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import places, storage
from ..backbone.identity import check_same, describe
from ..backbone.upstream import uncompiled
from ..errors import InputError, PromptFileError
from ..prompts import peft_files, prompt_files
from ..prompts.encoder import PromptEncoder, initialise
from ..prompts.encoder_config import CONFIG_NAME, PromptEncoderConfig
from ..prompts.prompt import Prompt
from .modules_to_save import wrappers

_VECTORS = "prompt_embeddings"
_PREFIX = "base_model."


@dataclasses.dataclass(frozen=True)
class Saved:
    """A saved adapter.

    Attributes:
        config: as saved.
        state: what `set_peft_model_state_dict` takes.
        prompt: with the encoder's weights and the template, where this package saved it.
    """

    config: PromptEncoderConfig
    state: dict[str, Tensor]
    prompt: Prompt | None


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the reference's names.

    Args:
        model: a ``PeftModel``.
        state_dict: of the whole model, to take the trained modules from, as distributed training
            gathers it; by default the model's own.
        adapter_name: which adapter.
        unwrap_compiled: look through ``torch.compile``.
        save_embedding_layers: without effect; P-tuning never changes the embedding.

    Returns:
        ``prompt_embeddings`` ``(virtual tokens x submodules, width)`` and the trained modules'.
    """
    if unwrap_compiled:
        model = uncompiled(model)
    model.adapter(adapter_name)
    result = {_VECTORS: model.get_prompt_embedding_to_save(adapter_name)}
    for path, wrapper in wrappers(model.base_model).items():
        if adapter_name in wrapper.modules_to_save:
            module = wrapper.modules_to_save[adapter_name]
            for key, tensor in module.state_dict().items():
                whole = f"{_PREFIX}{path}.modules_to_save.{adapter_name}.{key}"
                given = (state_dict or {}).get(whole, tensor)
                result[f"{_PREFIX}{path}.{key}"] = given.detach()
    return result


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> torch.nn.modules.module._IncompatibleKeys:
    """Give an adapter the tensors of a state dict.

    An encoder with a head is changed so that it gives the vectors of the state dict; the reference
    would take them for the head's input.

    Args:
        model: a ``PeftModel``.
        peft_model_state_dict: as `get_peft_model_state_dict` gives it.
        adapter_name: which adapter.
        ignore_mismatched_sizes: leave out trained modules of another shape.
        low_cpu_mem_usage: without effect.

    Raises:
        PromptFileError: missing, extra or mis-shaped tensors; nothing is changed.
    """
    adapter = model.adapter(adapter_name)
    state = dict(peft_model_state_dict)
    encoder = model.prompt_encoder[adapter_name]
    rows = state.pop(_VECTORS, None)
    expected = tuple(encoder.embedding.weight.shape)
    if rows is None or tuple(rows.shape) != expected:
        came = "none" if rows is None else f"{_VECTORS} of shape {tuple(rows.shape)}"
        raise PromptFileError(
            f"adapter {adapter_name!r} needs {_VECTORS} of shape {expected}; there is {came}"
        )
    targets = _module_tensors(model, adapter_name)
    extra = sorted(set(state) - set(targets))
    wrong = [k for k in targets if k in state and state[k].shape != targets[k].shape]
    if extra or (wrong and not ignore_mismatched_sizes):
        shapes = [f"{k} {tuple(state[k].shape)} for {tuple(targets[k].shape)}" for k in wrong]
        raise PromptFileError(
            f"adapter {adapter_name!r} has no place for {extra + shapes}; the modules that it "
            f"trains are {adapter.config.modules_to_save}: give the model and configuration that "
            "it was saved with"
        )
    with torch.no_grad():
        initialise_all(encoder, rows)
        for key in set(state) - set(wrong):
            targets[key].copy_(state[key])
    missing = sorted(set(targets) - set(state))
    return torch.nn.modules.module._IncompatibleKeys(missing, wrong)


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The base model's own tensors under its own names, without adapters."""
    state = model.get_base_model().state_dict()
    return {
        key.replace(".original_module.", "."): tensor
        for key, tensor in state.items()
        if ".modules_to_save." not in key
    }


def set_base_model_state_dict(
    model: Any, state_dict: Mapping[str, Tensor], strict: bool = True
) -> torch.nn.modules.module._IncompatibleKeys:
    """Load the base model's own tensors, as `get_base_model_state_dict` gives them."""
    base = model.get_base_model()
    names = {
        key.replace(".original_module.", "."): key
        for key in base.state_dict()
        if ".modules_to_save." not in key
    }
    inner = {names.get(key, key): tensor for key, tensor in state_dict.items()}
    trained = {k: v for k, v in base.state_dict().items() if ".modules_to_save." in k}
    return base.load_state_dict({**trained, **inner}, strict=strict)


def _module_tensors(model: Any, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter's trained modules, under the names that are saved."""
    return {
        f"{_PREFIX}{path}.{key}": tensor
        for path, wrapper in wrappers(model.base_model).items()
        if name in wrapper.modules_to_save
        for key, tensor in wrapper.modules_to_save[name].state_dict(keep_vars=True).items()
    }


def initialise_all(encoder: PromptEncoder, rows: Tensor) -> None:
    """Let an encoder give `rows`, one for each of its virtual tokens."""
    weight = encoder.embedding.weight
    initialise(encoder, rows.to(weight.device), torch.arange(len(weight), device=weight.device))


def save(
    model: Any,
    name: str,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None,
    keep_encoder: bool,
) -> None:
    """Write an adapter's folder, atomically; other files there stay."""
    adapter = model.adapter(name)
    encoder = model.prompt_encoder[name]
    state = get_peft_model_state_dict(model, state_dict, name)
    rows = state.pop(_VECTORS).float().cpu()
    modules = {key.removeprefix(_PREFIX): tensor for key, tensor in state.items()}
    config = adapter.config.replace(inference_mode=True)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model.base_model, "name_or_path", None) or None
    if config.task_type is None:
        kind = type(model.base_model)
        config.auto_mapping = {
            "base_model_class": kind.__name__,
            "parent_library": kind.__module__,
        }
    prompt = Prompt.of_config(config, adapter.frame.template)
    prompt.vectors = rows[: config.num_virtual_tokens]
    if not adapter.config.inference_mode:
        prompt.encoder_weights = {k: v.detach() for k, v in encoder.state_dict().items()}
    prompt.modules = modules
    prompt.base_model = describe(model.base_model, None)
    prompt.peft_config = config.to_dict()
    content = prompt.contents(keep_encoder=keep_encoder)
    if adapter.frame.template is None:
        content |= peft_files.pack(rows, config, None, modules)
    storage.write_folder(folder, content, peft_files.NAMES)


def read(path: str | Path, **hub: Any) -> Saved:
    """Read a saved adapter, of this package or of the reference.

    Raises:
        PromptFileError: missing, damaged, unsafe, or of another method.
    """
    known = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")
    folder = places.local_folder(path, **{k: hub[k] for k in known if hub.get(k) is not None})
    with storage.reading(folder):
        return _read(folder)


def _read(folder: Path) -> Saved:
    prompt = Prompt.load(folder) if prompt_files.are_in(folder) else None
    if prompt is None or (folder / CONFIG_NAME).is_file():
        rows, config, modules = peft_files.read(folder, old_releases=True)
        if prompt and (len(rows) < len(prompt.vectors) or not _same(rows, prompt)):  # type: ignore[arg-type]
            prompt = None
            warnings.warn(
                f"{folder}: {peft_files.WEIGHTS_NAME} has other vectors than prompt.safetensors: "
                "another program has written it since, or it is damaged; its vectors are used",
                stacklevel=4,
            )
        elif prompt:  # the reference knows no encoder without a head
            config.encoder_reparameterization_type = prompt.encoder.upper()
    else:
        if not prompt.peft_config:
            raise PromptFileError(
                f"{folder} holds a prompt that was not made from a configuration; load it with "
                "ptuning.Prompt.load and use it with ptuning.attach"
            )
        config = PromptEncoderConfig.from_dict(prompt.peft_config)
        rows, modules = prompt.trained_vectors(), prompt.modules
    state = {_VECTORS: rows, **{_PREFIX + name: tensor for name, tensor in modules.items()}}
    return Saved(config, state, prompt)


def _same(rows: Tensor, prompt: Prompt) -> bool:
    vectors = prompt.trained_vectors()
    return torch.equal(rows[: len(vectors)], vectors)


def warn_of_missing(result: Any) -> None:
    """Warn of trained modules that a checkpoint does not have."""
    if result.missing_keys:
        warnings.warn(
            f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}; they "
            "keep the base model's values",
            stacklevel=4,
        )


def fill(model: Any, name: str, saved: Saved, ignore_mismatched_sizes: bool = False) -> Any:
    """Give an adapter what was saved; the encoder's own weights too where they are kept."""
    result = set_peft_model_state_dict(model, saved.state, name, ignore_mismatched_sizes)
    encoder = model.prompt_encoder[name]
    weights = saved.prompt.encoder_weights if saved.prompt else None
    shapes = {key: tensor.shape for key, tensor in encoder.state_dict().items()}
    if weights and {key: tensor.shape for key, tensor in weights.items()} == shapes:
        encoder.load_state_dict(weights)
    if saved.prompt:
        check_same(saved.prompt.base_model, model.base_model, None)
    if model.adapter(name).frame.template != (saved.prompt.template if saved.prompt else None):
        raise InputError(
            f"adapter {name!r} has another template than the saved one; load it under another name"
        )
    return result
