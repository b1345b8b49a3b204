"""``ptuning merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..data.rows import listed
from ..errors import InputError, counted
from . import console, saved_prompt
from .options import DtypeAsSaved, Json

if TYPE_CHECKING:
    from ..inference.merged_files import Merged
    from ..prompts.prompt import Prompt


def merge(
    output: Annotated[Path, typer.Option(help="Model folder to write, or a merged one to add to.")],
    prompt_folders: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DIR]...", help="Folders (or hub names) of saved prompts."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model, or a merged one, whose prompts stay. [default: the one that the "
            "first prompt was trained on]"
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Name of each prompt, in order. [default: its folder's name]"),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="Prompt to take out of a merged model.")
    ] = None,
    dtype: DtypeAsSaved = "auto",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace prompts of the same names, or the whole model."),
    ] = False,
    alone: saved_prompt.Alone = False,
    json_output: Json = False,
) -> None:
    """Make prompts part of an ordinary model, which vLLM and every other engine serves.

    Writes the model with the prompts' virtual tokens in its embedding and its tokenizer, and
    prompts.json, which says what to ask it.
    """
    from .. import storage
    from ..inference import merged_files, merging

    names = _names(prompt_folders or [], name or [])
    if not names and not remove:
        raise InputError("nothing to merge; give the folder of a saved prompt, or --remove NAME")
    with storage.locked(output):
        merged_files.check_free(output)
        there = merged_files.holds_merged(output)
        adds = there and model is None
        if there and not adds and not overwrite:
            raise InputError(
                f"--output {output} is a merged model; leave --model away to add to it, choose "
                "another folder, or --overwrite"
            )
        prompts = {
            name: saved_prompt.load_one(folder, alone, "merged into a model")
            for name, folder in names.items()
        }
        merged = _begin(str(output) if adds else model, prompts, dtype)
        replaced = [name for name in prompts if overwrite and name in merged.prompts]
        merged = merging.unmerge(merged, [*(remove or []), *replaced])
        merged = merging.merge(merged.model, merged.tokenizer, prompts, merged.prompts)
        merged.save(output)
    if json_output:
        console.print_json({"output": str(output), "prompts": merged.prompts})
        return
    shown = f": {listed(merged.prompts)}" if merged.prompts else ""
    console.tell(f"{counted(len(merged.prompts), 'prompt')} in {output}{shown}")


def _names(folders: list[str], names: list[str]) -> dict[str, str]:
    """Name -> the folder of its prompt."""
    from ..inference.merging import check_name

    if names and len(names) != len(folders):
        raise InputError(
            f"--name is given {len(names)} times for {len(folders)} prompts; give one for each, or "
            "none"
        )
    found: dict[str, str] = {}
    for name in names:
        check_name(name)
    names = names or [saved_prompt.merged_name(folder) for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        if name in found:
            raise InputError(
                f"{found[name]} and {folder} would both be called {name!r}; give --name for each"
            )
        found[name] = folder
    return found


def _begin(model: str | None, prompts: dict[str, Prompt], dtype: str) -> Merged:
    """What is merged into: a base model, or one with prompts."""
    from ..backbone.load import load_as_saved
    from ..inference.merged_files import Merged, holds_merged

    if model is not None and holds_merged(model):
        return Merged.load(model, dtype)
    if not prompts:
        raise InputError("--remove takes prompts out of a merged model; none is given")
    name = saved_prompt.base_name(next(iter(prompts.values())), model)
    return Merged(*load_as_saved(name, dtype), {})
