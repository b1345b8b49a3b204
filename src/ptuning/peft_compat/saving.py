"""Adapters as folders, through the package's one writer and one reader.

A folder holds the reference's two files, which the reference reads without a warning, and beside
them this package's own (`prompt`): with the encoder's weights, so that training can go on. An
adapter with a template has no configuration for the reference, which would put its tokens in front.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

from .. import formats, places, storage
from ..backbone.identity import check_same, describe
from ..backbone.upstream import uncompiled
from ..data.text import read_text
from ..errors import InputError, PromptFileError, warn
from ..prompts import peft_files, prompt_files
from ..prompts.encoder_config import CONFIG_NAME, PromptEncoderConfig
from ..prompts.model_card import TAGS
from ..prompts.prompt import Prompt
from .adapter_names import folder_of
from .adapters import checked
from .state_dicts import (
    PREFIX,
    VECTORS,
    embedding_layers,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

HUB = ("token", "cache_dir", "force_download", "local_files_only")
"""How the hub is asked, for a base model and its adapter alike."""


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


def save(
    model: Any,
    name: str,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None,
    keep_encoder: bool,
    save_embedding_layers: bool | str,
) -> None:
    """Write an adapter's folder, atomically; other files there stay."""
    adapter = model.adapter(name)
    encoder = model.prompt_encoder[name]
    state = get_peft_model_state_dict(model, state_dict, name, save_embedding_layers=False)
    rows = state.pop(VECTORS).float().cpu()
    layers = embedding_layers(model, name, save_embedding_layers)
    modules, whole = (
        {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        for tensors in (state, {**layers, **state})
    )
    config = adapter.config.replace(inference_mode=True)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model.base_model, "name_or_path", None) or None
    if config.task_type is None:
        kind = type(uncompiled(model.base_model))
        config.auto_mapping = {
            "base_model_class": kind.__name__,
            "parent_library": kind.__module__,
        }
    prompt = Prompt.of_config(config, adapter.insertion.template)
    prompt.vectors = rows[: config.num_virtual_tokens]
    if not adapter.config.inference_mode:
        prompt.encoder_weights = {k: v.detach() for k, v in encoder.state_dict().items()}
    prompt.modules = modules if adapter.insertion.template is None else whole
    prompt.base_model = describe(model.base_model, None)
    prompt.peft_config = config.to_dict()
    content = prompt.contents(keep_encoder=keep_encoder)
    if prompt_files.has_other_card(folder):
        del content[prompt_files.CARD]
    if adapter.insertion.template is None:
        content |= peft_files.pack(rows, config, None, whole)
    else:
        # transformers' Trainer resumes from a checkpoint that has a file of this name. PEFT reads
        # none of it: no configuration stands beside it, and no tensor has a name that PEFT knows.
        tensors = {"vectors_of_template": prompt.vectors}
        content[peft_files.WEIGHTS_NAME] = formats.pack_tensors(tensors, {"format": "pt"})
    storage.write_folder(folder, content, peft_files.NAMES)


def read(path: str | Path, **hub: Any) -> Saved:
    """Read a saved adapter, of this package or of the reference.

    Raises:
        PromptFileError: missing, damaged, unsafe, or of another method.
    """
    known = ("revision", "subfolder", *HUB)
    folder = places.local_folder(path, **{k: hub[k] for k in known if hub.get(k) is not None})
    with storage.reading(folder):
        return _read(folder)


def _read(folder: Path) -> Saved:
    prompt = Prompt.load(folder) if prompt_files.are_in(folder) else None
    if prompt is None or (folder / CONFIG_NAME).is_file():
        rows, config, modules = peft_files.read(folder, old_releases=True)
        if prompt and not _begin_as(rows, prompt.trained_vectors()):
            prompt = None
            warn(
                f"{folder}: {peft_files.WEIGHTS_NAME} has other vectors than prompt.safetensors: "
                "another program has written it since, or it is damaged; its vectors are used"
            )
        elif prompt:  # the reference knows no encoder of an embedding alone
            config.encoder_reparameterization_type = prompt.encoder.upper()
    else:
        if not prompt.peft_config:
            raise PromptFileError(
                f"{folder} holds a prompt that was not made from a configuration; load it with "
                "ptuning.Prompt.load and use it with ptuning.attach"
            )
        config = PromptEncoderConfig.from_dict(prompt.peft_config)
        rows, modules = prompt.trained_vectors(), prompt.modules
    state = {VECTORS: rows, **{PREFIX + name: tensor for name, tensor in modules.items()}}
    return Saved(config, state, prompt)


def _begin_as(rows: Tensor, vectors: Tensor) -> bool:
    return torch.equal(rows[: len(vectors)], vectors)


def warn_of_missing(result: Any) -> None:
    """Warn of trained modules that a checkpoint does not have."""
    if result.missing_keys:
        warn(
            f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}; they "
            "keep the base model's values"
        )


def fill(model: Any, name: str, saved: Saved, ignore_mismatched_sizes: bool = False) -> Any:
    """Give an adapter what was saved; the encoder's own weights too where they are kept.

    Raises:
        InputError: the adapter has another template than the saved one.
    """
    if model.adapter(name).insertion.template != (saved.prompt.template if saved.prompt else None):
        raise InputError(
            f"adapter {name!r} has another template than the saved one; load it under another name"
        )
    if saved.prompt:
        check_same(saved.prompt.base_model, model.base_model, None)
    result = set_peft_model_state_dict(model, saved.state, name, ignore_mismatched_sizes)
    encoder = model.prompt_encoder[name]
    weights = saved.prompt.encoder_weights if saved.prompt else None
    shapes = {key: tensor.shape for key, tensor in encoder.state_dict().items()}
    if weights and {key: tensor.shape for key, tensor in weights.items()} == shapes:
        encoder.load_state_dict(weights)
    return result


class Saving:
    """The part of ``PeftModel`` that reads and writes adapters."""

    def create_or_update_model_card(self: Any, output_dir: str | Path) -> None:
        """Say in a folder's README.md that an adapter is there; what else it says stays.

        transformers' ``Trainer`` calls it when it has written a card of its own.

        Args:
            output_dir: of the training; the card is made where there is none.
        """
        path = places.named(output_dir) / "README.md"
        card = ModelCard(read_text(path) if path.is_file() else "---\n{}\n---\n")
        data: Any = card.data
        data.library_name = "peft"
        data.base_model = getattr(self.base_model, "name_or_path", None) or None
        data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS]))
        card.save(path)

    def save_pretrained(
        self: Any,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        keep_encoder: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save adapters: ``default`` in the folder itself, others in folders of their names.

        Args:
            save_directory: made if need be.
            safe_serialization: False is refused; prompts are never pickled.
            selected_adapters: their names; all by default.
            save_embedding_layers: also save the base model's embedding and output layer; by default
                where the embedding was resized since the base model was saved.
            is_main_process: only that process writes.
            path_initial_model_for_weight_conversion: refused; it is another method's.
            keep_encoder: also save the encoder's weights, so that training can continue.
            kwargs: ``state_dict`` of the whole model, as distributed training gathers it.

        Raises:
            InputError: an unknown name, no path, or something refused; nothing is written.
        """
        if not safe_serialization or path_initial_model_for_weight_conversion is not None:
            raise InputError(
                "prompts are saved as safetensors, never pickled or converted; leave "
                "safe_serialization and path_initial_model_for_weight_conversion out"
            )
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise InputError(
                f"You passed an invalid `selected_adapters` arguments: {unknown} are not among "
                f"{list(self.peft_config)}"
            )
        save_directory = places.named(save_directory)
        if save_directory.is_file():
            raise InputError(f"{save_directory} is a file; give a directory")
        if is_main_process:
            for name in names:
                folder, state = folder_of(save_directory, name), kwargs.get("state_dict")
                save(self, name, folder, state, keep_encoder, save_embedding_layers)

    def load_adapter(
        self: Any,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved adapter beside the others, or into the one of that name.

        Args:
            model_id: a folder or a hub repository.
            adapter_name: its name here. It is not made active.
            is_trainable: go on training: from the saved encoder, or from the vectors alone.
            tokenizer: needed if the adapter has a template.
            kwargs: ``revision``, ``subfolder`` and so on for the hub; ``config`` to use instead of
                the saved one; ``ignore_mismatched_sizes``.
            torch_device, autocast_adapter_dtype, ephemeral_gpu_offload, low_cpu_mem_usage,
            key_mapping: the reference's, without effect.

        Returns:
            ``missing_keys`` and ``unexpected_keys``.

        Raises:
            PromptFileError, InputError: it cannot be read or does not fit; nothing is changed.
        """
        saved = read(model_id, **kwargs)
        new = adapter_name not in self.peft_config
        if not new and is_trainable and self.peft_config[adapter_name].inference_mode:
            raise InputError(
                f"adapter {adapter_name!r} is there for inference alone, without an encoder to "
                f"train; delete_adapter({adapter_name!r}) first, or give another adapter_name"
            )
        if new:
            config = checked(kwargs.get("config") or saved.config)
            config.inference_mode = not is_trainable
            template = saved.prompt.template if saved.prompt else None
            self.add_adapter(adapter_name, config, template=template, tokenizer=tokenizer)
        try:
            result = fill(self, adapter_name, saved, bool(kwargs.get("ignore_mismatched_sizes")))
        except BaseException:
            if new:
                self.delete_adapter(adapter_name)
            raise
        self._activate_modules()
        if not is_trainable:
            self.eval()
        return result

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Put a saved adapter on a base model.

        Args:
            model: the base model.
            model_id: a folder or a hub repository.
            adapter_name: the adapter's name here.
            is_trainable: go on training, which the reference refuses.
            config: instead of the saved one; changed in place.
            kwargs: as for `load_adapter`, and ``tokenizer``, ``reference_layout``,
                ``drop_virtual_positions``.
            autocast_adapter_dtype, ephemeral_gpu_offload, low_cpu_mem_usage, key_mapping: the
                reference's, without effect.

        Raises:
            PromptFileError, InputError: it cannot be read or does not fit the model.
        """
        saved = read(model_id, **kwargs)
        config = checked(saved.config if config is None else config)
        config.inference_mode = not is_trainable
        own = ("tokenizer", "reference_layout", "drop_virtual_positions")
        options = {name: kwargs[name] for name in own if name in kwargs}
        template = saved.prompt.template if saved.prompt else None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        task = config.task_type or getattr(cls, "task_type", None)
        kind = cls.by_task[task]  # type: ignore[attr-defined]
        result: Any = kind(model, config, adapter_name, template=template, **options)
        try:
            load = fill(result, adapter_name, saved, bool(kwargs.get("ignore_mismatched_sizes")))
        except BaseException:
            result.delete_adapter(adapter_name)
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        warn_of_missing(load)
        return result if is_trainable else result.eval()

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What is trained: encoders and trained modules, ``(…)`` by name. The base model is its
        owner's to save."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = nn.Module.state_dict(self, *args, **kwargs)
        mine = f"{prefix}base_model."
        for key in [k for k in state if k.startswith(mine) and ".modules_to_save." not in k]:
            del state[key]
        return state


def expect_no_base(module: nn.Module, keys: Any) -> None:
    """A state dict without the base model's tensors is whole (`Saving.state_dict`)."""
    keys.missing_keys[:] = [
        key for key in keys.missing_keys if "base_model." not in key or ".modules_to_save." in key
    ]
