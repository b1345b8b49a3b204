"""The fast paths against PEFT in one process: same model, same inputs, interleaved runs.

SmolLM2-135M in float32, 20 virtual tokens, one answer token. Each line is the median time of both
sides and their ratio; ``--json`` writes the figures as a list of {name, device, ours, peft, ratio,
unit}. Memory and GPU figures are not measured here yet.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

from ptuning import Prompt, load_model
from ptuning.fetch import fetch
from ptuning.layout import Sequence
from ptuning.loss import answer_logits
from ptuning.population import Member, Population
from ptuning.prefix import PrefixStore, for_prediction
from ptuning.render import Rendered, Renderer
from ptuning.score import batch_for

VIRTUAL = 20
Step = Callable[[], Any]


def reference(base: Any) -> Any:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=576
    )
    return peft.get_peft_model(copy.deepcopy(base), config)


def reference_step(model: Any, ids: torch.Tensor) -> Step:
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def rendered(ids: torch.Tensor, after: bool) -> list[Rendered]:
    """Rows of text whose last id is the answer, with the virtual tokens in front or behind."""
    virtual = tuple(-1 - i for i in range(VIRTUAL))
    examples = []
    for row in ids.tolist():
        text = tuple(row[:-1])
        whole = (*text, *virtual) if after else (*virtual, *text)
        fields = (("text", 0 if after else VIRTUAL, len(text) + (0 if after else VIRTUAL)),)
        examples.append(Rendered((Sequence(whole, len(whole), (row[-1],), fields),)))
    return examples


class Ours:
    """One or several prompts on the base model."""

    def __init__(self, base: Any, tokenizer: Any, members: int = 1):
        self.base = base
        prompt = Prompt(f"{{text}}[P*{VIRTUAL}][MASK]", encoder="mlp")
        self.renderer = Renderer(tokenizer, prompt, "causal")
        made = [Member(prompt, base, seed, [None] * VIRTUAL) for seed in range(members)]
        self.population = Population(base, tokenizer, made)
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in made]

    def batch(self, examples: list[Rendered]) -> Any:
        """The examples of each member, one behind the other."""
        first = self.population.first_ids()
        each = len(examples) // len(first)
        batch = batch_for(
            self.base, self.renderer, examples, [i for i in first for _ in range(each)]
        )
        member = torch.arange(len(first)).repeat_interleave(each)
        return type(batch)(**{**vars(batch), "member": member})

    def step(self, examples: list[Rendered], store: Callable[[], PrefixStore | None]) -> Step:
        def run() -> None:
            self.population.prefix = store()
            self.population.step(self.batch(examples)).sum().backward()
            for member, optimizer in zip(self.population.roster, self.optimizers, strict=True):
                torch.nn.utils.clip_grad_norm_(member.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

        return run


def train(base: Any, tokenizer: Any, kind: str) -> tuple[Step, Step]:
    ids = torch.randint(100, 49000, (8, 129))
    ours = Ours(base, tokenizer)
    kept = PrefixStore(base)
    store = {
        "train_front": lambda: None,
        "train_after_first_epoch": lambda: PrefixStore(base),
        "train_after_cached": lambda: kept,
    }[kind]
    examples = rendered(ids, after=kind != "train_front")
    return ours.step(examples, store), reference_step(reference(base).train(), ids)


def classify_short(base: Any, tokenizer: Any) -> tuple[Step, Step]:
    ids = torch.randint(100, 49000, (8, 17))
    words, ours, store = torch.tensor([330, 441]), Ours(base, tokenizer), PrefixStore(base)
    batch = ours.batch(rendered(ids, after=False))
    theirs = reference(base).eval()

    @torch.no_grad()
    def mine() -> torch.Tensor:
        return answer_logits(base, for_prediction(batch, False), store)[:, -1, words]

    @torch.no_grad()
    def other() -> torch.Tensor:
        text = ids[:, :-1]
        return theirs(input_ids=text, attention_mask=torch.ones_like(text)).logits[:, -1, words]

    return mine, other


def many_prompts(base: Any, tokenizer: Any) -> tuple[Step, Step]:
    ids = torch.randint(100, 49000, (1, 513))
    ours = Ours(base, tokenizer, members=16)
    theirs, words = reference(base).eval(), torch.tensor([330, 441])
    examples = rendered(ids, after=True) * 16

    @torch.no_grad()
    def mine() -> None:
        answer_logits(base, ours.batch(examples), PrefixStore(base))[:, -1, words]

    @torch.no_grad()
    def other() -> None:
        text = ids[:, :-1]
        for _ in range(16):
            theirs(input_ids=text, attention_mask=torch.ones_like(text)).logits[:, -1, words]

    return mine, other


def population_cpu(base: Any, tokenizer: Any) -> tuple[Step, Step]:
    ids = torch.randint(100, 49000, (8, 33))
    ours = Ours(base, tokenizer, members=16)
    model = reference(base).train()
    one = reference_step(model, ids)

    def other() -> None:
        for _ in range(16):
            one()

    return ours.step(rendered(ids, after=False) * 16, lambda: None), other


ROWS: dict[str, Callable[[Any, Any], tuple[Step, Step]]] = {
    "train_front": lambda base, tokenizer: train(base, tokenizer, "train_front"),
    "train_after_first_epoch": lambda b, t: train(b, t, "train_after_first_epoch"),
    "train_after_cached": lambda base, tokenizer: train(base, tokenizer, "train_after_cached"),
    "classify_short": classify_short,
    "many_prompts_one_document": many_prompts,
    "population_cpu": population_cpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--row", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    base, tokenizer = load_model(str(fetch("smollm2")))
    figures = []
    for name in options.row:
        torch.manual_seed(0)
        made = ROWS[name](copy.deepcopy(base), tokenizer)  # each row attaches prompts to a copy
        sides = dict(zip(("ours", "peft"), made, strict=True))
        times: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(options.runs + 1):  # the first one warms up
            for side, run in sides.items():
                start = time.perf_counter()
                run()
                if number:
                    times[side].append(1000 * (time.perf_counter() - start))
        ours, theirs = (statistics.median(times[side]) for side in ("ours", "peft"))
        figures.append(
            {"name": name, "device": "cpu", "ours": ours, "peft": theirs}
            | {"ratio": theirs / ours, "unit": "ms"}
        )
        print(f"{name:28} {ours:9.0f} ms {theirs:9.0f} ms   {theirs / ours:6.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
