"""The per-task names that people import: one class, with each task's order of arguments."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import InputError, warn
from ..prompts.encoder_config import PromptEncoderConfig, TaskType
from .adapters import checked
from .model import PeftModel

_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")
_MORE = ("position_ids", "token_type_ids", "adapter_names")
_LABELLED = ("input_ids", "attention_mask", "inputs_embeds", "labels", *_OUTPUTS, *_MORE)


class PeftModelForCausalLM(PeftModel):
    """A causal language model; ``logits`` are ``(B, virtual tokens + T, vocabulary)``."""

    task_type = TaskType.CAUSAL_LM
    arguments = _LABELLED


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder model; the prompt stands in the encoder's input."""

    task_type = TaskType.SEQ_2_SEQ_LM
    arguments = (
        "input_ids",
        "attention_mask",
        "inputs_embeds",
        "decoder_input_ids",
        "decoder_attention_mask",
        "decoder_inputs_embeds",
        "labels",
        *_OUTPUTS,
        "adapter_names",
    )

    def generate(self, **kwargs: Any) -> Any:
        """The base model's ``generate``; takes keywords only, as the reference's does."""
        return super().generate(**kwargs)


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier, whose last layer is trained too; ``logits`` are ``(B, labels)``."""

    task_type = TaskType.SEQ_CLS
    arguments = _LABELLED


class PeftModelForTokenClassification(PeftModel):
    """A token classifier; ``logits`` are ``(B, virtual tokens + T, labels)``.

    Labels may have the text's length, or the reference's ``virtual tokens + T``.
    """

    task_type = TaskType.TOKEN_CLS
    arguments = _LABELLED


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answering model.

    ``start_positions`` and ``end_positions`` count from the first virtual token, as the
    reference's, unless virtual positions are dropped: then they count from the text's first.
    """

    task_type = TaskType.QUESTION_ANS
    arguments = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "start_positions",
        "end_positions",
        *_OUTPUTS,
        "adapter_names",
    )


class PeftModelForFeatureExtraction(PeftModel):
    """A model of hidden states; ``last_hidden_state`` is ``(B, virtual tokens + T, width)``."""

    task_type = TaskType.FEATURE_EXTRACTION
    arguments = ("input_ids", "attention_mask", "inputs_embeds", *_OUTPUTS, *_MORE)


class PeftModelForAnyTask(PeftModel):
    """A model of no declared task, such as a masked language model.

    Labels as long as the text are taken to have a value per token.
    """

    task_type = None
    arguments = _LABELLED


def get_peft_model(
    model: nn.Module,
    peft_config: PromptEncoderConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    **options: Any,
) -> PeftModel:
    """Put an untrained prompt on a base model.

    Args:
        model: a transformers model; frozen in place.
        peft_config: completed in place with the model's sizes.
        adapter_name: name of the prompt.
        mixed: the reference's mix of methods; refused.
        autocast_adapter_dtype: without effect; encoders are float32 whatever the model is.
        revision: of the base model, kept in the configuration.
        low_cpu_mem_usage: without effect; prompts are small.
        options: ``template``, ``tokenizer``, ``reference_layout``, ``drop_virtual_positions``
            (`PeftModel`).

    Returns:
        The model with the prompt, of the class that the configuration's task has.

    Raises:
        InputError: another method's configuration, or one that does not fit the model, which is
            left as it was.
    """
    config = checked(peft_config)
    if mixed:
        raise InputError("mixed=True combines several methods; this package has P-tuning alone")
    name = getattr(model, "name_or_path", None) or None
    before = config.base_model_name_or_path
    result: PeftModel = PeftModel.by_task[config.task_type](model, config, adapter_name, **options)
    config.base_model_name_or_path = name
    if before is not None and before != name:
        warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to '{name}'. "
            "Make sure that the saved prompt is loaded with the right base model."
        )
    if revision is not None:
        config.revision = revision
    return result
