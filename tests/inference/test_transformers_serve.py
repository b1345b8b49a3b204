"""A merged folder under `transformers serve`: the answers of the attached prompts."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import ptuning
from ptuning import Prompt
from ptuning.backbone.base_model import BaseModel
from ptuning.inference.attachment import attach
from ptuning.prompts.task import fill
from ptuning.rendering.render import Renderer

from .. import tiny

CHAT = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %} Answer:"
TEMPLATES = {"capital": "[P*2] {country} is [P] [MASK]", "talk": "[P*2] About {country} [P]"}
ROWS = [{"country": "France"}, {"country": "Italy or Spain, 2024"}]
TOKENS = 8


@contextmanager
def _served(folder: Path, tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as server:
        try:
            while True:
                assert server.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def _said(model: Any, tokenizer: Any, prompt: Prompt, row: dict[str, Any]) -> str:
    """What the model says with the prompt attached."""
    layout = Renderer(tokenizer, prompt, "causal").layout
    with torch.no_grad(), attach(model, tokenizer, prompt) as attachment:
        first = attachment.first_id(prompt)
        ids = torch.tensor([[i if i >= 0 else first - 1 - i for i in layout(row, None).ids]])
        out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_completions_and_chats_are_the_attached_prompts(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    model = tiny.model("llama", vocab_size=len(tokenizer))
    prompts = {}
    for name, template in TEMPLATES.items():
        prompts[name] = prompt = Prompt(template, chat=name == "talk")
        prompt.vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        prompt.base_model = BaseModel.of(model, tokenizer).describe()
    merged = ptuning.merge(model, tokenizer, prompts)
    merged.save(tmp_path / "merged")
    ask: dict[str, Any] = {"model": str(tmp_path / "merged"), "temperature": 0}
    with _served(tmp_path / "merged", tmp_path) as address:
        client = openai.OpenAI(base_url=address, api_key="none")
        for row in ROWS:
            text = fill(merged.prompts["capital"]["text"], row)
            told = client.completions.create(**ask, prompt=text, max_tokens=TOKENS)
            assert told.choices[0].text == _said(model, tokenizer, prompts["capital"], row)
            chat = client.chat.completions.create(
                **ask,
                messages=[{"role": "user", "content": row["country"]}],
                max_tokens=TOKENS,
                extra_body={"chat_template_kwargs": {"prompt": "talk"}},
            )
            said = _said(model, tokenizer, prompts["talk"], row)
            assert chat.choices[0].message.content == said
