"""In front of a running vLLM (or what speaks like it) that has the merged model.

Rows are rendered here and go there as token ids, virtual ones by the ids that ``prompts.json`` of
the merged folder gives them, so that no text of a user can be taken for a virtual token. Labels are
compared by the log-probabilities of their words' tokens (``prompt_logprobs``). Batching, caching
and devices are the other server's.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers

from .. import formats
from ..backbone.kinds import ModelKind
from ..errors import InputError, PtuningError
from ..forward.label_scores import mixed
from ..inference.merged_files import LOGIT_BIAS, PROMPTS, check_table
from ..inference.merged_tokenizer import free_names, without_names
from ..inference.merging import fingerprint
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..rendering.layout import Sequence as Tokens
from ..rendering.merged_text import names_of
from ..rendering.render import Renderer
from .backend import (
    PLAIN,
    PLAIN_CHAT,
    Answer,
    Row,
    Unreachable,
    Wish,
    as_it_is,
    cut_at,
    each_in_time,
    in_time,
    is_plain,
)
from .batcher import Overloaded, Stopping, TooLate

_PROBE = 5.0
"""Seconds in which the server behind says that it is there."""


@dataclass(eq=False)
class Handle:
    """A task, and the ids of its virtual tokens in the merged model."""

    task: Task
    renderer: Renderer
    ids: tuple[int, ...] = ()
    by_hand: Handle | None = None

    @property
    def goes_on(self) -> bool:
        """It goes on with text as it is, to the last space."""
        return is_plain(self.task) and not self.task.chat


class Remote:
    """The backend that asks a server.

    Args:
        url: of its OpenAI-compatible API, such as ``http://127.0.0.1:8001/v1``.
        folder: the merged model that it serves.
        waiting: rows that may be under way.
        key: that it wants.

    Raises:
        InputError, Unreachable: the folder holds no merged model; the server does not answer.
        PromptFileError: its table of prompts is damaged, or another model's.
    """

    def __init__(self, url: str, folder: str, waiting: int = 1024, key: str | None = None):
        self._url, self._waiting = url.rstrip("/"), waiting
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._merged = formats.read_json(Path(folder) / PROMPTS)
        except PtuningError as error:
            raise InputError(
                f"{error}; --model is the folder that ptuning merge wrote and vLLM serves"
            ) from None
        bias = Path(folder) / LOGIT_BIAS
        self._bias = formats.read_json(bias) if bias.is_file() else None
        self.name, self._context = self._model_there()
        named = transformers.AutoTokenizer.from_pretrained(folder)
        check_table(self._merged, named, str(Path(folder) / PROMPTS))
        tokens = [t for n, e in self._merged.items() for t in names_of(n, len(e["virtual_ids"]))]
        self._tokenizer = without_names(named, tokens)  # there what looks like one is text
        free = free_names(self._tokenizer)  # and those that were free before
        self._virtual = set(self._tokenizer.convert_tokens_to_ids(free))
        self._rendering = threading.Lock()
        self._clients: dict[int, httpx.AsyncClient] = {}
        self._under_way, self._closing = 0, False
        self.plain = self._handle(PLAIN)
        chats = getattr(self._tokenizer, "chat_template", None)
        self.plain_chat = self._handle(PLAIN_CHAT) if chats else None

    def _model_there(self) -> tuple[str, int | None]:
        try:
            response = httpx.get(f"{self._url}/models", headers=self._headers, timeout=10)
            response.raise_for_status()
            first = response.json()["data"][0]
            return str(first["id"]), first.get("max_model_len")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise Unreachable(f"no model at {self._url}/models: {error}; is vLLM up?") from None

    def take_on(self, name: str, prompt: Prompt) -> Handle:
        """A handle for a prompt that is merged into the model there.

        Raises:
            InputError: it is not merged there, or another one of its name is.
        """
        prompt.check_alone("served by a merged model")
        entry = self._merged.get(name)
        if entry is None:
            raise InputError(
                f"{name!r} is not merged into this model; it has "
                f"{', '.join(map(repr, self._merged)) or 'none'}. Merge it, or give its name: "
                "NAME=DIR"
            )
        ids = tuple(entry["virtual_ids"])
        same = entry.get("vectors") in (None, fingerprint(prompt))  # older tables do not tell
        if not same or len(ids) != len(prompt.trained_vectors()):
            raise InputError(
                f"{name!r} has other vectors than the prompt of this name in the merged model; "
                "merge it again, and let vLLM load that"
            )
        return self._handle(prompt, ids)

    def let_go(self, handle: Handle) -> None:
        """Nothing is held."""

    async def answer(self, handle: Handle, rows: Sequence[Row], wish: Wish) -> list[Answer]:
        """An answer for each row; the first fault of one ends the others, and their requests."""
        with self._room(len(rows)):
            try:
                async with asyncio.TaskGroup() as together:
                    asked = [together.create_task(self._one(handle, row, wish)) for row in rows]
            except ExceptionGroup as faults:
                raise faults.exceptions[0] from None
            return [one.result() for one in asked]

    async def stream(self, handle: Handle, row: Row, wish: Wish) -> AsyncIterator[str | Answer]:
        """Parts of a free answer as they come, and at last the whole."""
        with self._room(1):
            handle, example = await asyncio.to_thread(self._rendered, handle, row, wish)
            if handle.renderer.compares:
                whole = await self._compared(handle, example, wish)
                yield whole.text
                yield whole
                return
            ids = self._ids(handle, example.sequences[0])
            heard, said, tokens, likelihood, complete = "", "", 0, 0.0, False
            body = {**self._free(handle, ids, wish), "stream": True}
            async for choice in self._chunks(body, wish):
                known = (choice.get("logprobs") or {}).get("token_logprobs") or []
                tokens, likelihood = tokens + len(known), likelihood + sum(known)
                complete = complete or choice.get("finish_reason") == "stop"
                heard += choice["text"]
                certain = heard if handle.goes_on else heard.strip()  # the last spaces wait
                if len(certain) > len(said):
                    yield certain[len(said) :]
                    said = certain
        likelihood, shortened = math.exp(likelihood), example.shortened
        yield Answer(said, likelihood, {}, shortened, len(ids), tokens, complete)

    async def nearest(self, handle: Handle, deadline: float) -> None:
        """Nobody here has the vocabulary's vectors."""

    @property
    def depth(self) -> int:
        """Rows under way."""
        return self._under_way

    async def alive(self) -> bool:
        """It takes questions, and so does the server behind."""
        if self._closing:
            return False
        try:  # by a connection of its own: rows may have taken all others
            response = await self._there(1).get("/models", timeout=_PROBE)
        except httpx.HTTPError:
            return False
        return response.is_success

    async def close(self) -> None:
        """Take nothing more."""
        self._closing = True
        for client in self._clients.values():
            await client.aclose()

    # Rendering.

    def _handle(self, task: Task, ids: tuple[int, ...] = ()) -> Handle:
        return Handle(task, self._renderer(task), ids)

    def _renderer(self, task: Task) -> Renderer:
        # Of its context vLLM counts the last token that is asked for, though nobody reads it, and
        # wants one behind the words that are compared.
        context = None if self._context is None else self._context - (2 if task.labels else 1)
        return Renderer(self._tokenizer, task, ModelKind.CAUSAL, context).asking()

    def _rendered(self, handle: Handle, row: Row, wish: Wish) -> tuple[Handle, Any]:
        with self._rendering:
            if not wish.virtual:
                handle.by_hand = handle.by_hand or self._handle(handle.task.manual())
                handle = handle.by_hand
            renderer, limit = handle.renderer, wish.tokens(handle.task)
            if is_plain(handle.task):
                return handle, as_it_is(renderer, row, limit)
            if not renderer.compares and limit != handle.task.answer_tokens:
                renderer = self._renderer(replace(handle.task, answer_tokens=limit))
            return handle, renderer(row, answered=False)

    def _ids(self, handle: Handle, tokens: Tokens) -> list[int]:
        """The ids of a rendered row in the merged model.

        Raises:
            InputError: its text spells a virtual token.
        """
        if spelled := self._virtual.intersection(tokens.ids):
            token = self._tokenizer.convert_ids_to_tokens(min(spelled))
            raise InputError(f"a field spells the virtual token {token}; write it otherwise")
        return [handle.ids[-1 - i] if i < 0 else i for i in tokens.ids]

    # Asking.

    async def _one(self, handle: Handle, row: Row, wish: Wish) -> Answer:
        handle, example = await asyncio.to_thread(self._rendered, handle, row, wish)
        if handle.renderer.compares:
            return await self._compared(handle, example, wish)
        ids = self._ids(handle, example.sequences[0])
        (choice,) = await self._post(self._free(handle, ids, wish), wish)
        known = (choice.get("logprobs") or {}).get("token_logprobs") or []
        text = cut_at(choice["text"], wish.stop)
        text = text if handle.goes_on else text.strip()
        complete = choice["finish_reason"] == "stop"
        likelihood = math.exp(sum(known))
        return Answer(text, likelihood, {}, example.shortened, len(ids), len(known), complete)

    def _free(self, handle: Handle, ids: list[int], wish: Wish) -> dict[str, Any]:
        """The body that asks for a free answer, greedily."""
        body = {
            **self._body([ids], wish.tokens(handle.task)),
            "logprobs": 0,
        }
        if wish.stop:
            body["stop"] = list(wish.stop)
        return body

    def _body(self, prompts: list[list[int]], limit: int) -> dict[str, Any]:
        bias = {} if self._bias is None else {"logit_bias": self._bias}
        return {
            "model": self.name,
            "prompt": prompts,
            "max_tokens": limit,
            "temperature": 0,
            "repetition_penalty": 1.0,
            **bias,
        }

    async def _compared(self, handle: Handle, example: Any, wish: Wish) -> Answer:
        """The most likely label, as `prediction` compares them."""
        renderer = handle.renderer
        context = self._ids(handle, example.sequences[0])
        if example.label_ids:
            words = [(context, [token]) for token in example.label_ids]
        else:
            words = [(self._ids(handle, s), list(s.answer)) for s in example.sequences]
        body = {**self._body([c + w for c, w in words], 1), "prompt_logprobs": 0}
        choices = await self._post(body, wish)
        try:
            by_index = sorted(choices, key=lambda choice: choice["index"])
            scores = [
                _likelihood(choice["prompt_logprobs"], c + w, len(w))
                for choice, (c, w) in zip(by_index, words, strict=True)
            ]
        except (ValueError, LookupError, TypeError):  # others than vLLM know no such thing
            raise Unreachable(
                "vLLM does not answer as it should: it tells no prompt_logprobs of the label words"
            ) from None
        if renderer.matrix is not None:
            scores = mixed(torch.tensor(scores, dtype=torch.float32), renderer.matrix).tolist()
        shares, bias = [0.0] * len(renderer.labels), renderer.bias or [0.0] * len(renderer.labels)
        scores = [s + bias[label] for label, s in zip(renderer.owner, scores, strict=True)]
        best = max(scores)
        for label, score in zip(renderer.owner, scores, strict=True):
            shares[label] += math.exp(score - best)
        named = {k: v / sum(shares) for k, v in zip(renderer.labels, shares, strict=True)}
        said = max(named, key=named.__getitem__)
        return Answer(said, named[said], named, example.shortened, len(context), 1)

    async def _post(self, body: dict[str, Any], wish: Wish) -> list[dict[str, Any]]:
        """The choices of an answer."""
        if wish.deadline <= time.monotonic():
            raise TooLate("the answer's time was over before its turn came")
        try:  # httpx has times for each step only, and none for all of them
            async with in_time(wish.deadline):
                response = await self._there().post("/completions", json=body, timeout=None)
        except httpx.HTTPError as error:
            raise Unreachable(f"vLLM does not answer: {error}") from None
        _check(response.status_code, response.content)
        return _choices(response.text)

    async def _chunks(self, body: dict[str, Any], wish: Wish) -> AsyncIterator[dict[str, Any]]:
        """The choices of a stream, as they come."""
        asked = self._there().stream("POST", "/completions", json=body, timeout=None)
        try:
            async with AsyncExitStack() as open_response:
                async with in_time(wish.deadline):
                    response = await open_response.enter_async_context(asked)
                    if response.status_code >= 400:
                        _check(response.status_code, await response.aread())
                async for line in each_in_time(response.aiter_lines(), wish.deadline):
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        for choice in _choices(data):
                            yield choice
        except httpx.HTTPError as error:
            raise Unreachable(f"vLLM does not answer: {error}") from None

    @contextmanager
    def _room(self, rows: int) -> Iterator[None]:
        if self._closing:
            raise Stopping("the server is stopping; ask another, or again later")
        if self._under_way + rows > self._waiting:
            raise Overloaded(
                f"{self._under_way} rows are under way, and {self._waiting} may; ask again in a "
                "moment"
            )
        self._under_way += rows
        try:
            yield
        finally:
            self._under_way -= rows

    def _there(self, most: int = 512) -> httpx.AsyncClient:
        """A client with so many connections, of the event loop that answers."""
        if most not in self._clients:
            limits = httpx.Limits(max_connections=most, max_keepalive_connections=64)
            self._clients[most] = httpx.AsyncClient(
                base_url=self._url, headers=self._headers, limits=limits
            )
        return self._clients[most]


def _likelihood(prompt_logprobs: Any, ids: list[int], count: int) -> float:
    """The log-probability of the last `count` of the ids, as vLLM tells it."""
    found = zip(prompt_logprobs[-count:], ids[-count:], strict=True)
    return float(sum(at[str(token)]["logprob"] for at, token in found))


def _choices(text: str) -> list[dict[str, Any]]:
    """Of an answer, or of a part of a stream, which may have none."""
    try:
        told = json.loads(text)
        if "error" in told:
            raise Unreachable(f"vLLM says: {told['error']}")
        return list(told["choices"])
    except (ValueError, LookupError, TypeError):
        raise Unreachable(f"vLLM does not answer as it should: {text[:200]}") from None


def _check(status: int, content: bytes) -> None:
    if status >= 400:
        text = content.decode("utf-8", "replace")
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, LookupError, TypeError):
            text = text[:200]
        raise Unreachable(f"vLLM says {status}: {text}")
