"""``ptuning export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console, saved_prompt
from .options import Dtype
from .saved_prompt import Model, PromptFolder


def export(
    prompt_folder: PromptFolder,
    to: Annotated[str, typer.Option(help="peft, vllm-embeds or tensorrt-llm.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    model: Model = None,
    dtype: Dtype = "float32",
) -> None:
    """Write a prompt for engines that take vectors beside a model; merge serves all others.

    peft: PEFT's adapter, for prompts in its placement. vllm-embeds: parts of a chat for vLLM with
    --enable-prompt-embeds. tensorrt-llm: a prompt table and the ids that point into it.
    """
    from .. import storage
    from ..backbone.base_model import BaseModel
    from ..backbone.load import load_model
    from ..inference import exports

    prompt = saved_prompt.load(prompt_folder)
    exports.check_format(to)
    name = saved_prompt.base_name(prompt, model)
    base = BaseModel.of(*load_model(name, dtype=dtype, device="cpu"))
    files = exports.export(prompt, base, to)
    storage.write_folder(output, files)
    console.tell(f"{', '.join(files)} in {output}")
