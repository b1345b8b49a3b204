"""One adapter: its configuration made complete by the model, what it inserts, its vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..backbone.lookups import input_embedding
from ..backbone.spans import Span
from ..errors import InputError, a_kind, warn
from ..prompts.encoder import PromptEncoder
from ..prompts.encoder_config import PeftType, PromptEncoderConfig, TaskType
from .insertion import Insertion

CLASSIFIERS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""What is trained with the prompt besides ``modules_to_save``, by task."""
_HEADS = frozenset(name for names in CLASSIFIERS.values() for name in names)
_SIZES = {
    "num_layers": ("num_hidden_layers", "n_layer", "encoder_layers"),
    "num_attention_heads": ("n_head", "num_heads", "encoder_attention_heads"),
}


@dataclass(eq=False)
class Adapter:
    """One adapter on a model.

    Attributes:
        config: complete.
        insertion: what it inserts around a row's text.
        span: its virtual ids.
    """

    config: PromptEncoderConfig
    insertion: Insertion
    span: Span

    def vectors(self, encoder: PromptEncoder) -> Tensor:
        """What the virtual ids stand for now ``(virtual tokens, width)``."""
        return encoder.table()[: len(self.span.rows)]


def checked(config: Any) -> PromptEncoderConfig:
    """A configuration of this package; the reference's own objects are taken over.

    Raises:
        InputError: it belongs to another method, has wrong values, or is no configuration.
    """
    if isinstance(config, PromptEncoderConfig):
        config.replace()  # refuses what was assigned since it was made
        return config
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None or not hasattr(config, "peft_type"):
        raise InputError(f"the configuration is {a_kind(config)}; give a PromptEncoderConfig")
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != PeftType.P_TUNING:
        raise InputError(
            f"peft_type is {kind}, and this package has only P_TUNING: use that configuration "
            "with the library that it belongs to"
        )
    return PromptEncoderConfig.from_dict(to_dict())


def tell_of_untrained(model: nn.Module, names: Sequence[str]) -> None:
    """Warn of modules to train, by the ends of their names, of which the model has none."""
    paths = [path.replace(".original_module", "") for path, _ in model.named_modules()]
    lost = [name for name in names if not any(path.endswith(name) for path in paths)]
    if lost == [*names] and _HEADS.issuperset(lost):
        text = f"the model has no module named {' or '.join(lost)}, so its head is"
    else:  # of a task's own names there need be but one
        lost = [name for name in lost if name not in _HEADS]
        text = f"modules_to_save names {', '.join(lost)}, which the model does not have:"
    if lost:
        warn(
            f"{text} not trained with the prompt; give names as model.named_modules() has them, "
            "such as modules_to_save=['classification_head'] for BART and T5"
        )


def completed(
    config: PromptEncoderConfig,
    model: nn.Module,
    insertion: Insertion | None,
    use: TaskType | None,
) -> dict[str, Any]:
    """The values that the model and the template give a configuration.

    Args:
        config: as it came.
        model: the base model.
        insertion: that of a template.
        use: what the ``PeftModel`` is for, which a configuration without a task is then for too.

    Raises:
        InputError: no number of virtual tokens, one that is not the template's, or a width that is
            not the model's.
    """
    count = config.num_virtual_tokens or (insertion.count if insertion else None)
    if count is None:
        raise InputError("num_virtual_tokens is missing; give the number of virtual tokens")
    if insertion is not None and insertion.count != count:
        raise InputError(
            f"num_virtual_tokens is {count}, and the template has {insertion.count} virtual "
            f"tokens: {insertion.template}; make them agree"
        )
    width = input_embedding(model).embedding_dim
    if config.token_dim not in (None, width):
        raise InputError(
            f"token_dim is {config.token_dim}, and the model's input embedding is {width} wide; "
            "leave token_dim out, or give the model that the configuration was made for"
        )
    task = TaskType(config.task_type) if config.task_type is not None else use
    doubled = task == TaskType.SEQ_2_SEQ_LM and insertion is None
    values: dict[str, Any] = {
        "task_type": task,
        "num_virtual_tokens": count,
        "token_dim": width,
        "num_transformer_submodules": config.num_transformer_submodules or (2 if doubled else 1),
        "encoder_hidden_size": config.encoder_hidden_size or width,
    }
    about: Any = getattr(model, "config", None)
    about = about.get_text_config() if hasattr(about, "get_text_config") else about
    for name, others in _SIZES.items():
        known = (getattr(about, other, None) for other in (name, *others))
        values[name] = getattr(config, name) or next((v for v in known if v is not None), None)
    trained = [*(config.modules_to_save or ())]
    for kind in (task, use):
        trained += CLASSIFIERS.get(kind, ()) if kind else ()
    values["modules_to_save"] = list(dict.fromkeys(trained)) or None
    return values
