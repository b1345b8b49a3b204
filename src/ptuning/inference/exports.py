"""A prompt in the formats of engines that take vectors, or prompts, beside a model.

    peft          PEFT's two files: virtual tokens in front of everything, and nothing else
    vllm-embeds   content parts of a chat: vectors (`prompt_embeds`) among texts with fields
    tensorrt-llm  a prompt table [1, virtual tokens, width], and the ids that point into it

A merged model (`merging`) needs none of these.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import formats
from ..backbone.base_model import BaseModel
from ..backbone.kinds import ModelKind
from ..backbone.lookups import check_fits, input_embedding
from ..errors import InputError
from ..prompts import peft_files
from ..prompts.prompt import Prompt
from ..rendering.chat import in_jinja
from ..rendering.merged_text import merged_text, names_of, special_tokens_around
from .merged_tokenizer import with_names
from .merging import scaling

_JOINED = """\
{%- set joined = namespace(messages=[], said="") %}
{%- for message in messages %}
{%- set joined.said = message['content'] if message['content'] is string else "" %}
{%- for part in message['content'] if message['content'] is not string %}
{%- set joined.said = joined.said ~ part['text'] %}
{%- endfor %}
{%- set joined.messages = joined.messages + [dict(message, content=SAID)] %}
{%- endfor %}
{%- set messages = joined.messages %}
"""
"""Goes before a chat template: the parts of a turn stand behind one another. vLLM puts a line's end
between them where a template does not take parts itself (0.32)."""
_WHOLE = "{%- for message in messages %}{{ message['content'] }}{%- endfor %}"
"""A chat template that adds nothing."""


def export(prompt: Prompt, base: BaseModel, to: str) -> dict[str, bytes]:
    """The files of an exported prompt: name -> content.

    Args:
        prompt: trained.
        base: the model that it was trained on.
        to: one of `FORMATS`.

    Raises:
        InputError: an unknown format, or one that cannot say this prompt.
    """
    check_format(to)
    prompt.check_alone("exported")
    base.check_same(prompt.base_model)
    return FORMATS[to](prompt, base)


def check_format(to: str) -> None:
    """Refuse a format that is not in `FORMATS`.

    Raises:
        InputError: it is not; lists them.
    """
    if to not in FORMATS:
        raise InputError(
            f"{to!r} is no format for prompts; expected one of {', '.join(FORMATS)}, or gguf for a "
            "merged model"
        )


def _peft(prompt: Prompt, base: BaseModel) -> dict[str, bytes]:
    in_front = prompt.template is None or prompt.prompt_leads
    adds = any(special_tokens_around(base.tokenizer))
    if not in_front or prompt.chat or (adds and prompt.special_tokens != "after"):
        raise InputError(
            "PEFT puts virtual tokens in front of everything, special tokens too, and this prompt "
            f"has them elsewhere: {prompt.template}; merge it instead (ptuning merge)"
        )
    peft_files.tell_of_labels(prompt.label_bias, prompt.label_matrix)
    vectors = prompt.trained_vectors().float()
    config = prompt.encoder_config(vectors.shape[1])
    return peft_files.pack(vectors, config, base.kind)


def _vllm_embeds(prompt: Prompt, base: BaseModel) -> dict[str, bytes]:
    if base.kind is not ModelKind.CAUSAL:
        raise InputError(
            f"vLLM reads vectors beside causal models alone, and this is a {base.kind} one; merge "
            "the prompt instead (ptuning merge)"
        )
    vectors = prompt.trained_vectors()
    text, pieces = _pieces(prompt, base)
    dtype = input_embedding(base.model).weight.dtype
    check_fits(vectors, dtype)
    content: list[dict[str, str]] = []
    at = 0
    for part in pieces:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
            continue
        content.append({"type": "prompt_embeds", "data": _packed(vectors[at : at + part], dtype)})
        at += part
    about: dict[str, Any] = {"content": content, **_labels(prompt, text)}
    own, said = _WHOLE, "joined.said"
    if prompt.chat:
        own, said = base.tokenizer.get_chat_template(), in_jinja(base.tokenizer, said)
    about["chat_template"] = _JOINED.replace("SAID", said) + own
    about["add_special_tokens"] = text.add_special_tokens and not prompt.chat
    return {"vllm_embeds.json": formats.pack_json(about)}


def _pieces(prompt: Prompt, base: BaseModel, chat: bool = True) -> tuple[Any, list[str | int]]:
    """The text, and its parts: text with fields, or how many virtual tokens.

    Args:
        prompt: trained.
        base: its model.
        chat: the reader puts the chat around it.
    """
    names = names_of("p", len(prompt.trained_vectors()))
    merged, ids = with_names(base.tokenizer, names)
    text = merged_text(prompt, "p", base.kind, base.tokenizer, merged, ids)
    if text.turn is None or not chat:
        whole = text.text
    else:
        doubled = [p.replace("{", "{{").replace("}", "}}") for p in text.turn]
        whole = "".join(f"{{{p}}}" if n % 2 else doubled[n] for n, p in enumerate(text.turn))
    parts = [part for part in re.split(f"({'|'.join(map(re.escape, names))})", whole) if part]
    runs = groupby(parts, set(names).__contains__)
    return text, [len(list(run)) if virtual else "".join(run) for virtual, run in runs]


def _labels(prompt: Prompt, text: Any) -> dict[str, Any]:
    """The words that a client compares, and what it makes of their log-probabilities."""
    return {"labels": text.labels, **scaling(prompt)}


def _packed(vectors: Tensor, dtype: torch.dtype) -> str:
    """A tensor as vLLM takes it: `torch.save`, in base64."""
    file = io.BytesIO()
    torch.save(vectors.detach().cpu().to(dtype).clone(), file)
    return base64.b64encode(file.getvalue()).decode()


def _tensorrt_llm(prompt: Prompt, base: BaseModel) -> dict[str, bytes]:
    vectors = prompt.trained_vectors().float()
    first = input_embedding(base.model).num_embeddings
    text, pieces = _pieces(prompt, base, chat=False)  # it takes ids
    file = io.BytesIO()
    np.save(file, vectors.detach().cpu().numpy()[None])
    about = {
        "task_id": 0,
        "virtual_ids": list(range(first, first + len(vectors))),
        "parts": pieces,
        "add_special_tokens": text.add_special_tokens,
        **_labels(prompt, text),
    }
    return {"prompt_table.npy": file.getvalue(), "prompt_table.json": formats.pack_json(about)}


FORMATS: dict[str, Callable[[Prompt, BaseModel], dict[str, bytes]]] = {
    "peft": _peft,
    "vllm-embeds": _vllm_embeds,
    "tensorrt-llm": _tensorrt_llm,
}
