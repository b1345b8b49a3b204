"""What users of the reference look at in a model: numbers, vectors, the base model's parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.lookups import input_embedding


class Summary:
    """The part of ``PeftModel`` that tells about it."""

    @property
    def word_embeddings(self: Any) -> nn.Embedding:
        """The base model's input embedding."""
        return input_embedding(self.base_model)

    @property
    def base_model_torch_dtype(self: Any) -> torch.dtype | None:
        """The base model's dtype."""
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self: Any) -> nn.Module:
        """The base model."""
        return self.base_model

    def get_prompt(self: Any, batch_size: int, **options: Any) -> Tensor:
        """The active adapter's vectors ``(batch_size, virtual tokens x submodules, width)``."""
        table = self.prompt_encoder[self.active_adapter].table()
        return table.unsqueeze(0).expand(batch_size, -1, -1)

    def get_prompt_embedding_to_save(self: Any, adapter_name: str) -> Tensor:
        """An adapter's vectors ``(virtual tokens x submodules, width)``, on the CPU."""
        encoder = self.prompt_encoder[adapter_name]
        with torch.no_grad():
            training, _ = encoder.training, encoder.eval()
            table = encoder.table().detach().cpu()
            encoder.train(training)
        return table

    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        """The number of parameters that are trained, and of all."""
        sizes = [(_size(p), p.requires_grad) for p in self.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def print_trainable_parameters(self: Any) -> None:
        """Print both numbers and their ratio."""
        trained, everything = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trained:,d} || all params: {everything:,d} || "
            f"trainable%: {100 * trained / everything:.4f}"
        )

    def prepare_model_for_gradient_checkpointing(self: Any, model: nn.Module | None = None) -> None:
        """Let the embedding's output require gradients; with prompts it does so by itself."""
        enable = getattr(self.base_model, "enable_input_require_grads", None)
        if enable is not None:
            enable()

    def set_requires_grad(self: Any, adapter_names: Any, requires_grad: bool = True) -> None:
        """Refused, as in the reference: load an adapter with ``is_trainable`` instead.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "Setting `requires_grad` is not supported for prompt learning methods like P_TUNING."
        )

    def get_layer_status(self: Any) -> Any:
        """Refused, as in the reference: a prompt adds no layers.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "get_layer_status() got an invalid PeftModel instance; prompts add no adapter layers; "
            "see active_adapter and peft_config instead"
        )

    def get_model_status(self: Any) -> Any:
        """Refused, as in the reference: a prompt adds no layers.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "get_model_status() got an invalid PeftModel instance; prompts add no adapter layers; "
            "see active_adapter and peft_config instead"
        )

    def supports_lora_conversion(self: Any, adapter_name: str = "default") -> bool:
        """Always false: a prompt is not a change of weights."""
        return False


def _size(parameter: nn.Parameter) -> int:
    """A parameter's numbers; those that are sharded or packed four bits each are counted whole."""
    size = parameter.numel() or getattr(parameter, "ds_numel", 0)
    if type(parameter).__name__ != "Params4bit":
        return size
    return size * 2 * parameter.element_size()
