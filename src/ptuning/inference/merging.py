"""`merge`: prompts become part of an ordinary model, which any engine serves.

A virtual token is a token id, so a prompt is merged by writing its vectors to the embedding and its
virtual tokens' names to the tokenizer. The result needs nothing of this package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .. import formats
from ..backbone.base_model import BaseModel
from ..backbone.identity import difference
from ..backbone.lookups import input_embedding
from ..devices import on_cpu_by_default
from ..errors import InputError, PromptFileError, a_kind, briefly, warn
from ..prompts.prompt import Prompt
from ..rendering.merged_text import merged_text, names_of
from .merged_files import Merged, check_table
from .merged_rows import with_rows
from .merged_tokenizer import chat_turns, free_names, set_chat_turns, with_names, without_names

_NAME = re.compile(r"\w[\w.-]{0,63}")


@on_cpu_by_default
def merge(
    model: nn.Module,
    tokenizer: Any,
    prompts: Mapping[str, Prompt],
    already: Mapping[str, Mapping[str, Any]] | None = None,
) -> Merged:
    """Put prompts into a copy of a model, which shares all weights that do not change.

    Virtual tokens are never generated: their logits are no model's largest (`merged_rows`).

    Args:
        model: the frozen base model, or an already merged one; stays as it is.
        tokenizer: the model's; stays as it is.
        prompts: name -> trained prompt.
        already: `Merged.prompts` of an already merged model.

    Raises:
        InputError: a name that cannot be used or is taken, or a prompt that cannot be merged.
        PromptFileError: a prompt was trained on another model; `already` is another model's.

    Example:
        >>> merged = merge(model, tokenizer, {"capital": prompt})
        >>> merged.prompts["capital"]["text"]
        '<|capital:0|><|capital:1|> {country}<|capital:2|>'
        >>> merged.save("merged/")
    """
    base = BaseModel.of(model, tokenizer)
    if not isinstance(already, Mapping | None):
        raise InputError(f"already is {briefly(already)}; give the merged model's Merged.prompts")
    check_table(already or {}, tokenizer, "already")
    table = {name: dict(entry) for name, entry in (already or {}).items()}
    before = _virtual_ids(table, tokenizer)
    _check(base, prompts, table, before)
    if not prompts:
        return Merged(model, tokenizer, table)
    vectors = [prompt.trained_vectors().float() for prompt in prompts.values()]
    names = [names_of(name, len(v)) for name, v in zip(prompts, vectors, strict=True)]
    merged_tokenizer, ids = with_names(tokenizer, [n for of_one in names for n in of_one])
    turns = chat_turns(tokenizer)
    at = 0
    for (name, prompt), of_one in zip(prompts.items(), names, strict=True):
        own = ids[at : at + len(of_one)]
        at += len(of_one)
        text = merged_text(prompt, name, base.kind, tokenizer, merged_tokenizer, own)
        table[name] = {
            **{"text": text.text, "virtual_ids": own, "labels": text.labels},
            "vectors": fingerprint(prompt),
        }
        table[name] |= scaling(prompt, f"the prompt {name!r}")
        if not text.add_special_tokens:
            table[name]["add_special_tokens"] = False
        if text.turn is not None:
            turns[name] = text.turn
    set_chat_turns(merged_tokenizer, turns)
    real = sorted(set(tokenizer.get_vocab().values()) - before)
    twin, tied = with_rows(model, ids, torch.cat([v.cpu() for v in vectors]), real)
    if tied and (config := getattr(twin, "generation_config", None)) is not None:
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), *before, *ids})
    return Merged(twin, merged_tokenizer, table)


def scaling(prompt: Prompt, named: str = "this prompt") -> dict[str, Any]:
    """What a client makes of label words' log-probabilities: ``label_matrix``, of all words in
    their order (`forward.label_scores`), and ``label_bias``, of labels; nothing of most prompts.

    Args:
        prompt: that is asked for.
        named: how to speak of it.

    Warns:
        UserWarning: of a matrix, without which fewer answers are right.
    """
    told: dict[str, Any] = {}
    if prompt.label_matrix is not None:
        told["label_matrix"] = prompt.label_matrix.of(prompt.labels).tolist()
        warn(
            f"{named} compares its labels by a matrix, which clients have to apply (label_matrix, "
            "beside its labels): who only reads how likely label words are, or lets the model "
            "write one, gets fewer right; for such clients train without (--no-label-matrix)"
        )
    if prompt.label_bias:
        told["label_bias"] = dict(prompt.label_bias)
    return told


def fingerprint(prompt: Prompt) -> str:
    """What a merged prompt is known by: the SHA-256 of its vectors' bytes in float32."""
    return formats.sha256(prompt.trained_vectors().float().cpu().contiguous().numpy().tobytes())


def unmerge(merged: Merged, names: Iterable[str]) -> Merged:
    """The same model without some of its prompts; the others keep their ids.

    Rows and tokens of those that leave are free for the next prompts.

    Raises:
        InputError: no prompt has such a name.
    """
    names = list(names)
    if unknown := [name for name in names if name not in merged.prompts]:
        raise InputError(
            f"no merged prompt is called {unknown[0]!r}; there are "
            f"{', '.join(merged.prompts) or 'none'}"
        )
    if not names:
        return merged
    gone = [n for name in names for n in names_of(name, len(merged.prompts[name]["virtual_ids"]))]
    tokenizer = without_names(merged.tokenizer, gone)
    turns = chat_turns(merged.tokenizer)
    set_chat_turns(tokenizer, {k: turn for k, turn in turns.items() if k not in names})
    table = {name: entry for name, entry in merged.prompts.items() if name not in names}
    model = merged.model
    if gone:  # nothing of their vectors stays in the file
        virtual = _virtual_ids(merged.prompts, merged.tokenizer)
        real = sorted(set(merged.tokenizer.get_vocab().values()) - virtual)
        ids = merged.tokenizer.convert_tokens_to_ids(gone)
        width = input_embedding(model).embedding_dim
        model, _ = with_rows(model, ids, torch.zeros(len(ids), width), real)
    return Merged(model, tokenizer, table)


def _virtual_ids(table: Mapping[str, Mapping[str, Any]], tokenizer: Any) -> set[int]:
    """Ids of prompts that are merged already, or were."""
    vocabulary = tokenizer.get_vocab()
    free = {vocabulary[name] for name in free_names(tokenizer)}
    return free | {i for entry in table.values() for i in entry["virtual_ids"]}


def _check(
    base: BaseModel, prompts: Mapping[str, Prompt], table: Mapping[str, Any], before: set[int]
) -> None:
    if not isinstance(prompts, Mapping):
        raise InputError(f"prompts is {a_kind(prompts)}; give name -> trained prompt")
    width = input_embedding(base.model).embedding_dim
    for name, prompt in prompts.items():
        check_name(name)
        if name in table:
            raise InputError(
                f"a prompt called {name!r} is merged already; choose another name, or remove that "
                "one first (--overwrite on the command line)"
            )
        if not isinstance(prompt, Prompt):
            raise InputError(f"{name!r} is {a_kind(prompt)}; give a trained Prompt")
        prompt.check_alone("merged into a model")
        vectors = prompt.trained_vectors()
        if prompt.modules:
            raise InputError(
                f"the prompt {name!r} was trained together with "
                f"{', '.join(sorted(prompt.modules))}, and means nothing without them"
            )
        if vectors.dim() != 2 or vectors.shape[1] != width:
            raise PromptFileError(
                f"the prompt {name!r} has vectors of shape {tuple(vectors.shape)}, and the model's "
                f"embedding takes vectors of {width} numbers; give the model that it was trained on"
            )
        unlike = difference(prompt.base_model, base.model, base.tokenizer, before)
        if unlike:
            raise PromptFileError(f"the prompt {name!r} cannot be merged: {unlike}")


def check_name(name: str) -> None:
    """Refuse what cannot name a merged prompt.

    Raises:
        InputError: anything but letters, digits, dots, hyphens and underscores.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "ptuning-free":
        raise InputError(
            f"{name!r} cannot name a merged prompt; give 1 to 64 letters, digits, dots, hyphens "
            "and underscores, the first a letter, digit or underscore"
        )
