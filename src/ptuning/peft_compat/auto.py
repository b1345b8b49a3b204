"""``AutoPeftModel…``: base model and adapter from one name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar

import transformers

from ..errors import InputError
from ..places import local_folder
from ..prompts.encoder_config import PromptEncoderConfig, TaskType
from . import saving
from .model import PeftModel
from .state_dicts import embedding_rows

_LIBRARIES = ("transformers",)


class AutoPeftModel:
    """Loads an adapter of no declared task and the base model that it names."""

    task_type: ClassVar[TaskType | None] = None
    base_class: ClassVar[Any] = None

    def __init__(self, *args: Any, **kwargs: Any):
        raise OSError(
            f"{type(self).__name__} is designed to be instantiated using the "
            f"`{type(self).__name__}.from_pretrained(pretrained_model_name_or_path)` method"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PromptEncoderConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load base model and adapter.

        Args:
            pretrained_model_name_or_path: the adapter's folder or hub repository; its configuration
                names the base model.
            adapter_name: its name here.
            is_trainable: go on training.
            config: instead of the saved one.
            revision: of the adapter.
            import_allowlist: libraries from which the base model's class may come.
            kwargs: for the base model's ``from_pretrained``; ``tokenizer``, ``reference_layout``
                and ``drop_virtual_positions`` are `PeftModel`'s.

        Raises:
            InputError: the adapter belongs to another task, or names no base model.
        """
        place = pretrained_model_name_or_path
        own = ("tokenizer", "reference_layout", "drop_virtual_positions")
        options = {name: kwargs.pop(name) for name in own if name in kwargs}
        hub = {name: kwargs[name] for name in saving.HUB if name in kwargs}
        adapter = saving.read(place, revision=revision, **hub)
        saved = adapter.config
        if saved.task_type is not None and saved.task_type != cls.task_type:
            expected, asked = (PeftModel.by_task[c.task_type].__name__ for c in (saved, cls))
            raise InputError(
                f"Expected target PEFT class: {expected}, but you have asked for: {asked}; use the "
                f"class of the task type {saved.task_type}"
            )
        if not saved.base_model_name_or_path:
            raise InputError(
                f"the configuration in {place} names no base model; load the base model yourself "
                "and use PeftModel.from_pretrained"
            )
        base_class = cls.base_class
        if saved.task_type is None:  # then the file names the class, whatever the task asked for
            base_class = _named(saved.auto_mapping, import_allowlist)
        base = base_class.from_pretrained(
            saved.base_model_name_or_path, revision=saved.revision, **kwargs
        )
        if rows := embedding_rows(adapter.state, base):
            _resize(base, rows)
        elif (local_folder(place, revision, **hub) / "tokenizer_config.json").is_file():
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=revision, **hub)
            _resize(base, max(len(tokenizer), len(base.get_input_embeddings().weight)))
        return PeftModel.by_task[cls.task_type].from_pretrained(
            base,
            place,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **hub,
            **options,
        )


def _named(mapping: dict[str, Any] | None, allowed: list[str] | None) -> Any:
    """The base model's class as a configuration names it, from libraries that may be imported."""
    if not mapping:
        raise InputError(
            "Cannot infer the auto class from the config: it has no task type and no auto_mapping; "
            "load the base model yourself and use PeftModel.from_pretrained"
        )
    library, name = (mapping.get(key) for key in ("parent_library", "base_model_class"))
    if not isinstance(library, str) or not isinstance(name, str):
        raise InputError(
            f"auto_mapping is {mapping}; it names no parent_library and base_model_class: load the "
            "base model yourself and use PeftModel.from_pretrained"
        )
    known = _LIBRARIES if allowed is None else tuple(allowed)
    if not any(library == own or library.startswith(f"{own}.") for own in known):
        raise InputError(
            f"The auto mapping wants to import '{library}' which is not in the import allowlist "
            f"{list(known)}. If you trust it, give import_allowlist=['{library}']"
        )
    try:
        return getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"auto_mapping names {name} of {library}, and there is none in this environment: "
            f"{error}; load the base model yourself and use PeftModel.from_pretrained"
        ) from error


def _resize(model: Any, rows: int) -> None:
    """Make room for tokens that were added when the adapter was trained."""
    if rows != len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(rows)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """A causal language model with its adapter."""

    task_type = TaskType.CAUSAL_LM
    base_class = transformers.AutoModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An encoder-decoder model with its adapter."""

    task_type = TaskType.SEQ_2_SEQ_LM
    base_class = transformers.AutoModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """A sequence classifier with its adapter."""

    task_type = TaskType.SEQ_CLS
    base_class = transformers.AutoModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """A token classifier with its adapter."""

    task_type = TaskType.TOKEN_CLS
    base_class = transformers.AutoModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """An extractive question answering model with its adapter."""

    task_type = TaskType.QUESTION_ANS
    base_class = transformers.AutoModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """A model that ends with its hidden states, with its adapter."""

    task_type = TaskType.FEATURE_EXTRACTION
    base_class = transformers.AutoModel
