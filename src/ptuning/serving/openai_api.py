"""``/v1/completions`` and ``/v1/chat/completions``: a prompt is a model there.

The text of the request is the prompt's one field. A prompt with several takes them as JSON in that
text, or as ``fields`` beside it (``extra_body`` of OpenAI's client). The base model's own name goes
on with plain text, and answers chats of any length.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response, StreamingResponse

from ..formats import distinct
from .asking import Desk, begun
from .backend import Answer, Row
from .gate import Refused, error_body, no_constant
from .json_text import Json, event
from .messages import ChatRequest, CompletionRequest
from .registry import Served


def routes(desk: Desk) -> APIRouter:
    """OpenAI's two addresses."""
    router = APIRouter(prefix="/v1", tags=["as OpenAI's"])

    @router.post("/completions", summary="Complete a text, or answer with a prompt")
    async def completions(request: CompletionRequest) -> Response:
        came = request.prompt
        texts: list[Any] = came if isinstance(came, list) else [came]
        if request.fields is not None:
            if any(texts):
                raise Refused(422, "prompt and fields both came; send one of them")
            texts = [None]
        name, handle, served = _model(desk, request.model, chat=False)
        rows = [_row(served, text, request.fields) for text in texts]
        return await _respond(desk, name, handle, served, rows, request, chat=False)

    @router.post("/chat/completions", summary="Answer a user's message with a prompt")
    async def chat(request: ChatRequest) -> Response:
        name, handle, served = _model(desk, request.model, chat=True)
        if served is None:
            row = _turns(request)
        elif len(request.messages) == 1 and request.messages[0].role == "user":
            row = _row(served, request.messages[0].text, request.fields)
        else:
            raise Refused(
                422,
                f"messages has {len(request.messages)} messages, ending with the role "
                f"{request.messages[-1].role!r}; a prompt answers one message of the user",
            )
        return await _respond(desk, name, handle, served, [row], request, chat=True)

    return router


def _model(desk: Desk, name: str, chat: bool) -> tuple[str, Any, Served | None]:
    """Name, handle and, for a prompt, what is served under the name of a model."""
    if name == desk.backend.name and name not in desk.registry.served:
        handle = desk.backend.plain_chat if chat else desk.backend.plain
        if handle is None:
            what = "takes no chats" if chat else "writes no text"
            raise Refused(422, f"the base model {name!r} {what}; ask one of its prompts")
        return "(base model)", handle, None
    served = desk.served(name)
    return name, served.handle, served


def _turns(request: ChatRequest) -> Row:
    if request.fields is not None:
        raise Refused(422, "the base model takes messages and no fields")
    return {"turns": [{"role": turn.role, "content": turn.text} for turn in request.messages]}


def _row(served: Served | None, text: str | None, fields: Row | None) -> Row:
    if served is None:
        if text is None or fields is not None:
            raise Refused(422, "the base model takes a text and no fields")
        return {"text": text}
    if fields is not None:
        return fields
    if text is None:
        raise Refused(422, "neither prompt nor fields came; send one of them")
    if len(served.fields) == 1:
        return {served.fields[0]: text}
    try:
        row = json.loads(text, parse_constant=no_constant, object_pairs_hook=distinct)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or any(isinstance(v, dict | list) for v in row.values()):
        raise Refused(
            422,
            f"the prompt {served.name!r} has the fields {', '.join(map(repr, served.fields))}; "
            "send them as 'fields', or as a JSON object in the text",
        )
    return row


async def _respond(
    desk: Desk,
    name: str,
    handle: Any,
    served: Served | None,
    rows: list[Row],
    request: CompletionRequest | ChatRequest,
    chat: bool,
) -> Response:
    desk.check_count(rows)
    if served is not None:
        desk.check_rows(served, rows, named=False)
    limit = request.max_tokens
    if isinstance(request, ChatRequest):
        limit = limit or request.max_completion_tokens
    wish = desk.wish(limit=limit, stop=request.stop)
    frame = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": request.model,
    }
    if request.stream:
        if len(rows) != 1:
            raise Refused(422, f"{len(rows)} prompts came; a stream answers one")
        options = request.stream_options
        usage = options is not None and bool(options.include_usage)
        parts = await begun(desk.stream(name, handle, rows[0], wish))
        told = _events(parts, frame, chat, usage)
        return StreamingResponse(told, media_type="text/event-stream")
    answers = await desk.answer(name, handle, rows, wish)
    choices = [_choice(number, answer, chat) for number, answer in enumerate(answers)]
    return Json({**frame, "choices": choices, "usage": _usage(answers)})


def _choice(number: int, answer: Answer, chat: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": number,
        "finish_reason": "stop" if answer.complete else "length",
        "logprobs": None,
    }
    if answer.probabilities:
        choice["probabilities"] = answer.probabilities
    if chat:
        return {**choice, "message": {"role": "assistant", "content": answer.text}}
    return {**choice, "text": answer.text}


def _usage(answers: list[Answer]) -> dict[str, int]:
    read, written = sum(a.read for a in answers), sum(a.written for a in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def _events(
    parts: AsyncIterator[Any], frame: dict[str, Any], chat: bool, usage: bool
) -> AsyncIterator[str]:
    frame = {**frame, "object": "chat.completion.chunk" if chat else "text_completion"}
    role = {"role": "assistant"}  # told once: clients join what chunks say, the role too

    def chunk(text: str, end: str | None = None) -> str:
        said = {"delta": {**role, "content": text}} if chat else {"text": text}
        role.clear()
        choice = {"index": 0, "finish_reason": end, "logprobs": None, **said}
        return event({**frame, "choices": [choice]})

    async for part in parts:
        if isinstance(part, str):
            yield chunk(part)
        elif isinstance(part, Answer):
            yield chunk("", "stop" if part.complete else "length")
            if usage:
                yield event({**frame, "choices": [], "usage": _usage([part])})
        else:
            yield event(error_body(part.status, str(part)))
    yield "data: [DONE]\n\n"
