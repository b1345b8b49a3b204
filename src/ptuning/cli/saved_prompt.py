"""What the commands on a saved prompt share: their options, and how prompt and model are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, InputError

if TYPE_CHECKING:
    from ..data.rows import Row
    from ..prompts.prompt import Prompt

PromptFolder = Annotated[
    str, typer.Argument(metavar="DIR", help="Folder (or hub name) of a saved prompt.")
]
Model = Annotated[
    str | None, typer.Option(help="Base model. [default: the one that the prompt was trained on]")
]
Candidates = Annotated[
    Path | None, typer.Option(help="File of answers to choose among, one per line.")
]
AnswerTokens = Annotated[int | None, typer.Option(help="Longest free answer in tokens.", min=1)]
Alone = Annotated[bool, typer.Option("--alone", help="Of an ensemble take the best member alone.")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="Examples per forward. [default: 32, on a GPU more where they are short]", min=1
    ),
]
Answered = Annotated[
    str, typer.Option(help="Examples with answers: JSONL, CSV, Parquet, or a hub data set.")
]
AnswerColumn = Annotated[
    str | None, typer.Option(help="Column of the right answer. [default: as in the training]")
]
Manual = Annotated[
    str | None,
    typer.Option(
        help="Template without virtual tokens to compare with. [default: the best of the prompt's "
        "words and some plain ones]"
    ),
]


def load(folder: str | Path) -> Prompt:
    """The prompt of a folder or of the hub.

    Raises:
        PromptFileError: there is none, or its training has not come to its end.
    """
    from ..prompts.prompt import Prompt

    return Prompt.load(folder)


def last_part(folder: str) -> str:
    """What a prompt is called if nobody names it: its folder's name."""
    path = Path(folder)
    return path.resolve().name if path.is_dir() else path.name


def merged_name(folder: str) -> str:
    """What a prompt is called in a merged model if nobody names it.

    Raises:
        InputError: its folder's name cannot be a merged prompt's.
    """
    from ..inference.merging import check_name

    name = last_part(folder)
    try:
        check_name(name)
    except InputError as error:
        raise InputError(
            f"{error}; this is the name of the prompt's folder: ptuning merge --name gives another"
        ) from None
    return name


def load_one(folder: str, alone: bool, what: str) -> Prompt:
    """A prompt for what an ensemble cannot be.

    Args:
        folder: or a name on the hub.
        alone: of an ensemble take the best member.
        what: cannot be done with an ensemble, as for `Prompt.check_alone`.

    Raises:
        InputError: an ensemble, and not `alone`.
    """
    prompt = load(folder)
    prompt = prompt.alone() if alone else prompt
    prompt.check_alone(what)
    return prompt


def base_name(prompt: Prompt, name: str | None) -> str:
    """The model that is named, else the one that the prompt was trained on.

    Raises:
        InputError: neither is known.
    """
    name = name or prompt.base_model.get("name")
    if not name:
        raise InputError("the prompt does not say which model it is for; give --model")
    return name


def answered_rows(
    prompt: Prompt, data: str, form: Mapping[str, Any], manual: str | None
) -> list[Row]:
    """Examples that a prompt and a manual template can be measured on.

    Raises:
        DataError, InputError: they lack a column or an answer, or `manual` is no manual template.
    """
    from ..data import read_examples
    from ..rendering.example import check_rows

    by_hand = prompt.manual(manual)
    rows = read_examples(data, **form)
    check_rows(prompt, rows, "evaluation")
    check_rows(by_hand, rows, "evaluation", answered=False)
    return rows


def read_candidates(path: Path | None) -> list[str] | None:
    """The lines of a file of answers; None without one.

    Raises:
        InputError: it cannot be read, or names fewer than two.
    """
    if path is None:
        return None
    found = list(dict.fromkeys(lines_of(path)))
    if len(found) < 2:
        raise InputError(f"--candidates {path} holds {len(found)} answers; give at least two")
    return found


def lines_of(path: Path) -> list[str]:
    """The answers in a file of ``--candidates``."""
    from ..data.text import lines

    try:
        return [line.strip() for line in lines(path) if line.strip()]
    except DataError as error:
        raise InputError(f"--candidates: {error}") from None
