"""How a model answers, by what it is; and models that cannot keep rows apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ptuning
from ptuning.backbone.kinds import ModelKind, kind_of
from ptuning.errors import InputError

from .. import tiny

_SMALL: dict[str, Any] = {"vocab_size": 400, "max_position_embeddings": 64, "pad_token_id": 0}
_XLM = {**_SMALL, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "mask_token_id": 4, "pad_index": 0}
_LABELS = {"p": "yes", "n": "not"}


def _model(name: str, **values: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**values)
        head = getattr(transformers, f"{name}WithLMHeadModel", None)
        return (head or getattr(transformers, f"{name}ForMaskedLM"))(config).eval()


def _prompt(template: str) -> ptuning.Prompt:
    prompt = ptuning.Prompt(template, verbalizer=_LABELS)
    random = torch.Generator().manual_seed(1)
    prompt.vectors = torch.randn(prompt.num_virtual_tokens or 0, 32, generator=random) * 0.2
    return prompt


@pytest.mark.parametrize("name", ["XLM", "Flaubert"])
def test_a_masked_model_that_writes_text_too_answers_at_its_masks(name: str) -> None:
    model, tokenizer = _model(name, **_XLM), tiny.tokenizer(around=True)
    assert kind_of(model) == ModelKind.MASKED
    said = ptuning.predict_details(
        model, tokenizer, ptuning.Task("{text} is [MASK] .", verbalizer=_LABELS), [{"text": "Oslo"}]
    )[0]
    words = [
        tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in _LABELS.values()
    ]
    ids = tokenizer("Oslo is<mask> .", return_tensors="pt")["input_ids"]
    at = int((ids[0] == tokenizer.mask_token_id).nonzero())
    shares = model(ids).logits[0, at, [word for (word,) in words]].softmax(0)
    assert said.probabilities["p"] == pytest.approx(float(shares[0]), abs=1e-5)


def test_a_model_set_up_as_causal_writes_what_follows() -> None:
    assert kind_of(_model("XLM", **_XLM, causal=True)) == ModelKind.CAUSAL


@pytest.mark.parametrize("name", ["Bert", "Roberta", "BertGeneration"])
def test_an_encoder_goes_on_with_a_text_only_if_it_is_set_up_as_a_decoder(
    name: str, tmp_path: Path
) -> None:
    head = {"Bert": "BertLMHeadModel", "BertGeneration": "BertGenerationDecoder"}
    kind = getattr(transformers, head.get(name, f"{name}ForCausalLM"))
    sizes = {**tiny.FAMILIES["bert"][2], "vocab_size": 400}
    config = getattr(transformers, f"{name}Config")
    with pytest.raises(InputError, match="reads in both directions; load it with is_decoder=True"):
        kind_of(kind(config(**sizes)))
    decoder = kind(config(**sizes, is_decoder=True))
    assert kind_of(decoder) == ModelKind.CAUSAL
    decoder.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert type(ptuning.load_model(str(tmp_path), device="cpu")[0]) is kind


def test_a_masked_model_that_writes_text_too_is_loaded(tmp_path: Path) -> None:
    _model("Flaubert", **_XLM).save_pretrained(tmp_path)
    tiny.tokenizer(around=True).save_pretrained(tmp_path)
    assert kind_of(ptuning.load_model(str(tmp_path))[0]) == ModelKind.MASKED


def test_a_model_that_reads_in_any_order_is_refused() -> None:
    config = transformers.XLNetConfig(vocab_size=400, d_model=32, n_layer=1, n_head=2, d_inner=48)
    with pytest.raises(InputError, match="XLNet reads in any order"):
        kind_of(transformers.XLNetLMHeadModel(config))


def test_a_model_that_counts_on_an_image_is_refused() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["intermediate_size"] = 16
    config = transformers.GitConfig(vision_config=sizes, **sizes, vocab_size=400)
    with pytest.raises(InputError, match="GIT counts on the keys and values of an image"):
        kind_of(transformers.GitForCausalLM(config))


@pytest.mark.parametrize("name", ["FNet", "ConvBert", "Nystromformer", "Yoso"])
def test_rows_of_a_model_that_reads_padding_are_computed_alone_or_refused(name: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    more = {"embedding_size": 32} if name == "ConvBert" else {}
    model = _model(name, **_SMALL, **sizes, num_attention_heads=2, **more)
    tokenizer, prompt = tiny.tokenizer(around=True), _prompt("[P*2] {text} [P] It was [MASK]")
    rows = [{"text": "x"}, {"text": "the worst film of Oslo and Berlin"}]
    with pytest.raises(InputError, match=r"reads padding as text.*give batch_size=1"):
        ptuning.predict(model, tokenizer, prompt, rows)
    alone = [ptuning.predict(model, tokenizer, prompt, [row])[0] for row in rows]
    assert ptuning.predict(model, tokenizer, prompt, rows, batch_size=1) == alone
