"""``ptuning distill``."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..prompts.from_table import AUTO
from . import console, loading, run_files, saved_prompt, training_report
from .fields import filled
from .options import (
    OF_DISTILLING,
    OF_FILES,
    OF_LEARNER,
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
from .train import found, grid_of, is_open, prompt_of

if TYPE_CHECKING:
    from ..inference.agreement import Agreement
    from ..prompts.prompt import Prompt


@filled(PANELS, form=OF_FILES, prompt=OF_LEARNER, settings=OF_DISTILLING)
def distill(
    context: typer.Context,
    form: dict[str, Any],
    prompt: dict[str, Any],
    settings: dict[str, Any],
    model: Model,
    teacher: Annotated[
        Path,
        typer.Option(
            help="The long text: instructions, worked examples. With {columns} or [MASK] "
            "it is a template; else it stands in front of --template's own words (in a chat it is "
            "the system's turn). Or the folder of a trained prompt, such as an ensemble: without "
            "--template the new one begins at its first member."
        ),
    ],
    data: Annotated[
        str, typer.Option(help="Texts, without answers: JSONL, CSV, Parquet, or a hub data set.")
    ],
    output: Output,
    dev: Annotated[
        str | None,
        typer.Option(help="Texts that choose the best epoch. [default: a fifth of --data]"),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            help="Texts to compare prompt and teacher on at the end. [default: those that chose]"
        ),
    ] = None,
    label_weight: Annotated[
        float,
        typer.Option(help="How much the texts' own labels count, where they have some: 0 to 1."),
    ] = 0.0,
    calibrate_teacher: Annotated[
        bool,
        typer.Option(
            "--calibrate-teacher",
            help="Take back what the teacher prefers whatever the texts say: it is measured on "
            "them, and the labels taken for equally frequent.",
        ),
    ] = False,
    init_from: Annotated[
        Path | None, typer.Option(help="Continue from the vectors of this saved prompt.")
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
    """Put what a long text makes a model say into a few virtual tokens, without labels.

    The teacher is the same frozen model behind it. It reads --data once; the prompt learns
    its probabilities of the label words, or of the tokens that it says. At the end both are
    compared: answers in common, right answers where there are labels, tokens and time per request.

    Example:

        ptuning distill --model smollm2 --teacher teacher.txt --data texts.jsonl \\
            --template "[P*20] {text} Kind: [MASK]" --labels who=person,where=place --output out/

    A system prompt of a chat, with free answers:

        ptuning distill --model smollm2 --teacher system.txt --data questions.jsonl \\
            --template "[P*20] {question}" --chat --answer-tokens 64 --output out/

    Four prompts that answer together become one:

        ptuning distill --model smollm2 --teacher ensemble/ --data texts.jsonl --output out/
    """
    from .. import distributed
    from ..backbone.load import load_model
    from ..data import read_examples
    from ..data.text import read_text
    from ..inference import kept_answers
    from ..inference.distillation import check_distillation, columns_asked, teacher_of, with_dev
    from ..inference.distillation import distill as distill_prompt
    from ..prompts.prompt import Prompt
    from ..training import checkpoint
    from ..training.checks import check_whole
    from ..training.settings import TrainSettings

    with distributed.together(), distributed.locked(output):
        console.speak_if(distributed.state().is_main_process)
        how = TrainSettings(**settings)
        begins = output, resume, overwrite, model, init_from, how
        if not distributed.from_main(lambda: is_open(*begins)):
            distributed.from_main(lambda: training_report.tell_finished(output, json_output))
            return
        if AUTO in (prompt["template"], prompt["verbalizer"]):
            raise InputError(
                f"{AUTO} is made of a table with answers, and distill needs none; write --template "
                "and --labels"
            )
        if not teacher.exists():
            raise InputError(
                f"--teacher {teacher} does not exist; give a text file, or the folder of a saved "
                "prompt"
            )
        trained = saved_prompt.load(teacher) if teacher.is_dir() else None
        if trained is not None and init_from is None:
            if prompt["template"] is None:
                init_from = teacher
            else:
                prompt = {**prompt, **_answers_of(trained, OF_LEARNER.given(context))}
        if prompt["template"] is None and init_from is None:
            raise InputError(
                "no --template; it says where columns, virtual tokens and answer stand, for "
                "example '[P*20] {text} Kind: [MASK]'"
            )
        grid = grid_of(population_grid, context.args)
        source = read_text(teacher) if trained is None else trained
        learner = prompt_of(context, prompt, init_from, [])
        rows = read_examples(data, **form)
        dev_rows = read_examples(dev, **form) if dev else []
        check_whole(learner, rows, answered=False)
        long = teacher_of(source, learner)
        read = columns_asked(learner, long, how, population, grid)
        rows, dev_rows = with_dev(rows, dev_rows, read, how.seed)
        held_out = read_examples(test, **form) if test else dev_rows
        check_distillation(
            *(learner, long, rows, dev_rows, held_out, how, population, grid, label_weight),
            calibrate_teacher=calibrate_teacher,
        )
        instead = ("float32", "--mixed-precision takes the weights as they are")
        mixed = how.mixed_precision != "no"
        dtype = loading.chosen(model, dtype, instead if mixed else None, usual=True, frozen=frozen)
        base, tokenizer = load_model(model, dtype=dtype, frozen=frozen)
        if isinstance(source, Prompt):
            size = f"prompts: {len(source.members)}"
        else:
            size = f"{len(tokenizer(source, verbose=False)['input_ids']):,} tokens"
        console.say(f"the teacher ({size}) reads {len(rows) + len(dev_rows)} texts")
        answers = {"answer_tokens": learner.answer_tokens, "answer_end": learner.answer_end}
        begun = {**found(learner, prompt, init_from), **answers}
        begun["init_from"] = init_from and str(init_from)
        run_file = run_files.as_yaml({**run_files.settings_of(context), **begun, "dtype": dtype})
        with recorded(output, run_file, overwrite, resume, "distill") as listener:
            result = distill_prompt(
                base,
                tokenizer,
                learner,
                rows,
                dev_rows,
                teacher=source,
                test=held_out if test else (),
                label_weight=label_weight,
                calibrate_teacher=calibrate_teacher,
                output=output,
                resume=resume,
                settings=how,
                population=population,
                grid=grid,
                listener=listener,
            )

        def end() -> None:
            beside = result.agreement.to_dict()
            report = training_report.save(
                output, learner, result.training, keep_encoder, more={"teacher": beside}
            )
            if result.training.complete:
                kept_answers.delete_all(output)
                checkpoint.delete_all(output)
            if json_output:
                console.print_json(report)
            else:
                training_report.tell(
                    output, learner, result.training, test or dev or data, "distill"
                )
                _tell(result.agreement, "held out" if test else "that chose the epoch")

        distributed.from_main(end)


def _answers_of(teacher: Prompt, given: Collection[str]) -> dict[str, Any]:
    """A trained teacher's answers as options, where none are given."""
    labels = {label: list(words) for label, words in teacher.labels.items()}
    theirs = {
        "verbalizer": json.dumps(labels) if labels else None,
        "answer": teacher.answer,
        "answer_tokens": teacher.answer_tokens,
        "answer_end": teacher.answer_end,
    }
    return {name: value for name, value in theirs.items() if name not in given}


def _tell(found: Agreement, which: str) -> None:
    """What became of the teacher's answers, and what is saved."""
    share = console.percent(found.agreement)
    console.tell(f"{share} % of {found.examples} texts {which} are answered as the teacher does")
    if found.sure_agreement is not None:
        console.tell(
            f"{console.percent(found.sure_agreement)} % of the {found.sure} that the teacher is "
            "sure of: its label is at least twice as likely as the next"
        )
    if found.accuracy is not None and found.teacher_accuracy is not None:
        ours, theirs = map(console.percent, (found.accuracy, found.teacher_accuracy))
        console.tell(f"right: prompt {ours} %, teacher {theirs} %")
    line = (
        f"a request: {found.tokens:.0f} tokens instead of {found.teacher_tokens:.0f}, "
        f"{1000 * found.seconds:.0f} ms instead of {1000 * found.teacher_seconds:.0f}"
    )
    if found.kept_seconds is not None:
        line += (
            f" ({1000 * found.kept_seconds:.0f} with the teacher's keys and values kept, "
            f"{found.kept_bytes / 2**20:.1f} MiB)"
        )
    console.tell(line)
