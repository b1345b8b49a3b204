"""Figures as a table on the terminal, as ``results.json`` and as ``RESULTS.md``.

A run replaces the rows that it measured and keeps the others, each with its own date and machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent
JSON, PAGE, IMAGES = FOLDER / "results.json", FOLDER / "RESULTS.md", FOLDER / "images"
HEADER = (
    *("row", "ours", "PEFT", "ratio", "of single rounds"),
    *("limit", "limit ratio", "equal", "host ops"),
)
Figure = dict[str, Any]

_CURVES = (
    "Numbers at the points are ratios. The pictures may be of an earlier run than the figures "
    "above; [README.md](README.md) says of which."
)
_READING = """\
## How to read it

- **ratio**: PEFT over ours for times, ours over PEFT for examples per second: above 1 we are
  faster. For memory it is **ours over PEFT: smaller is better** (0.35 or less is wanted).
- **of single rounds**: the lowest and the highest ratio of one run of each side next to each other.
  A wide range says that other processes disturbed the machine.
- **limit**: the floating-point operations of our side in the frozen model (tokens behind the first
  virtual one, logits where the answer is), forward and in training backward, over the rate of the
  model's own matrix products, measured alone in the same rounds. In brackets the same for PEFT's
  side: all positions, all logits.
- **limit ratio**: PEFT's measured time over our limit: what the ratio would be if our side did
  nothing but matrix products.
- **equal**: before any training the numbers that must be equal are compared; here is the largest
  difference. More than 1e-4 in float32 ends the benchmark.
- **host ops**: operations that a step of ours asks the host for, beside the graphs that it replays;
  a GPU waits 6 to 8 microseconds for each.
- **memory**: the highest resident size above the loaded model over two epochs of three batches, the
  store of kept keys and values included, each side in a fresh process with the same threads. On a
  GPU the peak of allocated memory above the model.
"""


def merge(figures: list[Figure], order: list[str]) -> list[Figure]:
    """Write ``results.json`` with these rows in place of the rows of their names; gives all."""
    known: list[Figure] = json.loads(JSON.read_text()) if JSON.exists() else []
    rows = {figure["name"]: figure for figure in [*known, *figures]}
    merged = [rows[name] for name in order if name in rows]
    JSON.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
    return merged


def show(figures: list[Figure]) -> None:
    """Print the table."""
    table = Table(title="ptuning against PEFT", title_justify="left")
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="left" if number == 0 else "right")
    for figure in figures:
        table.add_row(*_cells(figure))
    Console(width=120).print(table)


def write_page(figures: list[Figure], work: dict[str, str], curves: dict[str, str]) -> None:
    """Write ``RESULTS.md``.

    Args:
        figures: all rows.
        work: of each row, in words.
        curves: name and description of pictures; those that exist are shown.
    """
    lines = [
        "# Results",
        "",
        "Written by `make bench` (`python benchmarks/bench.py`); the same figures are in "
        "[results.json](results.json). SmolLM2-135M in float32, 20 virtual tokens, one answer "
        "token; GPU rows: random weights in bfloat16. Medians of runs of both sides in turn, in "
        "one process.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" * len(HEADER) + "|",
    ]
    lines += ["| " + " | ".join(_cells(figure, code=True)) + " |" for figure in figures]
    lines += ["", "| row | work | runs | measured |", "|---|---|---|---|"]
    for figure in figures:
        lines.append(
            f"| `{figure['name']}` | {work[figure['name']]}{_note(figure)} | {figure['runs']} | "
            f"{figure['date']} |"
        )
    lines += ["", _READING]
    shown = {name: text for name, text in curves.items() if (IMAGES / f"{name}.png").exists()}
    if shown:
        lines += ["## How it grows", "", _CURVES, ""]
        lines += [f"![{text}](images/{name}.png)" for name, text in shown.items()]
        lines.append("")
    lines += ["## Machine and versions", ""]
    for machine in dict.fromkeys(figure["machine"] for figure in figures):
        names = [f["name"] for f in figures if f["machine"] == machine]
        which = "" if len(names) == len(figures) else f" ({', '.join(names)})"
        lines.append(f"- {machine}{which}")
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _cells(figure: Figure, code: bool = False) -> list[str]:
    low, high = figure["spread"]
    name = f"`{figure['name']}`" if code else figure["name"]
    limit = figure.get("limit")
    return [
        name,
        _amount(figure["ours"], figure["unit"]),
        _amount(figure["peft"], figure["unit"]),
        f"**{figure['ratio']:.2f}**" if code else f"{figure['ratio']:.2f}",
        f"{low:.2f} to {high:.2f}" if low != high else "",
        f"{limit['ours']:.0f} ms ({limit['peft']:.0f})" if limit else "",
        f"{limit['ratio']:.2f}" if limit else "",
        f"{figure['difference']:.0e}" if "difference" in figure else "",
        str(figure.get("host_ops", "")),
    ]


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"


def _note(figure: Figure) -> str:
    note = f"; compared: {figure['equal']}" if "equal" in figure else ""
    return note + (f"; {figure['note']}" if "note" in figure else "")
