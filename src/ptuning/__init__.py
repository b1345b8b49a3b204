"""P-tuning: trainable virtual tokens for frozen language models.

prompt = ptuning.Prompt("[P*3] {country} [P*3] [MASK]", answer="capital")
ptuning.train(model, tokenizer, prompt, rows, dev=dev_rows)
ptuning.predict(model, tokenizer, prompt, [{"country": "France"}])
"""

from importlib.metadata import PackageNotFoundError, version

from .attach import Attachment, attach
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
from .evaluate import Evaluation, evaluate
from .models import load_model
from .nearest import nearest_words
from .predict import Prediction, predict, predict_details
from .prompt import Prompt
from .render import Renderer
from .settings import TrainSettings
from .task import Task
from .template import parse
from .train import TrainResult, train
from .trainer import trainer_parts

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
