"""``ptuning export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import console, saved_prompt
from .options import DtypeAsSaved, Overwrite
from .saved_prompt import Alone, Model

if TYPE_CHECKING:
    from ..inference.merged_files import Merged
    from ..prompts.prompt import Prompt

GGUF = "gguf"


def export(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Folder (or hub name) of a saved prompt; for gguf also a merged model's.",
        ),
    ],
    to: Annotated[str, typer.Option(help="gguf, peft, vllm-embeds or tensorrt-llm.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    model: Model = None,
    dtype: DtypeAsSaved = "auto",
    alone: Alone = False,
    overwrite: Overwrite = False,
) -> None:
    """Write prompts for engines that read no transformers model; merge serves all others.

    gguf: the merged model as model.gguf, for llama.cpp. Beside a model that stays as it is: peft,
    PEFT's adapter, for prompts in its placement; vllm-embeds, parts of a chat for vLLM with
    --enable-prompt-embeds; tensorrt-llm, a prompt table and the ids that point into it.
    """
    from .. import storage
    from ..backbone.base_model import BaseModel
    from ..inference import exports, gguf_file

    if to != GGUF:
        exports.check_format(to)
    with storage.locked(output):
        if storage.holds_something(output) and not overwrite:
            raise InputError(
                f"--output {output} is not empty; choose another folder, or --overwrite to write "
                "there all the same"
            )
        if to == GGUF:
            gguf_file.save_gguf(_merged(folder, model, dtype, alone), output)
            names = f"{gguf_file.FILE} and prompts.json"
        else:
            prompt = saved_prompt.load_one(folder, alone, "exported")
            files = exports.export(prompt, BaseModel.of(*_base(prompt, model, dtype)), to)
            storage.write_folder(output, files)
            names = ", ".join(files)
    console.tell(f"{names} in {output}")


def _merged(folder: str, model: str | None, dtype: str, alone: bool) -> Merged:
    """The merged model of a folder, or one with the folder's prompt in it."""
    from ..inference.merged_files import Merged, holds_merged
    from ..inference.merging import merge

    if holds_merged(folder):
        if model is not None:
            raise InputError(f"{folder} is a merged model; --model goes with a saved prompt")
        return Merged.load(folder, dtype)
    name = saved_prompt.merged_name(folder)
    prompt = saved_prompt.load_one(folder, alone, "merged into a model")
    return merge(*_base(prompt, model, dtype), {name: prompt})


def _base(prompt: Prompt, model: str | None, dtype: str) -> tuple[Any, Any]:
    from ..backbone.load import load_as_saved

    return load_as_saved(saved_prompt.base_name(prompt, model), dtype)
