"""Adapters as state dicts, under the reference's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..backbone.upstream import different_keys, uncompiled, uncompiled_name
from ..errors import InputError, PromptFileError, warn
from ..prompts.encoder import initialise
from .modules_to_save import ModulesToSaveWrapper, wrappers

VECTORS = "prompt_embeddings"
"""The name of an adapter's vectors; trained modules follow under `PREFIX`."""
PREFIX = "base_model."


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
        save_embedding_layers: also the base model's embedding, as for `embedding_layers`.

    Returns:
        ``prompt_embeddings`` ``(virtual tokens x submodules, width)`` and the trained modules'.
    """
    if unwrap_compiled:
        model = uncompiled(model)
    model.adapter(adapter_name)
    layers = embedding_layers(model, adapter_name, save_embedding_layers)
    result = {VECTORS: model.get_prompt_embedding_to_save(adapter_name)}
    gathered = {uncompiled_name(key): tensor for key, tensor in (state_dict or {}).items()}
    for path, wrapper in wrappers(model.base_model).items():
        own = f"{PREFIX}{uncompiled_name(path)}."
        state = {**wrapper.state_dict(prefix=own), **gathered}
        names = wrapper.adapter_state_dict_load_map(adapter_name)
        result |= {f"{own}{key}": state[f"{own}{name}"].detach() for key, name in names.items()}
    return {**layers, **result}


def embedding_layers(model: Any, adapter_name: str, wanted: bool | str) -> dict[str, Tensor]:
    """The base model's input embedding and output layer under the names that are saved, for rows of
    tokens that were added to it: nobody else has these.

    Args:
        model: a ``PeftModel``.
        adapter_name: which adapter.
        wanted: ``"auto"``: if the base model's own folder, or its copy from the hub, has another
            vocabulary.

    Raises:
        InputError: `wanted` is none of True, False and ``"auto"``.
    """
    if wanted not in (True, False, "auto"):
        raise InputError(f"save_embedding_layers is {wanted!r}; give True, False or 'auto'")
    if wanted == "auto" and (wanted := _was_resized(model, adapter_name)):
        warn(
            "the base model's embedding was resized, so it is saved with the adapter; if it is "
            "saved elsewhere, give save_embedding_layers=False"
        )
    found: dict[str, Tensor] = {}
    for name, tensor in _embedding_tensors(model).items() if wanted else ():
        if all(tensor is not other for other in found.values()):  # one tensor of tied layers
            found[name] = tensor
    return {name: tensor.detach() for name, tensor in found.items()}


def embedding_rows(state: Mapping[str, Tensor], base: Any) -> int:
    """How many rows the base model's input embedding has in an adapter's state dict; 0 where it is
    not in it."""
    embedding = base.get_input_embeddings()
    names = (f"{PREFIX}{name}.weight" for name, m in base.named_modules() if m is embedding)
    return next((len(state[name]) for name in names if name in state), 0)


def _was_resized(model: Any, adapter_name: str) -> bool:
    base = model.base_model
    place = model.adapter(adapter_name).config.base_model_name_or_path or base.name_or_path
    if not place:
        return False
    try:
        saved = type(base.config).from_pretrained(place, local_files_only=True)
    except (OSError, ValueError):  # there is nothing to compare with
        return False
    sizes = [getattr(c.get_text_config(), "vocab_size", None) for c in (saved, base.config)]
    return sizes[0] != sizes[1]


def _embedding_tensors(model: Any) -> dict[str, Tensor]:
    """Name in a saved adapter -> tensor of the base model, tied ones too."""
    base = model.base_model
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    return {
        f"{PREFIX}{uncompiled_name(path)}.{key}": tensor
        for path, module in base.named_modules()
        if any(module is layer for layer in layers) and not isinstance(module, ModulesToSaveWrapper)
        for key, tensor in module.state_dict(keep_vars=True).items()
    }


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Give an adapter the tensors of a state dict.

    An encoder with an MLP or LSTM is changed so that it gives the vectors of the state dict; the
    reference would take them for the network's input.

    Args:
        model: a ``PeftModel``.
        peft_model_state_dict: as `get_peft_model_state_dict` gives it.
        adapter_name: which adapter.
        ignore_mismatched_sizes: leave out trained modules of another shape.
        low_cpu_mem_usage: without effect.

    Returns:
        ``missing_keys`` and ``unexpected_keys``, as ``load_state_dict`` gives them.

    Raises:
        PromptFileError: missing, extra or mis-shaped tensors; nothing is changed.
    """
    adapter = model.adapter(adapter_name)
    state = {uncompiled_name(key): tensor for key, tensor in peft_model_state_dict.items()}
    encoder = model.prompt_encoder[adapter_name]
    rows = state.pop(VECTORS, None)
    expected = encoder.total_virtual_tokens, encoder.token_dim
    if rows is None or tuple(rows.shape) != expected:
        came = "none" if rows is None else f"{VECTORS} of shape {tuple(rows.shape)}"
        raise PromptFileError(
            f"adapter {adapter_name!r} needs {VECTORS} of shape {expected}; there is {came}"
        )
    trained = _module_tensors(model, adapter_name)
    layers = {k: v for k, v in _embedding_tensors(model).items() if k in state}
    targets = {**layers, **trained}
    extra = sorted(set(state) - set(targets))
    wrong = [k for k in targets if k in state and state[k].shape != targets[k].shape]
    if extra or (wrong and not ignore_mismatched_sizes):
        shapes = [f"{k} {tuple(state[k].shape)} for {tuple(targets[k].shape)}" for k in wrong]
        raise PromptFileError(
            f"adapter {adapter_name!r} has no place for {extra + shapes}; the modules that it "
            f"trains are {adapter.config.modules_to_save}: give the model and configuration that "
            "it was saved with, and resize_token_embeddings first where tokens were added"
        )
    with torch.no_grad():
        initialise(encoder, rows)
        for key in set(state) - set(wrong):
            targets[key].copy_(state[key])
    missing = sorted(set(trained) - set(state))
    return different_keys(missing, wrong)


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The base model's own tensors under its own names, without adapters."""
    state = uncompiled(model.get_base_model()).state_dict()
    return {
        key.replace(".original_module.", "."): tensor
        for key, tensor in state.items()
        if ".modules_to_save." not in key
    }


def set_base_model_state_dict(
    model: Any, state_dict: Mapping[str, Tensor], strict: bool = True
) -> Any:
    """Load the base model's own tensors, as `get_base_model_state_dict` gives them."""
    base = uncompiled(model.get_base_model())
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
        f"{PREFIX}{uncompiled_name(path)}.{key}": tensor
        for path, wrapper in wrappers(model.base_model).items()
        if name in wrapper.modules_to_save
        for key, tensor in wrapper.modules_to_save[name].state_dict(keep_vars=True).items()
    }
