"""P-tuning: trainable virtual tokens for frozen language models.

    prompt = ptuning.Prompt("[P*3] {country} [P*3] [MASK]", answer="capital")
    ptuning.train(model, tokenizer, prompt, rows, dev=dev_rows)
    ptuning.predict(model, tokenizer, prompt, [{"country": "France"}])

Names are imported when they are first used, so that ``ptuning --help`` need not wait for torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attachment import Attachment, attach
    from .config import (
        PeftType,
        PromptEncoderConfig,
        PromptEncoderReparameterizationType,
        TaskType,
    )
    from .data import read_examples
    from .encoder import PromptEncoder
    from .errors import (
        DataError,
        InputError,
        PromptFileError,
        PtuningError,
        TemplateError,
        TrainingError,
    )
    from .evaluation import Evaluation, evaluate
    from .models import load_model
    from .nearest import nearest_words
    from .prediction import Prediction, predict, predict_details
    from .prompt import Prompt
    from .render import Renderer
    from .settings import TrainSettings
    from .task import Task
    from .template import parse
    from .trainer import trainer_parts
    from .training import TrainResult, train

_HOME = {
    "attachment": ("Attachment", "attach"),
    "config": (
        "PeftType",
        "PromptEncoderConfig",
        "PromptEncoderReparameterizationType",
        "TaskType",
    ),
    "data": ("read_examples",),
    "encoder": ("PromptEncoder",),
    "errors": (
        "DataError",
        "InputError",
        "PromptFileError",
        "PtuningError",
        "TemplateError",
        "TrainingError",
    ),
    "evaluation": ("Evaluation", "evaluate"),
    "models": ("load_model",),
    "nearest": ("nearest_words",),
    "prediction": ("Prediction", "predict", "predict_details"),
    "prompt": ("Prompt",),
    "render": ("Renderer",),
    "settings": ("TrainSettings",),
    "task": ("Task",),
    "template": ("parse",),
    "training": ("TrainResult", "train"),
    "trainer": ("trainer_parts",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

try:
    __version__ = version("ptuning")
except PackageNotFoundError:  # the source tree without an installation
    __version__ = "0.0.0"

__all__ = [
    "Attachment",
    "DataError",
    "Evaluation",
    "InputError",
    "PeftType",
    "Prediction",
    "Prompt",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptFileError",
    "PtuningError",
    "Renderer",
    "Task",
    "TaskType",
    "TemplateError",
    "TrainResult",
    "TrainSettings",
    "TrainingError",
    "attach",
    "evaluate",
    "load_model",
    "nearest_words",
    "parse",
    "predict",
    "predict_details",
    "read_examples",
    "train",
    "trainer_parts",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'ptuning' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value
