"""What kind of language model it is: how it gives an answer, and which models cannot give one."""

from __future__ import annotations

import enum
import inspect
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    BertGenerationDecoder,
)

from ..errors import InputError
from .traits import check_model
from .upstream import uncompiled

_UNFIT = {
    "cpmant": "CPM-Ant reads its text in both directions and goes on with it",
    "git": "GIT counts on the keys and values of an image wherever some are kept",
    "xlnet": "XLNet reads in any order, and what it sees of an answer depends on the call",
}


class ModelKind(enum.StrEnum):
    """How a language model gives an answer."""

    CAUSAL = "causal"
    """The tokens that follow the input."""
    MASKED = "masked"
    """The tokens at the masks."""
    SEQ2SEQ = "seq2seq"
    """What the decoder says."""


def kind_of(model: nn.Module) -> ModelKind:
    """How the model gives an answer.

    Raises:
        InputError: it is no model, or has no output head over a vocabulary.
    """
    check_model(model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return ModelKind.SEQ2SEQ
    if why := _UNFIT.get(str(getattr(config, "model_type", None))):
        raise InputError(f"{why}; give a causal, masked or encoder-decoder language model")
    writes = getattr(model, "can_generate", lambda: False)()
    _check_reads_text(model, writes)
    if writes and not _fills_masks(model):
        return ModelKind.CAUSAL
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return ModelKind.MASKED
    raise InputError(
        f"{type(model).__name__} has no language-model head to answer with; load the model with "
        "AutoModelForCausalLM, AutoModelForMaskedLM or AutoModelForSeq2SeqLM"
    )


def _check_reads_text(model: nn.Module, writes: bool) -> None:
    """Refuse a model that reads no text without images or sounds, or that goes on with a text which
    it reads in both directions: PaliGemma, whose masks depend on the batch's padding, and encoders.

    Raises:
        InputError: it is one.
    """
    config: Any = getattr(model, "config", None)
    given = inspect.signature(uncompiled(model).forward).parameters.values()
    wanted = [p.name for p in given if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    missing = ", ".join(name for name in wanted if name not in ("input_ids", "attention_mask"))
    if missing:
        raise InputError(
            f"{type(model).__name__} reads no text alone (it wants {missing}); give a language "
            "model, or one that reads text without images"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise InputError(
            f"{type(model).__name__} reads its text in both directions, and how it then goes on "
            "depends on the batch; give a causal, masked or encoder-decoder language model"
        )
    known = type(config) in MODEL_FOR_MASKED_LM_MAPPING or isinstance(model, BertGenerationDecoder)
    if writes and known and not getattr(config, "is_decoder", True):
        raise InputError(
            f"{type(model).__name__} goes on with a text that it reads in both directions; load it "
            "with is_decoder=True in its configuration, or as a masked language model"
        )


def _fills_masks(model: nn.Module) -> bool:
    """A masked model that writes text, too: XLM and Flaubert, unless they are set up as causal."""
    config: Any = model.config
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "causal", False):
        return False
    return isinstance(model, MODEL_FOR_MASKED_LM_MAPPING[type(config)])  # type: ignore[arg-type]


def reads_left_to_right(model: nn.Module) -> bool:
    """A decoder-only architecture, whatever its head and whatever else it reads."""
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return False
    for known in (config, config.get_text_config()):  # the latter: of a model that reads images
        if type(known) in MODEL_FOR_MASKED_LM_MAPPING:
            return bool(getattr(known, "is_decoder", False))
        if type(known) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return True
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate():
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())
