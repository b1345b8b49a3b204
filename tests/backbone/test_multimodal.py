"""The text of models that read images or sounds, too: as `load_model` gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ptuning
from ptuning.backbone.base_model import BaseModel
from ptuning.backbone.kinds import kind_of
from ptuning.backbone.traits import repeated_layers
from ptuning.forward.engine import Engine
from ptuning.forward.prefix_store import PrefixStore
from ptuning.rendering.merged_text import fill

from .. import tiny
from ..multimodal import DECODERS

ROWS = [
    {"text": f"{place} is a place", "kind": kind}
    for place, kind in [("Vienna", "city"), ("Italy", "land"), ("Rome", "city"), ("France", "land")]
]
LABELS = {"city": "Paris", "land": "Oslo"}
TEXT = sorted(set(DECODERS) - {"gpt2 with token types"})


def _folder(family: str, folder: Path) -> tuple[str, Any]:
    """A tiny model of that family over the tiny tokenizer's words, saved; and its class."""
    made = DECODERS[family]()[0]
    config, text = made.config, made.config.get_text_config()
    for name in ("image_token_id", "video_token_id", "audio_token_id"):
        if hasattr(config, name):  # no word of the tokenizer's
            setattr(config, name, 410)
    text.vocab_size = 420
    with torch.random.fork_rng():
        torch.manual_seed(0)
        type(made)(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 8}')
    return str(folder), type(made)


def _trained(model: Any, tokenizer: Any, template: str, **settings: Any) -> ptuning.Prompt:
    prompt = ptuning.Prompt(template, answer="kind", verbalizer=LABELS, encoder="none")
    settings = {"epochs": 2, "batch_size": 2, **settings}
    ptuning.train(model, tokenizer, prompt, ROWS * 3, ROWS, **settings)
    return prompt


def _only_id(tokenizer: Any, word: str) -> int:
    (only,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    return only


@pytest.mark.parametrize("family", TEXT)
def test_their_text_trains_the_same_with_prefixes_kept_and_merges_whole(
    family: str, tmp_path: Path
) -> None:
    name, kind = _folder(family, tmp_path / "model")
    model, tokenizer = ptuning.load_model(name, device="cpu")
    assert type(model) is kind and kind_of(model) == "causal"
    template = "{text}, so [P*3] it is [MASK]"
    prompt, plain = (_trained(model, tokenizer, template, prefix_cache=c) for c in ("auto", "off"))
    torch.testing.assert_close(
        prompt.trained_vectors(), plain.trained_vectors(), atol=2e-5, rtol=1e-4
    )
    ptuning.merge(model, tokenizer, {"kind": prompt}).save(tmp_path / "merged")
    assert (tmp_path / "merged/preprocessor_config.json").read_text() == '{"size": 8}'
    merged, words = ptuning.load_model(str(tmp_path / "merged"), device="cpu")
    assert type(merged) is kind
    for row, told in zip(
        ROWS, ptuning.predict_details(model, tokenizer, prompt, ROWS), strict=True
    ):
        text = fill(json.loads((tmp_path / "merged/prompts.json").read_text())["kind"]["text"], row)
        with torch.no_grad():
            logits = merged(**words(text, return_tensors="pt")).logits[0, -1]
        ids = [_only_id(words, f" {word}") for word in LABELS.values()]
        shares = logits[ids].softmax(0).tolist()
        assert len(set(ids)) == len(LABELS)
        assert shares == pytest.approx([told.probabilities[word] for word in LABELS], abs=1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama"])
def test_a_batch_answers_as_its_rows_alone(family: str, tmp_path: Path) -> None:
    model, tokenizer = ptuning.load_model(_folder(family, tmp_path)[0], device="cpu")
    prompt = _trained(model, tokenizer, "[P*3] {text}, so it is [MASK]")
    rows = [{"text": "of this place " * count} for count in (1, 9, 3)]
    together = ptuning.predict_details(model, tokenizer, prompt, rows)
    for row, told in zip(rows, together, strict=True):
        (alone,) = ptuning.predict_details(model, tokenizer, prompt, [row])
        assert told.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


def test_an_older_chat_template_beside_the_processor_is_the_tokenizers(tmp_path: Path) -> None:
    name, _ = _folder("llava", tmp_path / "model")
    written = {"chat_template": "{% for m in messages %}Q:{{ m.content }}{% endfor %}A:"}
    (tmp_path / "model/chat_template.json").write_text(json.dumps(written))
    model, tokenizer = ptuning.load_model(name, device="cpu")
    assert tokenizer.chat_template == written["chat_template"]
    prompt = ptuning.Prompt("[P*2] {text}", chat=True)
    prompt.vectors = torch.randn(2, 32)
    merged = ptuning.merge(model, tokenizer, {"one": prompt})
    merged.save(tmp_path / "merged")
    assert not (tmp_path / "merged/chat_template.json").exists()  # it would hide the merged one
    kept = ptuning.load_model(str(tmp_path / "merged"), device="cpu")[1].chat_template
    assert kept == merged.tokenizer.chat_template != tokenizer.chat_template


def test_the_layers_of_a_model_are_those_of_its_text() -> None:
    model = DECODERS["llava"]()[0]
    assert repeated_layers(model) == [*model.model.language_model.layers]


def test_a_model_that_reads_no_text_alone_is_refused() -> None:
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BlipConfig(
        text_config={**tower, "vocab_size": 400, "intermediate_size": 32},
        vision_config={**tower, "intermediate_size": 32, "image_size": 8, "patch_size": 4},
    )
    model = transformers.BlipForConditionalGeneration(config)
    with pytest.raises(ptuning.InputError, match=r"reads no text alone \(it wants pixel_values\)"):
        kind_of(model)


def test_a_model_that_reads_its_text_in_both_directions_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", "vocab_size": 400, "num_attention_heads": 4, **sizes},
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": 8,
            "patch_size": 4,
            **sizes,
        }
        | {"num_attention_heads": 2},
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    with pytest.raises(ptuning.InputError, match="reads its text in both directions"):
        kind_of(model)


def test_a_model_saved_without_its_head_is_refused(tmp_path: Path) -> None:
    whole = DECODERS["llava"]()[0]
    whole.model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ptuning.InputError, match="saved as LlavaModel, which has no language-model"
    ):
        ptuning.load_model(str(tmp_path))


def test_text_behind_kept_keys_has_no_positions_of_a_generation_before(tmp_path: Path) -> None:
    model, tokenizer = ptuning.load_model(_folder("qwen2_vl", tmp_path)[0])
    prompt = ptuning.Prompt("{text} [P*3] [MASK]", answer_tokens=6)
    prompt.vectors = torch.randn(3, 32, generator=torch.manual_seed(0)) * 0.3
    renderer = Engine(BaseModel.of(model, tokenizer)).renderer(prompt)
    example = renderer(
        {"text": "it rains in Oslo and the capital of Italy is Rome"}, answered=False
    )
    said = []
    with ptuning.attach(model, tokenizer, prompt) as attached, torch.no_grad():
        for store in (None, PrefixStore(model, None)):
            model.model.rope_deltas = torch.full((2, 1), 5)  # of two rows with images
            engine = tiny.engine(model, tokenizer, store)
            batch = engine.batch([(example, 0)], [attached.first_id(prompt)])
            assert store is None or store.serves(batch)
            said.append(engine.continue_greedily(batch, 6, []))
    (ids, scores), (behind, their_scores) = said
    assert torch.equal(ids, behind)
    torch.testing.assert_close(scores, their_scores, atol=1e-5, rtol=1e-4)
