"""How far an answer depends on the seed: one prompt, the best of four, four together.

    python benchmarks/steady.py --data everyday/ --dtype bfloat16 --output out/
    python benchmarks/steady.py --data everyday/ --dtype bfloat16 --output made/ --template auto

`everyday/TASK/{train,dev,test}.jsonl` hold `text` and `label`. Five times four seeds are trained on
the same examples; the deviations are over the five. From the same prompts: their vectors averaged,
and the label biases of ``--calibrate``. Epochs and members are chosen on dev, the figures are from
test and, for what might become a default, from dev. A run that was stopped goes on; several with
one folder and other `--groups` share the work.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ptuning
from ptuning import Prompt, TrainSettings
from ptuning.data import Row
from ptuning.experiments.ledger import Ledger, digest
from ptuning.training.calibration import bias_against, fitted_bias, without_content

TEMPLATES = {
    "sst2": "{text} [P*6] Sentiment: [MASK]",
    "trec": "{text} [P*6] Asks for: [MASK]",
    "subj": "{text} [P*6] This is [MASK]",
}
"""Texts come first, so that a population computes them once."""
MADE = "auto"
"""Instead of a template: the one that a table gets without one."""
GROUPS, MEMBERS = 5, 4
Figures = dict[str, Any]


def measure(base: tuple[Any, Any], folder: Path, template: str, first_seed: int) -> Figures:
    """What four seeds from `first_seed` on give, alone and together.

    Args:
        base: model and tokenizer.
        folder: of the task's rows.
        template: of all members, or `MADE`.
        first_seed: of the population.
    """
    parts = {p: ptuning.read_examples(folder / f"{p}.jsonl") for p in ("train", "dev", "test")}
    labels = sorted({str(row["label"]) for row in parts["train"]})
    if template == MADE:
        prompt = Prompt.for_rows([*parts["train"], *parts["dev"]], answer="label")
    else:
        prompt = Prompt(template, answer="label", verbalizer={label: label for label in labels})
    settings = TrainSettings(seed=first_seed, halving=False, ensemble=MEMBERS)
    result = ptuning.train(
        *base, prompt, parts["train"], parts["dev"], settings=settings, population=MEMBERS,
        verbose=False,
    )  # fmt: skip
    averaged = replace(prompt.alone(), others=())
    averaged.vectors = torch.stack([m.trained_vectors() for m in prompt.members]).mean(0)
    asked = [*prompt.members, averaged, prompt]
    scores = {part: _scores(base, asked, parts[part], labels) for part in ("dev", "test")}
    free = _scores(base, asked, without_content(prompt.columns), labels)
    right = {p: torch.tensor([labels.index(str(r["label"])) for r in parts[p]]) for p in scores}

    def share(part: str, number: int, bias: Tensor | float = 0.0) -> float:
        hits = (scores[part][number] + bias).argmax(1) == right[part]
        return round(100 * float(hits.double().mean()), 1)

    figures: Figures = {"seconds": round(result.seconds)}
    for part in scores:
        figures[part] = {
            "alone": [share(part, n) for n in range(MEMBERS)],
            "averaged": share(part, MEMBERS),
            "together": share(part, MEMBERS + 1),
        }
        for name, number in (("alone", 0), ("together", MEMBERS + 1)):
            on_dev = scores["dev"][number]
            figures[part][f"{name}, calibrated"] = {
                "context": share(part, number, bias_against(free[number])),
                "batch": share(part, number, bias_against(on_dev)),
                "dev": share(part, number, fitted_bias(on_dev, right["dev"])),
            }
    return figures


def _scores(
    base: tuple[Any, Any], prompts: list[Prompt], rows: list[Row], labels: list[str]
) -> list[Tensor]:
    """Of each prompt the labels' log-probabilities ``(rows, labels)``."""
    found = ptuning.predict_details(*base, prompts, rows)
    shares = [[[p.probabilities[label] for label in labels] for p in of_one] for of_one in found]
    return [torch.tensor(of_one).clamp(min=1e-30).log() for of_one in shares]


def table(found: dict[str, Figures]) -> list[str]:
    """Markdown: mean and deviation over the groups, of test."""
    lines = ["| | " + " | ".join(TEMPLATES) + " |", "|---" * (1 + len(TEMPLATES)) + "|"]
    ways: dict[str, Callable[[Figures], list[float]]] = {
        "one prompt": lambda f: f["alone"],
        f"the best of {MEMBERS} by dev": lambda f: f["alone"][:1],
        f"{MEMBERS} together": lambda f: [f["together"]],
        "their vectors averaged": lambda f: [f["averaged"]],
    }
    for name in ("alone", "together"):
        for method in ("context", "batch", "dev"):
            ways[f"{name}, calibrated by {method}"] = partial(_calibrated, name, method)
    for part in ("test", "dev"):
        for way, of in ways.items():
            cells = []
            for task in TEMPLATES:
                groups = [f[part] for name, f in found.items() if name.startswith(f"{task}-")]
                values = [value for figures in groups for value in of(figures)]
                known = len(values) > 1
                cells.append(
                    f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
                    if known
                    else ""
                )
            lines.append(f"| {way} ({part}) | " + " | ".join(cells) + " |")
    return lines


def _calibrated(name: str, method: str, figures: Figures) -> list[float]:
    return [figures[f"{name}, calibrated"][method]]


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", nargs="+", default=list(TEMPLATES), choices=list(TEMPLATES))
    parser.add_argument("--template", choices=[MADE], help="the made one instead of ours")
    parser.add_argument("--groups", nargs="+", type=int, default=range(GROUPS))
    options = parser.parse_args()
    templates = {task: options.template or ours for task, ours in TEMPLATES.items()}
    decisive = {"model": options.model, "dtype": options.dtype, "templates": templates}
    ledger, found = Ledger(options.output, decisive), {}
    base: Any = None
    for group in options.groups:
        for task in options.tasks:
            name, template = f"{task}-{group}", templates[task]
            figures = ledger.get(name, digest(template))
            if figures is None:
                base = base or ptuning.load_model(options.model, dtype=options.dtype)
                figures = measure(base, options.data / task, template, MEMBERS * group)
                ledger.put(name, digest(template), figures)
            found[name] = figures
            print(name, figures, flush=True)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
