"""``ptuning train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import console, run_files, run_folder, training_report
from .fields import filled
from .options import (
    OF_PROMPT,
    OF_TRAINING,
    PANELS,
    Config,
    Dtype,
    Json,
    Model,
    Overwrite,
    Separator,
)

if TYPE_CHECKING:
    from ..prompts.prompt import Prompt
    from ..training.progress import Progress


@filled(PANELS, prompt=OF_PROMPT, settings=OF_TRAINING)
def train(
    context: typer.Context,
    prompt: dict[str, Any],
    settings: dict[str, Any],
    model: Model,
    data: Annotated[
        str, typer.Option(help="Training examples: JSONL, CSV, Parquet, or a hub data set.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for the prompt and the run's files.",
            callback=run_folder.find_settings,
            is_eager=True,
        ),
    ],
    dev: Annotated[
        str | None, typer.Option(help="Examples that choose the best epoch; strongly advised.")
    ] = None,
    separator: Separator = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Continue from the vectors of this saved prompt.")
    ] = None,
    population: Annotated[
        int, typer.Option(help="Train so many seeds side by side; the best by dev is saved.")
    ] = 1,
    population_grid: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=V,V ...",
            help="Values to train side by side too: learning_rate=1e-3,3e-3 encoder=mlp,lstm "
            "virtual_tokens=3,6 (of each group); templates are separated by '|'.",
        ),
    ] = None,
    dtype: Dtype = "float32",
    keep_encoder: Annotated[
        bool,
        typer.Option(
            "--keep-encoder/--no-keep-encoder",
            help="Save the encoder too, to train on from it; the vectors are a few kilobytes.",
        ),
    ] = True,
    config: Config = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the interrupted run in --output, with its settings (run.yaml).",
            callback=run_folder.find_settings,
            is_eager=True,
        ),
    ] = False,
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Train a prompt for a frozen model.

    The model's weights never change. --output gets the prompt (prompt.json, prompt.safetensors),
    run.yaml with every setting (repeat it with --config), result.json and curve.png.

    Example:

        ptuning train --model smollm2 --data train.csv --dev dev.csv \\
            --template "[P*3] {country} [P*3] [MASK]" --answer capital --output capital/

    An interrupted run goes on:

        ptuning train --output capital/ --resume
    """
    from .. import distributed
    from ..backbone.load import check_dtype, load_model
    from ..data import read_examples
    from ..training import checkpoint
    from ..training.checks import check_run
    from ..training.settings import TrainSettings
    from ..training.train import train as train_prompt

    with distributed.together(), distributed.locked(output):
        console.speak_if(distributed.state().is_main_process)
        how = TrainSettings(**settings)
        if not distributed.from_main(lambda: _is_open(output, resume, overwrite, how.tune_model)):
            console.say(f"{output} holds a finished run; there is nothing to resume")
            return
        trained = _prompt(context, prompt, init_from)
        grid = _grid(population_grid, context.args)
        rows = read_examples(data, separator)
        dev_rows = read_examples(dev, separator) if dev else []
        check_dtype(dtype)
        check_run(trained, rows, dev_rows, how, population, grid)
        console.say(f"loading {model}")
        base, tokenizer = load_model(model, dtype=dtype)
        run_file = run_files.as_yaml(run_files.settings_of(context))
        begun = False

        def begin() -> None:
            """The first step is done: all that could be refused was accepted."""
            nonlocal begun
            if not begun:
                begun = True
                run_folder.begin(output, run_file, anew=overwrite)

        console.on_stop(lambda: run_folder.how_to_go_on(output))
        with console.training_bar() as show:

            def listener(heard: Progress) -> None:
                begin()
                show(heard)

            result = train_prompt(
                base,
                tokenizer,
                trained,
                rows,
                dev_rows,
                output=output,
                resume=resume,
                settings=how,
                population=population,
                grid=grid,
                listener=listener,
            )
        tuned = (base, tokenizer) if how.tune_model else None

        def end() -> None:
            begin()  # where no step was left to be done
            report = training_report.save(output, trained, result, keep_encoder, tuned)
            checkpoint.delete_all(output)
            if json_output:
                console.print_json(report)
            else:
                training_report.tell(output, trained, result, dev or data)

        distributed.from_main(end)


def _is_open(output: Path, resume: bool, overwrite: bool, tune_model: bool) -> bool:
    """There is a run to begin or to go on with; raises where --output is not for this one."""
    from ..storage import settle
    from ..training import checkpoint

    settle(output)
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one")
    if resume and run_folder.is_finished(output):
        checkpoint.delete_all(output)  # a kill may have left them
        return False
    if not overwrite and not resume:
        run_folder.check_free(output)
    model = output / training_report.MODEL
    if tune_model and model.exists() and not training_report.made_model(output):
        raise InputError(
            f"{model} was made by no run, and --tune-model saves the model there; choose another "
            "--output"
        )
    return True


def _prompt(context: typer.Context, chosen: dict[str, Any], start_folder: Path | None) -> Prompt:
    """The prompt that the options describe; with --init-from they change the saved one's."""
    from ..prompts.prompt import Prompt

    if chosen["template"] is None and start_folder is None:
        raise InputError(
            "no --template; it says where columns, virtual tokens and answer stand, for example "
            "'[P*3] {country} [P*3] [MASK]'"
        )
    chosen = {**chosen, "verbalizer": run_files.parse_labels(chosen["verbalizer"])}
    if start_folder is None:
        return Prompt(**chosen)
    given = {field: chosen[field] for field in OF_PROMPT.given(context)}
    start = Prompt.load(start_folder)
    prompt = Prompt(**{**start.settings(), **given})
    prompt.begin_from(start)
    return prompt


def _grid(first: str | None, more: list[str]) -> dict[str, Any] | None:
    """The grid, also where its parts were typed without quotes."""
    from ..training.grid import parse_grid

    if more and first is None:
        raise InputError(f"what is {more[0]!r}? Options begin with --; see ptuning train --help")
    return parse_grid([first, *more]) if first else None
