"""PEFT's P-tuning and LoRA with a classification head on the data of `ptuning superglue`.

    python benchmarks/superglue_peft.py --data DIR --task rte,cb,copa,boolq --output OUT

The same rows, optimizer steps and batch size as the command has. The epoch is chosen on dev, and so
is the rate, one of two, with the first seed; the figures are from test. COPA's two choices stand in
one text. A seed is finished for all tasks before the next begins, and a run that was stopped goes
on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from classifier import RATES, Classifier

from ptuning.data import Row
from ptuning.experiments.ledger import Ledger, digest
from ptuning.experiments.superglue.examples import Splits, read_few
from ptuning.experiments.superglue.metrics import METRICS
from ptuning.experiments.superglue.tasks import TASKS, SuperGlueTask
from ptuning.reporting import versions

COPA = 'What is {joined}? "{premise}" {joined} "{choice1}" or "{choice2}"'


def texts(task: SuperGlueTask, rows: list[Row]) -> list[str]:
    """The rows in the words of the task's first template."""
    manual = task.prompts()[0].manual().template or ""
    template = COPA if task.name == "copa" else manual.replace(" [MASK]", "")
    return [template.format(**row) for row in rows]


def labels(rows: list[Row]) -> list[str]:
    return [row["label"] for row in rows]


def one_seed(
    task: SuperGlueTask, method: str, splits: Splits, seed: int, rates: tuple[float, ...]
) -> dict[str, Any]:
    """Train with each rate; the figures of the one that is best on dev."""
    best: dict[str, Any] = {"dev": -1.0}
    for rate in rates:
        one = Classifier(method, sorted(set(labels(splits.train))), seed)

        def figures(rows: list[Row], one: Classifier = one) -> dict[str, float]:
            said = one.said(texts(task, rows))
            return {name: METRICS[name](labels(rows), said, rows) for name in task.metrics}

        def score(figures: Callable[[list[Row]], dict[str, float]] = figures) -> float:
            return statistics.mean(figures(splits.dev).values())

        dev = one.train(texts(task, splits.train), labels(splits.train), rate, score)
        if dev > best["dev"]:
            best = {"dev": dev, "rate": rate, "figures": figures}
    return {"dev": best["dev"], "rate": best["rate"], "test": best["figures"](splits.test)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", default="rte,cb,copa,boolq")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max-examples", type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    ledger = Ledger(options.output, {"max_examples": options.max_examples})
    names = options.task.split(",")
    splits = {n: read_few(options.data, TASKS[n], options.max_examples) for n in names}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {
        (name, method): [] for name in names for method in RATES
    }
    for seed in range(options.seeds):
        for (name, method), seeds in found.items():
            part = f"{name}-{method}-{seed}"
            made_of = digest(vars(splits[name]))
            result = ledger.get(part, made_of)
            if result is None:
                rates = (seeds[0]["rate"],) if seeds else RATES[method]
                result = one_seed(TASKS[name], method, splits[name], seed, rates)
                ledger.put(part, made_of, result)
            seeds.append(result)
            test = statistics.mean(result["test"].values())
            print(f"{part:20} {100 * test:5.1f}  rate {result['rate']:g}", flush=True)
    report: dict[str, Any] = {}
    for (name, method), seeds in found.items():
        scores = [statistics.mean(one["test"].values()) for one in seeds]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        mean = statistics.mean(scores)
        report.setdefault(name, {})[method] = {"mean": mean, "deviation": spread, "seeds": seeds}
    known = {**versions(), "peft": peft.__version__}
    text = json.dumps({"tasks": report, "versions": known}, indent=2)
    (options.output / "superglue_peft.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
