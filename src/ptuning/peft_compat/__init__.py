"""The reference's names for P-tuning: change one import and keep code and checkpoints.

    from ptuning.peft_compat import PromptEncoderConfig, get_peft_model

``docs/peft_compat.md`` lists what is the same, what is right here and wrong there, and what is new.
"""

from ..prompts.encoder import PromptEncoder
from ..prompts.encoder_config import (
    PeftType,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    TaskType,
)
from .auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .model import PeftModel
from .modules_to_save import ModulesToSaveWrapper
from .state_dicts import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)

# The reference's base classes of configurations; P-tuning has the one.
PeftConfig = PromptEncoderConfig
PromptLearningConfig = PromptEncoderConfig
PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType.P_TUNING: PromptEncoderConfig}


def get_peft_config(config_dict: dict[str, object]) -> PromptEncoderConfig:
    """A configuration from its fields."""
    return PromptEncoderConfig.from_dict(config_dict)


__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "ModulesToSaveWrapper",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "TaskType",
    "get_base_model_state_dict",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
