"""Decoders that positions, caches or keys and values set apart: no fast path changes a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import ptuning
from ptuning import InputError
from ptuning.backbone.traits import packs_rows, reads_caches
from ptuning.forward.prefix_store import PrefixStore
from ptuning.inference.prediction import predict_details

from .. import tiny
from .test_prefix_store import ROWS, TEMPLATE, losses_and_gradient

SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 4,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
WITHOUT_CACHE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 400}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "keys wider than values": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**SMALL, **LATENT}),
    "no position but in attention": (
        "FalconConfig",
        "FalconForCausalLM",
        {**SMALL, "alibi": True, "new_decoder_architecture": False},
    ),
    "no cache": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", WITHOUT_CACHE),
    "frequencies of the longest row": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {**SMALL, "rope_parameters": LONG, "original_max_position_embeddings": 24},
    ),
    "positions behind the padding's": (
        "RobertaConfig",
        "RobertaForCausalLM",
        {**SMALL, "is_decoder": True, "max_position_embeddings": 130, "pad_token_id": 1},
    ),
}
EXPERTS_OF_IDS = {
    **{**SMALL, "num_key_value_heads": 1, "q_lora_rank": 8, "head_dim": 8, "sliding_window": 8},
    **{"moe_intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"o_lora_rank": 8, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 8},
    "mlp_layer_types": ["hash_moe", "moe"],
    "layer_types": ["sliding_attention", "sliding_attention"],
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MODELS["no body without its head"] = (
    "MllamaTextConfig",
    "MllamaForCausalLM",
    {**SMALL, "num_key_value_heads": 2, "rope_parameters": ROPE, "cross_attention_layers": [1]},
)
MODELS["experts by the ids"] = ("DeepseekV4Config", "DeepseekV4ForCausalLM", EXPERTS_OF_IDS)
COUNTING = (
    ("BartConfig", "BartForCausalLM"),
    ("RoFormerConfig", "RoFormerForCausalLM"),
    ("TrOCRConfig", "TrOCRForCausalLM"),
    ("WhisperConfig", "WhisperForCausalLM"),
    ("ProphetNetConfig", "ProphetNetForCausalLM"),
    ("DeepseekV4Config", "DeepseekV4ForCausalLM"),
)


def made(config: str, model: str, values: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**values)).eval()


@pytest.mark.parametrize("name", list(MODELS))
def test_kept_prefixes_give_the_plain_losses_and_gradients(name: str) -> None:
    model = made(*MODELS[name])
    prompt = ptuning.Prompt(TEMPLATE, answer="capital", answer_end=False)
    plain = losses_and_gradient(model, prompt, ROWS, None)
    kept = losses_and_gradient(model, prompt, ROWS, PrefixStore(model))
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-5)
    if name != "frequencies of the longest row":  # there a row depends on its neighbours
        alone = [losses_and_gradient(model, prompt, [row], None)[0] for row in ROWS]
        torch.testing.assert_close(sum(alone), plain[0], atol=2e-5, rtol=1e-5)


class _WithoutPositions(transformers.LlamaForCausalLM):
    """Its body takes positions, and it does not say so (MossTranscribeDiarize)."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        logits_to_keep: Any = 0,
        **kwargs: Any,
    ) -> Any:
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


def test_nothing_is_kept_of_a_model_that_cannot_be_told_positions() -> None:
    torch.manual_seed(0)
    model = _WithoutPositions(transformers.LlamaConfig(**SMALL)).eval()
    assert not reads_caches(model) and not packs_rows(model)
    prompt = ptuning.Prompt(TEMPLATE, answer="capital", answer_end=False)
    plain = losses_and_gradient(model, prompt, ROWS, None)
    alone = [losses_and_gradient(model, prompt, [row], None)[0] for row in ROWS]
    torch.testing.assert_close(sum(alone), plain[0], atol=2e-5, rtol=1e-5)


def test_label_words_are_the_batchs_where_prefixes_pass_the_head_too() -> None:
    model, tokenizer = made(*MODELS["no body without its head"]), tiny.tokenizer()
    words = {"Paris": "Paris", "Rome": "Oslo"}
    rows = [
        {"country": f"{name} is a place in the north of it all", "capital": name}
        for name in ("Paris", "Rome")
    ] * 2
    found = []
    for kept in ("off", "auto"):
        prompt = ptuning.Prompt("{country} [P*2] [MASK]", answer="capital", verbalizer=words)
        ptuning.train(
            model, tokenizer, prompt, rows, rows, epochs=2, batch_size=3, prefix_cache=kept
        )
        found.append(prompt.trained_vectors())
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("words", [None, {"a": "Paris is far", "b": "Ro"}])
@pytest.mark.parametrize("name", list(MODELS))
def test_predictions_together_are_those_of_rows_alone(name: str, words: Any) -> None:
    model, tokenizer = made(*MODELS[name]), tiny.tokenizer()
    template = "The big old capital city of [P] {country} and {more} is [P*2] [MASK]"
    prompt = ptuning.Prompt(template, answer="capital", verbalizer=words, answer_tokens=3)
    prompt.vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)) / 5
    rows = [ROWS[0]] * 3 if name == "frequencies of the longest row" else ROWS
    (together,) = predict_details(model, tokenizer, [prompt], rows)
    for row, said in zip(rows, together, strict=True):
        ((alone,),) = predict_details(model, tokenizer, [prompt], [row])
        assert said.answer == alone.answer
        assert said.probability == pytest.approx(alone.probability, abs=1e-5)


def test_what_fast_paths_such_models_take() -> None:
    models = {name: made(*parts) for name, parts in MODELS.items()}
    assert {name for name, model in models.items() if reads_caches(model)} == {
        "keys wider than values",
        "no position but in attention",
        "positions behind the padding's",
        "no body without its head",
    }
    assert [name for name, model in models.items() if packs_rows(model)] == [
        "keys wider than values",
        "no body without its head",
    ]


@pytest.mark.parametrize(("config", "model"), COUNTING)
def test_where_padding_counts_as_positions_rows_stand_alone(config: str, model: str) -> None:
    values = {**tiny.FAMILIES["bart"][2], **SMALL, "is_decoder": True}
    if config == "ProphetNetConfig":  # which names its sizes otherwise
        values = {name: SMALL[name] for name in ("vocab_size", "hidden_size")}
        values |= {"num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    if config == "DeepseekV4Config":
        values = {**EXPERTS_OF_IDS, "layer_types": ["compressed_sparse_attention"] * 2}
    decoder = made(config, model, values)
    tokenizer = tiny.tokenizer()
    prompt = ptuning.Prompt("[P*3] {country} [MASK]", answer="capital")
    with pytest.raises(InputError, match=r"counts padding as positions.*batch_size=1"):
        ptuning.train(decoder, tokenizer, prompt, ROWS, epochs=1)
    ptuning.train(decoder, tokenizer, prompt, ROWS, epochs=1, batch_size=1)
    with pytest.raises(InputError, match="batch_size=1"):
        ptuning.predict(decoder, tokenizer, prompt, ROWS)
    assert len(ptuning.predict(decoder, tokenizer, prompt, ROWS, batch_size=1)) == len(ROWS)
