"""PEFT's way to a classifier: SmolLM2 with a classification head, and P-tuning or LoRA on it.

With P-tuning a batch is computed a row at a time, without padding: given vectors, transformers'
classifiers take what stands last for the last token of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ptuning.backbone.fetched import fetch

RATES = {"p_tuning": (1e-3, 1e-2), "lora": (2e-4, 1e-3)}
EPOCHS, BATCH, VIRTUAL, LENGTH = 10, 8, 20, 384


def adapted(method: str, folder: Path, count: int, pad: int, dtype: str) -> Any:
    """The model with a new head and the method's parameters, which stay in float32."""
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=count, dtype=getattr(torch, dtype)
    )
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
    model = peft.get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


class Classifier:
    """A tokenizer and a model, trained and asked.

    Args:
        method: ``lora`` or ``p_tuning``.
        names: the labels.
        seed: of initialisation and order.
        dtype: of the frozen model.
    """

    def __init__(self, method: str, names: list[str], seed: int, dtype: str = "float32"):
        folder = fetch("smollm2")
        torch.manual_seed(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        self.names, self.seed, self.lower = names, seed, dtype != "float32"
        self.at_once = BATCH if method == "lora" else 1
        pad = self.tokenizer.pad_token_id
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = adapted(method, folder, len(names), pad, dtype).to(self.device)

    def _logits(self, texts: list[str]) -> torch.Tensor:
        """Scores of the labels for a few texts, what is in float32 computed as the frozen model."""
        inputs = self.tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH
        ).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.lower):
            return self.model(**inputs).logits.float()

    @torch.no_grad()
    def said(self, texts: list[str]) -> list[str]:
        """A label for each text."""
        self.model.eval()
        parts = [texts[n : n + self.at_once] for n in range(0, len(texts), self.at_once)]
        return [self.names[n] for part in parts for n in self._logits(part).argmax(1).tolist()]

    def train(
        self, texts: list[str], labels: list[str], rate: float, score: Callable[[], float]
    ) -> float:
        """The best dev score over the epochs; the model keeps that epoch's parameters.

        Args:
            texts: to train on.
            labels: theirs.
            rate: the highest, AdamW's; it falls linearly.
            score: what decides, of the model as it is.
        """
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=rate)
        steps = EPOCHS * -(-len(texts) // BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / steps)
        gold = torch.tensor([self.names.index(name) for name in labels], device=self.device)
        best: tuple[float, dict[str, torch.Tensor]] = (-1.0, {})
        for epoch in range(EPOCHS):
            order = torch.randperm(
                len(texts), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            ).tolist()
            for start in range(0, len(texts), BATCH):
                self.model.train()
                batch = order[start : start + BATCH]
                for first in range(0, len(batch), self.at_once):
                    part = batch[first : first + self.at_once]
                    logits = self._logits([texts[n] for n in part])
                    loss = torch.nn.functional.cross_entropy(logits, gold[part], reduction="sum")
                    (loss / len(batch)).backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            dev = score()
            if dev > best[0]:
                best = (dev, {name: p.detach().clone() for name, p in trained.items()})
        self.model.load_state_dict(best[1], strict=False)
        return best[0]
