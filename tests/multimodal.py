"""Tiny random models that read more than token ids, each with an input of one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE = 150
_TEXT: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_SIDES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
_TOWER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _made(name: str, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
    model.generation_config.eos_token_id = None
    return model


def _row(*ids: int, **more: Tensor) -> dict[str, Tensor]:
    text = torch.tensor([ids])
    return {"input_ids": text, "attention_mask": torch.ones_like(text), **more}


def _pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _llava() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config=transformers.CLIPVisionConfig(**_TOWER, image_size=8),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default",
    )
    # Three channels and a text of three tokens would be the same number: the name decides.
    row = _row(5, *[IMAGE] * 4, 7, 8, pixel_values=_pixels(1, 3, 8, 8))
    return _made("LlavaForConditionalGeneration", config), row


def _gemma3() -> tuple[Any, dict[str, Tensor]]:
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "head_dim": 8, "sliding_window": 8, "layer_types": kinds},
        vision_config={**_TOWER, "image_size": 16, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=151,
        eoi_token_index=152,
    )
    row = _row(5, 6, 151, *[IMAGE] * 4, 152, 7, 8, 9, pixel_values=_pixels(1, 3, 16, 16))
    row["token_type_ids"] = (row["input_ids"] == IMAGE).long()
    model = _made("Gemma3ForConditionalGeneration", config)
    with torch.no_grad():  # zero at first: the image would not be seen
        weight = model.model.multi_modal_projector.mm_input_projection_weight
        weight.copy_(_pixels(*weight.shape))
    return model, row


def _gpt2() -> tuple[Any, dict[str, Tensor]]:
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.5}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    types = torch.tensor([[20, 20, 20, 21, 21, 21]])
    return _made("GPT2LMHeadModel", config), _row(5, 6, 7, 8, 9, 10, token_type_ids=types)


def _qwen2_vl() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": _MROPE},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
        | {"mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=IMAGE,
        video_token_id=151,
        vision_start_token_id=152,
        vision_end_token_id=153,
    )
    row = _row(5, 6, 152, *[IMAGE] * 4, 153, 7, 8, 9, 10, pixel_values=_pixels(16, 96))
    row["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    row["mm_token_type_ids"] = (row["input_ids"] == IMAGE).long()
    return _made("Qwen2VLForConditionalGeneration", config), row


def _mllama() -> tuple[Any, dict[str, Tensor]]:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    tower = {"hidden_size": 16, "attention_heads": 2, "num_hidden_layers": 2, "image_size": 8}
    tower |= {"num_global_layers": 1, "intermediate_size": 32, "patch_size": 4, "max_num_tiles": 2}
    ratios = {"supported_aspect_ratios": [[1, 1], [1, 2]], "intermediate_layers_indices": [0]}
    config = transformers.MllamaConfig(
        text_config={**_TEXT, "rope_parameters": rope, "cross_attention_layers": [1]},
        vision_config={**tower, **ratios, "vision_output_dim": 32},
        image_token_index=IMAGE,
    )
    row = _row(IMAGE, 5, 6, 7, 8, 9, pixel_values=_pixels(1, 1, 2, 3, 8, 8))
    row["aspect_ratio_mask"] = torch.ones(1, 1, 2, dtype=torch.long)
    row["aspect_ratio_ids"] = torch.ones(1, 1, dtype=torch.long)
    row["cross_attention_mask"] = torch.ones(1, 6, 1, 2, dtype=torch.long)
    row["cross_attention_mask"][:, :2] = 0
    model = _made("MllamaForConditionalGeneration", config)
    for name, gate in model.named_parameters():
        if name.endswith("_gate"):  # zero at first: the image would not be seen
            gate.data.fill_(1.0)
    return model, row


def _qwen2_audio() -> tuple[Any, dict[str, Tensor]]:
    audio = {"num_mel_bins": 8, "d_model": 32, "max_source_positions": 10}
    audio |= {k: v for k, v in _SIDES.items() if k.startswith("encoder")}
    config = transformers.Qwen2AudioConfig(
        text_config=transformers.Qwen2Config(**_TEXT), audio_config=audio, audio_token_index=IMAGE
    )
    row = _row(5, *[IMAGE] * 5, 7, 8, input_features=_pixels(1, 8, 20))
    row["feature_attention_mask"] = torch.ones(1, 20, dtype=torch.long)
    return _made("Qwen2AudioForConditionalGeneration", config), row


def _led() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.LEDConfig(
        **_SIDES,
        vocab_size=128,
        d_model=32,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        decoder_start_token_id=2,
        init_std=0.5,
    )
    attends = torch.tensor([[0, 0, 1, 0, 0, 0]])
    model = _made("LEDForConditionalGeneration", config)
    return model, _row(5, 6, 7, 8, 9, 10, global_attention_mask=attends)


def _florence2() -> tuple[Any, dict[str, Tensor]]:
    text = {"model_type": "bart", "vocab_size": 160, "d_model": 32, "pad_token_id": 1}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.5}
    vision = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "embed_dim": [16, 32]}
    vision |= {"patch_padding": [3, 1], "patch_prenorm": [False, True], "num_heads": [2, 4]}
    vision |= {"num_groups": [2, 4], "window_size": 2, "projection_dim": 32}
    vision |= {"max_temporal_embeddings": 4, "max_position_embeddings": 8, "in_channels": 3}
    config = transformers.Florence2Config(
        text_config={**text, **_SIDES, "max_position_embeddings": 64},
        vision_config=vision,
        image_token_id=IMAGE,
        is_encoder_decoder=True,
    )
    row = _row(*[IMAGE] * 5, 5, 6, 7, pixel_values=_pixels(1, 3, 16, 16))
    return _made("Florence2ForConditionalGeneration", config), row


DECODERS: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {
    "llava": _llava,
    "gemma3": _gemma3,
    "gpt2 with token types": _gpt2,
    "qwen2_vl": _qwen2_vl,
    "mllama": _mllama,
    "qwen2_audio": _qwen2_audio,
}
"""Models that go on with the text."""
ENCODER_DECODERS = {"led": _led, "florence2": _florence2}
"""Models with an encoder that reads more than ids."""
