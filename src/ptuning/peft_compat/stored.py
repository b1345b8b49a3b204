"""Saving and loading, as methods: what ``PeftModel`` offers on top of `saving`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from ..errors import InputError
from . import saving
from .adapter_names import folder_of
from .adapters import checked


class Stored:
    """The part of ``PeftModel`` that reads and writes adapters.

    Attributes:
        by_task: the class of each task.
    """

    by_task: ClassVar[dict[Any, Any]] = {}

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
            save_embedding_layers: without effect.
            is_main_process: only that process writes.
            path_initial_model_for_weight_conversion: refused; it is another method's.
            keep_encoder: also save the encoder's weights, so that training can continue.
            kwargs: ``state_dict`` of the whole model, as distributed training gathers it.

        Raises:
            InputError: an unknown name, or something refused; nothing is written.
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
        if Path(save_directory).is_file():
            raise InputError(f"{save_directory} is a file; give a directory")
        if is_main_process:
            for name in names:
                folder, state = folder_of(save_directory, name), kwargs.get("state_dict")
                saving.save(self, name, folder, state, keep_encoder)

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
        saved = saving.read(model_id, **kwargs)
        new = adapter_name not in self.peft_config
        if new:
            config = checked(kwargs.get("config") or saved.config)
            config.inference_mode = not is_trainable
            template = saved.prompt.template if saved.prompt else None
            self.add_adapter(adapter_name, config, template=template, tokenizer=tokenizer)
        try:
            result = saving.fill(
                self, adapter_name, saved, bool(kwargs.get("ignore_mismatched_sizes"))
            )
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
        saved = saving.read(model_id, **kwargs)
        config = checked(saved.config if config is None else config)
        config.inference_mode = not is_trainable
        own = ("tokenizer", "reference_layout", "drop_virtual_positions")
        options = {name: kwargs[name] for name in own if name in kwargs}
        template = saved.prompt.template if saved.prompt else None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        task = config.task_type or getattr(cls, "task_type", None)
        kind = cls.by_task[task]
        result: Any = kind(model, config, adapter_name, template=template, **options)
        try:
            load = saving.fill(
                result, adapter_name, saved, bool(kwargs.get("ignore_mismatched_sizes"))
            )
        except BaseException:
            result.delete_adapter(adapter_name)
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        saving.warn_of_missing(load)
        return result if is_trainable else result.eval()

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What is trained: encoders and trained modules. The base model is its owner's to save."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = nn.Module.state_dict(self, *args, **kwargs)
        mine = f"{prefix}base_model."
        for key in [k for k in state if k.startswith(mine) and ".modules_to_save." not in k]:
            del state[key]
        return state


def expect_no_base(module: nn.Module, keys: Any) -> None:
    """A state dict without the base model's tensors is whole (`Stored.state_dict`)."""
    keys.missing_keys[:] = [
        key for key in keys.missing_keys if "base_model." not in key or ".modules_to_save." in key
    ]
