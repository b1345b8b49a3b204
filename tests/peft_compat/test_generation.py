"""``generate`` of `ptuning.peft_compat`, with real PEFT as the oracle."""

from __future__ import annotations

import copy
import threading
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import ptuning
from ptuning.backbone.lookups import input_embedding
from ptuning.backbone.upstream import BEFORE, CACHE
from ptuning.errors import InputError
from ptuning.peft_compat import PromptEncoderConfig, get_peft_model

from .. import tiny

N = 3
FAMILIES = (*tiny.CAUSAL, *tiny.SEQ2SEQ)
IDS = torch.tensor([[15, 16, 17, 18, 19, 20], [30, 31, 32, 33, 34, 35]])
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
every_family = pytest.mark.parametrize("family", FAMILIES)
causal = pytest.mark.parametrize("family", tiny.CAUSAL)
seq2seq = pytest.mark.parametrize("family", tiny.SEQ2SEQ)


@pytest.fixture(autouse=True)
def peft_knows_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21.2 looks for them by their name before transformers 5.24, and where it finds none it
    puts the prompt in anew with each token."""
    plain = peft.PeftModelForCausalLM.prepare_inputs_for_generation

    def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        of_base = self.base_model_prepare_inputs_for_generation

        def renamed(*args: Any, **kwargs: Any) -> dict[str, Any]:
            return {BEFORE if k == CACHE else k: v for k, v in of_base(*args, **kwargs).items()}

        self.base_model_prepare_inputs_for_generation = renamed
        try:
            return plain(self, *args, **kwargs)
        finally:
            self.base_model_prepare_inputs_for_generation = of_base

    if CACHE != BEFORE:
        monkeypatch.setattr(peft.PeftModelForCausalLM, "prepare_inputs_for_generation", prepared)


def base_model(family: str, **changes: Any) -> Any:
    """A random model that says different things after different texts."""
    spread = {} if family in tiny.SEQ2SEQ else {"initializer_range": 0.3}
    if family == "gpt2":
        spread["pad_token_id"] = 0
    model = tiny.model(family, **{**spread, **changes})
    if family in tiny.SEQ2SEQ:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "layer_norm" not in name and "layernorm" not in name and "shared" not in name:
                    parameter.data.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def task_of(family: str) -> str:
    return "SEQ_2_SEQ_LM" if family in tiny.SEQ2SEQ else "CAUSAL_LM"


def ours(base: Any, family: str, count: int | None = N, seed: int = 3, **options: Any) -> Any:
    config = PromptEncoderConfig(
        task_type=task_of(family), num_virtual_tokens=count, encoder_hidden_size=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(base, config, **options).eval()


def pair(family: str, **options: Any) -> tuple[Any, Any]:
    """The same prompt on two copies of a base model: ours and PEFT's."""
    base = base_model(family)
    mine = ours(copy.deepcopy(base), family, **options)
    config = peft.PromptEncoderConfig(
        task_type=task_of(family),
        num_virtual_tokens=N,
        encoder_hidden_size=16,
        token_dim=input_embedding(base).embedding_dim,
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.prompt_encoder.load_state_dict(mine.prompt_encoder.state_dict())
    return mine, theirs


def generated(model: Any, *, seed: int = 0, **options: Any) -> Any:
    """What is generated; PEFT gets a mask of ones, as it asks for one."""
    torch.manual_seed(seed)
    if "attention_mask" not in options and "input_ids" in options:
        options["attention_mask"] = torch.ones_like(options["input_ids"])
    return model.generate(**{"max_new_tokens": 8, "do_sample": False, **options})


def new_tokens(family: str, tokens: Tensor, length: int) -> Tensor:
    """The tokens behind a text of this length; an encoder-decoder gives nothing else."""
    return tokens[:, 1:] if family in tiny.SEQ2SEQ else tokens[:, length:]


# --- unpadded: PEFT's tokens --------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "sampling_top_k_p": {"do_sample": True, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 3},
    "samples_returned": {"do_sample": True, "num_return_sequences": 3},
    "length_penalty": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "no_cache": {"use_cache": False},
    "no_cache_beams": {"use_cache": False, "num_beams": 2},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngrams": {"no_repeat_ngram_size": 2, "max_new_tokens": 16},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": list(range(3, 200))},
    "max_length": {"max_new_tokens": None, "max_length": 11},
    "max_new_tokens": {"max_new_tokens": 1},
    "eos": {"eos_token_id": list(range(3, 100)), "max_new_tokens": 20},
    "eos_beams": {"eos_token_id": list(range(3, 60)), "max_new_tokens": 20, "num_beams": 3},
    "suppressed": {"suppress_tokens": list(range(100, 400))},
    "first_suppressed": {"begin_suppress_tokens": list(range(0, 399, 2))},
    "forced_eos": {"forced_eos_token_id": 9, "max_new_tokens": None, "max_length": 12},
    "bias": {"sequence_bias": {(7,): 5.0, (8, 9): -3.0}},
    "bad_words": {"bad_words_ids": [[i] for i in range(50, 350)]},
    "min_p": {"do_sample": True, "min_p": 0.05},
    "typical": {"do_sample": True, "typical_p": 0.7},
    "guided": {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(10, 30))},
}


@pytest.mark.parametrize("name", OPTIONS)
@every_family
def test_the_tokens_are_pefts(family: str, name: str) -> None:
    mine, theirs = pair(family)
    options = OPTIONS[name]
    got = generated(mine, input_ids=IDS, **options)
    expected = generated(theirs, input_ids=IDS, **options)
    assert got.tolist() == expected.tolist()
    if family in tiny.CAUSAL:
        assert torch.equal(got[:2, :6], IDS) or "return" in name


@every_family
def test_the_generation_loop_says_different_things(family: str) -> None:
    """The other tests mean something: prompt, text and sampling all change the tokens."""
    model = ours(base_model(family), family)
    rows = new_tokens(family, generated(model, input_ids=IDS), 6)
    assert rows[0].tolist() != rows[1].tolist()
    with model.disable_adapter():
        plain = new_tokens(family, generated(model, input_ids=IDS), 6)
    assert rows.tolist() != plain.tolist()
    sampled = generated(model, input_ids=IDS, do_sample=True, seed=1)
    assert sampled.tolist() != generated(model, input_ids=IDS, do_sample=True, seed=2).tolist()
    assert rows.max() < 400


@causal
def test_min_length_counts_the_texts_tokens_as_peft_does(family: str) -> None:
    mine, theirs = pair(family)
    options = {"min_length": 10, "eos_token_id": list(range(3, 300)), "max_new_tokens": 12}
    got, expected = (generated(m, input_ids=IDS, **options) for m in (mine, theirs))
    assert got.tolist() == expected.tolist()
    assert got.shape[1] >= 10


@seq2seq
def test_encoder_repetition_penalty_is_that_of_the_texts_ids(family: str) -> None:
    """PEFT gives embeddings to ``generate``, which then leaves the option out."""
    model = ours(base_model(family), family)
    options = {"encoder_repetition_penalty": 0.05, "max_new_tokens": 12}
    plain = generated(model, input_ids=IDS, max_new_tokens=12)
    repelled = plain[:, 1:7]  # what the model wants to say anyhow stands in the text
    with_text = generated(model, input_ids=IDS, **options)
    assert with_text.shape == plain.shape
    scores = []
    for penalty in (1.0, 0.05):
        output = generated(
            model,
            input_ids=repelled,
            encoder_repetition_penalty=penalty,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        own, raw = output.scores[0].gather(1, repelled), output.logits[0].gather(1, repelled)
        scores.append((own - raw).abs().max())
    assert scores[0] == 0 and scores[1] > 0.1


@causal
def test_encoder_repetition_penalty_of_a_causal_model_is_that_of_the_base_model(
    family: str,
) -> None:
    model = ours(base_model(family), family)
    output = generated(
        model,
        input_ids=IDS,
        encoder_repetition_penalty=2.0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    changed = (output.scores[0] != output.logits[0]).nonzero()[:, 1]
    assert set(changed.tolist()) == set(IDS.flatten().tolist())


@every_family
def test_scores_logits_and_states_are_pefts(family: str) -> None:
    mine, theirs = pair(family)
    asked = dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits"), True)
    got, expected = (generated(m, input_ids=IDS, **asked) for m in (mine, theirs))
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert type(got).__name__ == type(expected).__name__
    for name in ("scores", "logits"):
        assert len(got[name]) == len(expected[name]) == 8
        for ours_, peft_ in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(ours_, peft_, atol=1e-4, rtol=1e-4)


@every_family
def test_beam_scores_are_pefts(family: str) -> None:
    mine, theirs = pair(family)
    asked = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 3}
    got, expected = (generated(m, input_ids=IDS, **asked) for m in (mine, theirs))
    torch.testing.assert_close(
        got.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4
    )
    assert got.beam_indices.tolist() == expected.beam_indices.tolist()


@every_family
def test_hidden_states_and_attentions_can_be_had(family: str) -> None:
    base = base_model(family)
    base.set_attn_implementation("eager")
    model = ours(base, family)
    asked = ("return_dict_in_generate", "output_hidden_states", "output_attentions")
    output = generated(model, input_ids=IDS, **dict.fromkeys(asked, True))
    if family in tiny.SEQ2SEQ:
        assert output.encoder_hidden_states[0].shape[1] == N + 6
        if (
            base.get_encoder().config._attn_implementation == "eager"
        ):  # in transformers 5.17 not T5's
            assert output.encoder_attentions[0].shape[-1] == N + 6
    else:
        assert output.hidden_states[0][0].shape[1] == N + 6
        assert output.attentions[0][0].shape[-1] == N + 6


@every_family
def test_the_mask_may_be_left_out(family: str) -> None:
    model = ours(base_model(family), family)
    got = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    assert got.tolist() == generated(model, input_ids=IDS, max_new_tokens=6).tolist()


@every_family
def test_a_text_with_the_paddings_id_in_it_is_read_whole(family: str) -> None:
    model, theirs = pair(family)
    ids = IDS.clone()
    ids[:, 2] = 0
    got, expected = (generated(m, input_ids=ids) for m in (model, theirs))
    assert got.tolist() == expected.tolist()


@every_family
def test_a_generation_config_and_its_overrides_are_followed(family: str) -> None:
    mine, theirs = pair(family)
    config = transformers.GenerationConfig(
        max_new_tokens=5, num_beams=2, pad_token_id=0, decoder_start_token_id=2, eos_token_id=None
    )
    got, expected = (
        m.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), generation_config=config)
        for m in (mine, theirs)
    )
    assert got.tolist() == expected.tolist()
    mine.generation_config.max_new_tokens = 3
    new = new_tokens(family, mine.generate(input_ids=IDS, do_sample=False), 6)
    assert new.shape[1] == 3


# --- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["greedy", "beams", "no_cache", "repetition_penalty", "eos"])
@every_family
def test_left_padded_rows_generate_what_they_do_alone(family: str, name: str) -> None:
    model = ours(base_model(family), family)
    options = {**OPTIONS[name], "max_new_tokens": 8}
    ids = IDS.masked_fill(LEFT == 0, 0)
    if name == "repetition_penalty":
        ids = IDS.masked_fill(
            LEFT == 0, 18
        )  # the padding counts as a text's id, as in transformers
    got = generated(model, input_ids=ids, attention_mask=LEFT, **options)
    got = new_tokens(family, got, 6)
    for row in range(2):
        own = ids[row][LEFT[row].bool()][None]
        alone = new_tokens(family, generated(model, input_ids=own, **options), own.shape[1])[0]
        padded = got[row].tolist()
        assert padded[: len(alone)] == alone.tolist()
        assert not any(padded[len(alone) :])


@seq2seq
def test_right_padded_rows_generate_what_they_do_alone(family: str) -> None:
    model = ours(base_model(family), family)
    mask = LEFT.flip(1)
    got = generated(model, input_ids=IDS.masked_fill(mask == 0, 0), attention_mask=mask)
    for row in range(2):
        alone = generated(model, input_ids=IDS[row][mask[row].bool()][None])
        assert got[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("name", ["greedy", "beams", "sampling", "no_cache"])
@every_family
def test_the_reference_layout_generates_pefts_tokens_from_padded_rows(
    family: str, name: str
) -> None:
    mine, theirs = pair(family, reference_layout=True)
    options = {"input_ids": IDS.masked_fill(LEFT == 0, 0), "attention_mask": LEFT}
    got, expected = (generated(m, **options, **OPTIONS[name]) for m in (mine, theirs))
    assert got.tolist() == expected.tolist()


# --- caches and decoding strategies that PEFT fails at -----------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@every_family
def test_a_static_cache_gives_the_dynamic_ones_tokens(family: str, padded: bool) -> None:
    model = ours(base_model(family), family)
    options: dict[str, Any] = {"input_ids": IDS, "max_new_tokens": 12}
    if padded:
        options["attention_mask"] = LEFT
    expected = generated(model, **options)
    got = generated(model, **options, cache_implementation="static", disable_compile=True)
    assert got.tolist() == expected.tolist()
    again = generated(model, **options, cache_implementation="static", disable_compile=True)
    assert again.tolist() == expected.tolist()
    options["input_ids"] = options["input_ids"][:, :4]  # the kept cache serves other lengths too
    if padded:
        options["attention_mask"] = LEFT[:, :4]
    got = generated(model, **options, cache_implementation="static", disable_compile=True)
    assert got.tolist() == generated(model, **options).tolist()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@causal
def test_a_static_cache_serves_beams(family: str, kind: str) -> None:
    model = ours(base_model(family), family)
    got = generated(
        model, input_ids=IDS, num_beams=3, cache_implementation=kind, disable_compile=True
    )
    assert got.tolist() == generated(model, input_ids=IDS, num_beams=3).tolist()


@every_family
def test_assisted_generation_gives_the_greedy_tokens(family: str) -> None:
    model = ours(base_model(family), family)
    assistant = base_model(family, seed=5)
    for draft in (assistant, copy.deepcopy(assistant)):
        draft.generation_config.num_assistant_tokens = 3
        got = generated(model, input_ids=IDS[:1], assistant_model=draft, max_new_tokens=12)
        assert got.tolist() == generated(model, input_ids=IDS[:1], max_new_tokens=12).tolist()


@every_family
def test_an_assistant_that_often_agrees_gives_the_greedy_tokens(family: str) -> None:
    base = base_model(family)
    assistant = copy.deepcopy(base)
    model = ours(base, family)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.mul_(0.3)
    got = generated(model, input_ids=IDS[1:], assistant_model=assistant, max_new_tokens=12)
    assert got.tolist() == generated(model, input_ids=IDS[1:], max_new_tokens=12).tolist()


@causal
def test_prompt_lookup_gives_the_greedy_tokens(family: str) -> None:
    model = ours(base_model(family), family)
    text = torch.cat([IDS[:1], IDS[:1]], dim=1)
    for ids in (text, generated(model, input_ids=text, max_new_tokens=16)):
        got = generated(model, input_ids=ids, prompt_lookup_num_tokens=3, max_new_tokens=12)
        assert got.tolist() == generated(model, input_ids=ids, max_new_tokens=12).tolist()


@seq2seq
def test_prompt_lookup_of_an_encoder_decoder_gives_the_greedy_tokens(family: str) -> None:
    model = ours(base_model(family), family)
    got = generated(model, input_ids=IDS[:1], prompt_lookup_num_tokens=3, max_new_tokens=12)
    assert got.tolist() == generated(model, input_ids=IDS[:1], max_new_tokens=12).tolist()


@causal
def test_generation_goes_on_from_a_returned_cache(family: str) -> None:
    """A chat that hands the cache of its last turn in gets the tokens of one long text."""
    model = ours(base_model(family), family)
    first = generated(model, input_ids=IDS[:1], return_dict_in_generate=True, max_new_tokens=4)
    longer = torch.cat([first.sequences, torch.tensor([[60, 61]])], dim=1)
    expected = generated(model, input_ids=longer, max_new_tokens=4)
    got = generated(
        model, input_ids=longer, past_key_values=first.past_key_values, max_new_tokens=4
    )
    assert got.tolist() == expected.tolist()


@causal
def test_a_cache_of_the_callers_is_filled(family: str) -> None:
    model = ours(base_model(family), family)
    cache = transformers.DynamicCache(config=model.base_model.config)
    got = generated(model, input_ids=IDS, past_key_values=cache)
    assert got.tolist() == generated(model, input_ids=IDS).tolist()
    assert cache.get_seq_length() == N + 6 + 7


# --- what sees the ids --------------------------------------------------------------------------


class Listener(transformers.generation.streamers.BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@every_family
def test_a_streamer_sees_the_texts_ids_and_the_new_ones(family: str) -> None:
    model = ours(base_model(family), family)
    listener = Listener()
    tokens = generated(model, input_ids=IDS[:1], streamer=listener)[0].tolist()
    assert listener.ended
    assert [i for part in listener.seen for i in part] == tokens
    assert max(tokens) < 400
    if family in tiny.CAUSAL:
        assert listener.seen[0] == IDS[0].tolist()


def test_a_text_streamer_gives_the_generated_text() -> None:
    tokenizer = tiny.tokenizer("wordpiece")
    model = ours(base_model("llama"), "llama")
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    options = {"input_ids": IDS[:1], "streamer": streamer}
    thread = threading.Thread(target=generated, args=(model,), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(generated(model, input_ids=IDS[:1])[0, 6:])


class Gatherer(transformers.LogitsProcessor):
    """Looks scores up at the ids so far, which fails where an id has none."""

    def __init__(self) -> None:
        self.largest, self.lengths = 0, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.largest = max(self.largest, int(input_ids.max()))
        self.lengths.append(input_ids.shape[1])
        return scores.scatter(1, input_ids, scores.gather(1, input_ids) - 1.0)


@pytest.mark.parametrize("beams", [1, 3])
@every_family
def test_a_logits_processor_meets_no_virtual_id(family: str, beams: int) -> None:
    mine, theirs = pair(family)
    results = []
    for model in (mine, theirs):
        gatherer = Gatherer()
        options = {"logits_processor": transformers.LogitsProcessorList([gatherer])}
        results.append(generated(model, input_ids=IDS, num_beams=beams, **options).tolist())
        if model is mine:  # PEFT gives an encoder-decoder a copy of the processor
            assert 0 < gatherer.largest < 400
            assert gatherer.lengths[0] == (6 if family in tiny.CAUSAL else 1)
    assert results[0] == results[1]


@every_family
def test_a_stopping_criterion_meets_the_texts_ids(family: str) -> None:
    model = ours(base_model(family), family)
    seen: list[Tensor] = []

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        seen.append(ids)
        return torch.full((len(ids),), ids.shape[1] >= 8)

    criteria = transformers.StoppingCriteriaList([stop])
    got = generated(model, input_ids=IDS, stopping_criteria=criteria)
    assert got.shape[1] == 8
    assert all(int(ids.max()) < 400 for ids in seen)


def test_stop_strings_work() -> None:
    tokenizer = tiny.tokenizer("wordpiece")
    model = ours(base_model("llama"), "llama")
    tokens = generated(model, input_ids=IDS[:1])[0]
    third = tokenizer.decode(tokens[8])
    got = generated(model, input_ids=IDS[:1], stop_strings=[third], tokenizer=tokenizer)
    assert got.shape[1] <= 9 and got[0].tolist() == tokens[: got.shape[1]].tolist()


# --- each row its own adapter -------------------------------------------------------------------

FOUR = torch.cat([IDS, IDS + 50])
NAMES = ["default", None, "long", "__base__"]
FOUR_LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])


def with_two_adapters(family: str) -> Any:
    model = ours(base_model(family), family)
    config = PromptEncoderConfig(
        task_type=task_of(family), num_virtual_tokens=5, encoder_hidden_size=16
    )
    model.add_adapter("long", config)
    return model.eval()


def alone(model: Any, name: str | None, **options: Any) -> Tensor:
    if name in (None, "__base__"):
        with model.disable_adapter():
            return generated(model, **options)
    model.set_adapter(name)
    result = generated(model, **options)
    model.set_adapter("default")
    return result


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["greedy", "beams", "no_cache", "returned"],
)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@every_family
def test_rows_with_different_adapters_generate_what_they_do_alone(
    family: str, padded: bool, options: dict[str, Any]
) -> None:
    model = with_two_adapters(family)
    mask = FOUR_LEFT if padded else torch.ones_like(FOUR)
    ids = FOUR.masked_fill(mask == 0, 0)
    got = generated(model, input_ids=ids, attention_mask=mask, adapter_names=NAMES, **options)
    got = new_tokens(family, got, 6)
    each = options.get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        own = ids[row][mask[row].bool()][None]
        expected = new_tokens(family, alone(model, name, input_ids=own, **options), own.shape[1])
        assert got[row * each : (row + 1) * each].tolist() == expected.tolist()


@causal
def test_a_mixed_batch_uses_a_static_cache(family: str) -> None:
    model = with_two_adapters(family)
    options = {"input_ids": FOUR, "adapter_names": NAMES}
    got = generated(model, **options, cache_implementation="static", disable_compile=True)
    assert got.tolist() == generated(model, **options).tolist()


@every_family
def test_names_that_do_not_fit_are_refused(family: str) -> None:
    model = with_two_adapters(family)
    with pytest.raises(InputError, match=r"adapter_names has 1 .* 2 rows"):
        generated(model, input_ids=IDS, adapter_names=["default"])
    with pytest.raises(InputError, match="other not found"):
        generated(model, input_ids=IDS, adapter_names=["default", "other"])


@every_family
def test_disable_adapter_generates_what_the_base_model_does(family: str) -> None:
    base = base_model(family)
    plain = generated(copy.deepcopy(base), input_ids=IDS)
    model = ours(base, family)
    before = generated(model, input_ids=IDS)
    with model.disable_adapter():
        assert generated(model, input_ids=IDS).tolist() == plain.tolist()
        assert generated(model, input_ids=IDS, num_beams=2).shape[0] == 2
    assert generated(model, input_ids=IDS).tolist() == before.tolist()


# --- how it is called ---------------------------------------------------------------------------


@causal
def test_input_ids_may_be_given_by_position(family: str) -> None:
    mine, theirs = pair(family)
    options = {"max_new_tokens": 5, "do_sample": False}
    mask = torch.ones_like(IDS)
    got, expected = (m.generate(IDS, attention_mask=mask, **options) for m in (mine, theirs))
    assert got.tolist() == expected.tolist()
    assert mine.generate(inputs=IDS, **options).tolist() == got.tolist()


@causal
def test_a_generation_config_may_be_given_by_position(family: str) -> None:
    """Behind the ids stands the configuration, in PEFT as in transformers."""
    mine, theirs = pair(family)
    config = transformers.GenerationConfig(max_new_tokens=3, pad_token_id=0)
    got, expected = (m.generate(IDS, config) for m in (mine, theirs))
    assert got.tolist() == expected.tolist() and got.shape[1] == 9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_a_text_generation_begins_as_pefts(family: str) -> None:
    mine, theirs = pair(family)
    options: dict[str, Any] = {"bos_token_id": 1, "max_new_tokens": 4, "do_sample": False}
    got, expected = (model.generate(**options) for model in (mine, theirs))
    assert got.tolist() == expected.tolist() and got.shape[1] > 1
    for model in (mine, theirs):
        config = transformers.GenerationConfig(bos_token_id=7, max_new_tokens=4, pad_token_id=0)
        assert model.generate(generation_config=config)[0, 0] == 7
        model.generation_config.bos_token_id = 2
    again, expected = (model.generate(max_new_tokens=4) for model in (mine, theirs))
    assert again.tolist() == expected.tolist() and again[0, 0] == 2


@seq2seq
def test_an_encoder_decoder_takes_keywords_only(family: str) -> None:
    model = ours(base_model(family), family)
    with pytest.raises(TypeError):
        model.generate(IDS)
    with pytest.raises(ValueError, match="input_ids must be provided"):
        model.generate(attention_mask=torch.ones_like(IDS))


@seq2seq
def test_an_encoder_decoder_drops_token_types_with_a_warning(family: str) -> None:
    """PEFT drops them, so what a tokenizer gives can be handed on."""
    mine, theirs = pair(family)
    types = torch.zeros_like(IDS)
    results = []
    for model in (mine, theirs):
        with pytest.warns(UserWarning, match=r"[Tt]oken.type.ids"):
            results.append(generated(model, input_ids=IDS, token_type_ids=types).tolist())
    assert results[0] == results[1]


@seq2seq
def test_a_decoder_may_begin_with_given_ids(family: str) -> None:
    mine, theirs = pair(family)
    begin = mine.config.decoder_start_token_id
    start = torch.tensor([[begin, 40, 41], [begin, 42, 43]])
    got, expected = (
        generated(m, input_ids=IDS, decoder_input_ids=start, num_beams=2) for m in (mine, theirs)
    )
    assert got.tolist() == expected.tolist()
    assert torch.equal(got[:, :3], start)


@causal
@pytest.mark.parametrize(
    "options",
    [{"prefill_chunk_size": 2}, {"token_healing": True}, {"cache_implementation": "paged"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_read_past_the_prompt_are_refused(
    family: str, options: dict[str, Any]
) -> None:
    model = ours(base_model(family), family)
    with pytest.raises(InputError, match=r"prompt|continuous batching"):
        generated(model, input_ids=IDS, **options)
    for name, value in options.items():
        config = transformers.GenerationConfig(max_new_tokens=2)
        setattr(config, name, value)
        with pytest.raises(InputError):
            model.generate(IDS, generation_config=config)


@seq2seq
def test_the_callers_encoder_outputs_are_refused(family: str) -> None:
    model = ours(base_model(family), family)
    with torch.no_grad():
        encoded = model.base_model.get_encoder()(IDS)
    with pytest.raises(InputError, match="made without the prompt"):
        generated(model, input_ids=IDS, encoder_outputs=encoded)


@causal
def test_embeddings_are_refused(family: str) -> None:
    model = ours(base_model(family), family)
    width = input_embedding(model.base_model).embedding_dim
    with pytest.raises(InputError):
        generated(model, input_ids=IDS, inputs_embeds=torch.randn(2, 6, width))
    with pytest.raises(InputError, match="input_ids"):
        model.generate(inputs_embeds=torch.randn(2, 6, width))


@every_family
def test_an_unknown_option_is_refused_as_transformers_does(family: str) -> None:
    model = ours(base_model(family), family)
    with pytest.raises(ValueError, match="no_such_option"):
        generated(model, input_ids=IDS, no_such_option=1)


# --- the base model afterwards, threads ---------------------------------------------------------


@every_family
def test_the_base_model_is_unchanged_afterwards(family: str) -> None:
    base = base_model(family)
    model = ours(base, family)
    kind, keys = type(base), set(base.__dict__)
    config = base.generation_config
    values = copy.deepcopy(config.to_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()]
    several: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"do_sample": True}]
    if family in tiny.CAUSAL:  # transformers keeps an encoder-decoder's static cache on the model
        several.append({"cache_implementation": "static"})
    for options in several:
        generated(model, input_ids=IDS, disable_compile=True, **options)
    with pytest.raises(ValueError, match="no_such_option"):
        generated(model, input_ids=IDS, no_such_option=1)
    assert type(base) is kind
    assert set(base.__dict__) == keys
    assert base.generation_config is config and config.to_dict() == values
    assert "prepare_inputs_for_generation" not in base.__dict__
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()] == hooks


@every_family
def test_a_training_model_generates_and_goes_on_training(family: str) -> None:
    model = ours(base_model(family), family).train()
    generated(model, input_ids=IDS)
    assert model.training
    labels = {"labels": IDS}
    model(input_ids=IDS, **labels).loss.backward()
    gradients = [p.grad for p in model.prompt_encoder.parameters()]
    assert any(g is not None and bool(g.any()) for g in gradients)
    assert not any(span.rows.requires_grad for span in model._injector.spans)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_two_threads_generate_with_different_adapters(family: str) -> None:
    model = with_two_adapters(family)
    expected = {
        name: generated(model, input_ids=IDS, adapter_names=[name] * 2).tolist()
        for name in ("default", "long")
    }
    failures: list[str] = []
    barrier = threading.Barrier(2)

    def work(name: str) -> None:
        barrier.wait()
        for _ in range(6):
            options = {"max_new_tokens": 8, "do_sample": False, "adapter_names": [name] * 2}
            mask = torch.ones_like(IDS)
            got = model.generate(input_ids=IDS, attention_mask=mask, **options).tolist()
            if got != expected[name]:
                failures.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- templates ----------------------------------------------------------------------------------

TEMPLATE = "[P*2] {text} [P*2] capital [P]"


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_a_template_generates_what_its_ids_give_through_attach(
    family: str, options: dict[str, Any]
) -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    model = ours(base_model(family), family, None, template=TEMPLATE, tokenizer=tokenizer)
    texts = ["Paris is Rome", "Oslo"]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    got = new_tokens(
        family, generated(model, input_ids=ids, attention_mask=mask, **options), ids.shape[1]
    )
    prompt = ptuning.Prompt(num_virtual_tokens=5)
    prompt.vectors = model.get_prompt(1)[0].detach()
    plain = base_model(family)
    capital = tokenizer.convert_tokens_to_ids("capital")
    with ptuning.attach(plain, None, prompt) as attached:
        v = list(attached.ids(prompt))
        for row, text in enumerate(texts):
            words = tokenizer(text, add_special_tokens=False)["input_ids"]
            whole = torch.tensor([[1, v[0], v[1], *words, v[2], v[3], capital, v[4], 2]])
            expected = new_tokens(
                family, generated(plain, input_ids=whole, **options), len(whole[0])
            )
            assert got[row].tolist() == expected[0].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_template_generates_what_its_vectors_give_directly(family: str) -> None:
    tokenizer = tiny.tokenizer("wordpiece", bos=True)
    base = base_model(family)
    model = ours(base, family, None, template=TEMPLATE, tokenizer=tokenizer)
    ids = tokenizer("Paris is Rome", return_tensors="pt")["input_ids"]
    got = generated(model, input_ids=ids)
    assert torch.equal(got[:, : ids.shape[1]], ids)
    embed = input_embedding(base)
    v = model.get_prompt(1)[0].detach()
    capital = embed(torch.tensor([tokenizer.convert_tokens_to_ids("capital")]))
    text = embed(ids[0])
    whole = torch.cat([text[:1], v[:2], text[1:], v[2:4], capital, v[4:]])[None]
    with model.disable_adapter():
        expected = model.base_model.generate(inputs_embeds=whole, max_new_tokens=8, do_sample=False)
    assert got[0, ids.shape[1] :].tolist() == expected[0].tolist()


def test_a_templates_rows_may_be_mixed_with_others() -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    model = ours(base_model("llama"), "llama", None, template=TEMPLATE, tokenizer=tokenizer)
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=16
    )
    model.add_adapter("front", config)
    model.eval()
    tokenizer.padding_side = "left"
    batch = tokenizer(["Paris is Rome", "Oslo", "Rome"], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    names = ["default", "front", None]
    got = generated(model, input_ids=ids, attention_mask=mask, adapter_names=names)
    for row, name in enumerate(names):
        own = ids[row][mask[row].bool()][None]
        expected = generated(model, input_ids=own, adapter_names=[name])
        assert got[row, ids.shape[1] :].tolist() == expected[0, own.shape[1] :].tolist()


def test_no_module_of_the_view_is_registered_anywhere() -> None:
    """The view shares the base model's weights and is no part of either model."""
    model = ours(base_model("llama"), "llama")
    names = [name for name, _ in model.named_modules()]
    state = set(nn.Module.state_dict(model))
    generated(model, input_ids=IDS)
    assert [name for name, _ in model.named_modules()] == names
    assert set(nn.Module.state_dict(model)) == state


def test_a_compiled_base_generates_with_its_prompt() -> None:
    model = ours(base_model("llama"), "llama")
    expected = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    model.base_model = torch.compile(model.base_model, backend="eager")
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False), expected)
