"""Where virtual tokens stand: what it gives, and what it costs.

    python benchmarks/placement.py --lama DIR --superglue DIR --output OUT

Six virtual tokens in front of the text, around it, or behind it, with words as anchors and without;
accuracy on test beside the seconds of the training. Epochs are chosen on dev.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from subjects import FEW_SHOT, Once, Subject, study

TEXTS = {
    "LAMA P36": ("{sub_label}", "The capital of {sub_label} is"),
    "RTE": ("{premise} {hypothesis}", "{premise} Question: {hypothesis} Yes or No? Answer:"),
    "CB": (
        "{premise} {hypothesis}",
        "{premise} Question: {hypothesis}? Yes, No or Maybe? Answer:",
    ),
    "COPA": ("{premise} {joined}", "This is true: {premise} {joined}"),
    "BoolQ": (
        "{passage} {question}",
        "{passage} Question: {question}? Yes or No? Answer:",
    ),
}
"""The fields alone, and the same with words."""

Runs = dict[str, list[dict[str, Any]]]


def placements(name: str) -> dict[str, str]:
    """What the tables show -> template."""
    forms = {"in front": "[P*6] {} [MASK]", "around": "[P*3] {} [P*3] [MASK]"}
    forms["behind"] = "{} [P*6] [MASK]"
    return {
        f"{place}, {words}": form.replace("{}", text)
        for place, form in forms.items()
        for words, text in zip(("no words", "anchors"), TEXTS[name], strict=True)
    }


def mean(runs: list[dict[str, Any]], figure: str) -> float:
    return statistics.mean(run[figure] for run in runs)


def picture(found: dict[str, Runs]) -> Figure:
    """For each subject the accuracy of every placement over its training time."""
    figure = Figure(figsize=(4.2 * len(found), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for (name, of_place), panel in zip(found.items(), panels, strict=True):
        for label, runs in of_place.items():
            marker = {"in front": "s", "around": "o", "behind": "^"}[label.split(",")[0]]
            fill = {} if "anchors" in label else {"markerfacecolor": "none"}
            seconds, right = mean(runs, "seconds"), 100 * mean(runs, "accuracy")
            panel.plot([seconds], [right], marker, label=label, linestyle="none", **fill)
        panel.set(title=name, xlabel="training (s)", ylabel="right on test (%)")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    panels[-1].legend(fontsize=8)
    return figure


def tell(name: str, of_place: Runs) -> None:
    table = Table(title=name, title_justify="left")
    for column in ("placement", "right on test (%)", "deviation", "training (s)"):
        table.add_column(column, justify="left" if column == "placement" else "right")
    for label, runs in of_place.items():
        values = [100 * run["accuracy"] for run in runs]
        spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else "-"
        table.add_row(
            label, f"{statistics.mean(values):.1f}", spread, f"{mean(runs, 'seconds'):.0f}"
        )
    Console().print(table)


def run(
    subjects: list[Subject], once: Once, options: argparse.Namespace
) -> tuple[dict[str, Runs], Figure]:
    found: dict[str, Runs] = {
        subject.name: {
            label: [once(subject, template, seed) for seed in range(options.seeds)]
            for label, template in placements(subject.name).items()
        }
        for subject in subjects
    }
    for name, of_place in found.items():
        tell(name, of_place)
    return found, picture(found)


if __name__ == "__main__":
    study("placement", __doc__, ",".join(FEW_SHOT), run, several=True)
