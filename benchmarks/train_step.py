"""One training step of ours against one of PEFT's: same model, inputs, encoder and optimizer.

SmolLM2-135M in float32, batch 8, 128 text tokens, 20 virtual tokens in front, one answer token. The
runs are interleaved, so that whatever else the machine does falls on both. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from accelerate import Accelerator

from ptuning import Prompt, TrainSettings, load_model
from ptuning.fetch import fetch
from ptuning.layout import Sequence
from ptuning.learner import Learner
from ptuning.population import Member, Population
from ptuning.render import Rendered, Renderer
from ptuning.score import batch_for

VIRTUAL = 20


def peft_step(base: Any, inputs: dict[str, torch.Tensor]) -> tuple[Callable[[], float], Any]:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=576
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)

    def step() -> float:
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, model.prompt_encoder["default"]


def our_step(
    base: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], encoder: Any
) -> Callable[[], float]:
    prompt = Prompt(f"[P*{VIRTUAL}]{{text}}[MASK]", encoder="mlp", special_tokens="after")
    member = Member(prompt, base, 0, [None] * VIRTUAL)
    member.encoder.load_state_dict(encoder.state_dict())
    population = Population(base, tokenizer, [member])
    settings = TrainSettings(learning_rate=1e-3, schedule="constant", warmup=0.0)
    learner = Learner(member, "mlp", settings, 1000, Accelerator())
    virtual = tuple(-1 - i for i in range(VIRTUAL))
    examples = [
        Rendered((Sequence((*virtual, *row[:-1]), VIRTUAL + len(row) - 1, (row[-1],)),))
        for row in inputs["input_ids"].tolist()
    ]
    renderer = Renderer(tokenizer, prompt, "causal")

    def step() -> float:
        first_ids = [population.first_ids()[0]] * len(examples)
        batch = batch_for(base, renderer, examples, first_ids)
        loss = population.step(batch).sum() / len(examples)
        loss.backward()
        learner.update()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9, help="timed steps of each side")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="text tokens per row")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    base, tokenizer = load_model(str(fetch("smollm2")))
    torch.manual_seed(0)
    ids = torch.randint(100, 49000, (options.batch, options.tokens + 1))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    theirs, encoder = peft_step(base, inputs)
    ours = our_step(base, tokenizer, inputs, encoder)
    # The first step warms up and is compared: same weights, so the same loss.
    difference = abs(ours() - theirs())
    times: dict[str, list[float]] = {"ours": [], "peft": []}
    for _ in range(options.runs):
        for name, step in (("ours", ours), ("peft", theirs)):
            start = time.perf_counter()
            step()
            times[name].append(1000 * (time.perf_counter() - start))
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"batch {options.batch}, {options.tokens} text tokens, {VIRTUAL} virtual tokens in front,"
    )
    print(
        f"float32, {torch.get_num_threads()} threads, medians of {options.runs} interleaved steps"
    )
    print(f"  ours  {middle['ours']:8.0f} ms")
    print(f"  PEFT  {middle['peft']:8.0f} ms  ({peft.__version__})")
    result = {
        "ours_ms": round(middle["ours"], 1),
        "peft_ms": round(middle["peft"], 1),
        "ratio": round(middle["peft"] / middle["ours"], 3),
        "loss_difference": difference,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
