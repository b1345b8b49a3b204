"""A report as one HTML page: no script, nothing from elsewhere, every text escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..data.values import is_number
from ..reporting import html_text as _text
from .evaluation import CONFUSED, WIDEST, Evaluation, most_mistaken_of
from .report import Bin, Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1d1f; --soft: #5d6066; --line: #d9dadd; --bar: #2554c7;
  --second: #b3540f; --back: #fff; --cell: 37, 84, 199; }
@media (prefers-color-scheme: dark) { :root { --ink: #ebecee; --soft: #a3a8b0; --line: #363a41;
  --bar: #8fb0ff; --second: #f0a868; --back: #15171a; --cell: 143, 176, 255; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
p.soft, td.soft { color: var(--soft); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; } th { color: var(--soft); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.confusion td { text-align: center; padding: .3rem .7rem; }
svg { max-width: 34rem; width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; } code { font-family: ui-monospace, monospace; }
"""


def page(report: Report) -> str:
    """The page's text."""
    result, prompt = report.result, report.prompt
    parts = [
        f"<h1>{_text(report.name)}</h1>",
        f'<p class="soft">{result.examples} test rows of {_text(report.data)}; '
        f"base model {_text(prompt.base_model.get('name') or 'unknown')}</p>",
        f"<p><code>{_text(prompt.template)}</code></p>",
        "<h2>Answered right</h2>",
        _shares(report),
    ]
    if report.f1_interval and result.macro_f1 is not None:
        low, high = report.f1_interval
        parts.append(
            f"<p>Macro F1 {_percent(result.macro_f1)} (95 % interval by bootstrap "
            f"{_percent(low)} to {_percent(high)}), loss {result.loss:.4f}.</p>"
        )
    else:
        parts.append(f"<p>Loss per answer token {result.loss:.4f}.</p>")
    if result.confusion:
        parts += ["<h2>Confusion</h2>", _confusion(result)]
    parts += [
        "<h2>Calibration</h2>",
        _calibration(report.bins),
        f"<p>Probability and share right are {_percent(report.calibration_error)} apart in the "
        "mean over the rows.</p>",
        "<h2>The surest mistakes</h2>",
        _mistakes(report),
    ]
    if len(report.history) > 1:
        parts += ["<h2>Training</h2>", _curve(report.history, "teacher" in prompt.training)]
    parts += ["<h2>Nearest words of each virtual token</h2>", _words(report)]
    settings = {**prompt.settings(), **{f"training: {k}": v for k, v in prompt.training.items()}}
    parts += ["<h2>Settings</h2>", _pairs(settings), "<h2>Made with</h2>", _pairs(report.versions)]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(report.name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "?"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    header_row = "".join(f"<th>{_text(name)}</th>" for name in header)
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{header_row}</tr>{lines}</table></div>'


def _cell(value: Any, kind: str = "") -> str:
    return f'<td class="{kind}">{_text(value)}</td>' if kind else f"<td>{_text(value)}</td>"


def _shares(report: Report) -> str:
    rows = []
    for name, share, (low, high) in report.shares():
        x, width = 5 + 190 * low, 190 * (high - low)
        bar = (
            '<td><svg viewBox="0 0 200 16" style="width: 12rem" aria-hidden="true">'
            '<rect x="5" y="7" width="190" height="2" fill="var(--line)"/>'
            f'<rect x="{x:.1f}" y="5" width="{width:.1f}" height="6" fill="var(--bar)" '
            'opacity=".45"/>'
            f'<circle cx="{5 + 190 * share:.1f}" cy="8" r="4" fill="var(--bar)"/></svg></td>'
        )
        interval = f"{_percent(low)} to {_percent(high)}"
        rows.append([_cell(name), _cell(_percent(share), "number"), _cell(interval), bar])
    return _table(["", "right", "95 % interval (Wilson)", "0 to 100 %"], rows)


def _confusion(result: Evaluation) -> str:
    """The matrix; of very many labels, whose cells would be millions, those mistaken most."""
    labels, counts = result.labels, result.confusion
    if len(labels) > WIDEST:
        rows = [[_cell(value) for value in result.confused(n)] for n in result.most_mistaken()]
        return f'<p class="soft">{most_mistaken_of(len(labels))}.</p>{_table(CONFUSED, rows)}'
    header_row = "".join(f"<th>{_text(label)}</th>" for label in labels)
    lines = []
    for label, row in zip(labels, counts, strict=True):
        most = max(1, sum(row))
        cells = "".join(
            f'<td style="background: rgba(var(--cell), {0.5 * n / most:.2f})">{n}</td>' for n in row
        )
        lines.append(f"<tr><th>{_text(label)}</th>{cells}</tr>")
    return (
        '<p class="soft">Rows: the right label; columns: what was said.</p>'
        '<div class="scroll"><table class="confusion">'
        f"<tr><th></th>{header_row}</tr>{''.join(lines)}</table></div>"
    )


def _calibration(bins: list[Bin]) -> str:
    most = max((b.rows for b in bins), default=1)
    dots = "".join(
        f'<circle cx="{40 + 200 * b.probability:.1f}" cy="{210 - 200 * b.right:.1f}" '
        f'r="{3 + 6 * math.sqrt(b.rows / most):.1f}" fill="var(--bar)" opacity=".8">'
        f"<title>{b.rows} rows: probability {_percent(b.probability)}, right {_percent(b.right)}"
        "</title></circle>"
        for b in bins
        if math.isfinite(b.probability)
    )
    rows = [
        [
            _cell(b.rows, "number"),
            _cell(_percent(b.probability), "number"),
            _cell(_percent(b.right), "number"),
        ]
        for b in bins
    ]
    return (
        '<svg viewBox="0 0 260 240" style="max-width: 18rem" role="img" '
        'aria-label="share right over probability"><path d="M40 10V210H240" fill="none" '
        'stroke="var(--line)"/><path d="M40 210L240 10" stroke="var(--line)" '
        f'stroke-dasharray="4"/>{dots}<text x="40" y="230">probability</text>'
        '<text x="8" y="14">right</text></svg>'
        + _table(["rows", "mean probability", "share right"], rows)
    )


def _mistakes(report: Report) -> str:
    if not report.mistakes:
        return "<p>None.</p>"
    columns = list(report.mistakes[0][0])
    rows = [
        [
            *(_cell(_short(row[column])) for column in columns),
            _cell(_short(right)),
            _cell(_short(said)),
            _cell(_percent(probability), "number"),
        ]
        for row, right, said, probability in report.mistakes
    ]
    return _table([*columns, "right", "said", "probability"], rows)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 500 else text[:500] + " …"


def _curve(history: list[dict[str, Any]], taught: bool) -> str:
    """Loss, and the share right on dev (as a teacher says, if one has taught), over the epochs."""
    losses = [_number(record.get("loss")) for record in history]
    shares = [_number(record.get("dev_accuracy")) for record in history]
    most = max((v for v in losses if v is not None), default=1.0) or 1.0

    def line(values: list[float | None], top: float, color: str) -> str:
        points = " ".join(
            f"{40 + 400 * at / (len(values) - 1):.1f},{150 - 130 * value / top:.1f}"
            for at, value in enumerate(values)
            if value is not None
        )
        return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2.5"/>'

    dev = ""
    if any(share is not None for share in shares):
        dev = line(shares, 1.0, "var(--second)")
        dev += '<text x="444" y="24">100 %</text>'
        right = "as the teacher on dev" if taught else "right on dev"
        dev += f'<text x="90" y="184" style="fill: var(--second)">{right}</text>'
    last = _text(history[-1].get("epoch", len(history)))
    return (
        '<svg viewBox="0 0 490 190" role="img" aria-label="training"><path d="M40 20V150H440" '
        f'fill="none" stroke="var(--line)"/>{line(losses, most, "var(--bar)")}'
        f'<text x="2" y="24">{most:.2g}</text><text x="2" y="150">0</text>'
        f'<text x="40" y="184" style="fill: var(--bar)">loss</text>{dev}'
        f'<text x="440" y="168" text-anchor="end">epoch {last}</text></svg>'
    )


def _number(value: Any) -> float | None:
    if not is_number(value) or not abs(value) < 1e300:
        return None  # a file's whole numbers may be longer than any float
    return float(value)


def _words(report: Report) -> str:
    tokens, mean = report.words
    rows = [
        [
            _cell(f"[P] {number}"),
            _cell(f"{token.norm:.2f}", "number"),
            _cell(", ".join(f"{word} {cosine:.2f}" for word, cosine in token.words)),
        ]
        for number, token in enumerate(tokens)
    ]
    table = _table(["token", "length", "nearest words (cosine)"], rows)
    return f'{table}<p class="soft">Mean length of the vocabulary\'s vectors: {mean:.2f}</p>'


def _pairs(values: dict[str, Any]) -> str:
    rows = [[_cell(name, "soft"), _cell(_short(value))] for name, value in values.items()]
    return f"<table>{''.join(f'<tr>{a}{b}</tr>' for a, b in rows)}</table>"
