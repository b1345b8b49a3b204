"""How both sides grow with batch size, text length, members and number of prompts: pictures.

Each picture shows the time of a run over one size, for both sides, on doubly logarithmic axes.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from workloads import Workload, many_prompts, population, train


@dataclass(frozen=True)
class Curve:
    """One picture: a row's function at several sizes."""

    label: str
    work: str
    sizes: tuple[int, ...]
    make: Callable[[Any, Any, int], Workload]


def _batch(kind: str, base: Any, other: Any, size: int) -> Workload:
    return train(base, other, kind, rows=size, tokens=64)


CURVES = {
    "batch": Curve(
        "texts in a batch",
        "training step, prompt after texts of 64 tokens that are kept",
        (1, 4, 16),
        partial(_batch, "cached"),
    ),
    "batch_front": Curve(
        "texts in a batch",
        "training step, prompt in front of texts of 64 tokens",
        (1, 4, 16),
        partial(_batch, "front"),
    ),
    "length": Curve(
        "tokens of a text",
        "training step, prompt after 2 texts that are kept",
        (32, 128, 512),
        lambda base, other, size: train(base, other, "cached", rows=2, tokens=size),
    ),
    "members": Curve(
        "members",
        "training step of several members, 4 texts of 16 tokens each",
        (1, 4, 16),
        lambda base, other, size: population(base, other, size, rows=4, tokens=16),
    ),
    "prompts": Curve(
        "prompts",
        "predictions of several prompts on one document of 256 tokens",
        (1, 4, 16),
        lambda base, other, size: many_prompts(base, other, size, tokens=256),
    ),
}


def measure(base: Any, curve: Curve, runs: int) -> list[dict[str, float]]:
    """For each size the median milliseconds of both sides, interleaved."""
    points = []
    for size in curve.sizes:
        torch.manual_seed(0)
        workload = curve.make(copy.deepcopy(base), copy.deepcopy(base), size)
        times: dict[str, list[float]] = {"ours": [], "peft": []}
        for number in range(runs + 1):  # the first one warms up
            for side, run in (("ours", workload.ours), ("peft", workload.peft)):
                start = time.perf_counter()
                run()
                if number:
                    times[side].append(1000 * (time.perf_counter() - start))
        workload.side.population.close()
        points.append({"size": size, **{k: statistics.median(v) for k, v in times.items()}})
    return points


def draw(curve: Curve, points: list[dict[str, float]], path: Path) -> None:
    """The picture of a curve as PNG, each pair with its ratio."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    sizes = [point["size"] for point in points]
    for side, name in (("peft", "PEFT"), ("ours", "ptuning")):
        panel.plot(sizes, [point[side] for point in points], marker="o", label=name)
    for point in points:
        panel.annotate(
            f"{point['peft'] / point['ours']:.1f}x",
            (point["size"], point["ours"]),
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            fontsize=8,
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.margins(y=0.2)
    panel.set_xticks(sizes, [str(int(size)) for size in sizes])
    panel.set(xlabel=curve.label, ylabel="ms")
    panel.set_title(curve.work, fontsize=9)
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
