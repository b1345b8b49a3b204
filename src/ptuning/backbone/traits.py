"""Every fact about an architecture that somebody here needs, in one place; how it answers, if at
all, is `kinds`.

Facts are read off the model and its configuration, by transformers' own names; no fact depends on a
prompt. A new architecture that behaves unlike the others gets its line here and nowhere else.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, briefly
from .upstream import CACHE, attention_of, is_compiled, is_offloaded, is_stateful, uncompiled


def check_model(model: Any) -> None:
    """Refuse what is no model, such as the name of one.

    Raises:
        InputError: says what came.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is {briefly(model)}; expected a loaded model (ptuning.load_model gives "
            "model and tokenizer)"
        )


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
    "prophetnet",
    "roformer",
    "rwkv",
    "trocr",
    "whisper",
)
_SEE_PADDING = ("convbert", "fnet", "funnel", "nystromformer", "xlstm", "yoso")
"""Convolutions, Fourier transforms, landmarks and states, which take no notice of a mask."""
_OF_ROWS = ("rope_deltas", "recurrent_states")
_DECODER_NAMES = ("max_decoder_position_embeddings", "max_position_embeddings")
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def context_length(model: nn.Module, tokenizer: Any) -> int | None:
    """The longest input in tokens, or None where neither model nor tokenizer has a limit."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    limits = [getattr(tokenizer, "model_max_length", None)]
    limits += [getattr(config, name, None) for name in _CONTEXT_NAMES]
    offset = padding_offset(model)
    known = [
        limit - (offset if at > 0 else 0)
        for at, limit in enumerate(limits)
        if isinstance(limit, int) and 0 < limit < 10**9
    ]
    return min(known) if known else None


def decoder_length(model: nn.Module) -> int | None:
    """The longest answer of an encoder-decoder in tokens, its end included; None without a limit:
    T5's positions are relative.
    """
    config = model.config
    if not getattr(config, "is_encoder_decoder", False):
        return None
    for name in _DECODER_NAMES:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Names that the model's forward takes, through wrappers such as torch.compile's."""
    return frozenset(inspect.signature(uncompiled(model).forward).parameters)


def takes_any_argument(model: nn.Module) -> bool:
    """Its forward takes further arguments than those that it names."""
    found = inspect.signature(uncompiled(model).forward).parameters.values()
    return any(parameter.kind == parameter.VAR_KEYWORD for parameter in found)


# Positions.


def padding_offset(model: nn.Module) -> int:
    """The first position: ``padding_idx + 1`` in RoBERTa's family, which has that many fewer."""
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def has_positions_on_axes(model: nn.Module) -> bool:
    """A token has several positions (Qwen2-VL: time, height, width); the model finds them itself.

    They follow from the ids and the images' sizes, so that a count of tokens cannot replace them.
    """
    config: Any = getattr(model, "config", None)
    given = getattr(config and config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in given:
        return True
    return any(hasattr(module, "get_rope_index") for module in model.modules())


def first_position(model: nn.Module) -> int:
    """Of a causal model: 0 but for RoBERTa's family."""
    config = getattr(model, "config", None)
    return padding_offset(model) if getattr(config, "is_decoder", False) else 0


def counts_columns(model: nn.Module) -> bool:
    """A decoder whose positions are columns, padding included: it cannot be told others. Layers
    that compress their keys (DeepSeek V4) take so many columns together."""
    config: Any = getattr(model, "config", None)
    kinds = getattr(config and config.get_text_config(), "layer_types", None) or []
    if any("compressed" in kind for kind in kinds):
        return True
    return getattr(config, "model_type", None) in _COUNT_COLUMNS and not config.is_encoder_decoder


def sees_padding(model: nn.Module) -> bool:
    """What stands in a row's padding changes the row, whatever its mask says."""
    return getattr(getattr(model, "config", None), "model_type", None) in _SEE_PADDING


def scales_with_length(model: nn.Module) -> bool:
    """Rotary frequencies depend on the longest input of a batch (Phi-3's, and dynamic NTK)."""
    config: Any = getattr(model, "config", None)
    rope = getattr(config and config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("longrope", "dynamic") for kind in kinds)


def reads_again(model: nn.Module) -> bool:
    """A row whose first tokens were read at another time, or beside other rows, goes on alike."""
    return not (counts_columns(model) or sees_padding(model) or scales_with_length(model))


# Attention and its cache.


def reads_caches(model: nn.Module) -> bool:
    """Every layer attends to keys and values that it is given, on one device.

    Recurrent layers have a state instead. Where rotary frequencies follow the length of the input,
    a prefix alone has others than within its row. Gradient checkpointing runs layers again, and
    transformers then gives them no cache. Rotary positions must be told: what the body computes
    alone stands in other columns than in the whole rows.
    """
    config: Any = model.config
    text, named = config.get_text_config(), forward_parameters(model)
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    attends = {"full_attention", "sliding_attention"}.issuperset(kinds)
    takes = CACHE in named and ("position_ids" in named or not _is_rotary(text))
    if not (attends and takes) or counts_columns(model) or scales_with_length(model):
        return False
    return not (checkpoints_gradients(model) or is_spread(model) or is_stateful(model))


def remembers_rows(model: nn.Module) -> bool:
    """Between two tokens something of the rows stays in the model itself, not in a cache: there no
    other row may come in between (positions of images in Qwen2-VL, states of RecurrentGemma)."""
    return any(hasattr(m, name) for m in model.modules() for name in _OF_ROWS)


def packs_rows(model: nn.Module) -> bool:
    """The model's attention takes a mask of our own, its positions are what it is told, and its
    logits are those that it is asked for (Qwen2-Audio's forward takes any argument and forgets it).

    So it is with rotary positions, full attention in every layer, and PyTorch's attention.
    """
    if not looks_attention_up(model):
        return False
    config: Any = model.config
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) and not getattr(text, "layer_types", None)
    if getattr(text, "alibi", False) or scales_with_length(model):
        return False
    if not _is_rotary(text) or kinds != {"full_attention"} or window:
        return False
    return {"position_ids", "logits_to_keep"} <= forward_parameters(model)


def _is_rotary(text: Any) -> bool:
    return bool(getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None))


def looks_attention_up(model: nn.Module) -> bool:
    """Its layers look PyTorch's attention up by name."""
    return attention_of(getattr(model, "config", None)) == "sdpa"


def groups_queries(model: nn.Module) -> bool:
    """Several query heads read the same keys and values, through PyTorch's attention."""
    if not looks_attention_up(model):
        return False
    config: Any = model.config
    text = config.get_text_config()
    queries = getattr(text, "num_attention_heads", None)
    return (getattr(text, "num_key_value_heads", None) or queries) != queries


def looks_at_lengths(model: nn.Module) -> bool:
    """FlashAttention reads the lengths of rows on the host."""
    return "flash" in str(attention_of(getattr(model, "config", None)))


def checkpoints_gradients(model: nn.Module) -> bool:
    """Layers run again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def is_spread(model: nn.Module) -> bool:
    """Its layers are on several devices."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


# The repeated layer.


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of layers of one class, which makes up most of a language model; or none.
    What a model reads images or sounds by is left out."""
    if is_compiled(model):
        return []
    part = _text_part(model)
    lists = [m for m in part.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    alike = [list(m) for m in lists if len({type(layer) for layer in m}) == 1]
    longest = max(alike, key=len, default=[])
    wrapped = any("forward" in vars(layer) or is_offloaded(layer) for layer in longest)
    return [] if wrapped else longest


def _text_part(model: nn.Module) -> nn.Module:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return model
    decoder = None if config.is_encoder_decoder else getattr(model, "get_decoder", lambda: None)()
    return decoder if isinstance(decoder, nn.Module) else model


def layer_weights(model: nn.Module) -> int:
    """How many weights a token is multiplied with before the output head."""
    parts = repeated_layers(model) or [model]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


# The output head.


def rows_beyond(model: nn.Module) -> int:
    """Rows of the embedding that its class makes beyond the vocabulary's size, and its head none:
    Mllama has eight for images, and Molmo 2 says how many."""
    config: Any = model.config
    text = config.get_text_config()
    kind = str(getattr(text, "model_type", ""))
    if kind.startswith("molmo2"):
        return int(text.additional_vocab_size)
    return 8 if kind.startswith("mllama") else 0


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, or None."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    return head if isinstance(head, nn.Module) else None


def finished_logits(model: nn.Module, logits: Tensor) -> Tensor:
    """What models do to the logits of their output head ``(…, words)``: scale, divide, cap.

    A bias over the vocabulary (`vocabulary_bias`) is not added: `logits` may be of some words only.
    """
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    scale = getattr(model, "logit_scale", None)  # Cohere
    if isinstance(scale, float | int):
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)  # Granite
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def vocabulary_bias(model: nn.Module) -> Tensor | None:
    """What is added behind the output head, ``(1, vocabulary)``: BART's family has it."""
    return getattr(model, "final_logits_bias", None)


def output_bias(model: nn.Module) -> Tensor | None:
    """What is added to the logits: `vocabulary_bias`, or the bias ``(vocabulary,)`` of the head or,
    where that has none (ESM), of the module around it."""
    head = output_head(model)
    around = [module for module in model.modules() if head in [*module.children()]]
    found = [vocabulary_bias(model), *(getattr(one, "bias", None) for one in (head, *around))]
    return next((bias for bias in found if isinstance(bias, Tensor)), None)


_ENGINES_TIE = ("cohere", "cohere2", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text")


def engines_tie_the_head(model: nn.Module) -> bool:
    """vLLM makes the logits from the input embedding, whatever the configuration says.

    Read in vLLM 0.32: ``commandr.py``, ``gemma2.py``, ``gemma3n.py``; ``gemma3.py`` did so before.
    """
    return getattr(getattr(model, "config", None), "model_type", None) in _ENGINES_TIE


def embedding_scale(embedding: nn.Module) -> float:
    """What an embedding multiplies its rows with: Gemma's and BART's do."""
    scale = getattr(embedding, "embed_scale", None)
    return 1.0 if scale is None else float(scale)
