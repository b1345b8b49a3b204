"""The application: a prompt's address, what is served, health and metrics, the page.

POST /v1/prompts/NAME/predict    fields -> label with probabilities, or text
GET  /v1/prompts/NAME            what a prompt is: template, fields, words, training
PUT, DELETE /v1/prompts/NAME     take on, take off (with a key only)
GET  /v1/models                  prompts and base model, as OpenAI lists them
/v1/completions, /v1/chat/completions      `openai_api`
/health  /metrics  /openapi.json  /docs  / (the page)
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..errors import InputError, briefly, excerpt
from ..inference.report import training_history
from ..reporting import versions
from . import openai_api
from .asking import Desk, begun
from .backend import Answer, Backend, shown_name
from .gate import METRICS, Gate, Limits, Refused, error_body
from .json_text import Json, event
from .messages import PredictRequest, PredictResponse, in_words
from .metrics import Metrics
from .registry import NoPrompt, Registry, Served

_RESCAN_SECONDS = 2.0
_ABOUT = "Prompts trained by P-tuning, on one frozen language model."
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
}


def application(
    backend: Backend,
    registry: Registry,
    limits: Limits = Limits(),  # noqa: B008
    key: str | None = None,
    done: Callable[[Desk], None] = lambda desk: None,
) -> FastAPI:
    """The ASGI application of a server.

    Args:
        backend: answers.
        registry: of the prompts that it took on; looked through again every two seconds.
        limits: of requests.
        key: that requests must bring; None lets all in, but changes nothing by HTTP.
        done: hears the server's figures at its end.
    """
    desk = Desk(backend, registry, limits, Metrics())
    desk.metrics.watch(
        lambda: backend.depth, lambda: len(registry.served), lambda: len(registry.refused)
    )
    if hasattr(backend, "batcher"):
        backend.batcher.sizes = desk.metrics.batches.observe

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        looking = asyncio.create_task(_look_again(registry))
        yield
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
        await backend.close()
        done(desk)

    app = FastAPI(
        title="ptuning",
        description=_ABOUT,
        version=versions()["ptuning"],
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        default_response_class=Json,
    )
    app.state.desk = desk
    _prompts(app, desk, key)
    _around(app, desk)
    app.include_router(openai_api.routes(desk))
    _errors(app)
    app.add_middleware(Gate, key=key, limits=limits, ended=desk.metrics.ended)
    return app


def _prompts(app: FastAPI, desk: Desk, key: str | None) -> None:
    registry, backend = desk.registry, desk.backend

    @app.post("/v1/prompts/{name}/predict", response_model=PredictResponse, tags=["prompts"])
    async def predict(name: str, request: PredictRequest) -> Any:
        """Answer one row (`fields`) or many (`rows`): a label with probabilities, or text.

        With `stream` the parts of one free answer come as server-sent events `{"text": …}`, and
        last the whole answer.
        """
        served = desk.served(name)
        rows = request.rows if request.fields is None else [request.fields]
        if rows is None or None not in (request.fields, request.rows):
            raise Refused(422, "send 'fields' for one row, or 'rows' for many")
        desk.check_rows(served, rows, named=request.rows is not None)
        wish = desk.wish(request.virtual_tokens, request.max_tokens, request.stop)
        if request.stream:
            if len(rows) != 1:
                raise Refused(422, f"{len(rows)} rows came; a stream answers one")
            parts = await begun(desk.stream(name, served.handle, rows[0], wish))
            return StreamingResponse(_parts(parts), media_type="text/event-stream")
        answers = await desk.answer(name, served.handle, rows, wish)
        told = [_told(answer) for answer in answers]
        return Json({"prompt": name, "model": backend.name, "predictions": told})

    @app.get("/v1/prompts/{name}", tags=["prompts"])
    async def about(name: str) -> dict[str, Any]:
        """What a prompt is: template, fields, labels, nearest words, the curve of its training."""
        served = desk.served(name)
        nearest = await desk.nearest(served)
        history = await asyncio.to_thread(_history, served)
        return {**_summary(served), "virtual_tokens": nearest, "history": history}

    @app.put("/v1/prompts/{name}", tags=["prompts"])
    async def put(name: str) -> dict[str, Any]:
        """Take on the prompt of this name in a folder that is served, or renew it."""
        _may_change(key)
        try:
            served = await asyncio.to_thread(registry.put, name)
        except InputError as error:
            status = 404 if isinstance(error, NoPrompt) else 422
            raise Refused(status, registry.shown(str(error))) from None
        return _summary(served)

    @app.delete("/v1/prompts/{name}", tags=["prompts"])
    async def delete(name: str) -> dict[str, str]:
        """Take a prompt off until it is put again; its files stay."""
        _may_change(key)
        try:
            await asyncio.to_thread(registry.drop, name)
        except InputError as error:
            raise Refused(404, str(error)) from None
        return {"deleted": name}


def _around(app: FastAPI, desk: Desk) -> None:
    registry, backend = desk.registry, desk.backend

    @app.get("/v1/models", tags=["as OpenAI's"])
    async def models() -> dict[str, Any]:
        """Prompts, then the base model; `refused` says which prompts cannot be served, and why."""
        listed = [_as_model(name, served) for name, served in sorted(registry.served.items())]
        if backend.name not in registry.served:
            listed.append(_as_model(backend.name, None))
        return {"object": "list", "data": listed, "refused": dict(registry.refused)}

    @app.get("/v1/models/{name:path}", tags=["as OpenAI's"])
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        served = registry.served.get(name)
        if served is None and name != backend.name:
            raise Refused(404, f"there is no model {briefly(name)} here; GET /v1/models lists them")
        return _as_model(name, served)

    @app.get("/health", tags=["server"])
    async def health() -> Json:
        """200 while the model answers."""
        alive = await backend.alive()
        state = {"status": "ok" if alive else "dead", "prompts": len(registry.served)}
        return Json(state, 200 if alive else 503)

    @app.get(METRICS, tags=["server"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(desk.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, name in (("/", "index.html"), ("/docs", "docs.html")):
        text = (files(__package__) / "page" / name).read_text(encoding="utf-8")
        app.add_api_route(path, _constant(text), include_in_schema=False, methods=["GET", "HEAD"])
    app.add_api_route("/health", health, include_in_schema=False, methods=["HEAD"])


def _constant(text: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return HTMLResponse(text, headers=_HEADERS)

    return page


def _errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Any) -> Response:
        body = error_body(error.status, str(error))
        return Json(body, error.status, headers=error.headers)

    async def invalid(request: Request, error: Any) -> Response:
        return Json(error_body(422, in_words(error.errors())), 422)

    async def other(request: Request, error: Any) -> Response:
        message = f"{request.method} {excerpt(request.url.path)}: {error.detail}; see /docs"
        return Json(error_body(error.status_code, message), error.status_code)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, other)


async def _look_again(registry: Registry) -> None:
    while True:
        await asyncio.sleep(_RESCAN_SECONDS)
        try:
            await asyncio.to_thread(registry.rescan)
        except Exception as error:  # what is served stays served
            traceback.print_exception(error, file=sys.stderr)


def _may_change(key: str | None) -> None:
    if key is None:
        raise Refused(
            403, "without an API key (--api-key) nothing is changed by HTTP; change the folder"
        )


def _as_model(name: str, served: Served | None) -> dict[str, Any]:
    """As OpenAI lists a model: a prompt, or None for the base model."""
    owner = "base model" if served is None else "ptuning"
    told = {"id": name, "object": "model", "created": 0, "owned_by": owner}
    return told if served is None else {**told, **_summary(served)}


def _summary(served: Served) -> dict[str, Any]:
    prompt = served.prompt
    return {
        "name": served.name,
        "template": prompt.template,
        "by_hand": prompt.parsed.without_virtual().text,
        "fields": list(served.fields),
        "labels": list(prompt.labels),
        "chat": prompt.chat,
        "answer_tokens": prompt.answer_tokens,
        "num_virtual_tokens": len(prompt.trained_vectors()),
        "members": len(prompt.members),
        "base_model": shown_name(str(prompt.base_model.get("name") or "")),
        "training": prompt.training,
    }


def _history(served: Served) -> list[dict[str, float]]:
    """What the page draws of a training."""
    names = ("epoch", "loss", "dev_loss", "dev_accuracy")
    return [
        {k: record[k] for k in names if isinstance(record.get(k), int | float)}
        for record in training_history(served.folder)[:10_000]
    ]


def _told(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "probability": answer.probability,
        "probabilities": answer.probabilities,
        "shortened": answer.shortened,
    }


async def _parts(parts: AsyncIterator[Any]) -> AsyncIterator[str]:
    async for part in parts:
        if isinstance(part, str):
            yield event({"text": part})
        elif isinstance(part, Answer):
            yield event(_told(part))
        else:
            yield event(error_body(part.status, str(part)))
