"""``forward`` of `ptuning.peft_compat` for every task, with real PEFT as the oracle."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import AddedToken
from torch import Tensor, nn

from ptuning import peft_compat
from ptuning.backbone.lookups import input_embedding
from ptuning.backbone.upstream import CACHE
from ptuning.errors import InputError
from ptuning.peft_compat import PromptEncoderConfig, get_peft_model

from .. import tiny

N = 3
IDS = torch.tensor([[15, 16, 17, 18, 19, 20], [30, 31, 32, 33, 34, 35]])
MASKS = {
    "left": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
}
AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
CASES = [
    ("CAUSAL_LM", "llama"),
    ("CAUSAL_LM", "gpt2"),
    ("CAUSAL_LM", "gemma2"),
    ("CAUSAL_LM", "opt"),
    ("SEQ_2_SEQ_LM", "t5"),
    ("SEQ_2_SEQ_LM", "bart"),
    ("SEQ_CLS", "bert"),
    ("SEQ_CLS", "roberta"),
    ("SEQ_CLS", "llama"),
    ("SEQ_CLS", "gpt2"),
    ("TOKEN_CLS", "bert"),
    ("TOKEN_CLS", "roberta"),
    ("TOKEN_CLS", "gpt2"),
    ("QUESTION_ANS", "bert"),
    ("QUESTION_ANS", "roberta"),
    ("QUESTION_ANS", "llama"),
    ("FEATURE_EXTRACTION", "bert"),
    ("FEATURE_EXTRACTION", "llama"),
]
every_task = pytest.mark.parametrize(("task", "family"), CASES)
one_per_task = pytest.mark.parametrize(
    ("task", "family"),
    [
        ("CAUSAL_LM", "llama"),
        ("SEQ_2_SEQ_LM", "bart"),
        ("SEQ_CLS", "bert"),
        ("TOKEN_CLS", "bert"),
        ("QUESTION_ANS", "bert"),
        ("FEATURE_EXTRACTION", "bert"),
    ],
)


def base_model(task: str | None, family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model whose outputs are far apart, with the task's head."""
    spread = {"t5": {}, "bart": {}}.get(family, {"initializer_range": 0.2})
    if family == "gpt2":
        changes = {"pad_token_id": 0, **changes}
    labels = 2 if task == "QUESTION_ANS" else 3
    changes = {**spread, "attn_implementation": "eager", "num_labels": labels, **changes}
    if task is None:
        return tiny.model(family, seed=seed, **changes)
    name, _, values = tiny.FAMILIES[family]
    config = getattr(transformers, name)(vocab_size=400, **{**values, **changes})
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AUTO[task].from_config(config).eval()


def ours(base: Any, task: str | None, count: int = N, seed: int = 3, **options: Any) -> Any:
    config = PromptEncoderConfig(task_type=task, num_virtual_tokens=count, encoder_hidden_size=16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(base, config, **options).eval()


def pair(task: str, family: str, **options: Any) -> tuple[Any, Any]:
    """The same prompt and heads on two copies of a base model: ours and PEFT's."""
    base = base_model(task, family)
    mine = ours(copy.deepcopy(base), task, **options)
    config = peft.PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=N,
        encoder_hidden_size=16,
        token_dim=input_embedding(base).embedding_dim,
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.prompt_encoder.load_state_dict(mine.prompt_encoder.state_dict())
    return mine, theirs


def inputs_for(task: str | None, *, labels: bool = True) -> dict[str, Tensor]:
    inputs = {"input_ids": IDS}
    if task == "SEQ_2_SEQ_LM" and not labels:
        inputs["decoder_input_ids"] = torch.tensor([[2, 40, 41], [2, 42, 43]])
    if not labels or task == "FEATURE_EXTRACTION":
        return inputs
    if task == "QUESTION_ANS":
        answers = {"start_positions": torch.tensor([3, 0]), "end_positions": torch.tensor([5, 4])}
        return {**inputs, **answers}
    if task == "SEQ_CLS":
        return {**inputs, "labels": torch.tensor([1, 2])}
    if task == "TOKEN_CLS":
        return {**inputs, "labels": torch.arange(2 * (N + 6)).view(2, -1) % 3}
    if task == "SEQ_2_SEQ_LM":
        return {**inputs, "labels": torch.tensor([[40, 41, 2], [42, 2, -100]])}
    return {**inputs, "labels": IDS}


def assert_same(got: Any, expected: Any) -> None:
    """Two outputs, or tuples of them, within 1e-5."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    elif isinstance(expected, dict):
        known = {k: v for k, v in expected.items() if k != CACHE}
        assert {k for k in got if k != CACHE} == set(known)
        for key, value in known.items():
            assert_same(got[key], value)
    elif isinstance(expected, tuple | list):
        assert len(got) == len(expected)
        for mine, theirs in zip(got, expected, strict=True):
            assert_same(mine, theirs)
    elif not isinstance(expected, transformers.Cache):
        assert got == expected


def trained_gradients(model: Any) -> dict[str, Tensor]:
    names = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n.replace("base_model.model.", "base_model."): g for n, g in names.items()}


# --- unpadded: what PEFT computes ---------------------------------------------------------------


@every_task
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no_labels"])
def test_outputs_and_losses_are_pefts(task: str, family: str, labels: bool) -> None:
    mine, theirs = pair(task, family)
    inputs = inputs_for(task, labels=labels)
    with torch.no_grad():
        got, expected = mine(**inputs), theirs(**inputs)
        assert_same(got, expected)
        masked = {**inputs, "attention_mask": torch.ones_like(IDS)}
        assert_same(mine(**masked), expected)
    if labels and task != "FEATURE_EXTRACTION":
        assert got.loss is not None
    shapes = {"CAUSAL_LM": (2, N + 6, 400), "SEQ_CLS": (2, 3), "TOKEN_CLS": (2, N + 6, 3)}
    if task in shapes:
        assert tuple(got.logits.shape) == shapes[task]
    elif task == "QUESTION_ANS":
        assert tuple(got.start_logits.shape) == tuple(got.end_logits.shape) == (2, N + 6)
    elif task == "FEATURE_EXTRACTION":
        assert tuple(got.last_hidden_state.shape) == (2, N + 6, 32)
    else:
        assert tuple(got.logits.shape) == (2, 3, 400)


@every_task
def test_gradients_are_pefts(task: str, family: str) -> None:
    mine, theirs = pair(task, family)
    for model in (mine, theirs):
        output = model(**inputs_for(task))
        loss = output[0].square().mean() if task == "FEATURE_EXTRACTION" else output.loss
        loss.backward()
    got, expected = trained_gradients(mine), trained_gradients(theirs)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        if gradient is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert all(
        p.grad is None
        for n, p in mine.base_model.named_parameters()
        if ".modules_to_save." not in n
    )


@pytest.mark.parametrize("family", tiny.MASKED)
def test_a_masked_language_model_reads_the_prompt_in_front(family: str) -> None:
    base = base_model(None, family)
    model = ours(base, None)
    with torch.no_grad():
        output = model(input_ids=IDS, labels=IDS)
        embeds = torch.cat([model.get_prompt(2), base.get_input_embeddings()(IDS)], dim=1)
        labels = torch.cat([torch.full((2, N), -100), IDS], dim=1)
        expected = base(inputs_embeds=embeds, labels=labels)
    assert tuple(output.logits.shape) == (2, N + 6, 400)
    assert_same(output.logits, expected.logits)
    assert_same(output.loss, expected.loss)


@every_task
def test_inputs_embeds_give_what_the_ids_give_and_get_a_gradient(task: str, family: str) -> None:
    model, theirs = pair(task, family)
    inputs = inputs_for(task)
    expected = model(**inputs)
    embeds = input_embedding(model.base_model)(inputs.pop("input_ids")).detach().requires_grad_()
    got = model(inputs_embeds=embeds, **inputs)
    assert_same(got, expected)
    got[0].square().mean().backward()
    gradient = embeds.grad
    assert gradient is not None and bool((gradient != 0).any(-1).any())
    embeds.grad = None
    theirs(inputs_embeds=embeds, **inputs)[0].square().mean().backward()
    torch.testing.assert_close(gradient, embeds.grad, atol=1e-6, rtol=1e-4)


@one_per_task
def test_inputs_embeds_leave_nothing_behind(task: str, family: str) -> None:
    model = ours(base_model(task, family), task)
    inputs = inputs_for(task, labels=False)
    spans = list(model._injector.spans)
    embeds = input_embedding(model.base_model)(inputs.pop("input_ids"))
    with torch.no_grad():
        model(inputs_embeds=embeds, **inputs)
    assert model._injector.spans == spans

    def fail(*args: Any) -> None:
        raise RuntimeError("no memory left")

    model.base_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        model(inputs_embeds=embeds, **inputs)
    assert model._injector.spans == spans


CLASSES = {
    "CAUSAL_LM": "PeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
    "SEQ_CLS": "PeftModelForSequenceClassification",
    "TOKEN_CLS": "PeftModelForTokenClassification",
    "QUESTION_ANS": "PeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
}


@pytest.mark.parametrize("task", CLASSES)
def test_positional_arguments_stand_in_pefts_order(task: str) -> None:
    name = CLASSES[task]
    theirs = list(inspect.signature(getattr(peft, name).forward).parameters)[:-1]
    mine = list(inspect.signature(getattr(peft_compat, name).forward).parameters)[:-1]
    assert mine[: len(theirs)] == theirs


@one_per_task
def test_positional_arguments_give_what_keywords_give(task: str, family: str) -> None:
    mine, theirs = pair(task, family)
    inputs = {**inputs_for(task), "attention_mask": torch.ones_like(IDS)}
    order = list(inspect.signature(type(theirs).forward).parameters)[1:-1]
    args = [inputs.get(name) for name in order]
    with torch.no_grad():
        got = mine(*args)
        assert_same(got, theirs(*args))
        assert_same(got, mine(**inputs))
    with pytest.raises(TypeError, match="at most"):
        mine(*([None] * 30))


def test_an_argument_given_twice_is_an_error() -> None:
    model = ours(base_model("CAUSAL_LM", "llama"), "CAUSAL_LM")
    with pytest.raises(TypeError, match="input_ids"):
        model(IDS, input_ids=IDS)


@every_task
def test_return_dict_false_gives_pefts_tuple(task: str, family: str) -> None:
    mine, theirs = pair(task, family)
    inputs = inputs_for(task)
    with torch.no_grad():
        got, expected = mine(**inputs, return_dict=False), theirs(**inputs, return_dict=False)
    assert isinstance(got, tuple)
    assert_same(got, expected)


@every_task
def test_hidden_states_and_attentions_are_pefts(task: str, family: str) -> None:
    mine, theirs = pair(task, family)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        got = mine(**inputs_for(task), **asked)
        expected = theirs(**inputs_for(task), **asked)
    assert_same(got, expected)
    states = "encoder_hidden_states" if task == "SEQ_2_SEQ_LM" else "hidden_states"
    assert got[states] and got[states][0].shape[1] == N + 6


def test_task_ids_are_taken_and_mean_nothing() -> None:
    mine = ours(base_model("CAUSAL_LM", "llama"), "CAUSAL_LM")
    with torch.no_grad():
        assert_same(mine(IDS, task_ids=torch.zeros(2)).logits, mine(IDS).logits)


# --- token types and positions ------------------------------------------------------------------

TYPES = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_token_types_are_used_as_in_peft(task: str) -> None:
    mine, theirs = pair(task, "bert")
    with torch.no_grad():
        got = mine(input_ids=IDS, token_type_ids=TYPES)
        assert_same(got, theirs(input_ids=IDS, token_type_ids=TYPES))
        assert not torch.allclose(got.logits, mine(input_ids=IDS).logits, atol=1e-3)


@pytest.mark.parametrize("task", ["QUESTION_ANS", "FEATURE_EXTRACTION", None])
def test_token_types_are_used_where_peft_drops_them(task: str | None) -> None:
    base = base_model(task, "bert")
    model = ours(base, task)
    embeds = torch.cat([model.get_prompt(2), base.get_input_embeddings()(IDS)], dim=1)
    types = torch.cat([torch.zeros(2, N, dtype=torch.long), TYPES], dim=1)
    with torch.no_grad():
        expected = base(inputs_embeds=embeds, token_type_ids=types)
        got = model(input_ids=IDS, token_type_ids=TYPES)
        plain = model(input_ids=IDS)
    assert_same(got, expected)
    assert not torch.allclose(got[0], plain[0], atol=1e-3)


@pytest.mark.parametrize("task", ["QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_the_reference_layout_drops_token_types_with_a_warning(task: str) -> None:
    mine, theirs = pair(task, "bert", reference_layout=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(input_ids=IDS, token_type_ids=TYPES)
    with torch.no_grad(), pytest.warns(UserWarning, match="token_type_ids are dropped"):
        got = mine(input_ids=IDS, token_type_ids=TYPES)
    assert_same(got, expected)


def test_token_types_for_a_model_that_takes_none_are_dropped_with_a_warning() -> None:
    model = ours(base_model("CAUSAL_LM", "llama"), "CAUSAL_LM")
    with torch.no_grad(), pytest.warns(UserWarning, match="the model takes none"):
        got = model(input_ids=IDS, token_type_ids=torch.zeros_like(IDS)).logits
    with torch.no_grad():
        assert_same(got, model(input_ids=IDS).logits)


WITH_POSITIONS = [
    ("CAUSAL_LM", "llama", 0),
    ("CAUSAL_LM", "gpt2", 0),
    ("SEQ_CLS", "bert", 0),
    ("TOKEN_CLS", "roberta", 1),
    ("QUESTION_ANS", "bert", 0),
]


@pytest.mark.parametrize(("task", "family", "offset"), WITH_POSITIONS)
def test_plain_positions_of_the_text_change_nothing(task: str, family: str, offset: int) -> None:
    model = ours(base_model(task, family), task)
    positions = torch.arange(6).expand(2, -1) + offset
    with torch.no_grad():
        got = model(input_ids=IDS, position_ids=positions)
        assert_same(got, model(input_ids=IDS))


@pytest.mark.parametrize(("task", "family", "offset"), WITH_POSITIONS)
def test_the_users_positions_get_room_for_the_prompt(task: str, family: str, offset: int) -> None:
    base = base_model(task, family)
    model = ours(base, task)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [5, 6, 7, 8, 9, 10]]) + offset
    whole = torch.cat([torch.arange(N).expand(2, -1) + offset, positions + N], dim=1)
    embeds = torch.cat([model.get_prompt(2), base.get_input_embeddings()(IDS)], dim=1)
    with torch.no_grad():
        expected = base(inputs_embeds=embeds, position_ids=whole)
        got = model(input_ids=IDS, position_ids=positions)
        assert not torch.allclose(got[0], model(input_ids=IDS)[0], atol=1e-3)
    if task != "SEQ_CLS":
        assert_same(got[0], expected[0])
    else:
        assert_same(got.logits, expected.logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_texts_are_refused_since_all_but_the_first_would_have_no_prompt(family: str) -> None:
    model = ours(base_model("CAUSAL_LM", family), "CAUSAL_LM")
    texts = [{"input_ids": [15, 16, 17, 18]}, {"input_ids": [30, 31, 32]}]
    packed = transformers.DataCollatorWithFlattening()(texts)
    with pytest.raises(InputError, match=r"position_ids begin again .* a row of its own"):
        model(**packed, use_cache=False)
    with torch.no_grad():  # one text, and the caller says so
        mask = torch.ones_like(packed["input_ids"])
        assert model(**packed, attention_mask=mask).logits.shape == (1, N + 7, 400)


@pytest.mark.parametrize("side", MASKS)
def test_positions_that_skip_the_padding_change_nothing(side: str) -> None:
    model = ours(base_model("CAUSAL_LM", "llama"), "CAUSAL_LM")
    positions = (MASKS[side].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got = model(input_ids=IDS, attention_mask=MASKS[side], position_ids=positions).logits
        expected = model(input_ids=IDS, attention_mask=MASKS[side]).logits
    real = torch.cat([torch.zeros(2, N), MASKS[side]], dim=1).bool()
    assert_same(got[real], expected[real])


def test_one_row_of_positions_serves_all_rows() -> None:
    model = ours(base_model("CAUSAL_LM", "llama"), "CAUSAL_LM")
    with torch.no_grad():
        got = model(input_ids=IDS, position_ids=torch.arange(6).unsqueeze(0)).logits
        assert_same(got, model(input_ids=IDS).logits)


def test_the_reference_layout_drops_positions_with_a_warning() -> None:
    mine, theirs = pair("CAUSAL_LM", "llama", reference_layout=True)
    positions = torch.arange(6).expand(2, -1) + 4
    with torch.no_grad(), pytest.warns(UserWarning, match="position_ids are dropped"):
        got = mine(input_ids=IDS, position_ids=positions).logits
    with torch.no_grad():
        assert_same(got, theirs(input_ids=IDS).logits)


@pytest.mark.parametrize("side", MASKS)
def test_attentions_of_a_padded_batch_stand_where_the_tokens_stand(side: str) -> None:
    model = ours(base_model("TOKEN_CLS", "bert"), "TOKEN_CLS")
    mask = MASKS[side]
    with torch.no_grad():
        got = model(input_ids=IDS, attention_mask=mask, output_attentions=True).attentions[-1]
        real = mask[0].bool()
        alone = model(IDS[0][real][None], output_attentions=True).attentions[-1][0]
    own = got[0, :, -7:, -7:] if side == "left" else got[0, :, :7, :7]
    assert_same(own, alone)


# --- labels of token classification -------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_token_labels_of_the_texts_length_are_those_with_ignored_ones_in_front(family: str) -> None:
    mine, theirs = pair("TOKEN_CLS", family)
    labels = torch.tensor([[0, 1, 2, -100, 1, 0], [2, 2, 1, 0, 0, 1]])
    whole = torch.cat([torch.full((2, N), -100), labels], dim=1)
    with torch.no_grad():
        expected = theirs(input_ids=IDS, labels=whole).loss
        assert_same(mine(input_ids=IDS, labels=labels).loss, expected)
        assert_same(mine(input_ids=IDS, labels=whole).loss, expected)


@pytest.mark.parametrize(("task", "family"), [("CAUSAL_LM", "llama"), ("TOKEN_CLS", "bert")])
def test_labels_may_be_whole_numbers_of_any_width(task: str, family: str) -> None:
    model = ours(base_model(task, family), task)
    labels = torch.tensor([[0, 1, 2, 0, 1, 0], [2, 2, 1, 0, 0, 1]])
    with torch.no_grad():
        expected = model(input_ids=IDS, labels=labels).loss
        assert_same(model(input_ids=IDS, labels=labels.int()).loss, expected)


def test_shares_of_as_many_labels_as_there_are_tokens_are_no_labels_of_tokens() -> None:
    base = base_model("SEQ_CLS", "bert", num_labels=6, problem_type="multi_label_classification")
    labels = torch.rand(2, 6)
    with torch.no_grad():
        output = ours(base, None)(input_ids=IDS, labels=labels)
    expected = nn.functional.binary_cross_entropy_with_logits(output.logits, labels)
    assert_same(output.loss, expected)


@pytest.mark.parametrize("side", MASKS)
def test_token_labels_follow_their_tokens_in_padded_rows(side: str) -> None:
    model = ours(base_model("TOKEN_CLS", "bert"), "TOKEN_CLS")
    labels = torch.tensor([[0, 1, 2, 0, 1, 0], [2, 2, 1, 0, 0, 1]])
    labels = labels.masked_fill(MASKS[side] == 0, -100)
    with torch.no_grad():
        got = model(input_ids=IDS, attention_mask=MASKS[side], labels=labels).loss
        alone = []
        for ids, mask, own in zip(IDS, MASKS[side], labels, strict=True):
            real = mask.bool()
            output = model(input_ids=ids[real][None], labels=own[real][None])
            alone.append((output.loss * real.sum(), real.sum()))
    expected = sum(loss for loss, _ in alone) / sum(count for _, count in alone)
    assert_same(got, expected)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_every_token_of_a_row_without_a_prompt_has_its_label(family: str) -> None:
    """Token classification predicts each token at its own place: the first one counts too."""
    model = ours(base_model("TOKEN_CLS", family), "TOKEN_CLS")
    labels = torch.tensor([[0, 1, 2, 0, 1, 0], [2, 2, 1, 0, 0, 1]])
    with torch.no_grad():
        got = model(IDS, labels=labels, adapter_names=["default", None]).loss
        apart = [
            model(IDS[i : i + 1], labels=labels[i : i + 1], adapter_names=[name]).loss
            for i, name in enumerate(["default", None])
        ]
    assert_same(got, torch.stack(apart).mean())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_labels_of_virtual_tokens_count_in_padded_rows(family: str) -> None:
    model = ours(base_model("TOKEN_CLS", family), "TOKEN_CLS")
    labels = torch.full((2, N + 6), -100)
    labels[:, 0] = torch.tensor([1, 2])  # of the first virtual token, as the reference has it
    with torch.no_grad():
        got = model(IDS, attention_mask=MASKS["left"], labels=labels).loss
        apart = [
            model(IDS[:1, 2:], labels=labels[:1, : N + 4]).loss,
            model(IDS[1:], labels=labels[1:]).loss,
        ]
    assert_same(got, torch.stack(apart).mean())


# --- padding: the reference's layout, and each row as alone -------------------------------------

PADDED = [
    ("CAUSAL_LM", "llama"),
    ("CAUSAL_LM", "gpt2"),
    ("SEQ_CLS", "bert"),
    ("SEQ_CLS", "roberta"),
    ("TOKEN_CLS", "bert"),
    ("QUESTION_ANS", "roberta"),
    ("FEATURE_EXTRACTION", "bert"),
    ("SEQ_2_SEQ_LM", "t5"),
    ("SEQ_2_SEQ_LM", "bart"),
    ("SEQ_CLS", "llama"),
    ("SEQ_CLS", "gpt2"),
]


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize(("task", "family"), PADDED)
def test_the_reference_layout_is_pefts_in_padded_batches(task: str, family: str, side: str) -> None:
    mine, theirs = pair(task, family, reference_layout=True)
    inputs = {**inputs_for(task), "attention_mask": MASKS[side]}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(mine(**inputs), theirs(**inputs))
        embeds = input_embedding(mine.base_model)(inputs.pop("input_ids"))
        assert_same(mine(inputs_embeds=embeds, **inputs), theirs(inputs_embeds=embeds, **inputs))


def padded(side: str, pad: int = 0) -> Tensor:
    return IDS.masked_fill(MASKS[side] == 0, pad)


def text_width(output: Any) -> dict[str, Tensor]:
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return {name: output[name] for name in names if name in output}


@pytest.mark.parametrize("embedded", [False, True], ids=["ids", "embeds"])
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize(
    ("task", "family"), [*PADDED, ("CAUSAL_LM", "opt"), ("CAUSAL_LM", "gemma2")]
)
def test_each_row_of_a_padded_batch_is_as_alone(
    task: str, family: str, side: str, embedded: bool
) -> None:
    model = ours(base_model(task, family), task)
    inputs = {**inputs_for(task, labels=False), "input_ids": padded(side)}
    decoder = inputs.pop("decoder_input_ids", None)
    extra = [{} if decoder is None else {"decoder_input_ids": row[None]} for row in IDS[:, :3]]
    together = {} if decoder is None else {"decoder_input_ids": IDS[:, :3]}
    mask = MASKS[side]
    if embedded:
        inputs["inputs_embeds"] = input_embedding(model.base_model)(inputs.pop("input_ids"))
    with torch.no_grad():
        got = text_width(model(**inputs, **together, attention_mask=mask))
        for row in range(2):
            real = mask[row].bool()
            alone = text_width(model(input_ids=IDS[row][real][None], **extra[row]))
            columns = torch.cat([torch.ones(N).bool(), real]) if side == "right" else None
            for name, value in alone.items():
                own = got[name][row]
                if len(own) == N + 6:
                    own = own[columns] if columns is not None else own[-value.shape[1] :]
                assert_same(own, value[0])


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_causal_classifiers_pool_the_last_real_token(family: str, side: str) -> None:
    """Also where it has the padding's id, and where the padding is given as embeddings."""
    model = ours(base_model("SEQ_CLS", family), "SEQ_CLS")
    ids = torch.tensor([[15, 0, 17, 0, 0, 0], [30, 31, 0, 0, 34, 0]])
    if side == "left":
        ids[0] = torch.tensor([0, 0, 15, 0, 17, 0])
    mask = MASKS[side]
    embeds = input_embedding(model.base_model)(ids)
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask).logits
        rows = [model(input_ids=ids[i][mask[i].bool()][None]).logits[0] for i in range(2)]
        assert_same(got, torch.stack(rows))
        assert_same(model(inputs_embeds=embeds, attention_mask=mask).logits, got)
        # The pooled token is the last one, so another one in its place changes the result.
        other = ids.clone()
        other[:, -1] = 77
        other = other.masked_fill(mask == 0, 0) if side == "right" else other
        if side == "right":
            other[0, 3] = 77
        assert not torch.allclose(model(input_ids=other, attention_mask=mask).logits, got)


@pytest.mark.parametrize("pad", [-1, 400])  # of old files; added to the tokenizer alone
def test_a_padding_id_that_is_no_word_changes_nothing(pad: int) -> None:
    base = base_model("SEQ_CLS", "llama", pad_token_id=None)
    base.config.pad_token_id = pad
    model = ours(base, "SEQ_CLS")
    words = input_embedding(base)(IDS)
    expected = base(inputs_embeds=torch.cat([model.get_prompt(2), words], 1)).logits
    assert_same(model(input_ids=IDS).logits, expected)
    model.add_adapter("longer", PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=5))
    assert_same(model(input_ids=IDS, adapter_names=["default", "longer"]).logits[0], expected[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_causal_classifiers_gradient_is_as_alone_where_a_token_has_the_paddings_id(
    family: str,
) -> None:
    model = ours(base_model("SEQ_CLS", family), "SEQ_CLS")
    ids = torch.tensor([[15, 0, 17, 0, 0, 0], [30, 31, 0, 0, 34, 0]])
    mask, labels = MASKS["right"], torch.tensor([1, 2])
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = torch.autograd.grad(
        model(input_ids=ids, attention_mask=mask, labels=labels).loss, parameters
    )
    losses = [
        model(input_ids=ids[i][mask[i].bool()][None], labels=labels[i : i + 1]).loss
        for i in range(2)
    ]
    apart = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    assert_same(whole, apart)


@pytest.mark.parametrize("side", MASKS)
def test_roberta_reads_text_with_the_paddings_id_as_bare_tokens(side: str) -> None:
    """RoBERTa counts positions by ids; here a padding id among the text is a token like others."""
    base = base_model("TOKEN_CLS", "roberta")
    model = ours(base, "TOKEN_CLS")
    ids = IDS.clone()
    ids[:, 3] = 0
    embeds = torch.cat([model.get_prompt(2), base.get_input_embeddings()(ids)], dim=1)
    with torch.no_grad():
        expected = base(inputs_embeds=embeds).logits
        assert_same(model(input_ids=ids).logits, expected)
        got = model(input_ids=ids, attention_mask=MASKS[side]).logits
        for row in range(2):
            real = MASKS[side][row].bool()
            alone = model(input_ids=ids[row][real][None]).logits[0]
            own = got[row][torch.cat([torch.ones(N).bool(), real])]
            if side == "left":
                own = got[row][-len(alone) :]
            assert_same(own, alone)


def test_padding_on_both_sides_and_holes_in_the_mask_are_as_alone() -> None:
    model = ours(base_model("CAUSAL_LM", "llama"), "CAUSAL_LM")
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        got = model(input_ids=IDS, attention_mask=mask).logits
        assert_same(got[0, 1:-1], model(input_ids=IDS[:1, 1:5]).logits[0])
        assert_same(got[1, 1:], model(input_ids=IDS[1:, 1:]).logits[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_masks_of_other_dtypes_mean_the_same(family: str, dtype: torch.dtype) -> None:
    task = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}[family]
    model = ours(base_model(task, family), task)
    inputs = inputs_for(task)
    with torch.no_grad():
        expected = model(**inputs, attention_mask=MASKS["left"])
        got = model(**inputs, attention_mask=MASKS["left"].to(dtype))
    assert_same(got.logits, expected.logits)


# --- without the virtual positions --------------------------------------------------------------


@pytest.mark.parametrize("side", [None, *MASKS])
@one_per_task
def test_dropped_virtual_positions_leave_the_texts(
    task: str, family: str, side: str | None
) -> None:
    model = ours(base_model(task, family), task)
    inputs: dict[str, Any] = {**inputs_for(task, labels=False), "output_hidden_states": True}
    if side:
        inputs["attention_mask"] = MASKS[side]
    real = MASKS[side].bool() if side else torch.ones(2, 6).bool()
    with torch.no_grad():
        whole = model(**inputs)
        got = model(**inputs, drop_virtual_positions=True)
    names = ["logits", "start_logits", "end_logits", "last_hidden_state", "hidden_states"]
    names += ["encoder_last_hidden_state", "encoder_hidden_states", "decoder_hidden_states"]
    for name in [n for n in names if n in whole]:
        parts = got[name] if isinstance(got[name], tuple) else (got[name],)
        before = whole[name] if isinstance(whole[name], tuple) else (whole[name],)
        for part, old in zip(parts, before, strict=True):
            if old.shape[1] != N + 6:
                assert_same(part, old)
                continue
            assert part.shape[1] == 6
            for row in range(2):
                start = int((real[row].cumsum(0) == 0).sum()) + N  # [pad v v text], [v v text pad]
                count = int(real[row].sum())
                assert_same(part[row][real[row]], old[row, start : start + count])


def test_dropping_is_a_setting_of_the_model_and_each_call_overrides_it() -> None:
    model = ours(base_model("CAUSAL_LM", "llama"), "CAUSAL_LM", drop_virtual_positions=True)
    assert model(IDS).logits.shape[1] == 6
    assert model(IDS, drop_virtual_positions=False).logits.shape[1] == N + 6


def test_dropping_leaves_the_loss() -> None:
    model = ours(base_model("CAUSAL_LM", "llama"), "CAUSAL_LM")
    with torch.no_grad():
        whole = model(IDS, labels=IDS).loss
        assert_same(model(IDS, labels=IDS, drop_virtual_positions=True).loss, whole)


@pytest.mark.parametrize("side", [None, *MASKS])
def test_answer_positions_count_from_the_text_where_virtual_ones_are_dropped(
    side: str | None,
) -> None:
    model = ours(base_model("QUESTION_ANS", "bert"), "QUESTION_ANS", drop_virtual_positions=True)
    start, end = torch.tensor([2, 1]), torch.tensor([3, 4])
    inputs = {"input_ids": IDS, **({"attention_mask": MASKS[side]} if side else {})}
    with torch.no_grad():
        got = model(**inputs, start_positions=start, end_positions=end)
        whole = model(**inputs, drop_virtual_positions=False)
    assert got.start_logits.shape == (2, 6)
    shift = torch.tensor([N, N])  # left padding stands in front of the virtual tokens, as before
    expected = nn.functional.cross_entropy(whole.start_logits, start + shift)
    expected = (expected + nn.functional.cross_entropy(whole.end_logits, end + shift)) / 2
    assert_same(got.loss, expected)


@pytest.mark.parametrize("outside", [90, -1])
def test_an_answer_outside_the_text_is_ignored_where_virtual_positions_are_dropped(
    outside: int,
) -> None:
    model = ours(base_model("QUESTION_ANS", "bert"), "QUESTION_ANS", drop_virtual_positions=True)
    with torch.no_grad():
        one = model(IDS[:1], start_positions=torch.tensor([1]), end_positions=torch.tensor([2]))
        two = model(
            IDS,
            start_positions=torch.tensor([1, outside]),
            end_positions=torch.tensor([[2], [outside]]),
        )
    assert_same(two.loss, one.loss)


@one_per_task
def test_return_dict_false_drops_virtual_positions_too(task: str, family: str) -> None:
    model = ours(base_model(task, family), task)
    inputs = inputs_for(task)
    with torch.no_grad():
        got = model(**inputs, drop_virtual_positions=True, return_dict=False)
        expected = model(**inputs, drop_virtual_positions=True).to_tuple()
    assert isinstance(got, tuple)
    assert_same(got, expected)


def test_a_model_whose_config_asks_for_tuples_drops_virtual_positions_too() -> None:
    base = base_model("TOKEN_CLS", "bert")
    base.config.return_dict = False
    model = ours(base, "TOKEN_CLS")
    with torch.no_grad():
        got = model(IDS, drop_virtual_positions=True)
        expected = model(IDS, return_dict=True).logits[:, N:]
    assert isinstance(got, tuple)
    assert_same(got[0], expected)


# --- each row its own adapter -------------------------------------------------------------------

NAMES = ["default", None, "long", "__base__"]
FOUR = torch.cat([IDS, IDS + 50])
FOUR_MASKS = {
    "none": None,
    "left": torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1] * 6, [1, 1, 1, 0, 0, 0]]),
}


def with_two_adapters(task: str | None, family: str) -> Any:
    """``default`` of 3 and ``long`` of 5 virtual tokens; heads that differ."""
    model = ours(base_model(task, family), task)
    config = PromptEncoderConfig(task_type=task, num_virtual_tokens=5, encoder_hidden_size=16)
    model.add_adapter("long", config)
    model.eval()
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.normal_(std=0.5)
    return model


def row_alone(model: Any, name: str | None, **inputs: Any) -> Any:
    if name in (None, "__base__"):
        with model.disable_adapter():
            return model(**inputs)
    model.set_adapter(name)
    output = model(**inputs)
    model.set_adapter("default")
    return output


@pytest.mark.parametrize("side", FOUR_MASKS)
@pytest.mark.parametrize(
    ("task", "family"),
    [
        ("CAUSAL_LM", "llama"),
        ("CAUSAL_LM", "gpt2"),
        ("SEQ_2_SEQ_LM", "t5"),
        ("SEQ_2_SEQ_LM", "bart"),
        ("SEQ_CLS", "bert"),
        ("SEQ_CLS", "roberta"),
        ("SEQ_CLS", "llama"),
        ("TOKEN_CLS", "bert"),
        ("QUESTION_ANS", "bert"),
        ("FEATURE_EXTRACTION", "bert"),
    ],
)
def test_rows_with_different_adapters_are_as_apart(task: str, family: str, side: str) -> None:
    model = with_two_adapters(task, family)
    mask = FOUR_MASKS[side]
    extra = {"decoder_input_ids": FOUR[:, :3]} if task == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad():
        output = model(
            input_ids=FOUR,
            attention_mask=mask,
            adapter_names=NAMES,
            drop_virtual_positions=True,
            **extra,
        )
        for row, name in enumerate(NAMES):
            real = mask[row].bool() if mask is not None else torch.ones(6).bool()
            own = {key: value[row : row + 1] for key, value in extra.items()}
            alone = row_alone(model, name, input_ids=FOUR[row][real][None], **own)
            for key, value in text_width(alone).items():
                got = output[key][row]
                if len(got) == 6 and task != "SEQ_CLS":
                    got, value = got[real], value[:, -int(real.sum()) :]
                assert_same(got, value[0])


@pytest.mark.parametrize(
    ("task", "family"), [("CAUSAL_LM", "llama"), ("SEQ_2_SEQ_LM", "t5"), ("SEQ_CLS", "bert")]
)
def test_gradients_of_a_mixed_batch_are_the_sums_of_its_rows(task: str, family: str) -> None:
    model = with_two_adapters(task, family)
    model.requires_grad_(False)
    model.prompt_encoder.requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".modules_to_save." in name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    extra = {"decoder_input_ids": FOUR[:, :3]} if task == "SEQ_2_SEQ_LM" else {}

    def value(output: Any) -> Tensor:
        return output.logits[:, -1].square().sum()

    mixed = torch.autograd.grad(
        value(model(input_ids=FOUR, adapter_names=NAMES, **extra)), parameters, allow_unused=True
    )
    total = torch.zeros(())
    for row, name in enumerate(NAMES):
        own = {key: rows[row : row + 1] for key, rows in extra.items()}
        total = total + value(model(FOUR[row : row + 1], adapter_names=[name], **own))
    apart = torch.autograd.grad(total, parameters, allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in mixed)
    for got, expected in zip(mixed, apart, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_losses_of_a_mixed_batch_are_those_of_its_rows() -> None:
    model = with_two_adapters("CAUSAL_LM", "llama")
    with torch.no_grad():
        got = model(input_ids=FOUR, labels=FOUR, adapter_names=NAMES).loss
        losses = [
            row_alone(model, n, input_ids=FOUR[i : i + 1], labels=FOUR[i : i + 1]).loss
            for i, n in enumerate(NAMES)
        ]
    predicted = torch.tensor([6, 5, 6, 5])  # a prompt predicts the row's first token too
    assert_same(got, (torch.stack(losses) * predicted).sum() / predicted.sum())


def test_a_mixed_batch_takes_embeddings_and_token_types() -> None:
    model = with_two_adapters("SEQ_CLS", "bert")
    types = torch.arange(24).view(4, 6) % 2
    embeds = input_embedding(model.base_model)(FOUR)
    with torch.no_grad():
        got = model(inputs_embeds=embeds, token_type_ids=types, adapter_names=NAMES).logits
        rows = [
            row_alone(model, n, input_ids=FOUR[i : i + 1], token_type_ids=types[i : i + 1]).logits
            for i, n in enumerate(NAMES)
        ]
    assert_same(got, torch.cat(rows))


def test_one_name_for_all_rows_is_that_adapter() -> None:
    model = with_two_adapters("SEQ_CLS", "bert")
    with torch.no_grad():
        got = model(IDS, adapter_names=["long", "long"]).logits
        assert_same(got, row_alone(model, "long", input_ids=IDS).logits)
        plain = model(IDS, adapter_names=[None, "__base__"]).logits
        assert_same(plain, row_alone(model, None, input_ids=IDS).logits)


@pytest.mark.parametrize("names", [["default"], ["default", "long", None], []])
def test_a_wrong_number_of_names_is_refused(names: list[Any]) -> None:
    model = with_two_adapters("CAUSAL_LM", "llama")
    with pytest.raises(InputError, match=rf"adapter_names has {len(names)} .* 2 rows"):
        model(IDS, adapter_names=names)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    model = with_two_adapters("CAUSAL_LM", "llama")
    with pytest.raises(InputError, match=r"other not found.*default.*long"):
        model(IDS, adapter_names=["default", "other"])


def test_disable_adapter_gives_the_base_models_output() -> None:
    base = base_model("SEQ_CLS", "bert")
    plain = copy.deepcopy(base)
    model = ours(base, "SEQ_CLS")
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.normal_()
    with torch.no_grad():
        before = model(IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert torch.equal(model(IDS).logits, before)


# --- templates ----------------------------------------------------------------------------------

TEMPLATE = "[P*2] {text} [P*2] capital [P]"
TEXTS = ["Paris is Rome", "Oslo"]


@contextmanager
def seen_ids(base: Any) -> Iterator[list[dict[str, Tensor]]]:
    """What the base model's embedding is given, and the attention mask of each call."""
    calls: list[dict[str, Tensor]] = []

    def spy(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append({**dict(zip(["input_ids", "attention_mask"], args, strict=False)), **kwargs})

    handle = base.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def whole_string(tokenizer: Any, template: str, text: str, first: int) -> list[int]:
    """A filled template with names for virtual tokens, tokenized at once by a grown tokenizer."""
    grown = copy.deepcopy(tokenizer)
    names = [f"<|v{i}|>" for i in range(5)]
    grown.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    spelled = template.replace("[P*2] {text}", "<|v0|><|v1|> {text}")
    spelled = spelled.replace("[P*2]{text}", "<|v0|><|v1|>{text}")
    spelled = spelled.replace(" [P*2] capital [P]", "<|v2|><|v3|> capital<|v4|>")
    spelled = spelled.replace("[P*2] capital [P]", "<|v2|><|v3|> capital<|v4|>")
    start = len(tokenizer)
    ids = grown(spelled.replace("{text}", text))["input_ids"]
    return [i - start + first if i >= start else i for i in ids]


ANY_TASK = [
    ("CAUSAL_LM", "llama"),
    (None, "bert"),
    ("SEQ_CLS", "roberta"),
    ("SEQ_CLS", "llama"),
    ("TOKEN_CLS", "bert"),
    ("QUESTION_ANS", "bert"),
    ("SEQ_2_SEQ_LM", "t5"),
    ("SEQ_2_SEQ_LM", "bart"),
]


def check_template(
    task: str | None, family: str, tokenizer: Any, template: str, texts: list[str], side: str
) -> None:
    base = base_model(task, family)
    model = ours(base, task, 5, template=template, tokenizer=tokenizer)
    tokenizer.padding_side = side
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = IDS[: len(texts), :3]
    target = base.get_encoder() if task == "SEQ_2_SEQ_LM" else base
    with torch.no_grad(), seen_ids(target) as calls:
        model(**inputs)
    (call,) = calls
    first = model._adapters["default"].span.first
    for ids, mask, text in zip(call["input_ids"], call["attention_mask"], texts, strict=True):
        assert ids[mask.bool()].tolist() == whole_string(tokenizer, template, text, first)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("special", [{}, {"bos": True}, {"around": True}], ids=str)
@pytest.mark.parametrize(("task", "family"), ANY_TASK)
def test_the_ids_of_a_template_are_the_whole_string_tokenized(
    task: str | None, family: str, special: dict[str, bool], side: str
) -> None:
    tokenizer = tiny.tokenizer("wordpiece", **special)
    check_template(task, family, tokenizer, TEMPLATE, TEXTS, side)


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_without_a_space_before_the_field_every_tokenizer_gives_the_whole_strings_ids(
    kind: str,
) -> None:
    template = TEMPLATE.replace("] {", "]{")
    texts = [" Paris is Rome", " Oslo"] if kind != "wordpiece" else TEXTS
    for special in ({}, {"bos": True}, {"around": True}):
        tokenizer = tiny.tokenizer(kind, **special)
        if kind.startswith("metaspace") and kind != "metaspace_never":
            texts = TEXTS
        for side in ("left", "right"):
            tokenizer.padding_side = side
            base = base_model("CAUSAL_LM", "llama")
            model = ours(base, "CAUSAL_LM", 5, template=template, tokenizer=tokenizer)
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            with torch.no_grad(), seen_ids(base) as calls:
                model(**{k: batch[k] for k in ("input_ids", "attention_mask")})
            first = model._adapters["default"].span.first
            for ids, mask, text in zip(
                calls[0]["input_ids"], calls[0]["attention_mask"], texts, strict=True
            ):
                spaced = text if text.startswith(" ") or kind == "wordpiece" else f" {text}"
                expected = whole_string(tokenizer, template, spaced, first)
                assert ids[mask.bool()].tolist() == expected


@pytest.mark.parametrize("kind", [k for k in tiny.TOKENIZERS if k != "wordpiece"])
def test_a_space_between_virtual_tokens_and_the_field_is_no_token_of_its_own(kind: str) -> None:
    tokenizer = tiny.tokenizer(kind, bos=True)
    base = base_model("CAUSAL_LM", "llama")
    model = ours(base, "CAUSAL_LM", 5, template=TEMPLATE, tokenizer=tokenizer)
    ids = tokenizer("Paris is", return_tensors="pt")["input_ids"]
    with torch.no_grad(), seen_ids(base) as calls:
        model(ids)
    first = model._adapters["default"].span.first
    got = calls[0]["input_ids"][0].tolist()
    capital = tokenizer(" capital", add_special_tokens=False)["input_ids"]
    if kind.startswith("metaspace") and kind != "metaspace_never":
        assert got == whole_string(tokenizer, TEMPLATE, "Paris is", first)
    expected = [1, first, first + 1, *ids[0, 1:].tolist(), first + 2, first + 3, *capital]
    assert got == [*expected, first + 4]


def test_a_template_stands_around_no_text_at_all() -> None:
    tokenizer = tiny.tokenizer(bos=True)
    base = base_model("CAUSAL_LM", "llama")
    model = ours(base, "CAUSAL_LM", 3, template="[P*2] {text} so [P]", tokenizer=tokenizer)
    first = model._adapters["default"].span.first
    expected = [first, first + 1, *tokenizer(" so", add_special_tokens=False)["input_ids"]]
    with torch.no_grad(), seen_ids(base) as calls:
        model(torch.zeros(2, 0, dtype=torch.long))
    assert calls[0]["input_ids"].tolist() == [[*expected, first + 2]] * 2


@pytest.mark.parametrize(("task", "family"), ANY_TASK)
def test_each_row_of_a_padded_batch_with_a_template_is_as_alone(
    task: str | None, family: str
) -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    model = ours(base_model(task, family), task, 5, template=TEMPLATE, tokenizer=tokenizer)
    model.drop_virtual_positions = True
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        decoder = {"decoder_input_ids": IDS[:, :3]} if task == "SEQ_2_SEQ_LM" else {}
        with torch.no_grad():
            got = text_width(model(input_ids=ids, attention_mask=mask, **decoder))
            for row in range(2):
                real = mask[row].bool()
                own = {k: v[row : row + 1] for k, v in decoder.items()}
                for name, value in text_width(model(ids[row][real][None], **own)).items():
                    kept = got[name][row]
                    per_token = task in (None, "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS")
                    assert_same(kept[real] if per_token else kept, value[0])


def test_labels_stay_with_their_tokens_under_a_template() -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    base = base_model("TOKEN_CLS", "bert")
    model = ours(base, "TOKEN_CLS", 5, template=TEMPLATE, tokenizer=tokenizer)
    ids = tokenizer("Paris is Rome", return_tensors="pt")["input_ids"]
    labels = torch.tensor([[0, 1, 2, 1, 0]])
    with torch.no_grad():
        got = model(ids, labels=labels)
        logits = model(ids, drop_virtual_positions=True).logits
    assert ids.shape[1] == 5 and got.logits.shape[1] == 5 + 6
    assert_same(got.loss, nn.functional.cross_entropy(logits[0], labels[0]))


def test_answers_are_found_under_a_template() -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    base = base_model("QUESTION_ANS", "bert")
    model = ours(base, "QUESTION_ANS", 5, template=TEMPLATE, tokenizer=tokenizer)
    model.drop_virtual_positions = True
    ids = tokenizer("Paris is Rome", return_tensors="pt")["input_ids"]
    at = torch.tensor([3])
    with torch.no_grad():
        whole = model(ids, drop_virtual_positions=False)
        got = model(ids, start_positions=at, end_positions=at)
    # [CLS] v v Paris is Rome v v capital v [SEP]: the text's word 3 stands in column 5
    expected = nn.functional.cross_entropy(whole.start_logits, at + 2)
    expected = (expected + nn.functional.cross_entropy(whole.end_logits, at + 2)) / 2
    assert_same(got.loss, expected)
    assert_same(got.start_logits[0, :4], whole.start_logits[0, [0, 3, 4, 5]])


def test_a_masked_models_template_may_hold_a_mask() -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    base = base_model(None, "bert")
    model = ours(base, None, 3, template="[P] {text} is [P*2] [MASK].", tokenizer=tokenizer)
    ids = tokenizer("Paris", return_tensors="pt")["input_ids"]
    with torch.no_grad(), seen_ids(base) as calls:
        model(ids)
    first = model._adapters["default"].span.first
    word = {w: tokenizer.convert_tokens_to_ids(w) for w in ("Paris", "is", ".", "<mask>")}
    expected = [1, first, word["Paris"], word["is"], first + 1, first + 2, word["<mask>"]]
    assert calls[0]["input_ids"][0].tolist() == [*expected, word["."], 2]


def test_a_causal_models_template_ends_before_the_mask() -> None:
    tokenizer = tiny.tokenizer("wordpiece", bos=True)
    base = base_model("CAUSAL_LM", "llama")
    model = ours(base, "CAUSAL_LM", 2, template="[P] {text} is [P] [MASK]", tokenizer=tokenizer)
    ids = tokenizer("Paris", return_tensors="pt")["input_ids"]
    with torch.no_grad(), seen_ids(base) as calls:
        model(ids)
    first = model._adapters["default"].span.first
    paris, is_ = (tokenizer.convert_tokens_to_ids(w) for w in ("Paris", "is"))
    assert calls[0]["input_ids"][0].tolist() == [1, first, paris, is_, first + 1]
    with pytest.raises(InputError, match="never sees what follows"):
        ours(base, "CAUSAL_LM", 1, template="{text} [MASK] [P]", tokenizer=tokenizer)


def test_rows_of_a_mixed_batch_may_have_templates_of_their_own() -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    base = base_model("SEQ_CLS", "bert")
    model = ours(base, "SEQ_CLS", 5, template=TEMPLATE, tokenizer=tokenizer)
    config = PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=2, encoder_hidden_size=8)
    model.add_adapter("front", config)
    config = PromptEncoderConfig(task_type="SEQ_CLS", encoder_hidden_size=8)
    model.add_adapter("behind", config, template="{text} [P]", tokenizer=tokenizer)
    model.eval()
    names = ["default", "front", "behind", None]
    texts = ["Paris is Rome", "Oslo", "Berlin, Madrid", "Rome"]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            got = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
            rows = [
                model(ids[i][mask[i].bool()][None], adapter_names=[n]).logits
                for i, n in enumerate(names)
            ]
        assert_same(got, torch.cat(rows))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("[P*2] Paris", "one field"),
        ("[P*2] {a} {b}", "one field"),
        ("[P*2] {a} {a}", "one field.*; this one has 2:"),
        ("{text} capital", "needs virtual tokens"),
        ("[P:capital] {text}", "needs virtual tokens"),
        ("[P*0] {text}", "at least 1"),
        ("[P {text}", "not closed"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: str, message: str) -> None:
    base = base_model("CAUSAL_LM", "llama")
    before = {name: p.requires_grad for name, p in base.named_parameters()}
    with pytest.raises(InputError, match=message):
        ours(base, "CAUSAL_LM", 2, template=template, tokenizer=tiny.tokenizer())
    assert {name: p.requires_grad for name, p in base.named_parameters()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_a_template_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="needs a tokenizer"):
        ours(base_model("CAUSAL_LM", "llama"), "CAUSAL_LM", 5, template=TEMPLATE)


def test_another_number_of_virtual_tokens_than_the_templates_is_refused() -> None:
    base = base_model("CAUSAL_LM", "llama")
    with pytest.raises(InputError, match="num_virtual_tokens is 4, and the template has 5"):
        ours(base, "CAUSAL_LM", 4, template=TEMPLATE, tokenizer=tiny.tokenizer())


def test_the_template_gives_the_number_of_virtual_tokens() -> None:
    config = PromptEncoderConfig(task_type="CAUSAL_LM")
    model = get_peft_model(
        base_model("CAUSAL_LM", "llama"), config, template=TEMPLATE, tokenizer=tiny.tokenizer()
    )
    assert config.num_virtual_tokens == 5 and model.get_prompt(1).shape == (1, 5, 32)


def test_a_template_inside_special_tokens_refuses_embeddings() -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    model = ours(
        base_model("SEQ_CLS", "bert"), "SEQ_CLS", 5, template=TEMPLATE, tokenizer=tokenizer
    )
    with pytest.raises(InputError, match="give input_ids"):
        model(inputs_embeds=torch.randn(1, 4, 32))


def test_a_row_without_the_special_tokens_gets_the_template_at_its_ends() -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    base = base_model("SEQ_CLS", "bert")
    model = ours(base, "SEQ_CLS", 5, template=TEMPLATE, tokenizer=tokenizer)
    with torch.no_grad(), seen_ids(base) as calls:
        model(torch.tensor([[50, 51]]))
    first, capital = (
        model._adapters["default"].span.first,
        tokenizer.convert_tokens_to_ids("capital"),
    )
    expected = [first, first + 1, 50, 51, first + 2, first + 3, capital, first + 4]
    assert calls[0]["input_ids"][0].tolist() == expected


# --- wrong input --------------------------------------------------------------------------------


@one_per_task
def test_a_mask_of_another_shape_is_refused(task: str, family: str) -> None:
    model = ours(base_model(task, family), task)
    for shape in [(2, 5), (2, N + 6), (1, 6), (2, 6, 6)]:
        with pytest.raises(ValueError, match=r"attention_mask has shape .* the input \(2, 6\)"):
            model(**inputs_for(task), attention_mask=torch.ones(shape))
        if hasattr(model.base_model, "generate"):
            with pytest.raises(ValueError, match="attention_mask has shape"):
                model.generate(input_ids=IDS, attention_mask=torch.ones(shape), max_new_tokens=1)


@one_per_task
def test_ids_and_embeddings_together_or_neither_are_refused(task: str, family: str) -> None:
    model = ours(base_model(task, family), task)
    embeds = torch.randn(2, 6, 32)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(input_ids=IDS, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(attention_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


def test_adapter_names_without_any_input_are_refused_in_words() -> None:
    model = with_two_adapters("CAUSAL_LM", "llama")
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(adapter_names=["default", "long"])


@one_per_task
def test_calls_in_inference_mode_leave_a_model_that_can_be_trained(task: str, family: str) -> None:
    model = ours(base_model(task, family), task)
    inputs = inputs_for(task)
    expected = model(**inputs)[0].detach()
    with torch.inference_mode():
        embeds = input_embedding(model.base_model)(IDS)
        model(**{**inputs, "input_ids": None}, inputs_embeds=embeds)
        model(**inputs)
    output = model(**inputs)[0]
    assert_same(output.detach(), expected)
    output.square().mean().backward()
    assert all(p.grad is not None for p in model.prompt_encoder.parameters())


def test_a_failed_call_leaves_the_model_usable() -> None:
    model = ours(base_model("SEQ_CLS", "bert"), "SEQ_CLS")
    with torch.no_grad():
        before = model(IDS).logits
        with pytest.raises(ValueError, match="attention_mask"):
            model(IDS, attention_mask=torch.ones(2, 5))
        assert torch.equal(model(IDS).logits, before)
