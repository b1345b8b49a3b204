"""PEFT's P-tuning and LoRA with a classification head on the data of `ptuning superglue`.

    python benchmarks/superglue_peft.py --data DIR --task rte,cb,copa,boolq --output OUT

The same rows, optimizer steps and batch size as the command has. The epoch is chosen on dev, and so
is the rate, one of two, with the first seed; the figures are from test. COPA's two choices stand in
one text. A batch is computed a row at a time, without padding: given vectors, as PEFT's P-tuning
gives them, transformers' classifiers take what stands last for the last token of the text. A seed
is finished for all tasks before the next begins, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ptuning.backbone.fetched import fetch
from ptuning.data import Row
from ptuning.experiments.ledger import Ledger, digest
from ptuning.experiments.superglue.examples import Splits, read_few
from ptuning.experiments.superglue.metrics import METRICS
from ptuning.experiments.superglue.tasks import TASKS, SuperGlueTask
from ptuning.reporting import versions

RATES = {"p_tuning": (1e-3, 1e-2), "lora": (2e-4, 1e-3)}
EPOCHS, BATCH, VIRTUAL, LENGTH = 10, 8, 20, 384
COPA = 'What is {joined}? "{premise}" {joined} "{choice1}" or "{choice2}"'


def texts(task: SuperGlueTask, rows: list[Row]) -> list[str]:
    """The rows in the words of the task's first template."""
    manual = task.prompts()[0].manual().template or ""
    template = COPA if task.name == "copa" else manual.replace(" [MASK]", "")
    return [template.format(**row) for row in rows]


def labels(rows: list[Row]) -> list[str]:
    return [row["label"] for row in rows]


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

    def inputs(self, rows: list[Row]) -> list[Any]:
        """Each row as the model's input."""
        return [
            self.tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH)
            for text in texts(self.task, rows)
        ]

    @torch.no_grad()
    def figures(self, rows: list[Row]) -> dict[str, float]:
        self.model.eval()
        said = [self.names[int(self.model(**one).logits.argmax())] for one in self.inputs(rows)]
        return {name: METRICS[name](labels(rows), said, rows) for name in self.task.metrics}

    def train(self, rate: float) -> float:
        """The best dev score over the epochs; the model keeps that epoch's parameters."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=rate)
        rows = self.splits.train
        inputs = self.inputs(rows)
        steps = EPOCHS * -(-len(rows) // BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / steps)
        gold = torch.tensor([self.names.index(name) for name in labels(rows)])
        best: tuple[float, dict[str, torch.Tensor]] = (-1.0, {})
        for epoch in range(EPOCHS):
            order = torch.randperm(
                len(rows), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            ).tolist()
            for start in range(0, len(rows), BATCH):
                self.model.train()
                batch = order[start : start + BATCH]
                for index in batch:
                    loss = self.model(**inputs[index], labels=gold[index : index + 1]).loss
                    (loss / len(batch)).backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            dev = statistics.mean(self.figures(self.splits.dev).values())
            if dev > best[0]:
                best = (dev, {name: p.detach().clone() for name, p in trained.items()})
        self.model.load_state_dict(best[1], strict=False)
        return best[0]


def one_seed(
    task: SuperGlueTask, method: str, splits: Splits, seed: int, rates: tuple[float, ...]
) -> dict[str, Any]:
    """Train with each rate; the figures of the one that is best on dev."""
    best: dict[str, Any] = {"dev": -1.0}
    for rate in rates:
        one = Classifier(task, method, splits, seed)
        dev = one.train(rate)
        if dev > best["dev"]:
            best = {"dev": dev, "rate": rate, "of": one}
    return {"dev": best["dev"], "rate": best["rate"], "test": best["of"].figures(splits.test)}


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
    names = options.task.split(",")
    splits = {n: read_few(options.data, TASKS[n], options.max_examples) for n in names}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {
        (name, method): [] for name in names for method in RATES
    }
    for seed in range(options.seeds):
        for (name, method), seeds in found.items():
            part = f"{name}-{method}-{seed}"
            made_of = digest(vars(splits[name]))
            result = ledger.get(part, made_of)
            if result is None:
                rates = (seeds[0]["rate"],) if seeds else RATES[method]
                result = one_seed(TASKS[name], method, splits[name], seed, rates)
                ledger.put(part, made_of, result)
            seeds.append(result)
            test = statistics.mean(result["test"].values())
            print(f"{part:20} {100 * test:5.1f}  rate {result['rate']:g}", flush=True)
    report: dict[str, Any] = {}
    for (name, method), seeds in found.items():
        scores = [statistics.mean(one["test"].values()) for one in seeds]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        mean = statistics.mean(scores)
        report.setdefault(name, {})[method] = {"mean": mean, "deviation": spread, "seeds": seeds}
    known = {**versions(), "peft": peft.__version__}
    text = json.dumps({"tasks": report, "versions": known}, indent=2)
    (options.output / "superglue_peft.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
