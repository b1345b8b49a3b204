"""Everyday tables: what a few labelled examples give, by the ways that people would try.

    python benchmarks/everyday.py --data everyday/ --dtype bfloat16 --output out/

`everyday/TASK/{train,dev,test}.jsonl` hold `text` and `label`. Every row of the table is trained on
the same examples; whatever is chosen (epoch, LoRA's rate) is chosen on dev, the figures are from
test. Ours is a table given to `Prompt.for_rows` and `train`, nothing else; as one table, train and
dev rows are given together, a share is set aside to choose with, and at last all are trained on. A
seed is finished for everything before the next begins, a run that was stopped goes on, and the same
command with other --rows, --tasks, --sizes or --seeds adds to it. A task is any folder of such
files in --data.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from classifier import RATES, Classifier
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline

import ptuning
from ptuning.backbone.fetched import fetch
from ptuning.data import Row
from ptuning.data.setting_aside import usual_share
from ptuning.experiments.ledger import Ledger, digest
from ptuning.reporting import versions

TASKS = {"sst2": "SST-2", "trec": "TREC, 6 kinds", "subj": "Subj", "banking": "Banking, 9 intents"}
ROWS = {
    "majority": "majority",
    "tfidf": "TF-IDF + logistic regression",
    "minilm": "MiniLM embeddings + logistic regression (22M)",
    "template": "the template without virtual tokens",
    "p_tuning": "PEFT's P-tuning with a classification head",
    "lora": "LoRA r=16 with a classification head, better of two rates by dev",
    "ours": "**ours, defaults**",
    "whole": "**ours (train and dev as one table)**",
}
DRAWN = ("p_tuning", "lora", "ours", "whole")
"""Rows whose training is random."""
DEV, TEST = 100, 500
COLOURS = (
    *("#bbbbbb", "#8da0cb", "#66c2a5", "#e5c494", "#e78ac3", "#fc8d62", "#333333", "#a6761d"),
)


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to choose with, and to test; `text` and `label`."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


def read(folder: Path, task: str, size: int, seed: int, tested: int = TEST) -> Splits | None:
    """A task's rows with `size` training examples; None where the data has fewer.

    Of more examples the seed draws them, each label its share; with few examples dev is as small.
    """
    parts = {p: ptuning.read_examples(folder / task / f"{p}.jsonl") for p in ("train", "dev")}
    if size > len(parts["train"]):
        return None
    test = ptuning.read_examples(folder / task / "test.jsonl")[:tested]
    return Splits(drawn(parts["train"], size, seed), parts["dev"][: min(DEV, size)], test)


def drawn(rows: list[Row], size: int, seed: int) -> list[Row]:
    """So many rows, one of each label in turn until the rarest have no more."""
    if size == len(rows):
        return rows
    shuffled = random.Random(seed).sample(rows, len(rows))
    seen: Counter[str] = Counter()
    rank = []
    for row in shuffled:
        seen[row["label"]] += 1
        rank.append(seen[row["label"]])
    order = sorted(range(len(rows)), key=rank.__getitem__)
    return [shuffled[n] for n in order[:size]]


def texts(rows: list[Row]) -> list[str]:
    return [row["text"] for row in rows]


def labels(rows: list[Row]) -> list[str]:
    return [row["label"] for row in rows]


def figures(rows: list[Row], said: list[str]) -> dict[str, float]:
    """Accuracy and macro F1."""
    right = sum(a == b for a, b in zip(labels(rows), said, strict=True)) / len(rows)
    macro = f1_score(labels(rows), said, average="macro", zero_division=0)
    return {"accuracy": right, "macro_f1": float(macro)}


@dataclass
class Ways:
    """What a table can be answered with. Each method trains on `splits` and answers its test rows.

    Args:
        dtype: of SmolLM2's weights.
        running: a folder for checkpoints.
    """

    dtype: str
    running: Callable[[str], Path]
    saved: int = field(default=0, init=False)
    """Bytes of what the last one would save."""

    @cached_property
    def base(self) -> tuple[Any, Any]:
        return ptuning.load_model("smollm2", dtype=self.dtype)

    @cached_property
    def encoder(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        folder = fetch("minilm")
        return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def majority(self, splits: Splits, seed: int, part: str) -> dict[str, Any]:
        answer, _ = Counter(labels(splits.train)).most_common(1)[0]
        return {"said": [answer] * len(splits.test), "bytes": 0}

    def tfidf(self, splits: Splits, seed: int, part: str) -> dict[str, Any]:
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            LogisticRegression(C=10, max_iter=1000),
        )
        model.fit(texts(splits.train), labels(splits.train))
        said = model.predict(texts(splits.test)).tolist()
        return {"said": said, "bytes": len(pickle.dumps(model))}

    @torch.no_grad()
    def embedded(self, rows: list[Row]) -> Any:
        """MiniLM's mean vectors of unit length, a text at a time: padding costs more."""
        model, tokenizer = self.encoder
        vectors = []
        for text in texts(rows):
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            vectors.append(model(**inputs).last_hidden_state.mean(1))
        return torch.nn.functional.normalize(torch.cat(vectors)).numpy()

    def minilm(self, splits: Splits, seed: int, part: str) -> dict[str, Any]:
        model = LogisticRegression(C=10, max_iter=1000)
        model.fit(self.embedded(splits.train), labels(splits.train))
        said = model.predict(self.embedded(splits.test)).tolist()
        return {"said": said, "bytes": len(pickle.dumps(model))}

    def template(self, splits: Splits, seed: int, part: str) -> dict[str, Any]:
        from ptuning.backbone.kinds import kind_of
        from ptuning.rendering.short_words import settle_words

        model, tokenizer = self.base
        prompt = ptuning.Prompt.for_rows([*splits.train, *splits.dev])
        settle_words(prompt, tokenizer, kind_of(model))
        said = ptuning.predict(model, tokenizer, prompt.manual(), splits.test)
        return {"said": said, "bytes": 0}

    def p_tuning(self, splits: Splits, seed: int, part: str) -> dict[str, Any]:
        return self._classifier("p_tuning", splits, seed, part)

    def lora(self, splits: Splits, seed: int, part: str) -> dict[str, Any]:
        return self._classifier("lora", splits, seed, part)

    def _classifier(self, method: str, splits: Splits, seed: int, part: str) -> dict[str, Any]:
        best: dict[str, Any] = {"dev": -1.0}
        for rate in RATES[method]:
            one = Classifier(method, sorted(set(labels(splits.train))), seed, self.dtype)

            def score(one: Classifier = one) -> float:
                return figures(splits.dev, one.said(texts(splits.dev)))["accuracy"]

            dev = one.train(texts(splits.train), labels(splits.train), rate, score)
            if dev > best["dev"]:
                said = one.said(texts(splits.test))
                best = {"dev": dev, "rate": rate, "said": said}
        folder = self.running(part)
        one.model.save_pretrained(folder)
        best["bytes"] = _size(folder)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        return best

    def ours(self, splits: Splits, seed: int, part: str) -> dict[str, Any]:
        return self._prompt(splits, splits.train, splits.dev, seed, part)

    def whole(self, splits: Splits, seed: int, part: str) -> dict[str, Any]:
        rows = [*splits.train, *splits.dev]
        return self._prompt(splits, rows, usual_share(len(rows)), seed, part)

    def _prompt(
        self, splits: Splits, rows: list[Row], dev: list[Row] | float, seed: int, part: str
    ) -> dict[str, Any]:
        model, tokenizer = self.base
        prompt = ptuning.Prompt.for_rows([*splits.train, *splits.dev])
        result = ptuning.train(
            model,
            tokenizer,
            prompt,
            rows,
            dev,
            seed=seed,
            output=self.running(part),
            resume=True,
            verbose=False,
        )
        said = ptuning.predict(model, tokenizer, prompt, splits.test)
        content = prompt.contents(keep_encoder=False)
        return {
            "said": said,
            "bytes": sum(map(len, content.values())),
            "dev": result.best["dev_accuracy"],
            "epochs": len(result.history),
            "refit": result.refit,
            "template": prompt.template,
            "words": {label: "|".join(of) for label, of in prompt.labels.items()},
        }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


Found = dict[int, dict[str, dict[str, list[dict[str, Any]]]]]
"""Size -> row -> task -> the results of its seeds."""


def table(found: Found, size: int) -> list[str]:
    """Mean and deviation of test accuracy (%), seconds of all cores and bytes, as Markdown."""
    tasks = tasks_of(found, size)
    lines = [f"| {size} examples | {' | '.join(tasks.values())} | core seconds | saved |"]
    lines.append("|---" * (len(tasks) + 3) + "|")
    for row, name in ROWS.items():
        of_row = found[size].get(row, {})
        if not of_row:
            continue
        cells = [cell(of_row.get(task, [])) for task in tasks]
        runs = [run for task in tasks for run in of_row.get(task, [])]
        seconds = statistics.median(run["core_seconds"] for run in runs)
        saved = statistics.median(run["bytes"] for run in runs)
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} | {in_bytes(saved)} |")
    return lines


def tasks_of(found: Found, size: int) -> dict[str, str]:
    """Task -> its name, the known ones first."""
    measured = dict.fromkeys(task for of_row in found[size].values() for task in of_row)
    known = [task for task in TASKS if task in measured]
    return {task: TASKS.get(task, task) for task in (*known, *measured)}


def cell(runs: list[dict[str, Any]]) -> str:
    values = [100 * run["accuracy"] for run in runs]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def in_bytes(count: float) -> str:
    if count == 0:
        return "-"
    return f"{count / 1000:.0f} KB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def picture(found: Found, size: int) -> Figure:
    """Bars of every row for each task, with deviations."""
    rows = [row for row in ROWS if found[size].get(row)]
    tasks = tasks_of(found, size)
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        of_row = {task: found[size][row][task] for task in tasks if task in found[size][row]}
        values = [[100 * run["accuracy"] for run in runs] for runs in of_row.values()]
        axes.bar(
            [list(tasks).index(task) + (number + 0.5) * width - 0.4 for task in of_row],
            [statistics.mean(of_task) for of_task in values],
            width,
            yerr=[statistics.stdev(v) if len(v) > 1 else 0.0 for v in values],
            color=COLOURS[list(ROWS).index(row)],
            label=ROWS[row].strip("*").split(",")[0],
        )
    axes.set_xticks(range(len(tasks)), list(tasks.values()))
    axes.set_ylabel("right on test (%)")
    axes.set_title(f"SmolLM2-135M, {size} examples", loc="left")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def part_names(text: str, known: dict[str, str], option: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"{option}: {name!r} is not one of {', '.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder for each task")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--tasks", default=",".join(TASKS), help="folders in --data")
    parser.add_argument("--sizes", default="200,32,1000")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tested", type=int, default=TEST, help="test rows at most")
    parser.add_argument(
        "--finished", action="store_true", help="measure nothing: show what --output has"
    )
    parser.add_argument("--dtype", default="float32", help="of SmolLM2: float32 or bfloat16")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = part_names(options.rows, ROWS, "--rows")
    folders = {path.parent.name: "" for path in sorted(options.data.glob("*/train.jsonl"))}
    tasks = part_names(options.tasks, folders, "--tasks")
    ledger = Ledger(options.output, {"dtype": options.dtype})
    ways = Ways(options.dtype, ledger.running)
    found: Found = {}
    for seed in range(options.seeds):
        for size in map(int, options.sizes.split(",")):
            for row in rows:
                for task in tasks:
                    splits = read(options.data, task, size, seed, options.tested)
                    if splits is None:
                        continue
                    again = row in DRAWN or (size == 32 and row != "template")
                    if seed and not again:
                        continue
                    part = f"{task}-{size}-{row}-{seed}"
                    if options.finished and ledger.get(part, digest(vars(splits))) is None:
                        continue
                    result = once(ledger, ways, part, row, splits, seed)
                    found.setdefault(size, {}).setdefault(row, {}).setdefault(task, []).append(
                        result
                    )
    report(found, options)


def once(
    ledger: Ledger, ways: Ways, part: str, row: str, splits: Splits, seed: int
) -> dict[str, Any]:
    """A part's figures: from an earlier run, or measured now."""
    made_of = digest(vars(splits))
    result = ledger.get(part, made_of)
    if result is None:
        started, worked = time.monotonic(), time.process_time()
        result = getattr(ways, row)(splits, seed, part)
        result |= figures(splits.test, result.pop("said"))
        result["seconds"] = round(time.monotonic() - started, 1)
        result["core_seconds"] = round(time.process_time() - worked, 1)
        ledger.put(part, made_of, result)
    print(f"{100 * result['accuracy']:5.1f}  {part}  {result['seconds']:.0f} s", flush=True)
    return result


def report(found: Found, options: argparse.Namespace) -> None:
    """Tables on stdout and in ``everyday.md``, pictures, and all figures as JSON."""
    lines = [line for size in found for line in (*table(found, size), "")]
    lines.append(
        f"Frozen model in {options.dtype}; core seconds: of training and test, the median."
    )
    print("\n".join(lines))
    (options.output / "everyday.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for size in found:
        picture(found, size).savefig(options.output / f"everyday_{size}.png", dpi=120)
    known = {**versions(), "peft": peft.__version__}
    text = json.dumps({"found": found, "dtype": options.dtype, "versions": known}, indent=2)
    (options.output / "everyday.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
