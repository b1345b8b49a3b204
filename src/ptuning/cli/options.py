"""Options that several commands have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from . import run_files

Model = Annotated[
    str, typer.Option(help="Hub name, folder, .gguf file, or a fetched model such as smollm2.")
]
Dtype = Annotated[
    str, typer.Option(help="Of the frozen model: float32, bfloat16, float16 or auto.")
]
Encoders = Annotated[
    str, typer.Option(help="Population's encoders: mlp, lstm, none, separated by commas.")
]
Seeds = Annotated[int, typer.Option(help="Seeds of each template, encoder and rate.", min=1)]
LearningRate = Annotated[
    float | None, typer.Option(help="[default: 1e-3 for mlp, 2e-3 for lstm, 1e-2 for none]")
]
LearningRates = Annotated[
    str | None,
    typer.Option(
        help="One, or several that compete. [default: 1e-3 for mlp, 2e-3 for lstm, 1e-2 for none]"
    ),
]
ChooseBy = Annotated[
    str, typer.Option(help="The best on dev: by accuracy, or by loss (few dev examples).")
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Run file (YAML) with any of these options; options given here come first.",
        callback=run_files.use_config,
        is_eager=True,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run that --output holds.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")]


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
