"""Where a model looks token ids up: its input embedding, those of the same weight, and other tables
of ids; and which vectors fit in there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .traits import check_model
from .upstream import works_on

_SECOND_LOOKUPS, _EXPERTS_OF_IDS = ("embed_tokens_per_layer",), "tid2eid"
"""Modules that look the ids up again, by name (Gemma 4) or by their table of each id's experts
(DeepSeek V4)."""


def input_embedding(model: nn.Module) -> nn.Embedding:
    """The module that turns input ids into vectors.

    Raises:
        InputError: it is no model, or has none.
    """
    check_model(model)
    get = getattr(model, "get_input_embeddings", None)
    try:
        module = get() if get else None
    except NotImplementedError:
        module = None
    weighs = isinstance(getattr(module, "weight", None), Tensor)
    if not weighs or not hasattr(module, "embedding_dim"):
        raise InputError(
            f"{type(model).__name__} has no input embedding to attach a prompt to; give a "
            "transformers model that reads token ids"
        )
    return module  # type: ignore[return-value]


def looks_up_on(embedding: nn.Embedding) -> torch.device:
    """The device on which an embedding takes ids now: models are moved, and offloaded."""
    device = embedding.weight.device
    return works_on(embedding) if device.type == "meta" else device


@torch.no_grad()
def vectors_of(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """What the embedding gives for ordinary ids: the scale that injected rows have."""
    return embedding(ids.to(looks_up_on(embedding))).float().cpu()


def shared_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The input embedding and every other embedding of the same weight (T5 and BART have three).

    Offloaded modules have placeholders for the one weight; there the model says what is tied.
    """
    first = input_embedding(model)
    found = {id(first): first}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    own = {f"{name}.weight" for name, module in model.named_modules() if module is first}
    own |= {tied[name] for name in own if name in tied}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            alike = f"{name}.weight" in own or tied.get(f"{name}.weight") in own
            if module.weight is first.weight or alike:
                found.setdefault(id(module), module)
    return list(found.values())


def second_lookups(model: nn.Module) -> list[nn.Module]:
    """Modules that look the input ids up again, in tables that have no row for a virtual token."""
    return [
        module
        for name, module in model.named_modules()
        if name.endswith(_SECOND_LOOKUPS) or hasattr(module, _EXPERTS_OF_IDS)
    ]


def second_table(module: nn.Module) -> Tensor:
    """What a module of `second_lookups` looks ids up in: ``(ids, …)``."""
    owner: Any = module
    found: Any = getattr(owner, _EXPERTS_OF_IDS, None)
    return owner.weight if found is None else found


def check_width(rows: Tensor, width: int) -> None:
    """Refuse vectors ``(count, width)`` of another width than the embedding's.

    Raises:
        InputError: says both.
    """
    if rows.dim() != 2 or rows.shape[1] != width:
        raise InputError(
            f"the prompt's vectors have shape {tuple(rows.shape)}, and the base model's embedding "
            f"takes vectors of {width} numbers: this prompt belongs to a model of another width"
        )


def check_fits(rows: Tensor, dtype: torch.dtype) -> None:
    """Refuse vectors ``(count, width)`` that a precision cannot hold.

    Raises:
        InputError: they are not finite there.
    """
    if not dtype.is_floating_point or rows.is_meta:  # an embedding of packed weights
        return
    if not torch.isfinite(rows.detach().to(dtype)).all():
        raise InputError(
            f"the prompt's vectors reach {rows.detach().abs().max():.1e}, which the model's "
            f"{str(dtype).removeprefix('torch.')} cannot hold; load the model as float32 or "
            "bfloat16 (--dtype), or train the prompt again"
        )
