"""Prompts on a tiny model in folders, and servers in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

import ptuning
from ptuning import Prompt
from ptuning.backbone.identity import describe

from .. import tiny

KEY = "a-key-of-tests"
WAIT = 300
"""Seconds after which what should come does not: long, since tests may share a slow machine."""
get, post, put, delete, request = (
    partial(ask, timeout=WAIT)
    for ask in (httpx.get, httpx.post, httpx.put, httpx.delete, httpx.request)
)
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "capital": ("[P*3] {country} [P] is [MASK]", {"answer": "capital", "answer_tokens": 6}),
    "mood": ("[P*2] {text} [P]: [MASK]", {"verbalizer": {"good": "Paris", "bad": "Rome"}}),
    "pair": (
        "{a} [P*2] {b} so [MASK]",
        {"verbalizer": {"x": "capital of Italy", "y": "Rome!", "z": "Oslo"}},
    ),
}
ROWS: dict[str, dict[str, Any]] = {
    "capital": {"country": "France"},
    "mood": {"text": "it rains in Oslo"},
    "pair": {"a": "Berlin", "b": 2024},
}


def make(place: Path) -> None:
    """``model/`` and ``prompts/NAME/`` in a folder."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %} Answer:"
    tiny.model("llama", vocab_size=len(tokenizer)).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for name in PROMPTS:
        prompt(place, name).save(place / "prompts" / name)


def model(place: Path) -> tuple[Any, Any]:
    return ptuning.load_model(str(place / "model"))


def prompt(place: Path, name: str, seed: int = 0) -> Prompt:
    """A prompt with random vectors as large as the model's own."""
    base, tokenizer = model(place)
    template, options = PROMPTS[name]
    made = Prompt(template, **options)
    weight = base.get_input_embeddings().weight
    random = torch.Generator().manual_seed(seed)
    shape = (made.num_virtual_tokens or 0, weight.shape[1])
    made.vectors = torch.randn(*shape, generator=random) * float(weight.std())
    made.base_model = describe(base, tokenizer)
    return made


class Server:
    """A running ``ptuning serve``."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None):
        command = [sys.executable, "-u", "-m", "ptuning", "serve", "--port", "0", *arguments]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=settings)
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.match(r"http://\S+", line)
        assert found, line + "\n".join(self.said)
        self.url = found[0]

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(line.rstrip() for line in self.process.stderr)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait; gives the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(WAIT)
        self._reader.join(10)
        return code

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Server]:
    server = Server([str(a) for a in arguments], environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
