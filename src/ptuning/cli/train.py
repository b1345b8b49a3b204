"""``ptuning train``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..prompts.from_table import AUTO
from . import console, loading, run_files, run_folder, saved_prompt, training_report
from .fields import filled
from .options import (
    OF_FILES,
    OF_PROMPT,
    OF_TRAINING,
    PANELS,
    Config,
    Dtype,
    Frozen,
    Json,
    KeepEncoder,
    Model,
    Output,
    Overwrite,
    Population,
    PopulationGrid,
    Resume,
)
from .recorded import recorded

if TYPE_CHECKING:
    from ..data import Row
    from ..prompts.prompt import Prompt
    from ..training.settings import TrainSettings


@filled(PANELS, form=OF_FILES, prompt=OF_PROMPT, settings=OF_TRAINING)
def train(
    context: typer.Context,
    form: dict[str, Any],
    prompt: dict[str, Any],
    settings: dict[str, Any],
    model: Model,
    data: Annotated[
        str, typer.Option(help="Training examples: JSONL, CSV, Parquet, or a hub data set.")
    ],
    output: Output,
    dev: Annotated[
        str | None,
        typer.Option(
            help="Examples that choose the best epoch. Without any a share of --data chooses "
            "(--dev-share), or nothing."
        ),
    ] = None,
    dev_share: Annotated[
        float | None,
        typer.Option(
            help="Without --dev: so large a part of the training examples chooses instead, such as "
            "0.2. [default: 0.2 where the template is made, at most 500 examples; else 0]"
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Begin at the vectors of this saved prompt; --template may have another number."
        ),
    ] = None,
    population: Population = 1,
    population_grid: PopulationGrid = None,
    dtype: Dtype = "auto",
    frozen: Frozen = "own",
    keep_encoder: KeepEncoder = True,
    config: Config = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Train a prompt for a frozen model.

    The model's weights never change (but with --tune-model). --output gets the prompt (prompt.json,
    prompt.safetensors), run.yaml with every setting (repeat it with --config), result.json and
    curve.png.

    A table is enough: its answer column, template, label words and dev examples are found.

        ptuning train --model smollm2 --data tickets.csv --output tickets/

    Or with a template of your own:

        ptuning train --model smollm2 --data train.csv --dev dev.csv \\
            --template "[P*3] {country} [P*3] [MASK]" --answer capital --output capital/

    An interrupted run goes on:

        ptuning train --output capital/ --resume
    """
    from .. import distributed
    from ..backbone.base_model import BaseModel
    from ..backbone.kinds import kind_of
    from ..backbone.load import load_model
    from ..data import read_examples
    from ..data.columns import columns_of
    from ..data.setting_aside import set_aside, usual_share
    from ..prompts.from_table import in_two_lines
    from ..rendering.example import answer_column
    from ..rendering.short_words import settle_words
    from ..training import checkpoint
    from ..training.checks import check_run, check_whole
    from ..training.found_words import find_words
    from ..training.grid import choices, columns_read
    from ..training.label_matrix import settled_matrix
    from ..training.refit import settled_refit
    from ..training.settings import TrainSettings
    from ..training.train import train as train_prompt
    from ..training.word_noise import settled_noise

    with distributed.together(), distributed.locked(output):
        console.speak_if(distributed.state().is_main_process)
        how = TrainSettings(**settings)
        begins = output, resume, overwrite, model, init_from, how
        if not distributed.from_main(lambda: is_open(*begins)):
            distributed.from_main(lambda: training_report.tell_finished(output, json_output))
            return
        grid = grid_of(population_grid, context.args)
        if dev and dev_share:
            dev, dev_share = _that_chooses(context, dev, dev_share)
        rows = read_examples(data, **form)
        dev_rows = read_examples(dev, **form) if dev else []
        made = init_from is None and prompt["template"] in (None, AUTO)
        trained = prompt_of(context, prompt, init_from, rows, dev_rows)
        columns = columns_of(rows, trained.answer, dev=dev_rows) if made else None
        if dev_share is None:
            dev_share = usual_share(len(rows)) if made and not (dev or how.folds) else 0.0
        if dev_share:
            answer = answer_column(trained, rows[0])
            check_whole(trained, rows)
            read = columns_read(choices(trained, how, population, grid))
            rows, dev_rows = set_aside(rows, read, answer, dev_share, how.seed)
        check_run(trained, rows, dev_rows, how, population, grid)
        dtype = loading.chosen(model, dtype, _format_of(how), usual=True, frozen=frozen)
        base, tokenizer = load_model(model, dtype=dtype, frozen=frozen)
        settle_words(trained, tokenizer, kind_of(base))
        if trained.nameless:
            console.say("the labels' names say nothing: words for them are looked for in examples")
        find_words(BaseModel.of(base, tokenizer), trained, rows)
        members = [member for _, member, _ in choices(trained, how, population, grid)]
        count, aside = len(rows) + len(dev_rows), bool(dev_rows) and not dev
        how = replace(how, refit=settled_refit(how, members, count, aside))
        if columns is not None:
            held = len(dev_rows) if aside else 0
            for line in in_two_lines(trained, columns, held, count, bool(how.refit)):
                console.say(line)
        # The chosen format is the run's, on whatever machine it goes on.
        chosen = {
            **{"dev": dev, "dev_share": dev_share, "dtype": dtype},
            "word_noise": settled_noise(how, members),
            "label_matrix": settled_matrix(how, members),
            **found(trained, prompt, init_from),
        }
        run_file = run_files.as_yaml({**run_files.settings_of(context), **chosen})
        with recorded(output, run_file, overwrite, resume) as listener:
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
            report = training_report.save(output, trained, result, keep_encoder, tuned)
            if result.complete:
                checkpoint.delete_all(output)
            if json_output:
                console.print_json(report)
            else:
                training_report.tell(output, trained, result, dev or data)

        distributed.from_main(end)


def _that_chooses(context: typer.Context, dev: str, share: float) -> tuple[str | None, float]:
    """Of --dev and --dev-share the one that is typed; of a run file's two --dev.

    Raises:
        InputError: both are typed.
    """
    sources = [context.get_parameter_source(name) for name in ("dev", "dev_share")]
    typed = [getattr(source, "name", None) == "COMMANDLINE" for source in sources]
    if all(typed):
        raise InputError(
            "--dev and --dev-share exclude each other: either a file chooses, or a share of --data"
        )
    return (None, share) if typed[1] else (dev, 0.0)


def _format_of(how: TrainSettings) -> tuple[str, str] | None:
    """What ``--dtype auto`` is where it does not depend on the machine, and why."""
    if how.tune_model:
        return "float32", "small changes of its own weights would be lost in less"
    if how.mixed_precision != "no":
        return "float32", "--mixed-precision takes the weights as they are"
    return None


def is_open(
    output: Path,
    resume: bool,
    overwrite: bool,
    model: str,
    init_from: Path | None,
    how: TrainSettings,
) -> bool:
    """There is a run to begin or to go on with; raises where --output is not for this one."""
    from ..inference import kept_answers
    from ..places import real
    from ..storage import settle
    from ..training import checkpoint

    settle(output)
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one")
    if resume and run_folder.is_finished(output):
        kept_answers.delete_all(output)  # a kill may have left them
        checkpoint.delete_all(output)
        return False
    if not overwrite and not resume:
        run_folder.check_free(output)
    if init_from is not None and how.max_minutes is not None and real(init_from) == real(output):
        raise InputError(
            f"--max-minutes would replace the prompt that --init-from {init_from} begins with, and "
            "the run could not go on; choose another --output, or leave one of the two out"
        )
    tuned, made = output / training_report.MODEL, training_report.made_model(output)
    if made and not how.tune_model and real(model) == real(tuned):
        raise InputError(
            f"--model {model} is an earlier run's, and this run would replace it; choose another "
            "--output"
        )
    if how.tune_model and tuned.exists() and not made:
        raise InputError(
            f"{tuned} was made by no run, and --tune-model saves the model there; choose another "
            "--output"
        )
    return True


def prompt_of(
    context: typer.Context,
    chosen: dict[str, Any],
    start_folder: Path | None,
    rows: list[Row],
    dev_rows: Sequence[Row] = (),
) -> Prompt:
    """The prompt that the options describe, or the rows where they leave it to them; with
    --init-from the options change the saved one's."""
    from ..prompts.prompt import Prompt

    found = {name: chosen[name] == AUTO for name in ("template", "verbalizer")}
    if start_folder is not None and any(found.values()):
        raise InputError(
            f"--init-from begins with a saved prompt's template and labels; leave {AUTO!r} out"
        )
    labels = None if found["verbalizer"] else run_files.parse_labels(chosen["verbalizer"])
    chosen = {**chosen, "verbalizer": labels}
    if start_folder is None:
        if chosen["template"] is None or any(found.values()):
            template = None if found["template"] else chosen["template"]
            if "encoder" not in OF_PROMPT.given(context):
                chosen.pop("encoder")
            return Prompt.for_rows(rows, dev=dev_rows, **{**chosen, "template": template})
        return Prompt(**chosen)
    given = {field: chosen[field] for field in OF_PROMPT.given(context)}
    start = saved_prompt.load(start_folder)
    prompt = Prompt(**{**start.settings(), "label_bias": None, **given})
    prompt.begin_from(start)
    return prompt


def found(trained: Prompt, chosen: dict[str, Any], start_folder: Path | None) -> dict[str, Any]:
    """What was found for the user, or is a saved prompt's, as a run file's options: what stands
    there is given, also where it is a default."""
    labels = {label: list(words) for label, words in trained.labels.items()} or None
    if start_folder is not None:
        begun = {name: getattr(trained, field) for name, field in OF_PROMPT.options().items()}
        # A count would contradict another template.
        return {**begun, "labels": labels, "num_virtual_tokens": chosen["num_virtual_tokens"]}
    given = labels if chosen["verbalizer"] in (None, AUTO) else chosen["verbalizer"]
    made = {"template": trained.template, "answer": trained.answer, "labels": given}
    return {**made, "encoder": trained.encoder}


def grid_of(first: str | None, more: list[str]) -> dict[str, Any] | None:
    """The grid, also where its parts were typed without quotes."""
    from ..training.grid import parse_grid

    if more and first is None:
        raise InputError(f"what is {more[0]!r}? Options begin with --; --help lists them")
    return parse_grid([first, *more]) if first else None
