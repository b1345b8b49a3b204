"""peft_compat on real pretrained weights: prompts learn what no constant answer reaches."""

from __future__ import annotations

import csv
import random
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ptuning import peft_compat


def professions() -> list[dict[str, str]]:
    text = (
        files("ptuning.experiments")
        .joinpath("demo_data/professions.csv")
        .read_text(encoding="utf-8")
    )
    rows = list(csv.DictReader(text.splitlines()))
    random.Random(0).shuffle(rows)
    return rows


def learn(model: Any, batches: list[dict[str, Tensor]], epochs: int, rate: float) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for _ in range(epochs):
        for batch in batches:
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("template", [None, "[P*4] {text} is a famous [P*4]"])
def test_minilm_learns_to_classify_sequences(minilm_folder: Path, template: str | None) -> None:
    rows = professions()
    names = sorted({row["profession"] for row in rows})
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)

    def batch(part: list[dict[str, str]]) -> dict[str, Tensor]:
        labels = torch.tensor([names.index(row["profession"]) for row in part])
        texts = [row["person"] for row in part]
        return {**tokenizer(texts, padding=True, return_tensors="pt"), "labels": labels}

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm_folder, num_labels=len(names)
    )
    config = peft_compat.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=8)
    model = peft_compat.get_peft_model(base, config, template=template, tokenizer=tokenizer).eval()
    train, test = rows[:320], rows[320:]
    learn(model, [batch(train[i : i + 32]) for i in range(0, 320, 32)], epochs=6, rate=5e-3)
    held_out = batch(test)
    with torch.no_grad():
        right = model(**held_out).logits.argmax(-1) == held_out["labels"]
    constant = Counter(row["profession"] for row in test).most_common(1)[0][1] / len(test)
    assert right.float().mean() > constant + 0.1


def test_minilm_learns_to_classify_tokens(minilm_folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    rows = professions()

    def batch(part: list[dict[str, str]]) -> dict[str, Tensor]:
        """Words of "X was a great Y of his time" are 0, the name's tokens 1, the profession's 2."""
        words = [
            [*row["person"].split(), "was", "a", "great", row["profession"], "once"] for row in part
        ]
        encoded = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        labels = torch.full_like(encoded["input_ids"], -100)
        for n, row in enumerate(words):
            for column, word in enumerate(encoded.word_ids(n)):
                if word is not None:
                    labels[n, column] = (
                        1 if word < len(row) - 5 else 2 if word == len(row) - 2 else 0
                    )
        return {**encoded, "labels": labels}

    base = transformers.AutoModelForTokenClassification.from_pretrained(minilm_folder, num_labels=3)
    config = peft_compat.PromptEncoderConfig(task_type="TOKEN_CLS", num_virtual_tokens=6)
    model = peft_compat.get_peft_model(base, config, drop_virtual_positions=True).eval()
    learn(model, [batch(rows[i : i + 32]) for i in range(0, 160, 32)], epochs=3, rate=5e-3)
    held_out = batch(rows[320:])
    labels = held_out["labels"]
    with torch.no_grad():
        logits = model(**held_out).logits
    assert logits.shape[:2] == labels.shape
    known = labels >= 0
    right = (logits.argmax(-1) == labels)[known].float().mean()
    constant = labels[known].bincount().max() / known.sum()
    assert right > constant + 0.2


@pytest.mark.slow
def test_smollm2_learns_facts_and_generates_them(smollm2_folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder)
    rows = professions()
    tokenizer.padding_side = "left"

    def batch(part: list[dict[str, str]]) -> dict[str, Tensor]:
        texts = [f"{row['person']}:" for row in part]
        whole = [f"{t} {row['profession']}" for t, row in zip(texts, part, strict=True)]
        encoded = tokenizer(whole, padding=True, return_tensors="pt")
        labels = torch.full_like(encoded["input_ids"], -100)
        for n, row in enumerate(part):
            answer = len(tokenizer(f" {row['profession']}")["input_ids"])
            labels[n, -answer:] = encoded["input_ids"][n, -answer:]
        return {**encoded, "labels": labels}

    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    model = peft_compat.get_peft_model(base, config).eval()
    train, test = rows[:256], rows[320:]
    learn(model, [batch(train[i : i + 16]) for i in range(0, 256, 16)], epochs=3, rate=1e-3)
    model.save_pretrained(tmp_path)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder)
    loaded = peft_compat.PeftModel.from_pretrained(fresh, tmp_path)
    asked = tokenizer([f"{row['person']}:" for row in test], padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = loaded.generate(**asked, max_new_tokens=4, do_sample=False)
    answers = tokenizer.batch_decode(tokens[:, asked["input_ids"].shape[1] :])
    right = [
        answer.strip().startswith(row["profession"])
        for answer, row in zip(answers, test, strict=True)
    ]
    constant = Counter(row["profession"] for row in test).most_common(1)[0][1] / len(test)
    assert sum(right) / len(right) > constant + 0.2
