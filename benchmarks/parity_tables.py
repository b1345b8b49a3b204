"""The tables of ``parity.py``: printed, and as Markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from families import VIRTUAL
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def number(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.0e}"


def worst(rows: Sequence[Row], key: str) -> float | None:
    return max((row[key] for row in rows if row.get(key) is not None), default=None)


def agreement(rows: Sequence[Row], *keys: str) -> str:
    def said(key: str) -> str:
        known = [row[key] for row in rows if row.get(key) is not None]
        return "–" if not known else "yes" if all(known) else "NO"

    return " · ".join(said(key) for key in keys)


def against_peft(rows: Sequence[Row]) -> list[str]:
    """Cells of the first table for one family and task."""
    result, used = [], []
    notes = [note for note in (rows[0]["note"],) if note]
    notes += ["not the same parameters are trained"] if rows[0]["apart"] else []
    for padding in ("none", "right", "left"):
        here = [row for row in rows if row["padding"] == padding]
        own = [row for row in here if row["layout"] == "default"]
        reasons = {row["differs because"] for row in own} - {""}
        layout = "reference" if reasons or padding == "left" else "default"
        chosen = [row for row in here if row["layout"] == layout]
        if "runs" in own[0]:
            result.append("runs" if all(row["runs"] for row in own) else "FAILS")
            continue
        used += chosen
        mark = " (R)" if layout == "reference" else ""
        keys = ("logits", "loss", "gradient")
        result.append(" · ".join(number(worst(chosen, key)) for key in keys) + mark)
        if reasons and padding != "left":
            off = number(worst(own, "logits"))
            notes.append(f"{padding}: by default {off} away, since {reasons.pop()}")
    result += [number(worst(used, "pads")), agreement(used, "greedy", "beam")]
    return [*result, agreement(rows, "saved by ours", "saved by PEFT"), "; ".join(notes)]


def against_alone(rows: Sequence[Row]) -> list[str]:
    """Cells of the second table for one family and task."""
    sides = [[row for row in rows if row["padding"] == side] for side in ("right", "left")]
    cells = [number(worst(side, f"alone {who}")) for who in ("ours", "PEFT") for side in sides]
    return [*cells, agreement(rows, "generates alone")]


FIRST = ("none", "right", "left", "pads", "greedy · beam", "files ours · PEFT's", "remarks")
SECOND = ("ours, right", "ours, left", "PEFT, right", "PEFT, left", "generates the same")
EXPLAINED = """
Largest absolute differences of logits · loss · the prompt encoder's gradient, over MLP and LSTM
encoders, at real and virtual tokens; hidden states where there are no logits. *pads*: outputs at
padding. (R): with `reference_layout=True`; elsewhere the default. *greedy · beam*: the same tokens.
*files*: each library gives the saved logits with what the other saved. *runs*: no PEFT to compare
with; finite outputs, loss and a gradient that is not zero.
"""


def report(rows: Sequence[Row], command: str, seconds: float) -> str:
    """Print the tables; returns them as Markdown."""
    pairs = list(dict.fromkeys((row["family"], row["task"]) for row in rows))
    versions = [f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers", "peft")]
    versions.append(f"ptuning {importlib.metadata.version('ptuning')}")
    text = [
        "# Parity with PEFT\n",
        f"`{command}`, {datetime.date.today()}, {seconds:.0f} s.",
        f"{', '.join(versions)}. Tiny random models, {VIRTUAL} virtual tokens, float32, CPU.",
    ]
    for title, said, columns, cells in (
        ("Against PEFT", EXPLAINED, FIRST, against_peft),
        (
            "Each row of a padded batch against the same row alone",
            "\nLargest differences of outputs and losses, without the switch.\n",
            SECOND,
            against_alone,
        ),
    ):
        text += [f"\n## {title}\n{said}", "| family | task | " + " | ".join(columns) + " |"]
        text.append("|---" * (len(columns) + 2) + "|")
        table = Table("family", "task", *columns, title=title)
        for pair in pairs:
            line = [*pair, *cells([r for r in rows if (r["family"], r["task"]) == pair])]
            table.add_row(*line)
            text.append(f"| {' | '.join(line)} |")
        Console(width=190).print(table)
    return "\n".join(text) + "\n"
