"""``ptuning superglue``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import console, run_files
from .options import ChooseBy, Config, Dtype, Encoders, Json, LearningRate, Model, Overwrite, Seeds

if TYPE_CHECKING:
    from ..experiments.superglue import SuperGlueOptions
    from ..experiments.superglue_data import Splits
    from ..experiments.superglue_tasks import SuperGlueTask

_ELSEWHERE = ("output", "data", "task", "seeds", "seed")


def superglue(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for figures, picture and prompts.")],
    task: Annotated[str, typer.Option(help="Such as rte,cb: boolq cb copa multirc rte wic wsc.")],
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
        int | None, typer.Option(help="So many test examples, the first of a shuffle (seed 0).")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each task.")] = 5,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    template: Annotated[
        str | None,
        typer.Option(help="Prompts instead of the task's own, separated by '|'."),
    ] = None,
    best_templates: Annotated[
        int, typer.Option(help="So many of the task's prompts: those best on dev as words.")
    ] = 2,
    encoder: Encoders = "none",
    population: Seeds = 1,
    epochs: Annotated[int, typer.Option(help="Passes over the examples.")] = 10,
    learning_rate: LearningRate = None,
    batch_size: Annotated[int, typer.Option(help="Examples of each member per step.")] = 8,
    choose_by: ChooseBy = "loss",
    dtype: Dtype = "float32",
    config: Config = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """SuperGLUE, few-shot or supervised: manual templates and P-tuned prompts.

    For each task the majority label, the zero-shot manual template that is best on dev, and a
    P-tuned prompt for each seed; the official metrics on test, with mean and deviation. The same
    command goes on where it stopped. --output gets superglue.json, superglue.png, run.yaml and the
    prompts.

    Example:

        ptuning superglue --model smollm2 --data fewglue/ --task rte,cb --output out/
    """
    from .. import processes
    from ..experiments.ledger import Ledger
    from ..experiments.superglue import SuperGlueOptions
    from ..models import load_model
    from ..settings import TrainSettings

    options = SuperGlueOptions(
        templates=tuple(template.split("|")) if template else (),
        best=best_templates,
        encoders=tuple(part.strip() for part in encoder.split(",")),
        population=population,
        settings=TrainSettings(
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            choose_by=choose_by,
        ),
    )
    settings = run_files.settings_of(context)
    decisive = {k: v for k, v in settings.items() if k not in _ELSEWHERE}
    with processes.together():
        console.speak_if(processes.state().is_main_process)
        tasks = _tasks(task)
        read = partial(_splits, data=data, files=(train, dev, test), most=max_examples)
        splits = {chosen.name: read(chosen, alone=len(tasks) == 1) for chosen in tasks}
        if seeds < 1:
            raise InputError(f"--seeds is {seeds}; give a whole number of at least 1")
        ledger = Ledger(output, decisive, overwrite)
        console.say(f"loading {model}")
        base, tokenizer = load_model(model, dtype=dtype)
        found: dict[str, Any] = {}
        with console.PartsBar(len(tasks) * (2 + seeds)) as bar:
            for chosen in tasks:
                parts = _Parts(base, tokenizer, chosen, splits[chosen.name], options, ledger, bar)
                manual = parts.baselines()
                runs = [parts.trained(number, manual) for number in range(seed, seed + seeds)]
                found[chosen.name] = _summary(manual, parts.tested(runs))
        report = {"tasks": found, "mean": _means(found), "settings": settings}
        processes.from_main(lambda: _save(output, report))
        if json_output:
            processes.from_main(lambda: console.print_json(report))
            return
    _tell(found, report["mean"])
    console.out.print(f"superglue.json, its picture and the prompts are in {output}", markup=False)


class _Parts:
    """The parts of one task: from an earlier run, or done now."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: SuperGlueTask,
        splits: Splits,
        options: SuperGlueOptions,
        ledger: Any,
        bar: console.PartsBar,
    ):
        self.model, self.tokenizer, self.task, self.splits = model, tokenizer, task, splits
        self.options, self.ledger, self.bar = options, ledger, bar

    def baselines(self) -> dict[str, Any]:
        from ..experiments.superglue import baselines, score

        name = f"{self.task.name}-manual"
        known = self.ledger.get(name)
        if known is None:
            self.bar.begin(f"{self.task.name}, manual templates")
            result = baselines(self.model, self.tokenizer, self.task, self.splits)
            self.ledger.put(name, result)
        else:
            result = known
        line = f"manual {console.percent(score(result['manual'] or result['templates'][0]['dev']))}"
        self.bar.end(f"{self.task.name:>8}  {line}", known is None)
        return result

    def trained(self, seed: int, manual: dict[str, Any]) -> dict[str, Any]:
        from .. import processes
        from ..experiments.superglue import score, tuned

        name = f"{self.task.name}-{seed}"
        known = self.ledger.get(name)
        if known is None:
            self.bar.begin(f"{self.task.name}, seed {seed}")
            options = replace(self.options, settings=replace(self.options.settings, seed=seed))
            result, prompt = tuned(
                self.model,
                self.tokenizer,
                self.task,
                self.splits,
                manual,
                options,
                self.bar.listener,
            )
            processes.from_main(partial(prompt.save, self._folder(seed)))
            result["seed"] = seed
            self.ledger.put(name, result)
        else:
            result = known
        shown = console.percent(score(result["dev"]))
        self.bar.end(f"{self.task.name:>8}  seed {seed}  P-tuned, dev {shown}", known is None)
        return result

    def tested(self, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same with figures from test: what the seeds' prompts share is computed once."""
        from ..experiments.superglue import measured, score
        from ..prompt import Prompt

        parts = [f"{self.task.name}-{run['seed']}-test" for run in runs]
        known = [self.ledger.get(part) for part in parts]
        if None in known:
            self.bar.begin(f"{self.task.name}, test")
            prompts = [Prompt.load(self._folder(run["seed"])) for run in runs]
            figures = measured(self.model, self.tokenizer, self.task, prompts, self.splits.test)
            for part, of_one in zip(parts, figures, strict=True):
                self.ledger.put(part, {"test": of_one})
        done = [{**run, **self.ledger.get(p)} for run, p in zip(runs, parts, strict=True)]
        scores = [score(run["test"] or run["dev"]) for run in done]
        line = f"P-tuned, {len(runs)} seeds, mean {console.percent(mean(scores))}"
        self.bar.end(f"{self.task.name:>8}  {line}", None in known)
        return done

    def _folder(self, seed: int) -> Path:
        return Path(self.ledger.output) / "prompts" / f"{self.task.name}-{seed}"


def _tasks(names: str) -> list[SuperGlueTask]:
    from ..experiments.superglue_tasks import TASKS

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
    from ..experiments.superglue_data import read_few, read_full

    train, dev, test = files
    if train is not None:
        if not alone:
            raise InputError("--train is for one task; give one in --task")
        return read_full(task.folder, train, dev, test, most)
    if dev or test:
        raise InputError("--dev and --test belong to --train; FewGLUE's folder has its own files")
    if data is None:
        raise InputError("give FewGLUE's folder (--data), or one task's examples (--train)")
    return read_few(data, task.folder, most)


def _summary(manual: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A task's figures: on test, or on dev where there is no test file."""
    from ..experiments.superglue import score

    part = "test" if manual["manual"] is not None else "dev"
    scores = [score(run[part]) for run in runs]
    by_hand = manual["manual"] or manual["templates"][0]["dev"]
    return {
        "measured_on": part,
        "test_examples": manual["test_examples"],
        "majority": None if manual["majority"] is None else score(manual["majority"]),
        "best_manual": score(by_hand),
        "best_manual_template": manual["templates"][0]["manual"],
        "mean": mean(scores),
        "deviation": stdev(scores) if len(scores) > 1 else 0.0,
        "metrics": {name: mean(run[part][name] for run in runs) for name in runs[0][part]},
        "seeds": runs,
        "baselines": manual,
    }


def _means(found: dict[str, Any]) -> dict[str, float | None]:
    names = ("majority", "best_manual", "mean")
    known = {n: [t[n] for t in found.values() if t[n] is not None] for n in names}
    return {name: mean(values) if values else None for name, values in known.items()}


def _save(output: Path, report: dict[str, Any]) -> None:
    from ..environment import versions
    from ..files import pack_json, write_folder
    from ..plot import shares

    tasks = report["tasks"]
    shown = {"majority": "majority", "best manual": "best_manual", "P-tuned": "mean"}
    bars = {label: [t[key] for t in tasks.values()] for label, key in shown.items()}
    files = {
        "superglue.json": pack_json({**report, "versions": versions()}),
        "superglue.png": shares(list(tasks), bars, "score (%)"),
        "run.yaml": run_files.as_yaml(report["settings"]),
    }
    write_folder(output, files)


def _tell(found: dict[str, Any], means: dict[str, float | None]) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else console.percent(value)

    rows = [
        [
            name if t["measured_on"] == "test" else f"{name} (dev: no test file)",
            share(t["majority"]),
            share(t["best_manual"]),
            f"{share(t['mean'])} ± {share(t['deviation'])}",
            ", ".join(f"{metric} {share(value)}" for metric, value in t["metrics"].items()),
        ]
        for name, t in found.items()
    ]
    rows.append(["mean", *(share(means[n]) for n in ("majority", "best_manual", "mean")), ""])
    header = ["task", "majority", "best manual", "P-tuned", "metrics"]
    console.table("Score (%), the mean of a task's metrics", header, rows)
