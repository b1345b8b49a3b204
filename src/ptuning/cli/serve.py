"""``ptuning serve``."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, PtuningError
from . import console, loading
from .fields import is_given
from .options import Dtype, Frozen

if TYPE_CHECKING:
    from ..serving.backend import Backend

_NEEDS = ("fastapi", "uvicorn", "prometheus_client", "httpx")
_OF_LOCAL = ("frozen", "dtype", "max_batch")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    context: typer.Context,
    prompt_folders: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="Saved prompts, or folders of such, which are looked through again while it "
            "runs; NAME=DIR gives a name.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model; with --backend vllm the merged folder. [default: the one that the "
            "first prompt was trained on]"
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="local: the model in this process; vllm: a server with the merged model, at --url."
        ),
    ] = "local",
    url: Annotated[
        str | None,
        typer.Option(
            help="Of a running vLLM, such as http://127.0.0.1:8001/v1; its key in PTUNING_URL_KEY."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PTUNING_API_KEY", help="That every request must bring.", show_envvar=True
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Rows of one batch.", min=1)] = 32,
    max_rows: Annotated[int, typer.Option(help="Rows of one request.", min=1)] = 256,
    max_waiting: Annotated[int, typer.Option(help="Rows that may wait.", min=1)] = 1024,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body.", min=1)] = 2**20,
    max_tokens: Annotated[int, typer.Option(help="Of a free answer.", min=1)] = 1024,
    timeout: Annotated[
        float, typer.Option(help="Seconds in which a request is answered.", min=0.1, max=1e9)
    ] = 60.0,
    body_timeout: Annotated[
        float, typer.Option(help="Seconds in which a request's body has come.", min=0.1, max=1e9)
    ] = 10.0,
    dtype: Dtype = "auto",
    frozen: Frozen = "own",
) -> None:
    """Serve prompts on one base model by HTTP, with a page to try them at /.

    Needs the extra of that name: pip install 'ptuning[serve]'.
    """
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise PtuningError(
            f"ptuning serve needs {', '.join(missing)}; install: pip install 'ptuning[serve]'"
        )
    if backend not in ("local", "vllm"):
        raise InputError(f"--backend is {backend!r}; expected local or vllm")
    if (backend == "vllm") != (url is not None):
        raise InputError("--backend vllm and --url go together: the address of a running server")
    chosen = [name for name in _OF_LOCAL if is_given(context, name)]
    if url is not None and chosen:
        option = chosen[0].replace("_", "-")
        raise InputError(
            f"--{option} is for --backend local: the running server has its own model and batches"
        )
    if api_key is None and os.environ.get("PTUNING_API_KEY") == "":
        raise InputError("PTUNING_API_KEY is empty, and so no key: give it a value, or unset it")
    if api_key is not None and not re.fullmatch("[!-~]{8,}", api_key):
        raise InputError("--api-key: give at least 8 ASCII characters without spaces")
    from ..serving.gate import Limits
    from ..serving.registry import Registry
    from ..serving.run import listening
    from ..serving.run import serve as run

    limits = Limits(
        body=max_body, body_seconds=body_timeout, seconds=timeout, rows=max_rows,
        waiting=max_waiting, batch=max_batch, tokens=max_tokens,
    )  # fmt: skip
    at = listening(host, port)
    with at:
        registry = Registry(  # it says which model the backend, made below, is to have
            prompt_folders,
            lambda name, prompt: answering.take_on(name, prompt),
            lambda handle: answering.let_go(handle),
            console.say,
        )
        name = model or registry.base_model()
        answering = _backend(name, url, dtype, frozen, limits)
        registry.rescan()
        registry.check_named()
        if not registry.served:
            console.warn("no prompt is served yet; put one into the folder")
        shown = f"[{host}]" if ":" in host else host
        console.tell(f"http://{shown}:{at.getsockname()[1]}  page at /, addresses at /docs")
        if api_key is None and host not in _LOOPBACK:
            console.warn(f"all who reach {host} may ask; give --api-key")
        try:
            run(answering, registry, limits, api_key, at, console.say)
        except KeyboardInterrupt:  # under a forward of the model's thread Python's own end aborts
            console.say(console.stopped())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)


def _backend(name: str, url: str | None, dtype: str, frozen: str, limits: Any) -> Backend:
    from ..backbone.base_model import BaseModel
    from ..serving.local import Local

    if url is not None:
        from ..serving.remote import Remote

        return Remote(url, name, limits.waiting, os.environ.get("PTUNING_URL_KEY"))
    return Local(
        BaseModel.of(*loading.base_model(name, dtype, frozen)), limits.batch, limits.waiting
    )
