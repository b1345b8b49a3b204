"""PEFT's P-tuning and LoRA with a classification head on the data of `ptuning superglue`.

    python benchmarks/superglue_peft.py --data DIR --task rte,cb,copa,boolq --output OUT

The same rows, optimizer steps and batch size as the command has; the rate (one of two) and the
epoch are chosen on dev, the figures are from test. COPA's two choices stand in one text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ptuning.data import Row
from ptuning.environment import versions
from ptuning.experiments.ledger import Ledger
from ptuning.experiments.superglue_data import Splits, read_few
from ptuning.experiments.superglue_metrics import METRICS
from ptuning.experiments.superglue_tasks import TASKS, SuperGlueTask
from ptuning.fetch import fetch

RATES = {"p_tuning": (1e-3, 1e-2), "lora": (2e-4, 1e-3)}
EPOCHS, BATCH, VIRTUAL, LENGTH = 10, 8, 20, 384
COPA = 'What is {joined}? "{premise}" {joined} "{choice1}" or "{choice2}"'


def texts(task: SuperGlueTask, rows: list[Row]) -> list[str]:
    """The rows in the words of the task's first template."""
    manual = task.prompts()[0].manual().template or ""
    template = COPA if task.name == "copa" else manual.replace(" [MASK]", "")
    return [template.format(**row) for row in rows]


def labels(rows: list[Row]) -> list[str]:
    return [
        str(r["label"]).lower() if isinstance(r["label"], bool) else str(r["label"]) for r in rows
    ]


def adapted(method: str, folder: Path, count: int, pad: int) -> Any:
    """The model with a new head and the method's parameters."""
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=count)
    base.config.pad_token_id = pad
    config: Any
    if method == "lora":
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear"
        )
    else:
        config = peft.PromptEncoderConfig(
            task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL, encoder_hidden_size=576
        )
    return peft.get_peft_model(base, config)


class Classifier:
    """A tokenizer and a model, trained and asked in batches."""

    def __init__(self, task: SuperGlueTask, method: str, splits: Splits, seed: int):
        folder = fetch("smollm2")
        torch.manual_seed(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        self.names = sorted(set(labels(splits.train)))
        pad = self.tokenizer.pad_token_id
        self.model = adapted(method, folder, len(self.names), pad)
        self.task, self.splits, self.seed = task, splits, seed

    def batches(self, rows: list[Row], order: list[int]) -> Iterator[tuple[Any, list[int]]]:
        words = texts(self.task, rows)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            inputs = self.tokenizer(
                [words[i] for i in chosen],
                return_tensors="pt", padding=True, truncation=True, max_length=LENGTH,
            )  # fmt: skip
            yield inputs, chosen

    @torch.no_grad()
    def figures(self, rows: list[Row]) -> dict[str, float]:
        self.model.eval()
        said = [""] * len(rows)
        for inputs, chosen in self.batches(
            rows, sorted(range(len(rows)), key=lambda i: len(str(rows[i])))
        ):
            for index, best in zip(
                chosen, self.model(**inputs).logits.argmax(-1).tolist(), strict=True
            ):
                said[index] = self.names[best]
        return {name: METRICS[name](labels(rows), said, rows) for name in self.task.metrics}

    def train(self, rate: float) -> tuple[float, dict[str, float]]:
        """The best dev score over the epochs, and the test figures of that epoch."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate)
        rows = self.splits.train
        steps = EPOCHS * -(-len(rows) // BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / steps)
        gold = torch.tensor([self.names.index(name) for name in labels(rows)])
        best: tuple[float, dict[str, torch.Tensor]] = (-1.0, {})
        for epoch in range(EPOCHS):
            self.model.train()
            order = torch.randperm(
                len(rows), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            ).tolist()
            for inputs, chosen in self.batches(rows, order):
                self.model(**inputs, labels=gold[chosen]).loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            dev = statistics.mean(self.figures(self.splits.dev).values())
            if dev > best[0]:
                state = {
                    n: p.detach().clone()
                    for n, p in self.model.named_parameters()
                    if p.requires_grad
                }
                best = (dev, state)
        self.model.load_state_dict(best[1], strict=False)
        return best[0], self.figures(self.splits.test)


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
    report: dict[str, Any] = {}
    for name in options.task.split(","):
        task = TASKS[name]
        splits = read_few(options.data, task.folder, options.max_examples)
        for method, rates in RATES.items():
            scores = []
            for seed in range(options.seeds):
                part = f"{name}-{method}-{seed}"
                found = ledger.get(part)
                if found is None:
                    runs = [Classifier(task, method, splits, seed).train(rate) for rate in rates]
                    dev, test = max(runs, key=lambda run: run[0])
                    found = {"dev": dev, "test": test}
                    ledger.put(part, found)
                scores.append(statistics.mean(found["test"].values()))
                print(f"{part:20} {100 * scores[-1]:5.1f}", flush=True)
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            report.setdefault(name, {})[method] = {
                "mean": statistics.mean(scores), "deviation": spread, "seeds": scores
            }  # fmt: skip
    text = json.dumps(
        {"tasks": report, "versions": {**versions(), "peft": peft.__version__}}, indent=2
    )
    (options.output / "superglue_peft.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
