from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptuning.backbone.injection import Injector
from ptuning.backbone.lookups import input_embedding
from ptuning.errors import InputError
from ptuning.forward.label_scores import Words, by_label
from ptuning.forward.plain import (
    answer_logits,
    answer_nll,
    example_losses,
    examples_right,
    position_ids,
    word_scores,
)
from ptuning.rendering.collate import IGNORED, Batch, collate
from ptuning.rendering.layout import Sequence
from ptuning.rendering.render import Rendered

from .. import tiny

KIND = {
    **dict.fromkeys(tiny.CAUSAL, "causal"),
    **dict.fromkeys(tiny.MASKED, "masked"),
    **dict.fromkeys(tiny.SEQ2SEQ, "seq2seq"),
}
START = {"t5": 0, "bart": 2}
MASK_ID = 4


def label_scores(logits: Tensor, batch: Batch, words: Tensor) -> Tensor:
    return by_label(word_scores(logits, batch, len(words)), words)


def sequence(kind: str, text: tuple[int, ...], answer: tuple[int, ...]) -> Sequence:
    """Virtual tokens before and after a text, the answer slot behind them."""
    before = (-1, *text, -2, -3)
    if kind == "masked":
        ids = (*before, *(MASK_ID,) * len(answer), 9, 2)
        return Sequence(ids, len(before), answer)
    return Sequence(before, len(before), answer)


def examples_for(kind: str) -> list[Rendered]:
    texts_and_answers = [
        ((20, 21, 22, 23, 24, 25, 26), (30,)),
        ((40, 41), (50, 51, 52)),
        ((60, 61, 62, 63), (70, 71)),
    ]
    return [Rendered((sequence(kind, *pair),)) for pair in texts_and_answers]


def batch_of(family: str, examples: list[Rendered]) -> Batch:
    return collate(
        examples, KIND[family], [400] * len(examples), decoder_start_id=START.get(family, 0)
    )


def attached(family: str) -> tuple[Any, Tensor]:
    # With BERT's usual weights a random encoder hardly passes a gradient on.
    wide = {"initializer_range": 0.2} if family in tiny.MASKED else {}
    model = tiny.model(family, **wide)
    rows = torch.randn(3, input_embedding(model).embedding_dim).requires_grad_()
    Injector(model).add(rows)
    return model, rows


def plain_nll(model: Any, family: str, one: Sequence) -> Tensor:
    """Loss of one answer: unpadded, all logits, picked one by one."""
    kind, answer = KIND[family], torch.tensor(one.answer)
    ids = [399 - i if i < 0 else i for i in one.ids]
    if kind == "causal":
        logits = model(input_ids=torch.tensor([[*ids, *one.answer]])).logits[0]
        at = torch.arange(len(answer)) + len(ids) - 1
    elif kind == "masked":
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        at = torch.arange(len(answer)) + one.slot
    else:
        decoder = torch.tensor([[START[family], *one.answer[:-1]]])
        logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder).logits[0]
        at = torch.arange(len(answer))
    return -logits[at].log_softmax(-1).gather(1, answer[:, None]).sum()


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_answer_only_loss_and_gradient_equal_the_plain_unpadded_twin(family: str) -> None:
    model, rows = attached(family)
    examples = examples_for(KIND[family])
    batch = batch_of(family, examples)
    logits = answer_logits(model, batch)
    assert logits.shape == (3, batch.answers.shape[1], 400)
    losses = example_losses(logits, batch, None)
    expected = torch.stack([plain_nll(model, family, e.sequences[0]) for e in examples])
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    weights = torch.tensor([1.0, -0.5, 2.0])
    (grad,) = torch.autograd.grad((losses * weights).sum(), rows)
    (plain_grad,) = torch.autograd.grad((expected * weights).sum(), rows)
    assert plain_grad.abs().max() > 1e-3
    torch.testing.assert_close(grad, plain_grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*tiny.CAUSAL, *tiny.MASKED])
def test_answer_logits_equal_those_picked_from_all_of_the_same_batch(family: str) -> None:
    model, _ = attached(family)
    batch = batch_of(family, examples_for(KIND[family]))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    count = batch.answers.shape[1]
    with torch.no_grad():
        got = answer_logits(model, batch)
        if KIND[family] == "causal":
            if family != "opt":
                inputs["position_ids"] = position_ids(batch.attention_mask)
            expected = model(**inputs).logits[:, -count:]
        else:
            logits = model(**inputs).logits
            expected = torch.stack(
                [
                    torch.stack([row[min(slot + k, len(row) - 1)] for k in range(count)])
                    for row, slot in zip(logits, batch.slots.tolist(), strict=True)
                ]
            )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_vocabulary_is_computed_at_the_answers_only(family: str) -> None:
    model, _ = attached(family)
    batch = batch_of(family, examples_for(KIND[family]))
    seen: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    answer_logits(model, batch)
    assert seen == [batch.answers.numel()] and batch.answers.numel() < batch.input_ids.numel()


def test_position_ids_count_real_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


# --- the masked models' hook ------------------------------------------------------------------


def test_the_masked_hook_is_gone_after_the_call() -> None:
    model, _ = attached("bert")
    batch = batch_of("bert", examples_for("masked"))
    hooks = len(model.base_model._forward_hooks)
    answer_logits(model, batch)
    assert len(model.base_model._forward_hooks) == hooks
    assert model(input_ids=batch.input_ids).logits.shape[1] == batch.input_ids.shape[1]


@pytest.mark.parametrize("where", ["before", "behind"])
def test_the_masked_hook_is_gone_after_an_error(where: str) -> None:
    model, _ = attached("bert")
    batch = batch_of("bert", examples_for("masked"))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    module = model.base_model if where == "before" else model.get_output_embeddings()
    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer_logits(model, batch)
    handle.remove()
    assert not model.base_model._forward_hooks


def test_the_masked_hook_does_not_touch_another_threads_call() -> None:
    model, _ = attached("bert")
    batch = batch_of("bert", examples_for("masked"))
    other = torch.randint(5, 400, (2, 11))
    with torch.no_grad():
        expected, expected_other = answer_logits(model, batch), model(input_ids=other).logits
    results: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            results.append(model(input_ids=other).logits)

    def another_thread_in_between(module: nn.Module, args: Any) -> None:
        if not results and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

    handle = model.base_model.register_forward_pre_hook(another_thread_in_between)
    with torch.no_grad():
        got = answer_logits(model, batch)
    handle.remove()
    assert torch.equal(got, expected)
    assert len(results) == 1 and torch.equal(results[0], expected_other)


def test_two_threads_compute_answers_on_one_masked_model() -> None:
    model, _ = attached("bert")
    batches = [batch_of("bert", examples_for("masked")[: n + 1]) for n in range(3)]
    with torch.no_grad():
        expected = [answer_logits(model, batch) for batch in batches]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(30):
                    assert torch.equal(answer_logits(model, batches[index]), expected[index])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not model.base_model._forward_hooks


# --- losses -----------------------------------------------------------------------------------


def test_answer_nll_is_zero_where_there_is_no_answer() -> None:
    logits = torch.randn(2, 2, 5)
    answers = torch.tensor([[IGNORED, 3], [1, 4]])
    nll = answer_nll(logits, answers)
    expected = -logits.log_softmax(-1)
    assert nll[0, 0] == 0
    for row, column, word in ((0, 1, 3), (1, 0, 1), (1, 1, 4)):
        torch.testing.assert_close(nll[row, column], expected[row, column, word])


def test_answer_nll_is_computed_in_float32() -> None:
    logits = torch.randn(1, 1, 7).bfloat16()
    nll = answer_nll(logits, torch.tensor([[2]]))
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, -logits.float().log_softmax(-1)[..., 2])


def test_logits_that_do_not_fit_the_answers_are_an_error() -> None:
    with pytest.raises(InputError, match="3 answer positions, 2 answer tokens"):
        answer_nll(torch.zeros(1, 3, 5), torch.zeros(1, 2, dtype=torch.long))


WORDS = (30, 31, 32)


@pytest.mark.parametrize("owner", [[0, 1, 2], [0, 0, 1]])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "bart"])
def test_single_token_label_scores_equal_the_sequence_path(family: str, owner: list[int]) -> None:
    model, rows = attached(family)
    kind = KIND[family]
    texts = [(20, 21, 22, 23), (40, 41)]
    right = [1, 0]
    fast, slow = [], []
    for text, label in zip(texts, right, strict=True):
        sequences = tuple(sequence(kind, text, (word,)) for word in WORDS)
        fast.append(Rendered(sequences[:1], WORDS, label))
        slow.append(Rendered(sequences, label=label))
    words = torch.tensor(owner)
    results = []
    for examples in (fast, slow):
        batch = batch_of(family, examples)
        assert len(batch.input_ids) == (2 if examples is fast else 6)
        logits = answer_logits(model, batch)
        scores = label_scores(logits, batch, words)
        losses = example_losses(logits, batch, Words(words))
        (grad,) = torch.autograd.grad(losses.sum(), rows)
        right_ones = examples_right(logits, batch, Words(words))
        results.append((scores.log_softmax(1), losses, grad, right_ones))
        assert scores.shape == (2, max(owner) + 1)
        assert torch.equal(right_ones, scores.argmax(1) == torch.tensor(right))
        torch.testing.assert_close(losses, -scores.log_softmax(1)[[0, 1], right])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_label_words_of_unequal_length_are_scored_by_their_whole_probability() -> None:
    model, _ = attached("llama")
    answers = ((30,), (31, 32, 33), (34, 35))
    sequences = tuple(sequence("causal", (20, 21), answer) for answer in answers)
    batch = batch_of("llama", [Rendered(sequences, label=2)])
    with torch.no_grad():
        scores = label_scores(answer_logits(model, batch), batch, torch.tensor([0, 1, 1]))
        each = torch.stack([-plain_nll(model, "llama", s) for s in sequences]).double()
    expected = [float(each[0]), math.log(math.exp(each[1]) + math.exp(each[2]))]
    torch.testing.assert_close(scores, torch.tensor([expected]), atol=1e-5, rtol=1e-5)


def test_a_labels_words_add_up_by_logsumexp_in_any_order() -> None:
    logits = torch.randn(2, 1, 10)
    examples = [Rendered((Sequence((5,), 1, (2,)),), (2, 7, 4, 9), 0)] * 2
    batch = collate(examples, "causal", [400] * 2)
    scores = label_scores(logits, batch, torch.tensor([1, 0, 1, 0]))
    p = logits[:, 0].exp()
    expected = torch.stack([p[:, 7] + p[:, 9], p[:, 2] + p[:, 4]], dim=1).log()
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("family", [*tiny.CAUSAL, *tiny.SEQ2SEQ])
def test_a_row_without_a_token_has_the_same_scores_alone_and_beside_others(family: str) -> None:
    empty, other = (
        Rendered((Sequence(ids, len(ids), (30, 31)), Sequence(ids, len(ids), (32,))), label=0)
        for ids in ((), (20, 21, 22, 23, 24))
    )
    model, words = tiny.model(family), torch.tensor([0, 1])
    alone, beside = (batch_of(family, rows) for rows in ([empty], [empty, other]))
    expected = label_scores(answer_logits(model, alone), alone, words)
    scores = label_scores(answer_logits(model, beside), beside, words)
    torch.testing.assert_close(scores[:1], expected, atol=1e-5, rtol=1e-5)


def test_labels_without_comparison_count_over_the_vocabulary() -> None:
    logits = torch.randn(1, 1, 40)
    batch = collate([Rendered((Sequence((5,), 1, (2,)),), (2, 7), 0)], "causal", [400])
    torch.testing.assert_close(
        example_losses(logits, batch, None), -logits[:, 0].log_softmax(-1)[:, 2]
    )


def test_an_answer_is_right_only_as_a_whole() -> None:
    examples = [Rendered((Sequence((5,), 1, answer),)) for answer in ((3, 4), (4,), (3, 3))]
    batch = collate(examples, "causal", [400] * 3)
    logits = torch.zeros(3, 2, 6)
    logits[:, 0, 3] = logits[:, 1, 4] = 1
    assert examples_right(logits, batch, None).tolist() == [True, True, False]


@pytest.mark.parametrize("family", [*tiny.CAUSAL, *tiny.SEQ2SEQ])
def test_examples_right_equals_greedy_decoding_by_generate(family: str) -> None:
    model, _ = attached(family)
    kind = KIND[family]
    texts = [(20, 21, 22, 23, 24), (40, 41), (60, 61, 62), (80, 81, 82, 83), (90,), (45, 46)]
    length = 4
    greedy: list[tuple[int, ...]] = []
    for text in texts:
        ids = [399 - i if i < 0 else i for i in sequence(kind, text, ()).ids]
        made = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
        )[0].tolist()
        new = made[1:] if kind == "seq2seq" else made[len(ids) :]
        if 2 in new:  # the end of the sequence is the end of the answer
            new = new[: new.index(2) + 1]
        greedy.append(tuple(new))
    answers, expected = [], []
    for number, answer in enumerate(greedy):
        wrong = number % 3  # right as a whole, wrong at the end, wrong at the start
        if wrong:
            at = len(answer) - 1 if wrong == 1 else 0
            answer = (*answer[:at], (answer[at] + 1) % 400, *answer[at + 1 :])
        answers.append(answer)
        expected.append(wrong == 0)
    assert any(len(answer) > 1 for answer in answers)
    examples = [
        Rendered((sequence(kind, text, answer),))
        for text, answer in zip(texts, answers, strict=True)
    ]
    batch = batch_of(family, examples)
    with torch.no_grad():
        got = examples_right(answer_logits(model, batch), batch, None)
    assert got.tolist() == expected
