"""Options that several commands have, and those that are made of the settings' fields."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.file_form import FileForm
from ..errors import InputError
from ..experiments.lama.options import LamaOptions
from ..experiments.superglue.options import SuperGlueOptions
from ..prompts.prompt_settings import PromptSettings
from ..training.settings import TrainSettings
from . import run_files, run_folder
from .fields import Fields

Model = Annotated[
    str, typer.Option(help="Hub name, folder, .gguf file, or a fetched model such as smollm2.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the frozen model: auto (what this machine multiplies fastest in, float32 or "
        "bfloat16), float32, bfloat16, float16, own (as it is saved). Less than float32 rounds: "
        "figures differ as they do between seeds."
    ),
]
Frozen = Annotated[
    str,
    typer.Option(
        help="Eight bits for the frozen model's layers and their products: int8, or fp8 (newer "
        "CUDA devices; slow on a CPU); own leaves them in --dtype. It rounds more than bfloat16."
    ),
]
DtypeAsSaved = Annotated[
    str, typer.Option(help="Of the model: auto (as it is saved), float32, bfloat16, float16.")
]
Encoders = Annotated[
    str,
    typer.Option(
        help="Population's encoders: mlp, lstm, none, residual, mixture, separated by commas."
    ),
]
LearningRates = Annotated[
    str | None,
    typer.Option(
        help="One, or several that compete. [default: 1e-3 for mlp, 2e-3 for lstm and residual, "
        "1e-2 for none and mixture]"
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Run file (YAML) with any of these options; options given here come first.",
        callback=run_files.use_config,
        is_eager=True,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --output holds.")]
Output = Annotated[
    Path,
    typer.Option(
        help="Folder for the prompt and the run's files.",
        callback=run_folder.find_settings,
        is_eager=True,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the interrupted run in --output, with its settings (run.yaml).",
        callback=run_folder.find_settings,
        is_eager=True,
    ),
]
Population = Annotated[
    int, typer.Option(help="Train so many seeds side by side; the best by dev is saved.")
]
PopulationGrid = Annotated[
    str | None,
    typer.Option(
        metavar="KEY=V,V ...",
        help="Values to train side by side too: learning_rate=1e-3,3e-3 encoder=mlp,lstm "
        "virtual_tokens=3,6 (of each group); templates are separated by '|'.",
    ),
]
KeepEncoder = Annotated[
    bool,
    typer.Option(
        "--keep-encoder/--no-keep-encoder",
        help="Save the encoder too, to train on from it; the vectors alone are some kilobytes.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")]

PANELS = {
    "Model and data": (
        *("model", "teacher", "data", "dev", "dev_share", "test"),
        *("separator", "encoding", "columns", "dtype", "frozen", "device"),
    ),
    "Prompt": ("template", "answer", "labels", "init_from"),
    "Training": (
        "epochs",
        "learning_rate",
        "batch_size",
        "max_minutes",
        "calibrate",
        "folds",
        "refit",
        "calibrate_teacher",
        "label_weight",
    ),
    "Population": ("population", "population_grid", "halving", "ensemble"),
    "Speed": ("mixed_precision", "prefix_cache", "graphs", "compile"),
    "Output": (
        "output",
        "resume",
        "overwrite",
        "json_output",
        "quiet",
        "config",
        "keep_encoder",
        "tracker",
        "checkpoint_seconds",
    ),
}
"""The headings of ``ptuning train --help``; other fields stand under their dataclass's own."""

OF_FILES = Fields(
    FileForm,
    "Options",
    written={
        "columns": (
            str | None,
            None,
            "Names of a CSV file's columns, as label,text, where it has no header. One name for a "
            ".txt: each line is a text.",
        )
    },
)
OF_PROMPT = Fields(
    PromptSettings,
    "Prompt",
    named={"verbalizer": "labels"},
    written={
        "template": (
            str | None,
            None,
            "Where columns, virtual tokens and answer stand: `[P*3] {country} [P*3] [MASK]`. "
            "[default: auto, made of the columns' names]",
        ),
        "answer": (
            str | None,
            None,
            "Column of the right answer. [default: answer, else label; where template or labels "
            "are found, else the one with few values]",
        ),
        "verbalizer": (
            str | None,
            None,
            "Words for the labels: yes=Yes,no=No; several with '|'; columns as {name}. auto: the "
            "labels' names, or words that are found where these say nothing (0, 1). Without labels "
            "answers are free text. [default: auto where the template is]",
        ),
    },
    left_out={"label_bias": "it is measured: --calibrate"},
)
OF_LEARNER = replace(
    OF_PROMPT,
    defaults={"encoder": "none"},
    written={
        "template": (
            str | None,
            None,
            "Where columns, virtual tokens and answer stand: `[P*20] {text} Kind: [MASK]`.",
        ),
        "verbalizer": (
            str | None,
            None,
            "Words for the labels: yes=Yes,no=No; several with '|'; columns as {name}. "
            "Without labels answers are free text, of --answer-tokens at most.",
        ),
    },
)
"""Of a prompt that learns from a teacher: nothing is made of a table, and without an encoder it
learns several times as fast (docs/distilling.md)."""
OF_TRAINING = Fields(TrainSettings, "Training")
OF_DISTILLING = Fields(
    TrainSettings,
    "Training",
    left_out={
        **dict.fromkeys(("tune_model", "model_learning_rate"), "the teacher is the model as it is"),
        "folds": "texts without labels are many: some of them choose",
        "refit": "texts without labels are many: some of them choose",
        "calibrate": "the prompt learns the teacher's shares of the labels: --calibrate-teacher",
    },
)

_TEMPLATES = (
    "Population's templates, separated by '|': own (LAMA's words as anchors), best (the best "
    "manual template's), own-words and best-words (virtual tokens begin as these words), plain "
    "(no words), or text with {sub_label} and [MASK]."
)
_AS_MEASURED = dict.fromkeys(
    (
        "gradient_accumulation",
        "weight_decay",
        "max_grad_norm",
        "schedule",
        "warmup",
        "shuffle",
        "mixed_precision",
        "halving",
        "tune_model",
        "model_learning_rate",
    ),
    "the experiments' published figures were made with its default",
)
_ELSEWHERE = {
    "patience": "the published figures were made without: it is 0 here",
    "learning_rate": "several compete: it is part of the grid",
    "tracker": "an experiment is many trainings, and a tracker follows one",
    "ensemble": "LamaOptions has it: --together",
    "calibrate": "the published figures were made without",
    "max_minutes": "an experiment's parts are resumed one by one, and none is half done",
    "folds": "each has a dev set",
    "init": "the published figures were made as the encoder begins: it is encoder here",
    "word_noise": "the published figures were made without: it is 0 here",
    "label_matrix": "the published figures were made without",
    "refit": "the published figures were made without",
}
OF_LAMA = Fields(
    LamaOptions,
    "Population",
    named={"templates": "template"},
    written={"templates": (str, "own|best", _TEMPLATES)},
    left_out={
        "grid": "options of its own: --encoder and --learning-rate",
        "settings": "its fields are options (OF_LAMA_TRAINING)",
    },
)
OF_LAMA_TRAINING = Fields(
    TrainSettings,
    "Training",
    left_out={
        **_AS_MEASURED,
        **_ELSEWHERE,
        "epochs": "LamaOptions has it: it depends on the relation",
        "choose_by": "P@1 is what LAMA measures",
    },
)
OF_SUPERGLUE = Fields(
    SuperGlueOptions,
    "Population",
    named={"templates": "template"},
    written={
        "templates": (
            str | None,
            None,
            "Prompts instead of the task's own, separated by '|'.",
        )
    },
    left_out={
        "grid": "options of its own: --encoder and --learning-rate",
        "settings": "its fields are options (OF_SUPERGLUE_TRAINING)",
    },
)
OF_SUPERGLUE_TRAINING = Fields(
    TrainSettings,
    "Training",
    defaults={"choose_by": "loss"},
    written={"epochs": (int, 10, "Passes over the training examples.")},
    left_out={
        **_AS_MEASURED,
        **_ELSEWHERE,
        "ensemble": "SuperGlueOptions has it: --together",
        "calibrate": "SuperGlueOptions has it: --together, on dev",
    },
)


def competing(encoders: str, learning_rates: str | None) -> dict[str, list[Any]]:
    """What the members of a population differ in, as a grid: encoders and, where given, rates.

    Raises:
        InputError: an option is empty, or a rate is no positive number.
    """
    grid: dict[str, list[Any]] = {"encoder": list(dict.fromkeys(parts(encoders, ",", "--encoder")))}
    if learning_rates is not None:
        found = dict.fromkeys(map(_rate, parts(learning_rates, ",", "--learning-rate")))
        grid["learning_rate"] = list(found)
    return grid


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise InputError(
            f"--learning-rate: {text!r} is no positive number; give one, or several separated by "
            "commas"
        )
    return rate


def parts(text: str, separator: str, option: str) -> tuple[str, ...]:
    """The parts of an option's text.

    Raises:
        InputError: there is none.
    """
    found = tuple(part.strip() for part in text.split(separator) if part.strip())
    if not found:
        raise InputError(f"{option} is empty")
    return found
