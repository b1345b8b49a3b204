"""A merged model is an ordinary model that answers as the attached prompt does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers

import ptuning
from ptuning import InputError, Merged, Prompt, PromptFileError, PtuningError
from ptuning.backbone.base_model import BaseModel
from ptuning.backbone.kinds import kind_of
from ptuning.backbone.traits import output_bias, output_head
from ptuning.inference import merged_files
from ptuning.inference.merging import unmerge
from ptuning.prompts.task import fill
from ptuning.rendering.render import Renderer

from .. import tiny

AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
}
ROWS = [{"country": "France"}, {"country": "Italy or Spain, 2024"}, {"country": "東京"}]
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
SPARE = {"vocab_size": 450}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny.FAMILIES},
    "llama tied": ("llama", TIED),
    "llama spare rows": ("llama", SPARE),
    "llama tied spare rows": ("llama", {**TIED, **SPARE}),
    "gpt2 untied": ("gpt2", UNTIED),
    "gpt2 spare rows": ("gpt2", SPARE),
    "bart scaled": ("bart", {"scale_embedding": True}),
    "bart spare rows": ("bart", SPARE),
    "t5 unscaled": ("t5", UNTIED),
    "t5 spare rows": ("t5", SPARE),
    "bert untied": ("bert", UNTIED),
    "roberta untied": ("roberta", UNTIED),
    "roberta spare rows": ("roberta", SPARE),
}


@pytest.mark.parametrize("per_layer", [400, 420])
@pytest.mark.parametrize("name", ["Gemma3n", "Gemma4"])
def test_a_merged_model_that_looks_ids_up_again_answers_as_the_attached_prompt(
    name: str, per_layer: int
) -> None:
    values: dict[str, Any] = {
        **{"vocab_size": 400, "vocab_size_per_layer_input": per_layer, "hidden_size": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 8, "sliding_window": 8, "hidden_size_per_layer_input": 8},
        **{"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
        **(
            {"laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]}
            if name == "Gemma3n"
            else {}
        ),
        "intermediate_size": [48, 48] if name == "Gemma3n" else 48,
        **({} if name == "Gemma3n" else {"global_head_dim": 8}),
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig")(**values)
    model, tokenizer = getattr(transformers, f"{name}ForCausalLM")(config).eval(), tiny.tokenizer()
    prompt = _prompt(model, tokenizer, verbalizer={"a": "Paris", "b": "Rome"})
    prompt.vectors = prompt.trained_vectors() / 3
    _assert_merged_as_attached(model, tokenizer, prompt)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["Esm", "MobileBert"])
def test_a_head_of_several_parts_grows_as_a_whole(name: str, tied: bool, tmp_path: Path) -> None:
    own: dict[str, Any] = {"position_embedding_type": "rotary", "mask_token_id": 4}
    if name == "MobileBert":
        own = {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32}
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    sizes = {**tiny.FAMILIES["bert"][2], **own, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, tie_word_embeddings=tied)
    model = getattr(transformers, f"{name}ForMaskedLM")(config).eval()
    prompt = _prompt(model, tokenizer)
    ptuning.merge(model, tokenizer, {"cap": prompt}).save(tmp_path / "merged")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    merged = ptuning.Merged.load(tmp_path / "merged")
    ids = _ids(merged.tokenizer, merged.prompts["cap"], ROWS[0])
    got, words = _logits(loaded, ids), len(tokenizer)
    expected = _attached(model, tokenizer, prompt, ROWS[0])[:, :words]
    torch.testing.assert_close(got[:, :words], expected, rtol=1e-5, atol=1e-5)
    assert (got[:, words:].max(1).values < got[:, :words].max(1).values).all()


def test_experts_that_are_chosen_by_ids_are_the_attached_prompts_when_it_is_merged() -> None:
    torch.manual_seed(0)
    config = transformers.DeepseekV4Config(
        **{"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"head_dim": 8, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2, "index_n_heads": 2},
        **{"index_head_dim": 8, "moe_intermediate_size": 48, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "mlp_layer_types": ["hash_moe", "moe"], "sliding_window": 8},
    )
    model = transformers.DeepseekV4ForCausalLM(config).eval()
    tokenizer = tiny.tokenizer()
    table = model.model.layers[0].mlp.gate.tid2eid
    table.copy_(torch.stack([torch.arange(400) % 4, (torch.arange(400) + 1) % 4], 1))
    prompt = _prompt(model, tokenizer, verbalizer={"a": "Paris", "b": "Rome"})
    _assert_merged_as_attached(model, tokenizer, prompt)


def test_rows_that_a_class_makes_beyond_the_vocabulary_stay_its_last(tmp_path: Path) -> None:
    """Molmo 2's embedding has some for images, and its head has not."""
    if not hasattr(transformers, "Molmo2Config"):
        pytest.skip("transformers has no Molmo 2 yet")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    tower = {**heads, "hidden_size": 16, "intermediate_size": 32}
    config = transformers.Molmo2Config(
        text_config={**tiny.FAMILIES["llama"][2], "vocab_size": 400, "additional_vocab_size": 8},
        vision_config={**tower, "num_hidden_layers": 2, "patch_size": 4},
        adapter_config={**tower, "text_hidden_size": 32, "vision_feature_layer": [0, 1]},
    )
    model, tokenizer = transformers.Molmo2ForConditionalGeneration(config).eval(), tiny.tokenizer()
    tokenizer.add_tokens([f"<image-{number}>" for number in range(8)])
    prompt = _prompt(model, tokenizer)
    merged = ptuning.merge(model, tokenizer, {"one": prompt})
    merged.save(tmp_path / "merged")
    loaded = transformers.Molmo2ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    expected = _attached(model, tokenizer, prompt, ROWS[0])[:, :400]
    got = _logits(loaded, _ids(merged.tokenizer, merged.prompts["one"], ROWS[0]))
    torch.testing.assert_close(got[:, :400], expected, rtol=1e-5, atol=1e-5)
    images, virtual = got[:, 400:408], got[:, merged.prompts["one"]["virtual_ids"][:1]]
    torch.testing.assert_close(images, virtual.expand_as(images))  # no more likely to be said


def test_a_model_whose_embedding_is_its_head_takes_no_merged_prompt() -> None:
    sizes = {"src_vocab_size": 400, "tgt_vocab_size": 400, "d_model": 32, "langs": ["en", "de"]}
    sides = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = transformers.FSMTConfig(**sizes, **sides, max_position_embeddings=64)
    model, tokenizer = transformers.FSMTForConditionalGeneration(config).eval(), tiny.tokenizer()
    with pytest.raises(InputError, match=r"answers with its embedding itself .* only attached"):
        ptuning.merge(model, tokenizer, {"one": _prompt(model, tokenizer)})


def _assert_merged_as_attached(model: Any, tokenizer: Any, prompt: Prompt) -> None:
    with torch.no_grad(), ptuning.attach(model, tokenizer, prompt) as attached:
        ids = torch.tensor([[15, 16, 17]])
        expected = model(**attached.prepend(prompt, ids)).logits[:, -1, :400]
    merged = ptuning.merge(model, tokenizer, {"one": prompt})
    virtual = merged.prompts["one"]["virtual_ids"]
    with torch.no_grad():
        got = merged.model(torch.tensor([[*virtual, 15, 16, 17]])).logits[:, -1, :400]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def _base(family: str, **changes: Any) -> tuple[Any, Any]:
    masked = family in tiny.MASKED
    tokenizer = tiny.tokenizer("wordpiece" if masked else "byte_bpe", around=masked)
    changes = {"vocab_size": len(tokenizer), **changes}
    return tiny.model(family, **changes), tokenizer


def _prompt(
    model: Any, tokenizer: Any, template: str = "[P*2] {country} is [P] [MASK]", **settings: Any
) -> Prompt:
    prompt = Prompt(template, **settings)
    width = model.get_input_embeddings().embedding_dim
    prompt.vectors = torch.randn(prompt.num_virtual_tokens or 0, width) * 3
    prompt.base_model = BaseModel.of(model, tokenizer).describe()
    return prompt


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    more = {"decoder_input_ids": torch.tensor([[0, 5, 9]])} if kind_of(model) == "seq2seq" else {}
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **more).logits[0]


def _attached(model: Any, tokenizer: Any, prompt: Prompt, row: Mapping[str, Any]) -> torch.Tensor:
    layout = Renderer(tokenizer, prompt, kind_of(model)).layout
    with ptuning.attach(model, tokenizer, prompt) as attachment:
        first = attachment.first_id(prompt)
        ids = [i if i >= 0 else first - 1 - i for i in layout(dict(row), None).ids]
        return _logits(model, ids)


def _ids(tokenizer: Any, entry: Mapping[str, Any], row: Mapping[str, Any]) -> list[int]:
    text = fill(entry["text"], row)
    return tokenizer(text, add_special_tokens=entry.get("add_special_tokens", True))["input_ids"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_attached_models_and_no_virtual_token_wins(
    name: str, tmp_path: Path
) -> None:
    family, changes = MODELS[name]
    model, tokenizer = _base(family, **changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prompt = _prompt(model, tokenizer)
    merged = ptuning.merge(model, tokenizer, {"cap": prompt})
    merged.save(tmp_path / "merged")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    loaded, info = AUTO[kind_of(model)].from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    reread = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    entry = merged.prompts["cap"]
    virtual, words = entry["virtual_ids"], len(tokenizer)
    assert virtual == list(range(words, words + 3))
    for row in ROWS:
        expected = _attached(model, tokenizer, prompt, row)[:, :words]
        ids = _ids(reread, entry, row)
        for one in (loaded, merged.model):
            got = _logits(one, ids)
            torch.testing.assert_close(got[:, :words], expected, rtol=1e-5, atol=1e-5)
            if family != "gemma2":
                assert (got[:, virtual].max(1).values < got[:, :words].max(1).values).all()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_token_that_the_tokenizer_alone_has_is_as_unlikely_as_a_virtual_one(family: str) -> None:
    model, tokenizer = _base(family)
    words = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    merged = ptuning.merge(model, tokenizer, {"cap": _prompt(model, tokenizer)})
    virtual = merged.prompts["cap"]["virtual_ids"]
    assert virtual[0] == words + 1
    got = _logits(merged.model, [10, 11, 12])
    assert (got[:, words] < got[:, :words].max(1).values).all()
    if output_bias(model) is not None:
        assert got[:, words].max() < -9000
    elif family == "gemma2":  # whose head is the embedding, and virtual tokens are suppressed
        row = output_head(merged.model).weight[words]
        assert 0 < row.norm() < output_head(model).weight.norm(dim=1).median()
    else:
        torch.testing.assert_close(got[:, words], got[:, virtual[0]])


def test_where_all_logits_are_low_no_token_of_the_tokenizer_alone_is_said() -> None:
    """As GPT-2's are, which tokenizers often give a padding token without a row."""
    model, tokenizer = _base("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(10.0)
        model.transformer.wte.weight.sub_(0.1)
    ids = torch.tensor([[10, 11, 12]])
    assert model(ids).logits.max() < -10
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    merged = ptuning.merge(model, tokenizer, {"cap": _prompt(model, tokenizer)})
    assert torch.equal(merged.model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_encoder_and_decoder_with_settings_of_their_own_are_read_again(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(around=True)
    small = {**tiny.FAMILIES["bert"][2], "vocab_size": len(tokenizer)}
    sides = transformers.BertConfig(**small), transformers.BertConfig(**small)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*sides)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = transformers.EncoderDecoderModel(config).eval()
    prompt = _prompt(model, tokenizer)
    merged = ptuning.merge(model, tokenizer, {"cap": prompt})
    merged.save(tmp_path / "merged")
    loaded = AUTO["seq2seq"].from_pretrained(tmp_path / "merged")
    words = len(tokenizer)
    expected = _attached(model, tokenizer, prompt, ROWS[0])[:, :words]
    got = _logits(loaded, _ids(merged.tokenizer, merged.prompts["cap"], ROWS[0]))
    torch.testing.assert_close(got[:, :words], expected, rtol=1e-5, atol=1e-5)


def test_answers_in_a_vocabulary_of_their_own_are_refused() -> None:
    small = {**tiny.FAMILIES["bart"][2], "vocab_size": 400, "decoder_vocab_size": 420}
    config = transformers.MarianConfig(
        **small, share_encoder_decoder_embeddings=False, tie_word_embeddings=False
    )
    model, tokenizer = transformers.MarianMTModel(config).eval(), tiny.tokenizer()
    with pytest.raises(InputError, match="reads 400 ids and answers with 420"):
        ptuning.merge(model, tokenizer, {"cap": _prompt(model, tokenizer)})


def test_only_embedding_and_head_are_copied() -> None:
    model, tokenizer = _base("llama", **TIED)
    merged = ptuning.merge(model, tokenizer, {"cap": _prompt(model, tokenizer)})
    own = {n: p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False)}
    grown = {n for n, p in merged.model.named_parameters() if p.data_ptr() != own[n]}
    assert grown == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_virtual_token_has_the_mean_of_real_rows_and_never_wins() -> None:
    model, tokenizer = _base("llama", **SPARE)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # as sure of its words as a trained one
    merged = ptuning.merge(model, tokenizer, {"cap": _prompt(model, tokenizer)})
    head = output_head(merged.model).weight.detach()
    rows = head[merged.prompts["cap"]["virtual_ids"]]
    real = head[: len(tokenizer)]
    assert torch.equal(rows, rows[:1].expand_as(rows))
    assert rows[0].norm() < real.norm(dim=1).min()  # a mean of many is shorter than each
    for seed in range(20):
        hidden = torch.randn(500, 32, generator=torch.Generator().manual_seed(seed))
        assert ((hidden @ rows[0]) < (hidden @ real.T).max(1).values).all()


def test_a_virtual_token_is_as_likely_as_the_least_likely_real_ones() -> None:
    model, tokenizer = _base("gpt2")
    with torch.no_grad():
        # Some words are likely wherever one asks.
        model.transformer.ln_f.bias.normal_(std=3, generator=torch.Generator().manual_seed(0))
    merged = ptuning.merge(model, tokenizer, {"cap": _prompt(model, tokenizer)})
    shares = _logits(merged.model, tokenizer(" ".join(tiny.TEXTS[:2]))["input_ids"]).softmax(-1)
    real = shares[:, : len(tokenizer)]
    least = real.sort(dim=1).values[:, 64]
    assert (shares[:, merged.prompts["cap"]["virtual_ids"]].max(1).values < least).all()


def test_where_engines_tie_the_head_virtual_tokens_are_suppressed(tmp_path: Path) -> None:
    model, tokenizer = _base("gemma2")
    prompt = _prompt(model, tokenizer)
    merged = ptuning.merge(model, tokenizer, {"cap": prompt})
    merged.save(tmp_path / "merged")
    virtual = merged.prompts["cap"]["virtual_ids"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.config.tie_word_embeddings
    assert loaded.generation_config.suppress_tokens == virtual
    bias = json.loads((tmp_path / "merged/logit_bias.json").read_text())
    assert bias == {str(index): -100 for index in virtual}
    ids = torch.tensor([_ids(merged.tokenizer, merged.prompts["cap"], ROWS[0])])
    said = loaded.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert not set(said.tolist()) & set(virtual)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generation_settings_that_transformers_warns_of_are_saved(
    family: str, tmp_path: Path
) -> None:
    """As of Llama 2: a temperature for who samples, and nothing is sampled unless one says so."""
    model, tokenizer = _base(family)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    path = tmp_path / "base/generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.6}))
    model, tokenizer = ptuning.load_model(str(tmp_path / "base"), device="cpu")
    merged = ptuning.merge(model, tokenizer, {"cap": _prompt(model, tokenizer)})
    merged.save(tmp_path / "merged")
    told = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert told["temperature"] == merged.model.generation_config.temperature == 0.6
    if family == "gemma2":
        assert told["suppress_tokens"] == merged.prompts["cap"]["virtual_ids"]


def test_what_was_suppressed_before_another_prompt_is_merged_stays_so(tmp_path: Path) -> None:
    model, tokenizer = _base("gemma2")
    model.generation_config.suppress_tokens = [7]
    prompt = _prompt(model, tokenizer)
    one = ptuning.merge(model, tokenizer, {"one": prompt})
    two = ptuning.merge(one.model, one.tokenizer, {"two": prompt}, one.prompts)
    virtual = [i for entry in two.prompts.values() for i in entry["virtual_ids"]]
    assert two.model.generation_config.suppress_tokens == sorted([7, *virtual])
    fewer = unmerge(two, ["one"])  # its rows are still there
    fewer.save(tmp_path / "merged")
    bias = json.loads((tmp_path / "merged/logit_bias.json").read_text())
    assert bias == {str(index): -100 for index in sorted(virtual)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_the_attached_model(dtype: torch.dtype) -> None:
    model, tokenizer = _base("llama")
    model.to(dtype)
    prompt = _prompt(model, tokenizer)
    merged = ptuning.merge(model, tokenizer, {"cap": prompt})
    expected = _attached(model, tokenizer, prompt, ROWS[0])
    got = _logits(merged.model, _ids(merged.tokenizer, merged.prompts["cap"], ROWS[0]))
    assert got.dtype == dtype and torch.equal(got[:, : len(tokenizer)], expected)


def test_attached_prompts_stay_on_the_model_and_are_not_in_the_copy() -> None:
    model, tokenizer = _base("llama")
    prompt, other = _prompt(model, tokenizer), _prompt(model, tokenizer)
    expected = _attached(model, tokenizer, prompt, ROWS[0])
    with ptuning.attach(model, tokenizer, other):
        merged = ptuning.merge(model, tokenizer, {"cap": prompt})
        torch.testing.assert_close(_attached(model, tokenizer, prompt, ROWS[0]), expected)
    with pytest.raises(IndexError):
        _logits(merged.model, [len(tokenizer) + 3])


def test_many_prompts_are_added_removed_and_added_again(tmp_path: Path) -> None:
    model, tokenizer = _base("llama", **TIED)
    prompts = {name: _prompt(model, tokenizer) for name in ("a", "b.2", "c-3")}
    merged = ptuning.merge(model, tokenizer, {"a": prompts["a"], "b.2": prompts["b.2"]})
    merged.save(tmp_path / "merged")
    again = Merged.load(tmp_path / "merged")
    again = ptuning.merge(again.model, again.tokenizer, {"c-3": prompts["c-3"]}, again.prompts)
    again.save(tmp_path / "merged")
    loaded = Merged.load(tmp_path / "merged")
    assert list(loaded.prompts) == ["a", "b.2", "c-3"]
    assert loaded.prompts["a"] == merged.prompts["a"]

    def check(one: Merged) -> None:
        for name, entry in one.prompts.items():
            expected = _attached(model, tokenizer, prompts[name], ROWS[1])
            got = _logits(one.model, _ids(one.tokenizer, entry, ROWS[1]))
            torch.testing.assert_close(got[:, : len(tokenizer)], expected, rtol=1e-5, atol=1e-5)

    check(loaded)
    without = unmerge(loaded, ["a"])
    assert "<|a:0|>" not in without.tokenizer.get_vocab()
    assert without.prompts["c-3"] == loaded.prompts["c-3"]
    ids = loaded.prompts["a"]["virtual_ids"]
    assert loaded.model.get_input_embeddings().weight[ids].any(1).all()
    assert not without.model.get_input_embeddings().weight[ids].any()
    check(without)
    prompts["d"] = _prompt(model, tokenizer, "[P*4] {country} [P]")
    final = ptuning.merge(without.model, without.tokenizer, {"d": prompts["d"]}, without.prompts)
    assert final.prompts["d"]["virtual_ids"][:3] == loaded.prompts["a"]["virtual_ids"]
    rows = final.model.get_input_embeddings().num_embeddings
    assert rows == len(tokenizer) + 11 == len(final.tokenizer)
    check(final)
    final.save(tmp_path / "merged")
    check(Merged.load(tmp_path / "merged"))


def test_a_tokenizer_is_set_as_it_was_when_prompts_leave_and_others_come() -> None:
    model, tokenizer = _base("llama")
    own = {"padding_side": "left", "truncation_side": "left", "clean_up_tokenization_spaces": True}
    for name, value in own.items():
        assert getattr(tokenizer, name) != value
        setattr(tokenizer, name, value)
    prompt = _prompt(model, tokenizer)
    fewer = unmerge(ptuning.merge(model, tokenizer, {"one": prompt}), ["one"])
    again = ptuning.merge(fewer.model, fewer.tokenizer, {"two": prompt}, fewer.prompts)
    for name, value in own.items():
        assert getattr(fewer.tokenizer, name) == getattr(again.tokenizer, name) == value


def test_a_prompt_keeps_fitting_where_merged_rows_fill_the_sampled_ones() -> None:
    model, tokenizer = _base("llama", **SPARE)
    one, two = _prompt(model, tokenizer), _prompt(model, tokenizer, "[P*50] {country}")
    one.vectors, two.vectors = one.trained_vectors() * 100, two.trained_vectors() * 100
    merged = ptuning.merge(model, tokenizer, {"two": two})
    ptuning.merge(merged.model, merged.tokenizer, {"one": one}, merged.prompts)


@pytest.mark.parametrize("kind", ["byte_bpe", "metaspace_always", "metaspace_never"])
def test_text_that_spells_a_virtual_token_is_found_or_stays_text(kind: str) -> None:
    """What docs/merging.md shows."""
    tokenizer = tiny.tokenizer(kind)
    model = tiny.model("llama", vocab_size=len(tokenizer))
    merged = ptuning.merge(model, tokenizer, {"cap": _prompt(model, tokenizer)})
    entry, reread = merged.prompts["cap"], merged.tokenizer
    virtual = set(entry["virtual_ids"])
    for text, harmless in [("France", True), ("a <|cap:1|> b", False), ("<|cap:0|>", False)]:
        whole = reread(fill(entry["text"], {"country": text}))["input_ids"]
        assert ([i for i in whole if i in virtual] == entry["virtual_ids"]) == harmless
        ids: list[int] = []
        for part in re.split(r"(<\|cap:[0-9]+\|>)", entry["text"]):
            own = re.fullmatch(r"<\|cap:[0-9]+\|>", part)
            filled = part if own else part.format(country=text)
            ids += reread(filled, add_special_tokens=False, split_special_tokens=not own)[
                "input_ids"
            ]
        assert [i for i in ids if i in virtual] == entry["virtual_ids"]
        assert (ids == whole) == harmless and text in reread.decode(ids)


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_the_chat_template_takes_a_prompts_name(tmp_path: Path) -> None:
    model, tokenizer = _base("llama")
    tokenizer.chat_template = CHAT
    prompts = {
        "one": _prompt(model, tokenizer, '[P*2] "{country}" {{x}} ü %}} [P]', chat=True),
        "two": _prompt(model, tokenizer, "[P]{country} in {place}, {country}[P]", chat=True),
        "plain": _prompt(model, tokenizer),
    }
    merged = ptuning.merge(model, tokenizer, prompts)
    merged.save(tmp_path / "merged")
    reread = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    for told, row, more in [
        ("one", {"country": 'a "b"\n'}, {}),
        ("two", {"country": "c", "place": "d"}, {"fields": {"country": "c", "place": "d"}}),
    ]:
        said = [{"role": "user", "content": row["country"]}]
        options = {"tokenize": False, "add_generation_prompt": True}
        chat = reread.apply_chat_template(said, prompt=told, **more, **options)
        assert chat == fill(merged.prompts[told]["text"], row)
        parts = [{"role": "user", "content": [{"type": "text", "text": row["country"]}]}]
        assert reread.apply_chat_template(parts, prompt=told, **more, **options) == chat
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    plain = tokenizer.apply_chat_template(talk, tokenize=False)
    assert reread.apply_chat_template(talk, tokenize=False) == plain
    with_prompt = reread.apply_chat_template(talk, tokenize=False, prompt="one")
    assert with_prompt == plain.replace("Hello", '<|one:0|><|one:1|> "Hello" {x} ü %}<|one:2|>')
    with pytest.raises(Exception, match="no chat prompt is called plain; there are: one, two"):
        reread.apply_chat_template(talk, tokenize=False, prompt="plain")
    said = [{"role": "user", "content": "c"}]
    with pytest.raises(Exception, match="two has the field place, and fields has not"):
        reread.apply_chat_template(said, prompt="two", fields={"country": "c", "places": "d"})
    with pytest.raises(Exception, match="two has several fields; give them as fields"):
        reread.apply_chat_template(said, prompt="two")
    fewer = unmerge(Merged.load(tmp_path / "merged"), ["one", "two"])
    assert fewer.tokenizer.chat_template == CHAT


def test_a_tokenizer_whose_copies_read_its_files_again_takes_another_prompt(tmp_path: Path) -> None:
    """Marian's: a prompt leaves and another one takes its ids, as with ``--overwrite``."""
    (tmp_path / "text").write_text("\n".join(tiny.TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        **{"input": str(tmp_path / "text"), "model_prefix": str(tmp_path / "sp"), "pad_id": 3},
        **{"vocab_size": 110, "hard_vocab_limit": False, "minloglevel": 2},
    )
    file = str(tmp_path / "sp.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=file)
    words = {pieces.id_to_piece(i): i for i in range(len(pieces))} | {"<pad>": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")
        tokenizer = transformers.MarianTokenizer(file, file, str(tmp_path / "vocab.json"))
        model = tiny.model("bart")
        prompt = _prompt(model, tokenizer)
        one = ptuning.merge(model, tokenizer, {"one": prompt})
        none = unmerge(one, ["one"])
        two = ptuning.merge(none.model, none.tokenizer, {"two": prompt}, none.prompts)
        del one, none
        two.save(tmp_path / "merged")
        saved = Merged.load(tmp_path / "merged")
    ids = _ids(saved.tokenizer, saved.prompts["two"], ROWS[0])
    assert ids == _ids(two.tokenizer, two.prompts["two"], ROWS[0])
    assert set(two.prompts["two"]["virtual_ids"]) <= set(ids)


def test_a_plain_process_loads_the_folder(tmp_path: Path) -> None:
    """transformers alone: models, tokenizer and pipelines, and nothing of ours is imported."""
    wanted: dict[str, list[Any]] = {}
    for family in ("llama", "bert", "t5"):
        model, tokenizer = _base(family)
        prompt = _prompt(model, tokenizer)
        merged = ptuning.merge(model, tokenizer, {"cap": prompt})
        merged.save(tmp_path / family)
        ids = _ids(merged.tokenizer, merged.prompts["cap"], ROWS[0])
        wanted[family] = [ids, _logits(merged.model, ids)[0].tolist(), None]
        if family == "llama":
            wanted[family][2] = ptuning.predict(
                model, tokenizer, prompt, [ROWS[0]], answer_tokens=3
            )[0]
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    script = """
import json, sys, torch, transformers as t
wanted = json.load(open("wanted.json"))
for family, auto in [("llama", t.AutoModelForCausalLM), ("bert", t.AutoModelForMaskedLM),
                     ("t5", t.AutoModelForSeq2SeqLM)]:
    model, tokenizer = auto.from_pretrained(family), t.AutoTokenizer.from_pretrained(family)
    text = json.load(open(family + "/prompts.json"))["cap"]["text"].replace("{country}", "France")
    ids, logits, answer = wanted[family]
    assert tokenizer(text)["input_ids"] == ids
    more = {"decoder_input_ids": torch.tensor([[0, 5, 9]])} if family == "t5" else {}
    got = model(input_ids=torch.tensor([ids]), **more).logits[0, 0]
    assert (got - torch.tensor(logits)).abs().max() < 1e-5
    if family == "llama":
        said = t.pipeline("text-generation", model=model, tokenizer=tokenizer)(
            text, max_new_tokens=3, do_sample=False, return_full_text=False)
        assert said[0]["generated_text"].strip() == answer
    if family == "bert":
        best = t.pipeline("fill-mask", model=model, tokenizer=tokenizer)(text)
        assert all(0 <= one["token"] < len(logits) - 3 for one in best)
assert not any(name.startswith("ptuning") for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", ".", "..", "a b", "x" * 65, "a|>", "\n", "-a", "ptuning-free"]
)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    model, tokenizer = _base("llama")
    with pytest.raises(InputError, match="cannot name a merged prompt"):
        ptuning.merge(model, tokenizer, {name: _prompt(model, tokenizer)})


def test_an_embedding_that_makes_something_of_its_rows_is_refused() -> None:
    class Normed(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(super().forward(input), dim=-1)

    model, tokenizer = _base("llama")
    prompt = _prompt(model, tokenizer)
    model.set_input_embeddings(Normed(400, 32))
    prompt.base_model = BaseModel.of(model, tokenizer).describe()
    with pytest.raises(InputError, match=r"Normed makes something of its rows .* only attached"):
        ptuning.merge(model, tokenizer, {"cap": prompt})


def test_what_means_nothing_in_the_merged_model_is_refused() -> None:
    model, tokenizer = _base("llama")
    prompt = _prompt(model, tokenizer)
    prompt.modules = {"score.weight": torch.zeros(2, 32)}
    with pytest.raises(InputError, match=r"together with score\.weight"):
        ptuning.merge(model, tokenizer, {"cap": prompt})
    large = _prompt(model, tokenizer)
    assert large.vectors is not None
    large.vectors[1, 3] = 1e6
    with pytest.raises(InputError, match="float16 cannot hold"):
        ptuning.merge(model.half(), tokenizer, {"cap": large})


def test_a_name_that_is_taken_is_refused() -> None:
    model, tokenizer = _base("llama")
    prompt = _prompt(model, tokenizer)
    merged = ptuning.merge(model, tokenizer, {"cap": prompt})
    with pytest.raises(InputError, match="'cap' is merged already"):
        ptuning.merge(merged.model, merged.tokenizer, {"cap": prompt}, merged.prompts)
    prompt.base_model = {}
    with pytest.raises(InputError, match="is a token of this tokenizer already"):
        ptuning.merge(merged.model, merged.tokenizer, {"cap": prompt})


def test_a_prompt_of_another_model_is_refused() -> None:
    model, tokenizer = _base("llama")
    other = tiny.model("llama", vocab_size=len(tokenizer), seed=1)
    with pytest.raises(PromptFileError, match=r"'cap' cannot be merged: .* has other weights"):
        ptuning.merge(model, tokenizer, {"cap": _prompt(other, tokenizer)})
    alike = _prompt(model, tokenizer)
    alike.base_model["tokenizer"] = "another"
    with pytest.raises(PromptFileError, match="another tokenizer"):
        ptuning.merge(model, tokenizer, {"cap": alike})
    narrow = _prompt(model, tokenizer)
    narrow.vectors, narrow.base_model = torch.zeros(3, 7), {}
    with pytest.raises(PromptFileError, match="takes vectors of 32 numbers"):
        ptuning.merge(model, tokenizer, {"cap": narrow})
    untrained = Prompt("[P] {x} [MASK]")
    with pytest.raises(InputError, match="no vectors yet"):
        ptuning.merge(model, tokenizer, {"cap": untrained})


def test_a_tokenizer_whose_ids_have_holes_is_refused() -> None:
    model, tokenizer = _base("llama", vocab_size=900)
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    last = max(text["model"]["vocab"], key=text["model"]["vocab"].get)
    text["model"]["vocab"][last] = 800
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(text))
    )
    with pytest.raises(InputError, match="ids have holes"):
        ptuning.merge(model, tokenizer, {"cap": _prompt(model, tokenizer)})


class _Packed(torch.nn.Module):
    """A stand-in for weight-only quantization: integers and a scale."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.packed * self.scale).T


def test_quantized_linear_layers_stay_and_a_quantized_head_is_refused() -> None:
    model, tokenizer = _base("llama")
    prompt = _prompt(model, tokenizer)
    for layer in model.model.layers:
        layer.mlp.gate_proj = _Packed(layer.mlp.gate_proj)
    expected = _attached(model, tokenizer, prompt, ROWS[0])
    merged = ptuning.merge(model, tokenizer, {"cap": prompt})
    got = _logits(merged.model, _ids(merged.tokenizer, merged.prompts["cap"], ROWS[0]))
    torch.testing.assert_close(got[:, : len(tokenizer)], expected, rtol=1e-5, atol=1e-5)
    packed = merged.model.model.layers[0].mlp.gate_proj.packed
    assert packed.data_ptr() == model.model.layers[0].mlp.gate_proj.packed.data_ptr()
    integers = model.lm_head.weight.detach().to(torch.int8)
    model.lm_head.weight = torch.nn.Parameter(integers, requires_grad=False)
    with pytest.raises(InputError, match="output head is quantized"):
        ptuning.merge(model, tokenizer, {"cap": prompt})


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = _base("llama")
    merged = ptuning.merge(model, tokenizer, {"cap": _prompt(model, tokenizer)})
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(merged_files.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(PtuningError, match=r"needs 0\.1 GB, and .* has room for 0\.0 GB"):
        merged.save(tmp_path / "deep/merged")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_merged_model_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = _base("llama")
    merged = ptuning.merge(model, tokenizer, {"a": _prompt(model, tokenizer)})
    merged.save(tmp_path / "merged")
    before = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    more = ptuning.merge(
        merged.model, merged.tokenizer, {"b": _prompt(model, tokenizer)}, merged.prompts
    )

    def fails(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(more.tokenizer, "save_pretrained", fails)
    with pytest.raises(PtuningError, match=r"cannot write to .* free space"):
        more.save(tmp_path / "merged")
    assert {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()} == before


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    model, tokenizer = _base("llama")
    merged = ptuning.merge(model, tokenizer, {"a": _prompt(model, tokenizer)})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no merged model"):
        merged.save(tmp_path)
    with pytest.raises(PromptFileError, match="holds no merged model"):
        Merged.load(tmp_path)


def test_a_sharded_model_is_replaced_by_one_of_other_shards(tmp_path: Path) -> None:
    model, tokenizer = _base("llama")
    prompt = _prompt(model, tokenizer)
    merged = ptuning.merge(model, tokenizer, {"a": prompt})
    merged.save(tmp_path / "merged")
    (tmp_path / "merged/model.safetensors").unlink()
    merged.model.save_pretrained(tmp_path / "merged", max_shard_size="20KB")
    shards = list((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = Merged.load(tmp_path / "merged")
    loaded.save(tmp_path / "merged")
    assert [p.name for p in (tmp_path / "merged").glob("model*")] == ["model.safetensors"]


def test_nothing_of_the_model_that_was_there_stays_in_the_folder_of_another_one(
    tmp_path: Path,
) -> None:
    model, tokenizer = _base("gemma2")
    tokenizer.chat_template = {"default": "{{ messages[-1].content }}", "other": "{{ messages }}"}
    prompt = _prompt(model, tokenizer, "[P*2] {country} [P]", chat=True)
    ptuning.merge(model, tokenizer, {"cap": prompt}).save(tmp_path / "merged")
    (tmp_path / "merged/README.md").write_text("mine")
    (tmp_path / "merged/preprocessor_config.json").write_text("{}")
    model, tokenizer = _base("bert")
    merged = ptuning.merge(model, tokenizer, {"one": _prompt(model, tokenizer)})
    merged.save(tmp_path / "alone")
    merged.save(tmp_path / "merged")
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names | {"README.md"}
    assert Merged.load(tmp_path / "merged").tokenizer.chat_template is None


@pytest.mark.parametrize("told", ["{", "[1]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_a_chat_template_that_was_damaged_is_refused(told: str) -> None:
    model, tokenizer = _base("llama")
    tokenizer.chat_template = (
        f"{{#- ptuning prompts #}}{{%- set ptuning_turns = {told} %}}\n"
        "{#- end of ptuning prompts +#}{{ messages[0].content }}"
    )
    with pytest.raises(InputError, match="chat template's list of merged prompts"):
        ptuning.merge(model, tokenizer, {"a": _prompt(model, tokenizer)})


def test_tables_that_do_not_fit_the_tokenizer_are_refused(tmp_path: Path) -> None:
    model, tokenizer = _base("llama")
    merged = ptuning.merge(model, tokenizer, {"a": _prompt(model, tokenizer)})
    merged.save(tmp_path / "merged")
    (tmp_path / "merged/prompts.json").write_text('{"b": {"text": "x", "virtual_ids": [1]}}')
    with pytest.raises(PromptFileError, match="do not belong together"):
        Merged.load(tmp_path / "merged")


def test_a_model_read_from_gguf_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    """transformers leaves the file's quantization in the configuration, though weights are not."""
    model, tokenizer = _base("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    merged = ptuning.merge(model, tokenizer, {"a": _prompt(model, tokenizer)})
    merged.save(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert model.config.quantization_config == {"quant_method": "gguf"}


def test_quantized_weights_that_cannot_be_written_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers refuses them: those that it read quantized, or all of a method."""
    model, tokenizer = _base("llama")
    merged = ptuning.merge(model, tokenizer, {"a": _prompt(model, tokenizer)})
    merged.model.hf_quantizer = object()
    for error in (NotImplementedError(), ValueError("quanto is not serializable")):
        with monkeypatch.context() as patch:
            patch.setattr(merged.model, "save_pretrained", _raising(error))
            with pytest.raises(InputError, match="merge into the model without quantization"):
                merged.save(tmp_path / "merged")
    packed = types.SimpleNamespace(packing_format_for_cpu=True)  # bitsandbytes, 4-bit, on a CPU
    merged.model.lm_head.weight.quant_state = packed
    with pytest.raises(InputError, match="quantized weights cannot be written"):
        merged.save(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def _raising(error: Exception) -> Any:
    def raises(*_: Any, **__: Any) -> None:
        raise error

    return raises


def test_room_is_reckoned_for_what_a_quantized_weight_is_made_of() -> None:
    class Quantized(torch.Tensor):
        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["data8", "scale"], None

    weight = torch.zeros(64, 32).as_subclass(Quantized)
    weight.data8, weight.scale = torch.zeros(64, 32, dtype=torch.int8), torch.zeros(64)
    assert merged_files._bytes(weight) == 64 * 32 + 64 * 4


@pytest.mark.parametrize("embeddings", [False, True])
def test_an_int8_model_of_torchao_is_merged_or_refused(embeddings: bool, tmp_path: Path) -> None:
    """Where torchao is installed: real int8 weights, written and read back."""
    quantization = pytest.importorskip("torchao.quantization")
    plain, tokenizer = _base("llama")
    plain.save_pretrained(tmp_path / "plain")
    config = transformers.TorchAoConfig(
        quantization.Int8WeightOnlyConfig(), include_input_output_embeddings=embeddings
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config
    ).eval()
    prompt = _prompt(plain, tokenizer)
    if embeddings:
        with pytest.raises(InputError, match="is quantized"):
            ptuning.merge(model, tokenizer, {"cap": prompt})
        return
    expected = _attached(model, tokenizer, prompt, ROWS[0])
    merged = ptuning.merge(model, tokenizer, {"cap": prompt})
    merged.save(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    got = _logits(loaded, _ids(merged.tokenizer, merged.prompts["cap"], ROWS[0]))
    assert loaded.config.quantization_config and torch.equal(got[:, : len(tokenizer)], expected)


@pytest.mark.slow
def test_smollm2_merged_answers_as_with_the_prompts_attached(
    smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = smollm2
    words = model.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(0)
    templates = {
        "capital": "[P*3] {country} [P*3] [MASK]",
        "chat": "[P*2] Tell me about {country}.",
        "spaces": "The capital of {country}[P*4]",
    }
    prompts = {}
    for name, template in templates.items():
        prompt = _prompt(model, tokenizer, template, chat=name == "chat")
        rows = torch.randint(0, len(words), (len(prompt.trained_vectors()),), generator=generator)
        prompt.vectors = words[rows].clone()
        prompts[name] = prompt
    ptuning.merge(model, tokenizer, prompts).save(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    reread = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    table = json.loads((tmp_path / "merged/prompts.json").read_text())
    virtual = [i for entry in table.values() for i in entry["virtual_ids"]]
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    for name, prompt in prompts.items():
        layout = Renderer(tokenizer, prompt, "causal").layout
        for row in ROWS:
            ids = torch.tensor([_ids(reread, table[name], row)])
            with ptuning.attach(model, tokenizer, prompt) as attachment:
                first = attachment.first_id(prompt)
                own = [i if i >= 0 else first - 1 - i for i in layout(row, None).ids]
                expected = _logits(model, own)
                said = model.generate(torch.tensor([own]), **greedy)[0, len(own) :]
            got = _logits(merged, ids[0].tolist())
            torch.testing.assert_close(got[:, : len(tokenizer)], expected, rtol=0, atol=1e-5)
            assert got.softmax(1)[:, virtual].max() < 1e-6
            assert merged.generate(ids, **greedy)[0, ids.shape[1] :].tolist() == said.tolist()
