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
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}


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
    for number in range(chosen.texts):
        name = f"task{number % chosen.prompts}"
        text = {"text": tokenizer.decode(texts[number % len(texts)][:24])}
        worst, unlike = compared(model, tokenizer, prompts[name], merged, reread, table[name], text,
                                 worst, unlike)  # fmt: skip
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
    model: Any, tokenizer: Any, prompt: ptuning.Prompt, merged: Any, reread: Any,
    entry: dict[str, Any], row: dict[str, str], worst: float, unlike: int,
) -> tuple[float, int]:  # fmt: skip
    """The largest difference so far, and how many texts were unlike."""
    renderer = ptuning.Renderer(tokenizer, prompt, "causal")
    ids = reread(fill(entry["text"], row))["input_ids"]
    with torch.no_grad(), ptuning.attach(model, tokenizer, prompt) as attachment:
        first = attachment.first_id(prompt)
        own = [i if i >= 0 else first - 1 - i for i in renderer.layout(row, None).ids]
        expected = model(torch.tensor([own])).logits
        said = model.generate(torch.tensor([own]), **GREEDY)[0, len(own) :]
    with torch.no_grad():
        got = merged(torch.tensor([ids])).logits[..., : expected.shape[-1]]
    again = merged.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :]
    return max(worst, float((got - expected).abs().max())), unlike + (
        said.tolist() != again.tolist()
    )


if __name__ == "__main__":
    main()
