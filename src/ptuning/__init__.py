"""P-tuning: trainable virtual tokens for frozen language models.

    prompt = ptuning.Prompt("[P*3] {country} [P*3] [MASK]", answer="capital")
    ptuning.train(model, tokenizer, prompt, rows, dev=dev_rows)
    ptuning.predict(model, tokenizer, prompt, [{"country": "France"}])

Names are imported when they are first used, so that ``import ptuning`` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from .backbone.load import load_model
    from .data import read_examples
    from .errors import (
        DataError,
        InputError,
        PromptFileError,
        PtuningError,
        TemplateError,
        TrainingError,
    )
    from .inference.agreement import Agreement
    from .inference.answering import Prediction
    from .inference.attachment import Attachment, attach
    from .inference.distillation import Distillation, distill
    from .inference.evaluation import Evaluation, evaluate
    from .inference.merged_files import Merged
    from .inference.merging import merge
    from .inference.nearest_words import Neighbours, nearest_words
    from .inference.prediction import predict, predict_details
    from .prompts.encoder import PromptEncoder
    from .prompts.encoder_config import (
        PeftType,
        PromptEncoderConfig,
        PromptEncoderReparameterizationType,
        TaskType,
    )
    from .prompts.prompt import Prompt
    from .prompts.task import Task
    from .prompts.template import Template, parse
    from .rendering.lesson import Lesson, Lessons
    from .rendering.render import Rendered, Renderer
    from .training.hf_trainer import PromptModule, trainer_parts
    from .training.progress import Progress
    from .training.result import TrainResult
    from .training.settings import TrainSettings
    from .training.train import train

_HOME = {
    "inference.attachment": ("Attachment", "attach"),
    "prompts.encoder_config": (
        "PeftType",
        "PromptEncoderConfig",
        "PromptEncoderReparameterizationType",
        "TaskType",
    ),
    "data": ("read_examples",),
    "prompts.encoder": ("PromptEncoder",),
    "errors": (
        "DataError",
        "InputError",
        "PromptFileError",
        "PtuningError",
        "TemplateError",
        "TrainingError",
    ),
    "inference.agreement": ("Agreement",),
    "inference.distillation": ("Distillation", "distill"),
    "inference.evaluation": ("Evaluation", "evaluate"),
    "backbone.load": ("load_model",),
    "inference.merged_files": ("Merged",),
    "inference.merging": ("merge",),
    "inference.nearest_words": ("Neighbours", "nearest_words"),
    "inference.answering": ("Prediction",),
    "inference.prediction": ("predict", "predict_details"),
    "prompts.prompt": ("Prompt",),
    "rendering.lesson": ("Lesson", "Lessons"),
    "rendering.render": ("Rendered", "Renderer"),
    "training.settings": ("TrainSettings",),
    "training.progress": ("Progress",),
    "prompts.task": ("Task",),
    "prompts.template": ("Template", "parse"),
    "training.result": ("TrainResult",),
    "training.train": ("train",),
    "training.hf_trainer": ("PromptModule", "trainer_parts"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Agreement",
    "Attachment",
    "DataError",
    "Distillation",
    "Evaluation",
    "InputError",
    "Lesson",
    "Lessons",
    "Merged",
    "Neighbours",
    "PeftType",
    "Prediction",
    "Progress",
    "Prompt",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptFileError",
    "PromptModule",
    "PtuningError",
    "Rendered",
    "Renderer",
    "Task",
    "TaskType",
    "Template",
    "TemplateError",
    "TrainResult",
    "TrainSettings",
    "TrainingError",
    "attach",
    "distill",
    "evaluate",
    "load_model",
    "merge",
    "nearest_words",
    "parse",
    "predict",
    "predict_details",
    "read_examples",
    "train",
    "trainer_parts",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _MODULE:
        raise AttributeError(f"module 'ptuning' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ptuning")
    except PackageNotFoundError:  # the source tree without an installation
        return "0.0.0"
