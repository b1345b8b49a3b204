"""``ptuning train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import console, run_files, training_report
from .options import ChooseBy, Config, Dtype, Json, LearningRate, Model, Overwrite

if TYPE_CHECKING:
    from ..prompts.prompt import Prompt
    from ..training.train import TrainResult

_RUN = ("prompt.json", "checkpoints")
_PROMPT_OPTIONS = (
    "template",
    "answer",
    "encoder",
    "encoder_hidden_size",
    "encoder_dropout",
    "num_virtual_tokens",
    "special_tokens",
    "label_mode",
    "chat",
    "max_length",
    "answer_tokens",
)


def train(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str, typer.Option(help="Training examples: JSONL, CSV, Parquet, or a hub data set.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the prompt and the run's files.")],
    template: Annotated[
        str | None,
        typer.Option(
            help="Where columns, virtual tokens and answer stand: `[P*3] {country} [P*3] [MASK]`."
        ),
    ] = None,
    dev: Annotated[
        str | None, typer.Option(help="Examples that choose the best epoch; strongly advised.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="Column of the right answer. [default: answer, else label]")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Words for the labels: yes=Yes,no=No; several with '|'; columns as {name}."
        ),
    ] = None,
    encoder: Annotated[str, typer.Option(help="Prompt encoder: mlp, lstm or none.")] = "mlp",
    encoder_hidden_size: Annotated[
        int | None, typer.Option(help="Width of the encoder. [default: by the model's embedding]")
    ] = None,
    encoder_dropout: Annotated[float, typer.Option(help="Dropout between LSTM layers.")] = 0.0,
    num_virtual_tokens: Annotated[
        int | None, typer.Option(help="To check against the template's count.")
    ] = None,
    special_tokens: Annotated[
        str,
        typer.Option(help="around: BOS/CLS enclose the whole; after: virtual tokens first (PEFT)."),
    ] = "around",
    label_mode: Annotated[
        str, typer.Option(help="labels: compare label words only; vocabulary: the whole of it.")
    ] = "labels",
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Template as user turn of the model's chat.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Longest input in tokens. [default: the model's context]")
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(help="Longest free answer in tokens. [default: as in the data]")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 10,
    learning_rate: LearningRate = None,
    batch_size: Annotated[int, typer.Option(help="Examples per micro-batch.")] = 8,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Micro-batches per optimizer step.")
    ] = 1,
    schedule: Annotated[str, typer.Option(help="linear, cosine or constant.")] = "linear",
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = (
        0.05
    ),
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Clip the gradient to this norm.")] = 1.0,
    choose_by: ChooseBy = "accuracy",
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a better dev result.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initialisation, order and dropout.")] = 0,
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
    more_of_grid: Annotated[
        list[str] | None, typer.Argument(metavar="", hidden=True, show_default=False)
    ] = None,
    halving: Annotated[
        bool,
        typer.Option("--halving/--no-halving", help="Drop members that fall behind on dev."),
    ] = True,
    dtype: Dtype = "float32",
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    prefix_cache: Annotated[
        str,
        typer.Option(
            metavar="auto|off|SIZE",
            help="Keep what the model makes of text before the first virtual token, up to bytes "
            "such as 2G; off: compute every row as a whole.",
        ),
    ] = "auto",
    tune_model: Annotated[
        bool,
        typer.Option("--tune-model", help="Train the model too; it is saved in OUT/model."),
    ] = False,
    model_learning_rate: Annotated[
        float, typer.Option(help="Of the model's weights, with --tune-model.")
    ] = 1e-5,
    graphs: Annotated[
        str, typer.Option(help="auto: replay steps as CUDA graphs on a GPU; or off.")
    ] = "auto",
    tracker: Annotated[
        str | None, typer.Option(help="A tracker of accelerate, such as tensorboard.")
    ] = None,
    keep_encoder: Annotated[
        bool,
        typer.Option(
            "--keep-encoder/--no-keep-encoder",
            help="Save the encoder too, to train on from it; the vectors are a few kilobytes.",
        ),
    ] = True,
    init_from: Annotated[
        Path | None, typer.Option(help="Continue from the vectors of this saved prompt.")
    ] = None,
    config: Config = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --output.")
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
    """
    from .. import distributed
    from ..backbone.load import load_model
    from ..data import read_examples
    from ..storage import check_writable
    from ..training.train import train as train_prompt

    with distributed.together():
        console.speak_if(distributed.state().is_main_process)
        if not distributed.from_main(lambda: _is_open(output, resume, overwrite)):
            console.say(f"{output} holds a finished run; there is nothing to resume")
            return
        prompt = _prompt(context)
        settings = _settings(context.params)
        grid = _grid(population_grid, more_of_grid)
        rows = read_examples(data)
        dev_rows = read_examples(dev) if dev else []
        distributed.from_main(lambda: check_writable(output))
        console.say(f"loading {model}")
        base, tokenizer = load_model(model, dtype=dtype)
        run_file = run_files.as_yaml(run_files.settings_of(context))
        distributed.from_main(lambda: _begin(output, run_file, anew=overwrite and not resume))
        with console.training_bar() as listener:
            result = train_prompt(
                base,
                tokenizer,
                prompt,
                rows,
                dev_rows,
                output=output,
                resume=resume,
                settings=settings,
                population=population,
                grid=grid,
                listener=listener,
            )
        tuned = (base, tokenizer) if tune_model else None
        distributed.from_main(
            lambda: _end(output, prompt, result, json_output, tuned, keep_encoder)
        )


def _is_open(output: Path, resume: bool, overwrite: bool) -> bool:
    """There is a run to begin or to go on with; raises where --output is not for this one."""
    if resume and (output / "result.json").is_file() and (output / "prompt.safetensors").is_file():
        return False
    _check_output(output, resume, overwrite)
    return True


def _begin(output: Path, run_file: bytes, anew: bool) -> None:
    from ..storage import write_folder
    from ..training import checkpoint

    if anew:
        checkpoint.delete_all(output)
        (output / "result.json").unlink(missing_ok=True)
    write_folder(output, {"run.yaml": run_file})


def _end(
    output: Path,
    prompt: Prompt,
    result: TrainResult,
    as_json: bool,
    tuned: tuple[Any, Any] | None,
    keep_encoder: bool,
) -> None:
    from ..training import checkpoint

    if tuned is not None:
        training_report.save_model(output, prompt, *tuned)
    report = training_report.save(output, prompt, result, keep_encoder)
    checkpoint.delete_all(output)
    if as_json:
        console.print_json(report)
    else:
        training_report.tell(output, prompt, result)


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one")
    if output.is_file():
        raise InputError(f"--output {output} is a file; give a folder")
    if resume or overwrite or not output.is_dir():
        return
    held = [name for name in _RUN if (output / name).exists()]
    if held:
        raise InputError(
            f"--output {output} holds another run ({held[0]}); go on with it (--resume), replace "
            "it (--overwrite), or choose another folder"
        )
    seen = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    if seen - {"run.yaml"}:  # left by a run that never began
        raise InputError(
            f"--output {output} is not empty; choose another folder, or --overwrite to write there "
            "all the same"
        )


def _prompt(context: typer.Context) -> Prompt:
    """The prompt that the options describe; with --init-from they change the saved one's."""
    from ..prompts.prompt import Prompt

    options, start_folder = context.params, context.params["init_from"]
    if options["template"] is None and start_folder is None:
        raise InputError(
            "no --template; it says where columns, virtual tokens and answer stand, for example "
            "'[P*3] {country} [P*3] [MASK]'"
        )
    given = {name: options[name] for name in _PROMPT_OPTIONS if options[name] is not None}
    if options["labels"] is not None:
        given["verbalizer"] = run_files.parse_labels(options["labels"])
    if start_folder is None:
        return Prompt(**given)
    for name in _PROMPT_OPTIONS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "DEFAULT":
            given.pop(name, None)
    start = Prompt.load(start_folder)
    prompt = Prompt(**{**start.settings(), **given})
    prompt.begin_from(start)
    return prompt


def _settings(options: dict[str, Any]) -> Any:
    from dataclasses import fields

    from ..training.settings import TrainSettings

    names = {f.name for f in fields(TrainSettings)}
    return TrainSettings(**{k: v for k, v in options.items() if k in names})


def _grid(first: str | None, more: list[str] | None) -> dict[str, Any] | None:
    """The grid, also where its parts were typed without quotes."""
    from ..training.grid import parse_grid

    if more and first is None:
        raise InputError(f"what is {more[0]!r}? Options begin with --; see ptuning train --help")
    return parse_grid([first, *(more or [])]) if first else None
