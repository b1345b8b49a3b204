"""How much a template's wording matters, with and without virtual tokens.

    python benchmarks/stability.py --lama DIR --superglue DIR --output OUT

Five manual templates that differ by a word or two, each as it stands and with virtual tokens among
its words; the spread of both. All figures are from test, epochs are chosen on dev.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from subjects import Once, Subject, study

SIDES = {"manual": "manual", "tuned": "with virtual tokens"}
CAPITAL = (
    "The capital of {sub_label} is [MASK]",
    "The capital city of {sub_label} is [MASK]",
    "The capital of {sub_label} is called [MASK]",
    "Capital of {sub_label}: [MASK]",
    "{sub_label} has the capital [MASK]",
)
ENTAILMENT = (
    "{premise} Question: {hypothesis}? Answer: [MASK]",
    "{premise} Question: {hypothesis}. Answer: [MASK]",
    "{premise} Question: is it true that {hypothesis}? Answer: [MASK]",
    "{premise} Statement: {hypothesis}. Answer: [MASK]",
    "{premise} Claim: {hypothesis}. Answer: [MASK]",
)
Figures = dict[str, dict[str, dict[str, Any]]]


def wordings(subject: Subject) -> dict[str, str]:
    """Manual template -> the same with virtual tokens.

    Few examples cannot train tokens that begin anywhere, so there they begin as the last word.
    """
    if "sub_label" in subject.train[0]:
        return {t: "[P*3] " + t.replace("{sub_label}", "{sub_label} [P*3]") for t in CAPITAL}
    return {t: t.replace("Answer:", "[P:Answer:]") for t in ENTAILMENT}


def picture(found: dict[str, Figures]) -> Figure:
    """For each subject the accuracy of every wording on both sides."""
    figure = Figure(figsize=(4.2 * len(found), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for (name, of_wording), panel in zip(
        found.items(), figure.subplots(1, len(found), squeeze=False)[0], strict=True
    ):
        for sides in of_wording.values():
            values = [100 * sides[side]["accuracy"] for side in SIDES]
            panel.plot(range(len(values)), values, marker="o", alpha=0.7)
        panel.set_xticks(range(len(SIDES)), list(SIDES.values()))
        panel.set(title=f"{name}: five wordings", ylabel="right on test (%)", xlim=(-0.3, 1.3))
        panel.grid(alpha=0.3)
    return figure


def tell(name: str, of_wording: Figures) -> None:
    table = Table(title=f"{name} (right on test, %)", title_justify="left")
    table.add_column("template")
    for label in SIDES.values():
        table.add_column(label, justify="right")
    columns = [[100 * f[side]["accuracy"] for f in of_wording.values()] for side in SIDES]
    for text, *values in zip(of_wording, *columns, strict=True):
        table.add_row(text.replace("[", "\\["), *(f"{value:.1f}" for value in values))
    for label, figure in (("mean", statistics.mean), ("deviation", statistics.stdev)):
        table.add_row(label, *(f"{figure(column):.1f}" for column in columns))
    Console().print(table)


def run(
    subjects: list[Subject], once: Once, options: argparse.Namespace
) -> tuple[dict[str, Figures], Figure]:
    found: dict[str, Figures] = {
        subject.name: {
            text: {"manual": once(subject, text, 0), "tuned": once(subject, prompt, 0)}
            for text, prompt in wordings(subject).items()
        }
        for subject in subjects
    }
    for name, of_wording in found.items():
        tell(name, of_wording)
    return found, picture(found)


if __name__ == "__main__":
    study("stability", __doc__, "cb", run)
