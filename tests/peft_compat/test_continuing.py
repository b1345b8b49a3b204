"""Calls behind a cache that has the prompt already."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ptuning.backbone.upstream import BEFORE, CACHE
from ptuning.errors import InputError
from ptuning.peft_compat import PromptEncoderConfig, get_peft_model

from .. import tiny
from ..multimodal import DECODERS

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # of the first three tokens
families = pytest.mark.parametrize("family", tiny.CAUSAL)


def ours(base: Any, **options: Any) -> Any:
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(base, config, **options).eval()


def model_of(family: str, **options: Any) -> Any:
    return ours(tiny.model(family, initializer_range=0.3), **options)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@families
@pytest.mark.parametrize("width", [None, "new", "text", "all"])
def test_a_text_in_two_calls_is_the_text_at_once(family: str, width: str | None) -> None:
    model = model_of(family)
    columns = {None: None, "new": 3, "text": 6, "all": 10}[width]
    mask = None if columns is None else torch.ones(2, columns, dtype=torch.long)
    with torch.no_grad():
        whole = model(input_ids=IDS).logits[:, -3:]
        first = model(input_ids=IDS[:, :3], use_cache=True)
        got = model(
            input_ids=IDS[:, 3:], past_key_values=first.past_key_values, attention_mask=mask
        )
    assert got.logits.shape[1] == 3
    close(got.logits, whole)


@families
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_the_first_calls_padding_stays_padding(family: str, mask: Tensor) -> None:
    if family == "gemma2" and mask is RIGHT:
        pytest.skip("padding inside of a row counts for its sliding window, prompt or not")
    model = model_of(family)
    with torch.no_grad():
        alone = model(input_ids=IDS[:1][mask[:1] == 1].unsqueeze(0)).logits[:, -3:]
        first = model(input_ids=IDS[:, :3], attention_mask=mask[:, :3], use_cache=True)
        got = model(
            input_ids=IDS[:, 3:], past_key_values=first.past_key_values, attention_mask=mask
        ).logits
    close(got[:1], alone)


def test_keys_and_values_are_taken_by_the_name_of_any_release() -> None:
    model = model_of("llama")
    with torch.no_grad():
        whole = model(input_ids=IDS).logits[:, -3:]
        for name in (BEFORE, CACHE):
            first = model(input_ids=IDS[:, :3], use_cache=True)
            read = copy.deepcopy(first[CACHE])
            close(model(input_ids=IDS[:, 3:], **{name: first[CACHE]}).logits, whole)
            said = model.generate(input_ids=IDS, max_new_tokens=1, **{name: read})
            assert said[:, -1].equal(whole[:, -1].argmax(-1))
        both = {BEFORE: first[CACHE], "cache": first[CACHE]}
        with pytest.raises(InputError, match="cache"):  # one argument, or one that is none there
            model(input_ids=IDS[:, 3:], **both)


def test_token_by_token_and_from_a_copied_cache() -> None:
    model = model_of("llama")
    cache = transformers.DynamicCache()
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        got = [model(input_ids=IDS[:, :1], past_key_values=cache).logits[:, -1:]]
        for at in range(1, 6):
            step = copy.deepcopy(cache) if at == 3 else cache
            got.append(model(input_ids=IDS[:, at : at + 1], past_key_values=step).logits)
            cache = step
    close(torch.cat(got, 1), whole[:, -6:])


def test_positions_of_the_text_get_room_for_the_prompt() -> None:
    model = model_of("gpt2")
    with torch.no_grad():
        whole = model(input_ids=IDS).logits[:, -3:]
        first = model(input_ids=IDS[:, :3], use_cache=True)
        positions = torch.tensor([[3, 4, 5]])
        got = model(
            input_ids=IDS[:, 3:], past_key_values=first.past_key_values, position_ids=positions
        ).logits
    close(got, whole)


def test_rows_with_and_without_a_prompt_go_on_side_by_side() -> None:
    model = model_of("llama")
    names = ["default", None]
    with torch.no_grad():
        whole = model(input_ids=IDS, adapter_names=names).logits[:, -3:]
        first = model(input_ids=IDS[:, :3], adapter_names=names, use_cache=True)
        got = model(
            input_ids=IDS[:, 3:], past_key_values=first.past_key_values, adapter_names=names
        )
    close(got.logits, whole)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_a_model_that_reads_images_goes_on(family: str) -> None:
    base, row = DECODERS[family]()
    model = ours(base)
    per_token = {k: v for k, v in row.items() if v.shape[1:2] == row["input_ids"].shape[1:]}
    head = {k: v[:, :-2] for k, v in per_token.items()}
    with torch.no_grad():
        whole = model(**row).logits[:, -2:]
        first = model(**{**row, **head}, use_cache=True)
        more = {k: v[:, -2:] for k, v in per_token.items() if k != "attention_mask"}
        got = model(**more, past_key_values=first.past_key_values).logits
    close(got, whole)


def test_a_decoders_cache_is_used_beside_the_encoders_prompt() -> None:
    config = PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny.model("bart"), config).eval()
    with torch.no_grad():
        whole = model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits[:, -1:]
        first = model(input_ids=IDS, decoder_input_ids=IDS[:, :3], use_cache=True)
        got = model(
            input_ids=IDS,
            decoder_input_ids=IDS[:, 3:4],
            past_key_values=first.past_key_values,
        ).logits
    close(got, whole)


def test_generation_goes_on_from_its_own_cache_and_from_forwards() -> None:
    model = model_of("llama")
    settings = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(input_ids=IDS, max_new_tokens=6, **settings).sequences
    part = model.generate(input_ids=IDS, max_new_tokens=3, **settings)
    more = model.generate(
        input_ids=part.sequences, past_key_values=part.past_key_values, max_new_tokens=3, **settings
    )
    assert more.sequences.tolist() == whole.tolist()
    with torch.no_grad():
        first = model(input_ids=IDS[:, :4], use_cache=True)
    again = model.generate(
        input_ids=IDS, past_key_values=first.past_key_values, max_new_tokens=6, **settings
    )
    assert again.sequences.tolist() == whole.tolist()


def test_a_cache_without_the_prompt_is_refused() -> None:
    base = tiny.model("llama")
    model = ours(base)
    with torch.no_grad():
        cache = base(input_ids=IDS[:, :3], use_cache=True).past_key_values
        for call in (model, model.generate):
            with pytest.raises(InputError, match="past_key_values"):
                call(input_ids=IDS, past_key_values=cache)
        first = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
        first.crop(-2)  # it holds less than was written down
        with pytest.raises(InputError, match="past_key_values"):
            model(input_ids=IDS[:, 3:], past_key_values=first)
        with model.disable_adapter():
            model(input_ids=IDS[:, 3:], past_key_values=cache)


def test_rows_and_masks_that_do_not_fit_are_refused() -> None:
    model = model_of("llama")
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
        with pytest.raises(InputError, match="hold 2 rows"):
            model(input_ids=IDS[:1, 3:], past_key_values=cache)
        with pytest.raises(InputError, match=r"attention_mask has shape \(2, 5\)"):
            model(input_ids=IDS[:, 3:], past_key_values=cache, attention_mask=torch.ones(2, 5))
        with pytest.raises(InputError, match="give the ids"):
            model.generate(input_ids=IDS[:, 3:], past_key_values=cache)


def test_a_mask_of_other_tokens_than_the_caches_is_refused() -> None:
    """It would be half ignored: what the cache holds was read with the first call's mask."""
    model, ones = model_of("llama"), torch.ones_like(IDS)
    padded = ones.masked_fill(torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6]).bool(), 0)
    with torch.no_grad():
        for first, second in [(None, padded), (padded, ones), (padded, padded.flip(0))]:
            mask = None if first is None else first[:, :3]
            cache = model(IDS[:, :3], attention_mask=mask, use_cache=True).past_key_values
            with pytest.raises(InputError, match="masks other tokens of the text than the call"):
                model(input_ids=IDS[:, 3:], past_key_values=cache, attention_mask=second)


@families
def test_the_reference_layout_in_two_calls_is_that_at_once(family: str) -> None:
    model = model_of(family, reference_layout=True)
    with torch.no_grad():
        whole = model(input_ids=IDS, attention_mask=LEFT).logits[:, -3:]
        first = model(input_ids=IDS[:, :3], attention_mask=LEFT[:, :3], use_cache=True)
        cache = first.past_key_values
        close(model(IDS[:, 3:], LEFT, past_key_values=cache).logits, whole)


def test_rows_go_on_with_the_trained_modules_of_their_own() -> None:
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, modules_to_save=["lm_head"]
    )
    model = get_peft_model(tiny.model("llama"), config).eval()
    model.add_adapter("second", config)
    head = model.base_model.lm_head
    head.modules_to_save["second"].weight.data += 1
    names = ["default", "second"]
    with torch.no_grad():
        whole = model(input_ids=IDS, adapter_names=names).logits[:, -3:]
        cache = model(input_ids=IDS[:, :3], adapter_names=names, use_cache=True).past_key_values
        got = model(input_ids=IDS[:, 3:], adapter_names=names, past_key_values=cache).logits
    close(got, whole)


def test_padded_rows_of_a_model_with_positions_on_axes_need_the_callers() -> None:
    model = ours(DECODERS["qwen2_vl"]()[0])
    positions = (LEFT.cumsum(1) - 1).clamp(min=0).expand(3, 2, 6)
    with torch.no_grad():
        alone = model(input_ids=IDS[:1, 2:]).logits[:, -3:]
        head = {"input_ids": IDS[:, :3], "attention_mask": LEFT[:, :3], "use_cache": True}
        cache = model(**head, position_ids=positions[..., :3])[CACHE]
        rest = {"input_ids": IDS[:, 3:], "attention_mask": LEFT, CACHE: cache}
        with pytest.raises(InputError, match="padded rows need position_ids here"):
            model(**rest)
        close(model(**rest, position_ids=positions[..., 3:]).logits[:1], alone)


def test_positions_go_on_from_where_a_model_begins_to_count() -> None:
    config = transformers.RobertaConfig(
        **{**tiny.FAMILIES["roberta"][2], "initializer_range": 0.3}, is_decoder=True, vocab_size=400
    )
    model = ours(transformers.RobertaForCausalLM(config).eval())
    with torch.no_grad():
        whole = model(input_ids=IDS, attention_mask=LEFT).logits[:, -3:]
        cache = model(input_ids=IDS[:, :3], attention_mask=LEFT[:, :3], use_cache=True)[CACHE]
        for column in (3, 4, 5):  # the masks have the text's width in each call
            step = {"input_ids": IDS[:, column : column + 1], CACHE: cache}
            got = model(**step, attention_mask=LEFT[:, : column + 1]).logits
            close(got, whole[:, column - 3 : column - 2])
