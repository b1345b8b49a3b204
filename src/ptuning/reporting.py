"""What stands beside every figure: versions, machine and date; texts that cannot harm; pictures.

matplotlib is imported when a picture is drawn: it takes longer than most commands.
"""

from __future__ import annotations

import base64
import datetime
import io
import json
import os
import platform
import re
from collections.abc import Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"  # control, line ends, half surrogate pairs
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # changes of direction
)
"""What a terminal may take for a title, a clipboard's content, a line of its own, another name."""
_PACKAGES = ("ptuning", "torch", "transformers", "accelerate", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Package versions, Python, processor and date as plain text."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source tree"
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return found


def safe(text: object) -> str:
    """Text on one line, its control characters written as escapes such as ``\\x1b``."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON in which every control character is an escape, and other text is as it is."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    # A line end that is left stands between values: json itself escapes those within.
    return _UNSAFE.sub(lambda f: f[0] if f[0] == "\n" else f"\\u{ord(f[0]):04x}", text)


def html_text(value: object) -> str:
    """Any value as harmless text of a page."""
    return escape(safe(value))


def html_table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """A table for notebooks; all text is escaped."""
    head = "".join(f"<th>{html_text(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{html_text(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f"<table><caption>{html_text(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def html_picture(png: bytes) -> str:
    """A picture for notebooks, inside the page."""
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def percent(share: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * share:.1f}"


def shares(names: list[str], bars: dict[str, list[float | None]], title: str) -> bytes:
    """Groups of bars, a group for each name and a bar for each series, in percent;
    None has no bar."""
    figure = _figure(max(4.5, 0.55 * len(names) + 2), 3.6)
    panel = figure.subplots()
    width = 0.8 / len(bars)
    for number, (label, values) in enumerate(bars.items()):
        shift = (number - (len(bars) - 1) / 2) * width
        known = {at + shift: 100 * v for at, v in enumerate(values) if v is not None}
        panel.bar(list(known), list(known.values()), width, label=label)
    panel.set_xticks(range(len(names)), names, rotation=90 if len(names) > 8 else 0)
    panel.set(ylabel=title, ylim=(0, 100))
    panel.grid(axis="y", alpha=0.3)
    panel.legend(ncols=len(bars), loc="upper center", fontsize="small")
    return _png(figure)


def training_curve(
    history: list[dict[str, float]],
    title: str = "P-tuning",
    beside: Mapping[str, float] | None = None,
) -> bytes:
    """Loss and, where there is a dev set, dev accuracy over the epochs.

    Args:
        history: one record per epoch.
        title: of the picture.
        beside: name -> dev accuracy of what the prompt is compared with, drawn as lines.
    """
    from matplotlib.ticker import MaxNLocator

    epochs = [record["epoch"] for record in history]
    has_dev = bool(history) and "dev_accuracy" in history[-1]
    figure = _figure(8 if has_dev else 4.5, 3.2)
    panels = figure.subplots(1, 2 if has_dev else 1, squeeze=False)[0]
    panels[0].plot(epochs, [r["loss"] for r in history], marker="o", markersize=3, label="train")
    if has_dev:
        dev_loss = [record["dev_loss"] for record in history]
        panels[0].plot(epochs, dev_loss, marker="o", markersize=3, label="dev")
        accuracy = [100 * record["dev_accuracy"] for record in history]
        panels[1].plot(epochs, accuracy, marker="o", markersize=3, color="C2", label="P-tuned")
        for number, (name, share) in enumerate((beside or {}).items()):
            panels[1].axhline(100 * share, linestyle="--", color=f"C{3 + number}", label=name)
        panels[1].set(xlabel="epoch", ylabel="right on dev (%)", ylim=(0, 100))
        if beside:
            panels[1].legend()
    panels[0].set(xlabel="epoch", ylabel="loss per answer token", ylim=(0, None))
    panels[0].legend()
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, which is drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
