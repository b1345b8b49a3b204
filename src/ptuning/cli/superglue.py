"""``ptuning superglue``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import console, loading, run_files, run_folder
from .fields import filled
from .options import (
    OF_SUPERGLUE,
    OF_SUPERGLUE_TRAINING,
    PANELS,
    Config,
    Dtype,
    Encoders,
    Frozen,
    Json,
    LearningRates,
    Model,
    Overwrite,
    competing,
    parts,
)
from .superglue_task import TaskRun

if TYPE_CHECKING:
    from ..experiments.superglue.examples import Splits
    from ..experiments.superglue.tasks import SuperGlueTask

_ELSEWHERE = ("output", "data", "train", "dev", "test", "task", "seeds", "seed")
"""What does not decide on a part's figures, or is looked at by its content."""


@filled(PANELS, wanted=OF_SUPERGLUE, settings=OF_SUPERGLUE_TRAINING)
def superglue(
    context: typer.Context,
    wanted: dict[str, Any],
    settings: dict[str, Any],
    model: Model,
    task: Annotated[str, typer.Option(help="Such as rte,cb: boolq cb copa multirc rte wic wsc.")],
    output: Annotated[Path, typer.Option(help="Folder for figures, picture and prompts.")] = Path(
        "superglue_output"
    ),
    data: Annotated[
        Path | None, typer.Option(help="FewGLUE's folder: TASK/{train,dev32,val}.jsonl.")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(help="Fully supervised: examples of one task; cut 60/15/25 if alone."),
    ] = None,
    dev: Annotated[Path | None, typer.Option(help="With --train: examples to choose with.")] = None,
    test: Annotated[Path | None, typer.Option(help="With --train: examples to test.")] = None,
    max_examples: Annotated[
        int | None,
        typer.Option(help="So many test examples, the first of a shuffle (seed 0).", min=1),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each task.", min=1)] = 5,
    encoder: Encoders = "none",
    learning_rate: LearningRates = None,
    dtype: Dtype = "auto",
    frozen: Frozen = "own",
    config: Config = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """SuperGLUE, few-shot or supervised: manual templates and P-tuned prompts.

    For each task the majority label, the zero-shot manual template that is best on dev, without
    and with a label bias, and for each seed P-tuned prompts that answer together; the official
    metrics on test, with mean and deviation. The same command goes on where it stopped, inside a
    training too. --output gets superglue.json, superglue.png, run.yaml and the prompts.

    Example:

        ptuning superglue --model smollm2 --data fewglue/ --task rte,cb --output out/
    """
    from .. import distributed
    from ..backbone.load import load_model
    from ..experiments.ledger import Ledger, format_of_run
    from ..experiments.superglue.options import SuperGlueOptions
    from ..training.settings import CHANGE_NO_RESULT, TrainSettings

    templates = wanted["templates"]
    options = SuperGlueOptions(
        **{
            **wanted,
            "templates": () if templates is None else parts(templates, "|", "--template"),
        },
        grid=competing(encoder, learning_rate),
        settings=TrainSettings(**settings, patience=0, init="encoder"),
    )
    seed = options.settings.seed
    given = run_files.settings_of(context)
    decisive = {k: v for k, v in given.items() if k not in (*_ELSEWHERE, *CHANGE_NO_RESULT)}
    with distributed.together(), distributed.locked(output):
        console.speak_if(distributed.state().is_main_process)
        tasks = _tasks(task)
        read = partial(_splits, data=data, files=(train, dev, test), most=max_examples)
        splits = {chosen.name: read(chosen, alone=len(tasks) == 1) for chosen in tasks}
        for chosen in tasks:
            options.check(chosen, splits[chosen.name])
        begun_in = None if overwrite else format_of_run(output, decisive)
        dtype = loading.chosen(model, dtype, begun_in, usual=True, frozen=frozen)
        decisive["dtype"] = given["dtype"] = dtype
        ledger = Ledger(output, decisive, overwrite)
        base, tokenizer = load_model(model, dtype=dtype, frozen=frozen)
        console.on_stop(lambda: run_folder.how_an_experiment_goes_on(overwrite))
        found: dict[str, Any] = {}
        with console.PartsBar(len(tasks) * (2 + seeds)) as bar:
            for chosen in tasks:
                run = TaskRun(base, tokenizer, chosen, splits[chosen.name], options, ledger, bar)
                manual = run.baselines()
                trained = [run.trained(number, manual) for number in range(seed, seed + seeds)]
                found[chosen.name] = run.tested(manual, trained)
        report = {"tasks": found, "mean": _means(found), "settings": given}
        distributed.from_main(lambda: _save(output, report))
        if json_output:
            distributed.from_main(lambda: console.print_json(report))
            return
    _tell(found, report["mean"])
    console.tell(f"superglue.json, its picture and the prompts are in {output}")


def _tasks(names: str) -> list[SuperGlueTask]:
    from ..experiments.superglue.tasks import TASKS

    chosen = list(dict.fromkeys(name.strip().lower() for name in names.split(",") if name.strip()))
    unknown = [name for name in chosen if name not in TASKS]
    if unknown or not chosen:
        given = repr(unknown[0]) if unknown else "empty"
        raise InputError(f"--task is {given}; there are {', '.join(TASKS)}")
    return [TASKS[name] for name in chosen]


def _splits(
    task: SuperGlueTask,
    alone: bool,
    data: Path | None,
    files: tuple[Path | None, Path | None, Path | None],
    most: int | None,
) -> Splits:
    from ..experiments.superglue.examples import read_few, read_full

    train, dev, test = files
    if train is not None:
        if not alone:
            raise InputError("--train is for one task; give one in --task")
        if data is not None:
            raise InputError("--train and --data exclude each other; give one of them")
        return read_full(task, train, dev, test, most)
    if dev or test:
        raise InputError("--dev and --test belong to --train; FewGLUE's folder has its own files")
    if data is None:
        raise InputError("give FewGLUE's folder (--data), or one task's examples (--train)")
    return read_few(data, task, most)


def _means(found: dict[str, Any]) -> dict[str, Any]:
    """Over the tasks that have test figures; over all where none has."""
    on_test = {name: t for name, t in found.items() if t["measured_on"] == "test"} or found
    names = ("majority", "best_manual", "mean")
    means = {name: mean(t[name] for t in on_test.values()) for name in names}
    return {**means, "tasks": list(on_test)}


def _save(output: Path, report: dict[str, Any]) -> None:
    from ..formats import pack_json
    from ..reporting import shares, versions
    from ..storage import write_folder

    tasks = report["tasks"]
    shown = {"majority": "majority", "best manual": "best_manual", "P-tuned": "mean"}
    bars = {label: [t[key] for t in tasks.values()] for label, key in shown.items()}
    files = {
        "superglue.json": pack_json({**report, "versions": versions()}),
        "superglue.png": shares(list(tasks), bars, "score (%)"),
        "run.yaml": run_files.as_yaml(report["settings"]),
    }
    write_folder(output, files)


def _tell(found: dict[str, Any], means: dict[str, Any]) -> None:
    share = console.percent
    rows = [
        [
            name if t["measured_on"] == "test" else f"{name} (dev: no test file)",
            share(t["majority"]),
            share(t["best_manual"]),
            "" if t["best_manual_biased"] is None else share(t["best_manual_biased"]),
            f"{share(t['mean'])} ± {share(t['deviation'])}",
            ", ".join(f"{metric} {share(value)}" for metric, value in t["metrics"].items()),
        ]
        for name, t in found.items()
    ]
    of = "" if len(means["tasks"]) == len(found) else f" of {', '.join(means['tasks'])}"
    always, by_hand, ours = (share(means[n]) for n in ("majority", "best_manual", "mean"))
    rows.append([f"mean{of}", always, by_hand, "", ours, ""])
    header = ["task", "majority", "best manual", "with a bias", "P-tuned", "metrics"]
    console.table("Score (%), the mean of a task's metrics", header, rows)
