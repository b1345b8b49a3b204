"""A merged model as one GGUF file, which llama.cpp and what is built on it serve.

The package gguf knows llama.cpp's names of tensors; what stands here beside them are the settings
of the few architectures that were run in llama.cpp and compared with transformers. llama.cpp's own
``convert_hf_to_gguf.py`` knows many more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from .. import formats, places, storage
from ..errors import InputError
from .gguf_tokenizer import describe_tokenizer
from .merged_files import PROMPTS, Merged, check_room, holds_merged

FILE = "model.gguf"
_KINDS = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def save_gguf(merged: Merged, folder: str | Path) -> None:
    """Write ``model.gguf`` and ``prompts.json``, as one save.

    Args:
        merged: a causal model with prompts in it, in the precision that the file is to have.
        folder: made if need be.

    Raises:
        InputError: the folder holds a merged model, or this one cannot be written (`write_gguf`).
        PtuningError: there is no room, or it cannot be written.
    """
    folder = places.real(folder)
    if holds_merged(folder):
        raise InputError(f"{folder} holds a merged model; choose another folder for {FILE}")
    check_room(merged.model, folder)
    with storage.one_save(folder) as staged:
        write_gguf(merged, staged / FILE)
        (staged / PROMPTS).write_bytes(formats.pack_json(merged.prompts))


def write_gguf(merged: Merged, path: str | Path) -> None:
    """Write a merged model as a GGUF file; beside the model one tensor at a time is in memory.

    Raises:
        InputError: an architecture, a setting or a tokenizer that was not compared with
            llama.cpp's.
    """
    model, embedding = merged.model, merged.model.get_input_embeddings()
    try:
        family = _family(model)
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.arch])
        family.describe(writer, model.config)
        writer.add_file_type(_KINDS[embedding.weight.dtype][1])
        texts = [told["text"] for told in merged.prompts.values()]
        describe_tokenizer(writer, merged.tokenizer, embedding.num_embeddings, texts)
        for name, tensor in _tensors(model, family):
            kind = _KINDS[tensor.dtype][0]
            size = tensor.numel() * tensor.element_size()
            writer.add_tensor_info(name, list(tensor.shape), np.dtype(np.float32), size, kind)
    except InputError as error:
        raise InputError(
            f"this model cannot be written as GGUF: {error}; merge it, and try llama.cpp's "
            "convert_hf_to_gguf.py on the folder, which knows more of them, or serve it with vLLM"
        ) from error
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(model, family):
            writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    finally:
        writer.close()


class _Family(NamedTuple):
    """How llama.cpp reads an architecture of transformers.

    Attributes:
        arch: its name there.
        describe: puts the settings of a configuration into a file.
        turned: halves of a head's rotated pairs stand apart in transformers, beside each other
            in llama.cpp.
        scaled: llama.cpp takes factors for the frequencies of rotations.
    """

    arch: gguf.MODEL_ARCH
    describe: Callable[[gguf.GGUFWriter, Any], None]
    turned: bool = False
    scaled: bool = False


def _family(model: Any) -> _Family:
    name = model.config.model_type
    if name not in _FAMILIES:
        raise InputError(f"it is {name}; expected one of {', '.join(_FAMILIES)}")
    plain = all(type(p) is nn.Parameter and p.dtype in _KINDS for p in model.parameters())
    if not plain:
        raise InputError("its weights are quantized; give it in float32, bfloat16 or float16")
    return _FAMILIES[name]


def _rotary(writer: gguf.GGUFWriter, config: Any) -> None:
    _expect(config, hidden_act={"silu"})
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None and window and window < config.max_position_embeddings:
        kinds = ["sliding_attention"]
    if set(kinds or []) - {"full_attention"}:
        raise InputError("its layers attend to a window of the text")
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _gpt2(writer: gguf.GGUFWriter, config: Any) -> None:
    _expect(
        config,
        activation_function={"gelu_new", "gelu_pytorch_tanh"},
        scale_attn_weights={True},
        scale_attn_by_inverse_layer_idx={False},
        add_cross_attention={False},
    )
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


_FAMILIES = {
    "llama": _Family(gguf.MODEL_ARCH.LLAMA, _rotary, turned=True, scaled=True),
    "mistral": _Family(gguf.MODEL_ARCH.LLAMA, _rotary, turned=True, scaled=True),
    "qwen2": _Family(gguf.MODEL_ARCH.QWEN2, _rotary),
    "qwen3": _Family(gguf.MODEL_ARCH.QWEN3, _rotary),
    "gpt2": _Family(gguf.MODEL_ARCH.GPT2, _gpt2),
}


def _expect(config: Any, **values: set) -> None:
    for name, known in values.items():
        if (value := getattr(config, name)) not in known:
            raise InputError(f"its {name} is {value!r}; expected {', '.join(map(str, known))}")


def _tensors(model: Any, family: _Family) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's tensors, one after the other: matrices as they are, vectors in float32."""
    config = model.config
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    factors = _factors(model)
    if factors is not None and not family.scaled:
        raise InputError("its rotations are scaled, which llama.cpp does not do for it")
    if factors is not None:
        yield "rope_freqs.weight", factors
    for name, parameter in model.named_parameters():
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise InputError(f"llama.cpp has no place for its {name}")
        tensor = parameter.detach().cpu()
        if family.turned and ".q_proj." in name:
            tensor = _pairs_together(tensor, config.num_attention_heads)
        elif family.turned and ".k_proj." in name:
            tensor = _pairs_together(tensor, config.num_key_value_heads)
        elif family.arch is gguf.MODEL_ARCH.GPT2 and ".c_" in name and tensor.dim() == 2:
            tensor = tensor.T  # a Conv1D, whose matrix has its inputs first
        yield called, tensor if tensor.dim() > 1 else tensor.float()


def _pairs_together(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a head: first halves of its pairs, then second ones -> pair by pair."""
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def _factors(model: Any) -> Tensor | None:
    """By what the frequencies of rotations are divided; None where they are the plain ones."""
    told = getattr(model.config, "rope_parameters", None)
    if told is None:
        return None
    kind = told.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or told.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"its rotations are of the kind {kind}, or of a part of a head")
    used = next(b for name, b in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    count = len(used)
    plain = told["rope_theta"] ** -(torch.arange(count, dtype=torch.float64) / count)
    factors = (plain / used.cpu().double()).float()
    return None if torch.allclose(factors, torch.ones(count), atol=1e-5) else factors
