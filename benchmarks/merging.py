"""Prompts merged into SmolLM2 beside the same prompts attached: logits, texts, size, odd tokens.

python benchmarks/merging.py [--prompts 100] [--texts 200] [--tokens 20000]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import ptuning
from ptuning.backbone.identity import describe
from ptuning.prompts.task import fill

TEMPLATES = ["[P*3] {text} [P*3] [MASK]", "{text}[P*4]", "[P*2] Text: {text} [P] In short: [P*2]"]
GREEDY: dict[str, Any] = {
    "max_new_tokens": 8,
    "do_sample": False,
    "pad_token_id": 2,
    "min_new_tokens": 8,
}
BATCH = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=20000)
    chosen = parser.parse_args()
    model, tokenizer = ptuning.load_model("smollm2", device="cpu")
    words = model.get_input_embeddings().weight.detach()
    torch.manual_seed(0)
    prompts = {f"task{i}": made(model, tokenizer, i, words) for i in range(chosen.prompts)}
    texts = real_texts(tokenizer, chosen.tokens)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/base")
        tokenizer.save_pretrained(f"{folder}/base")
        ptuning.merge(model, tokenizer, prompts).save(f"{folder}/merged")
        sizes = [
            sum(p.stat().st_size for p in Path(folder, n).iterdir()) for n in ("base", "merged")
        ]
        merged: Any = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/merged")
        reread: Any = transformers.AutoTokenizer.from_pretrained(f"{folder}/merged")
        table = ptuning.Merged.load(f"{folder}/merged").prompts
    rows = sum(len(entry["virtual_ids"]) for entry in table.values())
    wanted = (len(words) + 2 * rows) * words.shape[1] * words.element_size()
    print(
        f"{rows} rows; the folder grows by {sizes[1] - sizes[0]:,} bytes, rows and head {wanted:,}"
    )
    worst, unlike = 0.0, 0
    for first in range(0, chosen.texts, BATCH):
        asked = []
        for number in range(first, min(first + BATCH, chosen.texts)):
            text = tokenizer.decode(texts[number % len(texts)][:24])
            asked.append((f"task{number % chosen.prompts}", {"text": text}))
        off, other = compared(model, tokenizer, prompts, merged, reread, table, asked)
        worst, unlike = max(worst, off), unlike + other
    print(f"{chosen.texts} texts: logits off by {worst:.1e} at most, greedy texts unlike: {unlike}")
    virtual = [i for entry in table.values() for i in entry["virtual_ids"]]
    most = 0.0
    with torch.no_grad():
        for ids in texts:
            shares = merged(torch.tensor([ids])).logits[0].softmax(-1)
            most = max(most, float(shares[:, virtual].max()))
    count = sum(map(len, texts))
    print(f"{count} real tokens: the largest probability of a virtual token is {most:.1e}")


def made(model: Any, tokenizer: Any, number: int, words: torch.Tensor) -> ptuning.Prompt:
    """A prompt of random words, moved a little."""
    prompt = ptuning.Prompt(TEMPLATES[number % len(TEMPLATES)])
    rows = words[torch.randint(0, len(words), (prompt.num_virtual_tokens or 0,))]
    prompt.vectors = rows + 0.5 * rows.std() * torch.randn_like(rows)
    prompt.base_model = describe(model, tokenizer)
    return prompt


def real_texts(tokenizer: Any, tokens: int) -> list[list[int]]:
    """So many tokens of this repository's prose and tables, 200 in each text."""
    root = Path(__file__).parent.parent
    paths = [
        *sorted(root.glob("docs/*.md")),
        *sorted(root.rglob("demo_data/*.csv")),
        root / "README.md",
    ]
    ids = tokenizer("\n".join(path.read_text() for path in paths))["input_ids"]
    ids = (ids * (tokens // len(ids) + 1))[:tokens]
    return [ids[i : i + 200] for i in range(0, tokens, 200)]


def compared(
    model: Any, tokenizer: Any, prompts: dict[str, ptuning.Prompt], merged: Any, reread: Any,
    table: dict[str, Any], asked: list[tuple[str, dict[str, str]]],
) -> tuple[float, int]:  # fmt: skip
    """The largest difference of logits, and how many greedy texts are unlike, of a batch."""
    texts = [fill(table[name]["text"], row) for name, row in asked]
    batch = padded([reread(text)["input_ids"] for text in texts])
    with torch.no_grad(), ptuning.attach(model, tokenizer, *prompts.values()) as attachment:
        own = []
        for name, row in asked:
            first = attachment.first_id(prompts[name])
            ids = ptuning.Renderer(tokenizer, prompts[name], "causal").layout(row, None).ids
            own.append([i if i >= 0 else first - 1 - i for i in ids])
        expected = model(**padded(own)).logits
        said = model.generate(**padded(own), **GREEDY)[:, -GREEDY["max_new_tokens"] :]
    with torch.no_grad():
        got = merged(**batch).logits[..., : expected.shape[-1]]
        again = merged.generate(**batch, **GREEDY)[:, -GREEDY["max_new_tokens"] :]
    real = batch["attention_mask"].bool()
    return float((got - expected)[real].abs().max()), int((said != again).any(1).sum())


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the left."""
    longest = max(map(len, rows))
    ids = [[2] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


if __name__ == "__main__":
    main()
