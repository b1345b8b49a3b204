"""The README.md of a saved prompt: what it is, what it was trained on, how to use it.

Names and texts come from anywhere, so none stands in the card but as a value, a code or a cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import PurePath, PureWindowsPath
from typing import Any

from ..backbone.fetched import SOURCES
from .task import named_fields
from .template import parse

TAGS = ["p-tuning", "prompt"]
HEADING = "# A P-tuned prompt"
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def model_card(description: dict[str, Any]) -> str:
    """Markdown with the hub's metadata block, from the values of ``prompt.json``."""
    from huggingface_hub import ModelCardData

    about, template = description["base_model"], description["template"]
    base = about.get("name") or ""
    reads = "peft" if description.get("peft_config") and template is None else "ptuning"
    shown = _shown(base)
    # A local path means nothing on the hub, but PEFT's card of an adapter has it.
    named = base if reads == "peft" else shown if _ON_THE_HUB.fullmatch(shown) else None
    data = ModelCardData(library_name=reads, base_model=named or None, tags=TAGS)
    state = "trained with them" if "folder" in about else "frozen"
    lines = ["---", data.to_yaml(), "---", "", HEADING, ""]
    lines.append(
        f"{description['num_virtual_tokens']} virtual tokens for the model "
        f"{_code(shown or 'unknown')} ({state}), trained by P-tuning (arXiv 2103.10385)."
    )
    if members := description.get("ensemble"):
        lines += ["", f"An ensemble: {1 + len(members)} such prompts answer together."]
    if template is None:
        lines += ["", "The virtual tokens stand in front of the whole input."]
    else:
        lines += ["", "Template:", "", *_block("text", template)]
    if description["verbalizer"]:
        lines += ["", "| label | words |", "|---|---|"]
        lines += [
            f"| {_cell(label)} | {_cell(', '.join(words))} |"
            for label, words in description["verbalizer"].items()
        ]
    facts = description["training"]
    scores = {k: v for k, v in facts.items() if isinstance(v, int | float)}
    if "teacher" in facts:  # whose answers are what counted as right
        names = {"dev_accuracy": "dev agreement with the teacher"}
        scores = {names.get(k, k): v for k, v in scores.items()}
    if scores:
        lines += ["", "| training | |", "|---|---|"]
        lines += [f"| {_cell(k.replace('_', ' '))} | {v:.6g} |" for k, v in scores.items()]
    if template is not None:
        lines += ["", *_block("python", _use(about, base, _columns(description)))]
    return "\n".join(lines) + "\n"


def _columns(description: dict[str, Any]) -> dict[str, None]:
    """What a row has for all members: the columns of templates and label words, in order."""
    members = [description, *description.get("ensemble", [])]
    words = [w for one in members for w in chain(*(one["verbalizer"] or {}).values())]
    fields = [parse(one["template"]).fields for one in members]
    return dict.fromkeys(chain(*fields, *map(named_fields, words)))


def _use(about: dict[str, Any], base: str, columns: Iterable[str]) -> str:
    example = dict.fromkeys(columns, "…")
    model = repr(_shown(base) or "base model")
    if "folder" in about:
        model = "prompt.base_model['name']"
    elif model.isascii() and "\\" not in model and '"' not in model:
        model = f'"{model[1:-1]}"'
    return (
        "import ptuning\n\n"
        'prompt = ptuning.Prompt.load("path/to/this/folder")\n'
        f"model, tokenizer = ptuning.load_model({model})\n"
        f"print(ptuning.predict(model, tokenizer, prompt, [{example}]))"
    )


def _shown(name: str) -> str:
    """A base model's real name: no short name of this package's, no path of a machine."""
    if name in SOURCES:
        return SOURCES[name].hub_name
    if name.startswith((".", "/", "~")) or PureWindowsPath(name).drive:
        return (PureWindowsPath(name) if "\\" in name else PurePath(name)).name
    return name


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _code(text: str) -> str:
    """Text as code within a line, whatever backticks it has."""
    ticks = "`" * (1 + _longest_run(text))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{_one_line(text)}{pad}{ticks}"


def _block(language: str, text: str) -> list[str]:
    """Text as a block of code that it cannot close."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return [fence + language, text, fence]


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _cell(text: str) -> str:
    """Text in a table, with nothing that Markdown or HTML reads."""
    return re.sub(r"([\\|`*_<>&\[\]])", r"\\\1", _one_line(str(text)))
