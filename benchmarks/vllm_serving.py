"""A merged model under `vllm serve`: the same answers as here, and the speed of the base model.

    make vllm-test

Merges prompts into SmolLM2, writes down what the attached prompts answer, and asks vLLM: with
OpenAI's client, through `ptuning serve` in front of it, and, not merged, as `prompt_embeds`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from vllm_client import EMBEDS, TOKENS, compared, running, served, told

import ptuning
from ptuning.backbone.base_model import BaseModel
from ptuning.backbone.fetched import fetch
from ptuning.backbone.identity import describe
from ptuning.inference.exports import export
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
    "short": ({"template": "[P:Tell me about] {country} [P:in five words.]", "chat": True},
              "country", COUNTRIES),
    "sentiment": ({"template": "[P:Review:] {review} [P:All in all it was] [MASK]",
                   "verbalizer": {"good": ["good", "great"], "bad": "bad"}}, "review", REVIEWS),
}  # fmt: skip
"""Name -> settings, field, what stands in it. Virtual tokens begin at words and are moved a little,
so that answers make sense without a training."""
Question = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True, help="bin folder with vllm in it")
    parser.add_argument("--requests", type=int, default=32, help="of a round, to each model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        questions = prepare(work)
        address = stack.enter_context(served(chosen.vllm, work / "merged"))
        same_answers(address, questions)
        never_virtual(address, questions)
        in_front(address, work, questions)
        base = stack.enter_context(served(chosen.vllm, fetch("smollm2")))
        virtual = [question["virtual_ids"] for question in questions]
        print(f"{chosen.clients} clients, {chosen.requests} requests to each model in a round")
        print(told(*compared(base, address, virtual, chosen.requests, chosen.clients,
                             chosen.rounds)))  # fmt: skip
        stack.close()
        with served(chosen.vllm, fetch("smollm2"), *EMBEDS) as address:
            as_embeds(address, questions)


def prepare(work: Path) -> list[Question]:
    """Merge the prompts, and ask the model with the prompts attached."""
    model, tokenizer = ptuning.load_model("smollm2", device="cpu")
    torch.manual_seed(0)
    prompts = {name: made(model, tokenizer, settings) for name, (settings, _, _) in PROMPTS.items()}
    merged = ptuning.merge(model, tokenizer, prompts)
    merged.save(work / "merged")
    base = BaseModel.of(model, tokenizer)
    questions = []
    for name, (_, field, texts) in PROMPTS.items():
        prompt, entry = prompts[name], merged.prompts[name]
        prompt.save(work / name)
        embeds = json.loads(export(prompt, base, "vllm-embeds")["vllm_embeds.json"])
        rows = [{field: text} for text in texts]
        answers = ptuning.predict_details(
            model, tokenizer, prompt, rows, answer_tokens=None if prompt.labels else TOKENS
        )
        for row, answer in zip(rows, answers, strict=True):
            question = {"name": name, "row": row, "virtual_ids": entry["virtual_ids"]}
            question |= {"text": fill(entry["text"], row), "answer": answer.answer}
            question["content"] = [
                {**part, "text": fill(part["text"], row)} if part["type"] == "text" else part
                for part in embeds["content"]
            ]
            question["template"] = {k: embeds[k] for k in ("chat_template", "add_special_tokens")}
            if prompt.chat:
                question["said"] = row[field]
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


def same_answers(address: str, questions: list[Question]) -> None:
    """Greedy texts are the attached prompts', label probabilities too."""
    client = OpenAI(base_url=address, api_key="none")
    found: list[Any] = []
    for question in questions:
        if "said" in question:
            chat = client.chat.completions.create(
                model="model", temperature=0, max_tokens=TOKENS,
                messages=[{"role": "user", "content": question["said"]}],
                extra_body={"chat_template_kwargs": {"prompt": question["name"]}},
            )  # fmt: skip
            found.append(chat.choices[0].message.content)
            continue
        ask: dict[str, Any] = {"model": "model", "prompt": question["text"], "temperature": 0}
        if "probabilities" not in question:
            answer = client.completions.create(**ask, max_tokens=TOKENS)
            found.append(answer.choices[0].text)
            continue
        ids = [i for words in question["word_ids"].values() for i in words]
        more = {"logprob_token_ids": ids, "return_tokens_as_token_ids": True}
        answer = client.completions.create(**ask, max_tokens=1, logprobs=len(ids), extra_body=more)
        top = answer.choices[0].logprobs.top_logprobs[0]
        found.append(shares(question, {i: top[f"token_id:{i}"] for i in ids}))
    judged("merged", questions, found)


def as_embeds(address: str, questions: list[Question]) -> None:
    """The same of prompts that are not merged: their vectors among the text."""
    client = OpenAI(base_url=address, api_key="none")
    found: list[Any] = []
    for question in questions:
        ids = [i for words in question.get("word_ids", {}).values() for i in words]
        more: dict[str, Any] = dict(question["template"])
        if ids:
            more |= {"logprob_token_ids": ids, "return_tokens_as_token_ids": True}
        choice = client.chat.completions.create(
            model="model", temperature=0, max_tokens=1 if ids else TOKENS, logprobs=bool(ids),
            messages=[{"role": "user", "content": question["content"]}], extra_body=more,
        ).choices[0]  # fmt: skip
        if not ids:
            found.append(choice.message.content)
            continue
        said = choice.logprobs
        assert said is not None and said.content, "asked for log-probabilities, got none"
        top = {t.token: t.logprob for t in said.content[0].top_logprobs}
        found.append(shares(question, {i: top[f"token_id:{i}"] for i in ids}))
    judged("as prompt_embeds", questions, found)


def in_front(address: str, work: Path, questions: list[Question]) -> None:
    """The same through `ptuning serve` in front of vLLM."""
    command = [sys.executable, "-m", "ptuning", "serve", *(str(work / name) for name in PROMPTS)]
    command += ["--backend", "vllm", "--url", address, "--model", str(work / "merged")]
    found: list[Any] = []
    with running(command, {}) as here:
        for question in questions:
            body: dict[str, Any] = {"fields": question["row"]}
            if "probabilities" not in question:
                body["max_tokens"] = TOKENS
            request = urllib.request.Request(
                f"{here}/v1/prompts/{question['name']}/predict",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                said = json.load(answer)
            (only,) = said["predictions"]
            found.append(only["probabilities"] or only["answer"])
    judged("through ptuning serve", questions, found)


def shares(question: Question, likely: dict[int, float]) -> dict[str, float]:
    """Label -> its probability among the labels, from its words' log-probabilities."""
    scores = {
        label: sum(math.exp(likely[i]) for i in words)
        for label, words in question["word_ids"].items()
    }
    return {label: score / sum(scores.values()) for label, score in scores.items()}


def judged(how: str, questions: list[Question], found: list[Any]) -> None:
    worst, texts, labels = 0.0, 0, 0
    for question, answer in zip(questions, found, strict=True):
        if "probabilities" not in question:
            if answer.strip() != question["answer"]:
                raise SystemExit(f"{how}: {answer!r}, and here {question['answer']!r}")
            texts += 1
            continue
        expected = question["probabilities"]
        worst = max([worst, *(abs(answer[label] - expected[label]) for label in expected)])
        labels += 1
    print(f"{how}: greedy texts alike {texts}, label probabilities {labels}, off by {worst:.1e}")
    if worst > 1e-4:
        raise SystemExit(f"{how}: label probabilities differ")


def never_virtual(address: str, questions: list[Question]) -> None:
    """Text that is drawn at random has no virtual token."""
    client = OpenAI(base_url=address, api_key="none")
    virtual = {i for question in questions for i in question["virtual_ids"]}
    drawn = 0
    for question in questions:
        answer = client.completions.create(
            model="model", prompt=question["text"], temperature=1, n=8, max_tokens=64, seed=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        for choice in answer.choices:
            said = (choice.model_extra or {})["token_ids"]
            if virtual & set(said):
                raise SystemExit(f"a virtual token was said: {choice.text!r}")
            drawn += len(said)
    print(f"virtual tokens among {drawn} drawn ones: 0")


if __name__ == "__main__":
    main()
