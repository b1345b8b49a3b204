"""A merged model under `vllm serve`: the same answers as here, and the speed of the base model.

    make vllm-test

This half knows ptuning: it merges prompts into SmolLM2 and writes down what the attached prompts
answer. `vllm_client.py`, run by the environment that has vLLM, serves and asks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

import ptuning
from ptuning.backbone.fetched import fetch
from ptuning.backbone.identity import describe
from ptuning.prompts.task import fill

COUNTRIES = ["France", "Italy", "Spain", "Poland", "Austria", "Portugal", "Norway", "Greece"]
REVIEWS = [
    "a film that never finds its feet",
    "warm, funny and over far too soon",
    "two hours of people shouting in the rain",
    "the best thing she has done in years",
]
PROMPTS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "capital": ({"template": "[P:The capital city of] {country} [P:is called] [MASK]"},
                "country", COUNTRIES),
    "about": ({"template": "[P:Tell me a story about] {country} [P:in one sentence.]"},
              "country", COUNTRIES),
    "sentiment": ({"template": "[P:Review:] {review} [P:All in all it was] [MASK]",
                   "verbalizer": {"good": ["good", "great"], "bad": "bad"}}, "review", REVIEWS),
}  # fmt: skip
"""Name -> settings, field, what stands in it. Virtual tokens begin at words and are moved a little,
so that answers make sense without a training."""
TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True, help="bin folder with vllm in it")
    parser.add_argument("--requests", type=int, default=200, help="of the load test, in each round")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        questions = prepare(work)
        (work / "questions.json").write_text(json.dumps(questions))
        client = Path(__file__).with_name("vllm_client.py")
        command = [chosen.vllm / "python", client, fetch("smollm2"), work / "merged"]
        command += [work / "questions.json", str(chosen.requests), str(chosen.clients)]
        done = subprocess.run([*map(str, command), str(chosen.rounds)], check=False)
    raise SystemExit(done.returncode)


def prepare(work: Path) -> list[dict[str, Any]]:
    """Merge the prompts, and ask the model with the prompts attached."""
    model, tokenizer = ptuning.load_model("smollm2", device="cpu")
    torch.manual_seed(0)
    prompts = {name: made(model, tokenizer, settings) for name, (settings, _, _) in PROMPTS.items()}
    merged = ptuning.merge(model, tokenizer, prompts)
    merged.save(work / "merged")
    questions = []
    for name, (_, field, texts) in PROMPTS.items():
        rows = [{field: text} for text in texts]
        answers = ptuning.predict_details(
            model, tokenizer, prompts[name], rows, answer_tokens=None if prompts[name].labels else
            TOKENS)  # fmt: skip
        entry = merged.prompts[name]
        for row, answer in zip(rows, answers, strict=True):
            question = {"name": name, "virtual_ids": entry["virtual_ids"]}
            question |= {"text": fill(entry["text"], row), "answer": answer.answer}
            if entry["labels"]:
                question["probabilities"] = answer.probabilities
                question["word_ids"] = {
                    label: [ids_of(tokenizer, word) for word in listed(words)]
                    for label, words in entry["labels"].items()
                }
            questions.append(question)
    return questions


def made(model: Any, tokenizer: Any, settings: dict[str, Any]) -> ptuning.Prompt:
    """A prompt whose virtual tokens are the words of its template, moved a little."""
    prompt = ptuning.Prompt(answer_end=False, **settings)
    groups = ptuning.Renderer(tokenizer, prompt, "causal").groups
    weight = model.get_input_embeddings().weight.detach()
    rows = weight[torch.tensor([i for group in groups for i in group])]
    prompt.vectors = rows + 0.1 * rows.std() * torch.randn_like(rows)
    prompt.base_model = describe(model, tokenizer)
    return prompt


def listed(words: str | list[str]) -> list[str]:
    return [words] if isinstance(words, str) else words


def ids_of(tokenizer: Any, word: str) -> int:
    (only,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    return int(only)


if __name__ == "__main__":
    main()
