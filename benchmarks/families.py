"""Tiny random models of many families with both libraries' prompts, and batches, for `parity`.

All matrices are drawn anew with a large spread: a wrong position, type or pad then shows in the
outputs, which it hardly does with the small weights that models are initialised with.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from ptuning import peft_compat

VOCABULARY = 113  # no other size of these models, since PEFT looks for the embedding by it
VIRTUAL = 3
LENGTHS = (9, 6, 4)  # with the virtual tokens longer than every sliding window below
DECODER_LENGTH = 5
LABELS = 3
FIRST_ORDINARY = 5  # ids below it are special

AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    "none": "AutoModelForMaskedLM",
}
ONLY = {"CAUSAL_LM": "decoder", "SEQ_2_SEQ_LM": "encoder-decoder", "none": "encoder"}
"""Tasks of one kind of model; the others are for all."""


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        config: name of its configuration's class, without ``Config``.
        kind: ``decoder``, ``encoder`` or ``encoder-decoder``.
        values: of the configuration.
    """

    config: str
    kind: str
    values: dict[str, Any] = field(default_factory=dict)


_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 5}
_OPT = {**_SMALL, "ffn_dim": 48, "pad_token_id": 1}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 2}
_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
_T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_MARIAN = {"pad_token_id": VOCABULARY - 1, "decoder_start_token_id": VOCABULARY - 1}
_DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
_MODERN = {"global_attn_every_n_layers": 2, "local_attention": 6}  # three tokens to each side
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
FAMILIES: dict[str, Family] = {
    "Llama": Family("Llama", "decoder", _GROUPED),
    "GPT-2": Family("GPT2", "decoder", _GPT2),
    "Qwen3": Family("Qwen3", "decoder", {**_GROUPED, "head_dim": 8}),
    "Gemma 2": Family("Gemma2", "decoder", _GEMMA),
    "Gemma 3": Family(
        "Gemma3Text",
        "decoder",
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "OPT projected": Family("OPT", "decoder", {**_OPT, "word_embed_proj_dim": 16}),
    "OPT": Family("OPT", "decoder", {**_OPT, "word_embed_proj_dim": 32}),
    "Bloom": Family("Bloom", "decoder", _BLOOM),
    "GPT-NeoX": Family("GPTNeoX", "decoder", _SMALL),
    "Mistral": Family("Mistral", "decoder", {**_GROUPED, "sliding_window": 5}),
    "Phi-3": Family("Phi3", "decoder", _GROUPED),
    "Mixtral": Family("Mixtral", "decoder", {**_GROUPED, "num_local_experts": 4}),
    "BERT": Family("Bert", "encoder", _SMALL),
    "RoBERTa": Family("Roberta", "encoder", {**_SMALL, "type_vocab_size": 1, "pad_token_id": 1}),
    "DeBERTa-v2": Family("DebertaV2", "encoder", {**_SMALL, **_DEBERTA}),
    "DistilBERT": Family("DistilBert", "encoder", _DISTIL),
    "ALBERT": Family("Albert", "encoder", {**_SMALL, "embedding_size": 16}),
    "ELECTRA": Family("Electra", "encoder", {**_SMALL, "embedding_size": 16}),
    "ModernBERT": Family("ModernBert", "encoder", {**_SMALL, **_MODERN}),
    "T5": Family("T5", "encoder-decoder", _T5),
    "mT5": Family("MT5", "encoder-decoder", _T5),
    "BART": Family("Bart", "encoder-decoder", {**_BART, "pad_token_id": 1}),
    "Marian": Family("Marian", "encoder-decoder", {**_BART, **_MARIAN, "scale_embedding": True}),
}


def model(name: str, task: str) -> Any:
    """A family's model with the task's head, in eval mode; None where transformers has none."""
    family = FAMILIES[name]
    if ONLY.get(task, family.kind) != family.kind:
        return None
    given = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 2, **family.values}
    config = getattr(transformers, f"{family.config}Config")(
        vocab_size=VOCABULARY, num_labels=2 if task == "QUESTION_ANS" else LABELS, **given
    )
    for key in vars(config):
        if "dropout" in key or key.endswith("pdrop"):
            setattr(config, key, 0.0)
    auto = getattr(transformers, AUTO[task])
    if type(config) not in auto._model_mapping:
        return None
    torch.manual_seed(0)
    result = auto.from_config(config).eval()
    for parameter in result.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
        else:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return result


def batch(name: str, task: str, padding: str, row: int | None = None) -> dict[str, Tensor]:
    """The task's arguments for three rows.

    Args:
        name: the family.
        task: the task.
        padding: ``none`` (rows equally long, no mask), ``right`` or ``left``.
        row: this row of the padded batch alone, without padding and mask.

    Labels per token have the text's length; start and end count from the first virtual token.
    """
    family = FAMILIES[name]
    pad, draw = family.values.get("pad_token_id", 0), torch.Generator().manual_seed(1)
    longest = max(LENGTHS)

    def random(*shape: int, first: int = 0, end: int = LABELS) -> Tensor:
        return torch.randint(first, end, shape, generator=draw)

    ordinary = {"first": FIRST_ORDINARY, "end": VOCABULARY - 1}
    ids, targets = random(3, longest, **ordinary), random(3, longest, **ordinary)
    answer, whole = random(3, DECODER_LENGTH, **ordinary), random(3)
    types, classes = random(3, longest, end=2), random(3, longest)
    lengths = torch.tensor(LENGTHS if padding != "none" else [longest] * 3)
    if family.kind == "encoder-decoder":  # BART's classifier pools the end-of-sequence token
        ids[torch.arange(3), lengths - 1] = 2
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    result = {"input_ids": ids.masked_fill(~mask, pad), "attention_mask": mask.long()}
    if task in ("SEQ_CLS", "TOKEN_CLS") and name in ("BERT", "ALBERT", "ELECTRA"):
        result["token_type_ids"] = types.masked_fill(~mask, 0)
    per_token = {"CAUSAL_LM": ids, "TOKEN_CLS": classes, "none": targets}
    if task in per_token:
        result["labels"] = per_token[task].masked_fill(~mask, -100)
    if row is not None:
        result = {key: value[:, : LENGTHS[row]] for key, value in result.items()}
    elif padding == "left":
        for key, value in result.items():
            moved = [r.roll(longest - n) for r, n in zip(value, LENGTHS, strict=True)]
            result[key] = torch.stack(moved)
    if task == "SEQ_CLS":
        result["labels"] = whole
    if task == "SEQ_2_SEQ_LM":
        result["labels"] = answer
    if task == "FEATURE_EXTRACTION" and family.kind == "encoder-decoder":
        result["decoder_input_ids"] = answer
    if task == "QUESTION_ANS":
        first = result["attention_mask"].argmax(1) + VIRTUAL
        result |= {"start_positions": first + 1, "end_positions": first + 3}
    if row is not None:
        result = {key: value[row : row + 1] for key, value in result.items()}
    if row is not None or padding == "none":
        del result["attention_mask"]
    return result


class ByHand(nn.Module):
    """PEFT's encoder in front of a model by ``inputs_embeds``, for what PEFT has no class for."""

    def __init__(self, model: Any, config: Any):
        super().__init__()
        self.base_model = model.requires_grad_(False)
        config.token_dim = config.encoder_hidden_size = width_of(model)
        config.num_transformer_submodules = 1
        self.prompt_encoder = nn.ModuleDict({"default": peft.PromptEncoder(config)})

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Any:
        text = self.base_model.get_input_embeddings()(input_ids)
        rows = self.prompt_encoder["default"](torch.arange(VIRTUAL).unsqueeze(0))
        text = torch.cat([rows.expand(len(text), -1, -1), text], dim=1)
        if "attention_mask" in inputs:
            inputs["attention_mask"] = in_front(inputs["attention_mask"], 1)
        return self.base_model(inputs_embeds=text, **inputs)


def width_of(model: Any) -> int:
    return int(model.get_input_embeddings().embedding_dim)


def in_front(values: Tensor, value: int) -> Tensor:
    return torch.cat([values.new_full((len(values), VIRTUAL), value), values], dim=1)


def placed(task: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The arguments with labels for virtual tokens too, where PEFT does not add them itself."""
    if task not in ("TOKEN_CLS", "none") or "labels" not in inputs:
        return inputs
    return {**inputs, "labels": in_front(inputs["labels"], -100)}


def short(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".split("\n")[0].replace("|", "/")
    return text if len(text) < 70 else f"{text[:69]}…"


def configured(library: Any, task: str, encoder: str, **more: Any) -> Any:
    return library.PromptEncoderConfig(
        task_type=None if task == "none" else task,
        num_virtual_tokens=VIRTUAL,
        encoder_reparameterization_type=encoder,
        **more,
    )


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def their_model(base: Any, name: str, task: str, encoder: str) -> tuple[Any, str]:
    """PEFT's model, or None; and what is to be said of it.

    All that it trains is moved away from its start, so that a head that is left out shows.
    """
    inputs, errors = placed(task, batch(name, task, "none")), []
    sizes = {"token_dim": width_of(base), "num_attention_heads": 4}
    make: Any = ByHand if task == "none" else peft.get_peft_model
    torch.manual_seed(0)
    for more in ({}, sizes):
        try:
            model = make(copy.deepcopy(base), configured(peft, task, encoder, **more)).eval()
            model(**inputs)
        except Exception as error:
            errors.append(short(error))
            continue
        for parameter in trained(model).values():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        note = "PEFT has no class: its encoder by inputs_embeds" if task == "none" else ""
        if errors:
            note = f"PEFT fails: {errors[0]} (compared with {' and '.join(sizes)} given)"
        return model, note
    return None, f"PEFT fails: {errors[0]}"


def our_model(base: Any, task: str, encoder: str, like: Any) -> tuple[Any, list[str]]:
    """This package's model with the weights of `like`; names that only one of the two trains."""
    config = configured(peft_compat, task, encoder)
    model = peft_compat.get_peft_model(copy.deepcopy(base), config).eval()
    if like is None:
        return model, []
    own, given = trained(model), trained(like)
    for name in set(own) & set(given):
        own[name].data.copy_(given[name].data)
    return model, sorted(set(own) ^ set(given))
