"""How much wording and placement matter, with and without virtual tokens.

    python benchmarks/stability.py --lama DIR --superglue DIR --output OUT

Stability: five manual templates that differ by a word or two, each as it stands and with virtual
tokens around its fields; the spread of both. Placement: virtual tokens in front, around, or behind
the text, with the template's words as anchors and without; accuracy beside training time. All
figures are from test, epochs are chosen on dev.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import ptuning
from ptuning.data import read_examples
from ptuning.environment import versions
from ptuning.evaluation import teacher_forced
from ptuning.experiments.lama_data import read_facts, read_relations
from ptuning.experiments.ledger import Ledger


@dataclass(frozen=True)
class Subject:
    """What is studied: rows, manual templates, and where virtual tokens may stand.

    Attributes:
        wordings: manual templates that differ by a word or two.
        prompted: each wording with virtual tokens.
        placements: name -> template.
        task: answer column, verbalizer and the like.
        settings: of the training.
    """

    name: str
    train: list[Any]
    dev: list[Any]
    test: list[Any]
    wordings: tuple[str, ...]
    prompted: Callable[[str], str]
    placements: dict[str, str]
    task: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


def capital(folder: Path, tokenizer: Any) -> Subject:
    """LAMA's P36, P@1 over the whole vocabulary."""
    (relation,) = read_relations(folder, ["P36"])
    facts = read_facts(folder, relation, tokenizer)
    x, answer = "{sub_label}", "[MASK]"
    return Subject(
        "LAMA P36",
        facts.train,
        facts.dev,
        facts.test,
        (
            f"The capital of {x} is {answer}",
            f"The capital city of {x} is {answer}",
            f"The capital of {x} is called {answer}",
            f"Capital of {x}: {answer}",
            f"{x} has the capital {answer}",
        ),
        lambda text: "[P*3] " + text.replace(x, f"{x} [P*3]"),
        {
            "in front, no words": f"[P*6] {x} {answer}",
            "in front, anchors": f"[P*6] The capital of {x} is {answer}",
            "around, no words": f"[P*3] {x} [P*3] {answer}",
            "around, anchors": f"[P*3] The capital of {x} [P*3] is {answer}",
            "after the text, no words": f"{x} [P*6] {answer}",
            "after the text, anchors": f"The capital of {x} [P*6] is {answer}",
        },
        {"answer": "obj_label", "answer_end": False},
        {"epochs": 8, "batch_size": 16},
    )


def entailment(folder: Path, tokenizer: Any) -> Subject:
    """FewGLUE's RTE: 32 examples to train on, 32 to choose with."""
    rows = {part: read_examples(folder / f"RTE/{part}.jsonl") for part in ("train", "dev32", "val")}
    random.Random(0).shuffle(rows["val"])
    p, h, answer = "{premise}", "{hypothesis}", "[MASK]"
    return Subject(
        "RTE",
        rows["train"],
        rows["dev32"],
        rows["val"],
        (
            f"{p} Question: {h} True or False? Answer: {answer}",
            f"{p} Question: {h} True or false? Answer: {answer}",
            f"{p} Question: is it true that {h} True or False? Answer: {answer}",
            f"{p} Statement: {h} True or False? Answer: {answer}",
            f"{p} Question: {h} Is this True or False? Answer: {answer}",
        ),
        lambda text: "[P*3] " + text.replace(f" {answer}", f" [P*3] {answer}"),
        {
            "in front, no words": f"[P*6] {p} {h} {answer}",
            "in front, anchors": f"[P*6] {p} Question: {h} True or False? Answer: {answer}",
            "around, no words": f"[P*3] {p} {h} [P*3] {answer}",
            "around, anchors": f"[P*3] {p} Question: {h} True or False? Answer: [P*3] {answer}",
            "after the text, no words": f"{p} {h} [P*6] {answer}",
            "after the text, anchors": f"{p} Question: {h} True or False? Answer: [P*6] {answer}",
        },
        {"answer": "label", "verbalizer": {"entailment": "True", "not_entailment": "False"}},
        {"epochs": 10, "batch_size": 8},
    )


def measure(
    base: Any, tokenizer: Any, subject: Subject, template: str, seed: int
) -> dict[str, Any]:
    """A template's accuracy on test; with virtual tokens after a training."""
    if "[P" not in template:
        task = ptuning.Task(template, **subject.task)
        return {"accuracy": teacher_forced(base, tokenizer, task, subject.test)[0]}
    prompt = ptuning.Prompt(template, **subject.task)
    started = time.monotonic()
    result = ptuning.train(
        base, tokenizer, prompt, subject.train, subject.dev, seed=seed, **subject.settings
    )
    seconds = time.monotonic() - started
    accuracy, _ = teacher_forced(base, tokenizer, prompt, subject.test)
    return {"accuracy": accuracy, "dev": result.best["dev_accuracy"], "seconds": seconds}


def picture(found: dict[str, Any]) -> Figure:
    """For each subject the spread of the wordings, and the placements."""
    figure = Figure(figsize=(10, 3.4 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(found), 2, squeeze=False)
    for (name, study), (left, right) in zip(found.items(), panels, strict=True):
        for place, side in enumerate(("manual", "prompted")):
            values = [100 * one[side]["accuracy"] for one in study["wordings"].values()]
            left.scatter([place] * len(values), values, alpha=0.7)
        left.set_xticks([0, 1], ["manual", "with virtual tokens"])
        left.set(title=f"{name}: five wordings", ylabel="right on test (%)", xlim=(-0.5, 1.5))
        means = {
            k: statistics.mean(r["accuracy"] for r in v) for k, v in study["placements"].items()
        }
        right.barh(list(means), [100 * value for value in means.values()])
        right.invert_yaxis()
        right.set(title=f"{name}: placement", xlabel="right on test (%)")
        for panel in (left, right):
            panel.grid(alpha=0.3)
    return figure


def tell(found: dict[str, Any]) -> None:
    console = Console()
    for name, study in found.items():
        table = Table(title=f"{name}: wordings (right on test, %)", title_justify="left")
        for column in ("template", "manual", "with virtual tokens"):
            table.add_column(column, justify="left" if column == "template" else "right")
        sides: dict[str, list[float]] = {"manual": [], "prompted": []}
        for text, one in study["wordings"].items():
            for side, values in sides.items():
                values.append(100 * one[side]["accuracy"])
            shown = [f"{values[-1]:.1f}" for values in sides.values()]
            table.add_row(text.replace("[", "\\["), *shown)
        for label, figure in (("mean", statistics.mean), ("deviation", statistics.stdev)):
            table.add_row(label, *(f"{figure(values):.1f}" for values in sides.values()))
        console.print(table)
        table = Table(title=f"{name}: placement", title_justify="left")
        for column in ("placement", "right on test (%)", "deviation", "training (s)"):
            table.add_column(column, justify="left" if column == "placement" else "right")
        for label, runs in study["placements"].items():
            values = [100 * run["accuracy"] for run in runs]
            spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else "-"
            seconds = statistics.mean(run["seconds"] for run in runs)
            table.add_row(label, f"{statistics.mean(values):.1f}", spread, f"{seconds:.0f}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lama", type=Path, help="LAMA's folder")
    parser.add_argument("--superglue", type=Path, help="FewGLUE's folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1, help="of each placement")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    base, tokenizer = ptuning.load_model(options.model)
    subjects = [capital(options.lama, tokenizer)] if options.lama else []
    subjects += [entailment(options.superglue, tokenizer)] if options.superglue else []
    ledger = Ledger(options.output, {"model": options.model})
    found: dict[str, Any] = {}

    def once(subject: Subject, template: str, seed: int = 0) -> dict[str, Any]:
        kinds = [*subject.wordings, *map(subject.prompted, subject.wordings)]
        number = [*kinds, *subject.placements.values()].index(template)
        part = f"{subject.name} {number} {seed}".replace(" ", "-")
        result = ledger.get(part)
        if result is None:
            result = measure(base, tokenizer, subject, template, seed)
            ledger.put(part, result)
        print(f"{100 * result['accuracy']:5.1f}  {subject.name}  {template}", flush=True)
        return result

    for subject in subjects:
        wordings = {
            text: {"manual": once(subject, text), "prompted": once(subject, subject.prompted(text))}
            for text in subject.wordings
        }
        placements = {
            name: [once(subject, template, seed) for seed in range(options.seeds)]
            for name, template in subject.placements.items()
        }
        found[subject.name] = {"wordings": wordings, "placements": placements}
    tell(found)
    picture(found).savefig(options.output / "stability.png", dpi=120)
    text = json.dumps({**found, "versions": versions()}, indent=2)
    (options.output / "stability.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
