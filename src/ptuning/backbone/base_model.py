"""What a prompt must know of its base model: kind, context length, and who it is.

The identity is a sample of the embedding's values, compared with a tolerance, because the same
model may be loaded in another dtype or quantized; and a hash of the tokenizer's vocabulary.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ..errors import InputError, PromptFileError
from .injection import input_embedding

_COUNT_COLUMNS = (
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
    "roformer",
    "rwkv",
)
_SAMPLED_ROWS = 16
_SAMPLED_COLUMNS = 16
# Relative error of the sampled values: bf16 gives 0.004, 4-bit quantization about 0.1, another
# model of the same width about 1.4.
_SAME_MODEL = 0.35


def task_kind(model: nn.Module) -> str:
    """``"causal"``, ``"seq2seq"`` or ``"masked"``: how the model gives an answer.

    Raises:
        InputError: the model has no language-model head.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate():
        return "causal"
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return "masked"
    raise InputError(
        f"{type(model).__name__} has no language-model head to answer with; load the model with "
        "AutoModelForCausalLM, AutoModelForMaskedLM or AutoModelForSeq2SeqLM"
    )


def reads_left_to_right(model: nn.Module) -> bool:
    """A decoder-only architecture, whatever its head."""
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return False
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return bool(getattr(config, "is_decoder", False))
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def context_length(model: nn.Module, tokenizer: Any) -> int | None:
    """The longest input in tokens, or None where neither model nor tokenizer has a limit."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    limits = [getattr(tokenizer, "model_max_length", None)]
    limits += [getattr(config, name, None) for name in names]
    offset = padding_offset(model)
    known = [
        limit - (offset if at > 0 else 0)
        for at, limit in enumerate(limits)
        if isinstance(limit, int) and 0 < limit < 10**9
    ]
    return min(known) if known else None


def padding_offset(model: nn.Module) -> int:
    """The first position: ``padding_idx + 1`` in RoBERTa's family, which has that many fewer."""
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def counts_columns(model: nn.Module) -> bool:
    """A decoder whose positions are columns, padding included: it cannot be told others."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "model_type", None) in _COUNT_COLUMNS and not config.is_encoder_decoder


def scales_with_length(model: nn.Module) -> bool:
    """Rotary frequencies depend on the longest input of a batch (Phi-3's, and dynamic NTK)."""
    config: Any = getattr(model, "config", None)
    given = getattr(config and config.get_text_config(), "rope_parameters", None) or {}
    kinds = [given, *(value for value in given.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("longrope", "dynamic") for kind in kinds)


def describe(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """The base model's name and fingerprints, as kept in ``prompt.json``."""
    embedding = input_embedding(model)
    rows = torch.linspace(3, embedding.num_embeddings - 1, _SAMPLED_ROWS).long()
    columns = torch.linspace(0, embedding.embedding_dim - 1, _SAMPLED_COLUMNS).long()
    sample = _sample(embedding, rows, columns)
    return {
        "name": name_of(model),
        "kind": _kind(model),
        "revision": getattr(getattr(model, "config", None), "_commit_hash", None),
        "embedding": {
            "width": embedding.embedding_dim,
            "rows": " ".join(map(str, rows.tolist())),
            "columns": " ".join(map(str, columns.tolist())),
            "values": [" ".join(f"{float(x):.6f}" for x in row) for row in sample],
        },
        "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
    }


def _kind(model: nn.Module) -> str:
    try:
        return task_kind(model)
    except InputError:  # a classifier, or no head at all
        return "other"


def _sample(embedding: nn.Embedding, rows: Tensor, columns: Tensor) -> Tensor:
    """Values of the stored weight at `rows` x `columns`; read through the module where the weight
    itself is quantized or offloaded."""
    weight = embedding.weight
    if weight.is_floating_point() and not weight.is_meta:
        return weight.detach()[rows.to(weight.device)].float().cpu()[:, columns]
    with torch.no_grad():
        return embedding(rows.to(weight.device)).float().cpu()[:, columns]


def check_same(saved: dict[str, Any], model: nn.Module, tokenizer: Any) -> None:
    """Compare a prompt's base model with the one at hand.

    Raises:
        PromptFileError: the embedding has another width.
    Warns:
        UserWarning: the weights or the tokenizer differ, with both names.
    """
    if not saved:
        return
    embedding = input_embedding(model)
    here = name_of(model)
    known = fingerprint(saved)
    if known["width"] != embedding.embedding_dim:
        raise PromptFileError(
            f"this prompt was trained on {saved['name']!r} with embedding width {known['width']}; "
            f"{here!r} has {embedding.embedding_dim}: give the model that it was trained on"
        )
    error = torch.inf
    if int(known["rows"].max()) < embedding.num_embeddings:
        got = _sample(embedding, known["rows"], known["columns"])
        expected = known["values"]
        error = float((got - expected).norm() / expected.norm().clamp(min=1e-12))
    if error > _SAME_MODEL:
        warnings.warn(
            f"this prompt was trained on {saved['name']!r}, and {here!r} has other weights: its "
            "answers will be poor unless one is a close relative of the other",
            stacklevel=3,
        )
    elif tokenizer is not None and saved.get("tokenizer") not in (None, tokenizer_hash(tokenizer)):
        warnings.warn(
            f"this prompt was trained on {saved['name']!r} with another tokenizer than that of "
            f"{here!r}: the same text becomes other ids",
            stacklevel=3,
        )


def fingerprint(saved: dict[str, Any]) -> dict[str, Any]:
    """The embedding's sample in what `describe` gave, as tensors.

    Raises:
        PromptFileError: there is none, or it cannot be read.
    """
    try:
        known = saved["embedding"]
        return {
            "width": int(known["width"]),
            "rows": torch.tensor([int(i) for i in known["rows"].split()]),
            "columns": torch.tensor([int(i) for i in known["columns"].split()]),
            "values": torch.tensor([[float(x) for x in row.split()] for row in known["values"]]),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PromptFileError(
            f"prompt.json: base_model has no readable sample of the embedding ({error!r}); copy "
            "the prompt again, or retrain"
        ) from None


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary with its ids, shortened to 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode meanwhile; afterwards each in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def first_free_id(tokenizer: Any) -> int:
    """One past the tokenizer's highest id (its length, unless its ids have holes)."""
    if tokenizer is None:
        return 0
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def name_of(model: nn.Module) -> str:
    """What to call a model in messages and files."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
