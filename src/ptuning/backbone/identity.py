"""Is it the same model? A sample of the embedding's values and a hash of the tokenizer.

The sample is compared with a tolerance, because the same model may be loaded in another dtype or
quantized.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import on_cpu_by_default
from ..errors import InputError, PromptFileError, warn
from .kinds import kind_of
from .lookups import input_embedding, looks_up_on
from .tokens import tokenizer_hash
from .upstream import commit_of

_SAMPLED_ROWS = 16
_SAMPLED_COLUMNS = 16
# Relative error of the sampled values: bf16 gives 0.004, 4-bit quantization about 0.1, another
# model of the same width about 1.4.
_SAME_MODEL = 0.35


def describe(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """The base model's name and fingerprints, as kept in ``prompt.json``."""
    return {
        "name": name_of(model),
        "kind": _kind(model),
        "revision": commit_of(getattr(model, "config", None)),
        "embedding": sample_of(model),
        "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
    }


def sample_of(model: nn.Module) -> dict[str, Any]:
    """Some values of the model's embedding, and where they stand."""
    embedding = input_embedding(model)
    dtype = torch.float32  # whatever the default is
    rows = torch.linspace(3, embedding.num_embeddings - 1, _SAMPLED_ROWS, dtype=dtype).long()
    columns = torch.linspace(0, embedding.embedding_dim - 1, _SAMPLED_COLUMNS, dtype=dtype).long()
    sample = _sample(embedding, rows, columns)
    return {
        "width": embedding.embedding_dim,
        "rows": " ".join(map(str, rows.tolist())),
        "columns": " ".join(map(str, columns.tolist())),
        "values": [" ".join(f"{float(x):.6f}" for x in row) for row in sample],
    }


def _kind(model: nn.Module) -> str:
    try:
        return kind_of(model)
    except InputError:  # a classifier, or no head at all
        return "other"


def _sample(embedding: nn.Embedding, rows: Tensor, columns: Tensor) -> Tensor:
    """Values of the stored weight at `rows` x `columns`; read through the module where the weight
    itself is quantized or offloaded."""
    weight = embedding.weight
    if weight.is_floating_point() and not weight.is_meta:
        return weight.detach()[rows.to(weight.device)].float().cpu()[:, columns]
    with torch.no_grad():
        return embedding(rows.to(looks_up_on(embedding))).float().cpu()[:, columns]


def check_same(saved: dict[str, Any], model: nn.Module, tokenizer: Any) -> None:
    """Compare a prompt's base model with the one at hand.

    Raises:
        PromptFileError: the embedding has another width.
    Warns:
        UserWarning: the weights or the tokenizer differ, with both names.
    """
    if unlike := difference(saved, model, tokenizer):
        warn(unlike)


def difference(
    saved: dict[str, Any], model: nn.Module, tokenizer: Any, added: Collection[int] = ()
) -> str | None:
    """What a prompt's base model and the one at hand differ in, in words; None: they are the same.

    Args:
        saved: what `describe` gave; empty where nothing is known.
        model: at hand.
        tokenizer: its own, or None.
        added: ids whose rows and names came later, by merging.

    Raises:
        PromptFileError: the embedding has another width.
    """
    if not saved:
        return None
    embedding = input_embedding(model)
    here, there = name_of(model), saved.get("name")
    known = fingerprint(saved)
    if known["width"] != embedding.embedding_dim:
        raise PromptFileError(
            f"this prompt was trained on {there!r} with embedding width {known['width']}; "
            f"{here!r} has {embedding.embedding_dim}: give the model that it was trained on"
        )
    error = torch.inf
    if int(known["rows"].max()) < embedding.num_embeddings:
        kept = torch.tensor([row not in added for row in known["rows"].tolist()])
        got = _sample(embedding, known["rows"], known["columns"])[kept]
        expected = known["values"][kept]
        error = float((got - expected).norm() / expected.norm().clamp(min=1e-12))
    if not error <= _SAME_MODEL:
        return (
            f"this prompt was trained on {there!r}, and {here!r} has other weights: its "
            "answers will be poor unless one is a close relative of the other"
        )
    if tokenizer is None or saved.get("tokenizer") is None:
        return None
    if saved["tokenizer"] == tokenizer_hash(tokenizer):
        return None
    if added and saved["tokenizer"] == tokenizer_hash(tokenizer, added):
        return None
    return (
        f"this prompt was trained on {there!r} with another tokenizer than that of "
        f"{here!r}: the same text becomes other ids"
    )


@on_cpu_by_default
def fingerprint(saved: dict[str, Any]) -> dict[str, Any]:
    """The embedding's sample in what `describe` gave, as tensors.

    Raises:
        PromptFileError: there is none, or it cannot be read.
    """
    try:
        known = saved["embedding"]
        width = int(known["width"])
        rows = torch.tensor([int(i) for i in known["rows"].split()])
        columns = torch.tensor([int(i) for i in known["columns"].split()])
        values = torch.tensor(
            [[float(x) for x in row.split()] for row in known["values"]], dtype=torch.float32
        )
        if values.shape != (len(rows), len(columns)) or not torch.isfinite(values).all():
            raise ValueError(f"values of shape {tuple(values.shape)}, or not finite")
        if rows.min() < 0 or columns.min() < 0 or columns.max() >= width:
            raise ValueError("a place outside the embedding")
        for name in ("name", "kind", "revision", "tokenizer"):
            if not isinstance(saved.get(name), str | None):
                raise TypeError(f"{name} is {saved[name]!r}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise PromptFileError(
            f"prompt.json: base_model has no readable sample of the embedding ({error!r}); copy "
            "the prompt again, or retrain"
        ) from None
    return {"width": width, "rows": rows, "columns": columns, "values": values}


def name_of(model: nn.Module) -> str:
    """What to call a model in messages and files."""
    return getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
