from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ptuning.backbone import spans
from ptuning.backbone.injection import Injector
from ptuning.backbone.lookups import input_embedding
from ptuning.errors import InputError

from .. import tiny
from ..scaffold import hooks_of, together

VOCABULARY = 400
COUNT = 3
MASK = torch.tensor([[1] * 9, [1] * 7 + [0] * 2])


def rows_for(model: nn.Module, *, seed: int = 1, count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = input_embedding(model).embedding_dim
    return torch.randn(count, width, generator=generator).requires_grad_()


def plain_ids(*, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (2, 9), generator=generator)
    return ids.masked_fill(MASK == 0, 0)


def mixed_ids(first: int, *, seed: int = 2) -> Tensor:
    """Virtual tokens amid ordinary ones, one of them twice, at other places in each row."""
    ids = plain_ids(seed=seed)
    ids[0, [2, 3, 6]] = torch.tensor([first, first + 1, first + 2])
    ids[1, [0, 4, 5]] = torch.tensor([first + 2, first, first])
    return ids


def embedded_by_hand(module: nn.Module, ids: Tensor, rows: Tensor) -> Tensor:
    virtual = ids >= VOCABULARY
    vectors = module(ids.masked_fill(virtual, 7)).detach()
    placed = rows[(ids - VOCABULARY).clamp(min=0)]
    return torch.where(virtual.unsqueeze(-1), placed, vectors)


def weighted_loss(logits: Tensor, mask: Tensor) -> Tensor:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    return (logits.float() * weights * mask.unsqueeze(-1)).sum() / 100


def gradient(loss: Tensor, rows: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, rows)
    return grad


@pytest.mark.parametrize("family", [*tiny.CAUSAL, *tiny.MASKED])
def test_virtual_ids_equal_inputs_embeds_in_logits_and_gradient(family: str) -> None:
    model = tiny.model(family)
    rows = rows_for(model)
    ids = mixed_ids(VOCABULARY)
    vectors = embedded_by_hand(input_embedding(model), ids, rows)
    expected = model(inputs_embeds=vectors, attention_mask=MASK).logits
    expected_grad = gradient(weighted_loss(expected, MASK), rows)
    injector = Injector(model)
    assert injector.add(rows).first == VOCABULARY
    logits = model(input_ids=ids, attention_mask=MASK).logits
    real = MASK.bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-6, rtol=1e-6)
    grad = gradient(weighted_loss(logits, MASK), rows)
    assert grad.abs().max() > 1e-4
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.SEQ2SEQ)
def test_virtual_ids_work_in_encoder_and_decoder_of_shared_embeddings(family: str) -> None:
    model = tiny.model(family)
    rows = rows_for(model)
    ids, decoder_ids = mixed_ids(VOCABULARY), mixed_ids(VOCABULARY, seed=5)[:, :7]
    module = input_embedding(model)
    expected = model(
        inputs_embeds=embedded_by_hand(module, ids, rows),
        decoder_inputs_embeds=embedded_by_hand(module, decoder_ids, rows),
        attention_mask=MASK,
    ).logits
    expected_grad = gradient(weighted_loss(expected, MASK[:, :7]), rows)
    injector = Injector(model)
    assert len(injector.modules) == 3
    injector.add(rows)
    logits = model(input_ids=ids, decoder_input_ids=decoder_ids, attention_mask=MASK).logits
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    grad = gradient(weighted_loss(logits, MASK[:, :7]), rows)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.SEQ2SEQ)
def test_shared_embeddings_stay_covered_after_a_resize(family: str) -> None:
    model = tiny.model(family)
    model.resize_token_embeddings(VOCABULARY + 10)
    injector = Injector(model)
    rows = rows_for(model)
    assert injector.add(rows).first == VOCABULARY + 10
    ids = mixed_ids(VOCABULARY + 10)
    logits = model(input_ids=ids, decoder_input_ids=ids, attention_mask=MASK).logits
    assert gradient(weighted_loss(logits, MASK), rows).abs().sum(1).min() > 0


def test_spans_come_whatever_device_is_the_default() -> None:
    model = tiny.model("llama")
    given = [rows_for(model, seed=seed) for seed in (1, 2)]
    with torch.device("meta"):
        injector = Injector(model)
        spans = [injector.add(rows) for rows in given]
    for span in spans:
        got = input_embedding(model)(torch.arange(span.first, span.end))
        assert torch.equal(got, span.rows)


def test_ids_of_rows_that_an_embedding_gets_while_hooked_are_words() -> None:
    model = tiny.model("llama")
    injector = Injector(model)
    span = injector.add(rows_for(model))
    model.resize_token_embeddings(VOCABULARY + 10)
    embedding = input_embedding(model)
    words = torch.arange(VOCABULARY + 10)
    assert torch.equal(embedding(words), embedding.weight)
    assert span.first == VOCABULARY + 10
    assert torch.equal(embedding(words[:COUNT] + span.first), span.rows)


def test_several_spans_come_and_go_at_once_all_or_none() -> None:
    model = tiny.model("llama")
    injector = Injector(model)
    wrong = torch.ones(2, injector.width + 1)
    with pytest.raises(InputError, match="numbers"):
        injector.add_all([rows_for(model), wrong])
    assert injector.spans == [] and hooks_of(model) == 0
    first = injector.add(rows_for(model))
    others = injector.add_all([rows_for(model, seed=seed) for seed in (1, 2, 3)], VOCABULARY + 99)
    assert [span.first for span in others] == [VOCABULARY + 99 + n * COUNT for n in range(3)]
    embedding = input_embedding(model)
    injector.remove(others[0], others[2])
    for span in (first, others[1]):
        assert torch.equal(embedding(torch.arange(span.first, span.end)), span.rows)
    assert injector.spans == [first, others[1]]
    injector.remove(first, others[1])
    assert hooks_of(model) == 0


def test_rows_that_have_no_room_on_the_device_leave_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("llama")
    rows = rows_for(model)
    injector = Injector(model)

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    def add_without_room() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(spans, "near", full)
            with pytest.raises(torch.OutOfMemoryError):
                injector.add(rows)

    add_without_room()
    assert injector.spans == [] and hooks_of(model) == 0
    span = injector.add(rows)
    add_without_room()
    assert injector.spans == [span] and injector.add(rows).first == span.end
    ids = torch.arange(COUNT) + span.first
    assert torch.equal(input_embedding(model)(ids), rows)


def test_a_scaling_embedding_gets_its_rows_after_the_scale() -> None:
    model = tiny.model("bart", scale_embedding=True)
    rows = rows_for(model)
    Injector(model).add(rows)
    got = input_embedding(model)(torch.tensor([[VOCABULARY + 1, 9]]))
    assert torch.equal(got[0, 0], rows[1])
    torch.testing.assert_close(got[0, 1], input_embedding(model).weight[9] * 32**0.5)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_plain_text_is_bit_identical_while_attached(family: str) -> None:
    model = tiny.model(family)
    ids = plain_ids()
    inputs = {"input_ids": ids, "attention_mask": MASK}
    if family in tiny.SEQ2SEQ:
        inputs["decoder_input_ids"] = ids
    before = model(**inputs).logits
    injector = Injector(model)
    span = injector.add(rows_for(model))
    assert torch.equal(model(**inputs).logits, before)
    injector.remove(span)
    assert torch.equal(model(**inputs).logits, before)


@given(
    threshold=st.integers(1, 30),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    gap=st.integers(0, 6),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_id_gets_the_vector_of_its_owner(
    threshold: int, sizes: list[int], gap: int, data: st.DataObject
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(threshold, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.words

    model = Model()
    injector = Injector(model)
    weight = model.words.weight.detach()
    table = {i: weight[i] for i in range(threshold)}
    for size in sizes:
        rows = torch.randn(size, 2)
        span = injector.add(rows, threshold + gap)
        assert not set(range(span.first, span.end)) & set(table)
        table |= {span.first + i: rows[i] for i in range(size)}
    ids = data.draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=12))
    got = model.words(torch.tensor([ids]))
    assert torch.equal(got[0], torch.stack([table[i] for i in ids]))


def test_an_id_that_no_prompt_owns_raises_and_names_the_owned_ranges() -> None:
    model = tiny.model()
    injector = Injector(model)
    injector.add(rows_for(model))
    message = r"input id 403 belongs to no attached prompt.*ids 0 to 399.*400 to 402"
    with pytest.raises(InputError, match=message):
        model(input_ids=torch.tensor([[5, 403]]))
    with pytest.raises(InputError, match="input id 100000 belongs"):
        model(input_ids=torch.tensor([[100000, 5]]))
    for _ in range(30):
        injector.add(rows_for(model))
    with pytest.raises(InputError, match=r"have 400 to 402, .*, and 11 more$"):
        model(input_ids=torch.tensor([[100000, 5]]))


def test_ids_in_holes_between_spans_raise() -> None:
    model = tiny.model()
    injector = Injector(model)
    first = injector.add(rows_for(model), 405)
    assert (first.first, first.end) == (405, 408)
    with pytest.raises(InputError, match="404 belongs"):
        model(input_ids=torch.tensor([[404]]))
    second, third = (injector.add(rows_for(model, seed=s)) for s in (2, 3))
    injector.remove(second)
    with pytest.raises(InputError, match=r"408 belongs.*405 to 407, 411 to 413"):
        model(input_ids=torch.tensor([[408]]))
    model(input_ids=torch.tensor([[405, third.first]]))


def test_several_spans_serve_their_own_rows() -> None:
    model = tiny.model()
    injector = Injector(model)
    tables = [rows_for(model, seed=s, count=s) for s in (1, 2, 3)]
    spans = [injector.add(table) for table in tables]
    assert [(s.first, s.end) for s in spans] == [(400, 401), (401, 403), (403, 406)]
    got = input_embedding(model)(torch.arange(400, 406))
    assert torch.equal(got, torch.cat(tables))
    injector.remove(spans[0])
    assert torch.equal(input_embedding(model)(torch.arange(401, 406)), torch.cat(tables[1:]))
    assert injector.add(tables[0]).first == 406


def test_of_many_spans_only_the_rows_that_a_batch_names_are_put_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model()
    injector, module = Injector.on(model), input_embedding(model)
    tables = [rows_for(model, seed=seed, count=1 + seed % 4) for seed in range(40)]
    spans = [injector.add(table) for table in tables]
    for gone in (3, 17):
        injector.remove(spans[gone])
    joined: list[int] = []
    cat = torch.cat

    def watched(parts: list[Tensor], *args: Any) -> Tensor:
        joined.append(len(parts))
        return cat(parts, *args)

    monkeypatch.setattr(torch, "cat", watched)
    named = (2, 9, 18, 39)
    ids = cat([torch.arange(spans[n].first, spans[n].end) for n in named] + [torch.tensor([7, 8])])
    vectors = module(ids)
    assert joined == [len(named)]
    expected = cat([*(tables[n] for n in named), module.weight[[7, 8]]])
    assert torch.equal(vectors, expected)
    vectors.sum().backward()
    for number, table in enumerate(tables):
        assert (table.grad is not None) == (number in named)


def test_written_rows_are_used_from_the_next_forward_on_and_carry_gradient() -> None:
    model = tiny.model()
    injector = Injector(model)
    span, other = injector.add(torch.zeros(COUNT, 32)), injector.add(torch.ones(1, 32))
    rows = rows_for(model)
    injector.write(span, rows * 2)
    output = input_embedding(model)(torch.tensor([[401, other.first]]))
    assert torch.equal(output[0, 0], rows[1] * 2) and torch.equal(output[0, 1], torch.ones(32))
    grad = gradient(output.sum(), rows)
    assert grad[1].eq(2).all() and grad[[0, 2]].eq(0).all()


def test_ids_start_behind_a_tokenizer_that_is_longer_than_the_embedding() -> None:
    injector = Injector(tiny.model())
    assert injector.add(torch.zeros(2, 32), 450).first == 450


def test_ids_start_behind_an_embedding_that_is_longer_than_the_tokenizer() -> None:
    injector = Injector(tiny.model())
    assert injector.add(torch.zeros(2, 32), 320).first == 400


@pytest.mark.parametrize("shape", [(3, 31), (32,), (1, 3, 32)])
def test_rows_of_another_width_are_refused_and_leave_no_hook(shape: tuple[int, ...]) -> None:
    model = tiny.model()
    injector = Injector(model)
    with pytest.raises(InputError, match=r"embedding takes vectors of 32 numbers"):
        injector.add(torch.zeros(shape))
    assert hooks_of(model) == 0 and Injector.of(model) is None


def test_a_model_without_an_input_embedding_is_refused() -> None:
    with pytest.raises(InputError, match="Linear has no input embedding"):
        Injector(nn.Linear(2, 2))
    model = tiny.model()
    model.set_input_embeddings(nn.Linear(2, 2))  # such as one that is quantized in its own way
    with pytest.raises(InputError, match="LlamaForCausalLM has no input embedding"):
        Injector(model)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_hooks_leave_with_the_last_span(family: str) -> None:
    model = tiny.model(family)
    injector = Injector(model)
    first, second = injector.add(rows_for(model)), injector.add(rows_for(model))
    assert hooks_of(model) == 2 * len(injector.modules) and Injector.of(model) is injector
    injector.remove(first)
    assert Injector.of(model) is injector
    injector.remove(second)
    injector.remove(second)
    assert hooks_of(model) == 0 and Injector.of(model) is None
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[VOCABULARY]]), **_decoder(family))


def _decoder(family: str) -> dict[str, Tensor]:
    return {"decoder_input_ids": torch.tensor([[5]])} if family in tiny.SEQ2SEQ else {}


def test_hooks_leave_after_a_forward_that_failed() -> None:
    model = tiny.model()
    injector = Injector(model)
    span = injector.add(rows_for(model))
    with pytest.raises(InputError):
        model(input_ids=torch.tensor([[999]]))
    injector.remove(span)
    assert hooks_of(model) == 0


def test_hooks_of_others_stay() -> None:
    model = tiny.model()
    seen: list[int] = []
    handle = input_embedding(model).register_forward_hook(lambda *_: seen.append(1))
    injector = Injector(model)
    injector.remove(injector.add(rows_for(model)))
    model(input_ids=torch.tensor([[5]]))
    assert seen == [1] and hooks_of(model) == 1
    handle.remove()


def test_a_second_lookup_of_the_ids_is_guarded() -> None:
    model = tiny.model()
    model.embed_tokens_per_layer = nn.Embedding(VOCABULARY, 4)
    injector = Injector(model)
    span = injector.add(rows_for(model))
    got = model.embed_tokens_per_layer(torch.tensor([7, VOCABULARY + 1]))
    assert torch.equal(got, model.embed_tokens_per_layer.weight[[7, 0]])
    injector.remove(span)
    assert hooks_of(model) == 0


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def _torch_saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _torch_saved])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_copy_of_a_hooked_model_works_and_unhooks_alone(
    family: str, copied: Callable[[nn.Module], Any]
) -> None:
    model = tiny.model(family)
    injector = Injector(model)
    rows = rows_for(model)
    span = injector.add(torch.zeros(COUNT, 32))
    injector.write(span, rows * 1)  # a table in training has a history
    ids = mixed_ids(VOCABULARY)
    inputs = {"input_ids": ids, "attention_mask": MASK, **_decoder(family)}
    if family in tiny.SEQ2SEQ:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        expected = model(**inputs).logits
        twin = copied(model)
        assert torch.equal(twin(**inputs).logits, expected)
    own = Injector.of(twin)
    assert own is not None and own is not injector
    assert len(own.modules) == len(injector.modules)
    inside = set(map(id, twin.modules()))
    assert all(id(module) in inside for module in own.modules)
    own.write(own.spans[0], torch.zeros(COUNT, 32))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
        assert not torch.equal(twin(**inputs).logits, expected)
    own.remove(own.spans[0])
    assert hooks_of(twin) == 0
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    injector.remove(span)
    assert hooks_of(model) == 0


def test_threads_with_other_prompts_get_single_thread_results_while_one_attaches() -> None:
    model = tiny.model()
    injector = Injector(model)
    works, attached = [], [0]
    for seed in range(3):
        span = injector.add(rows_for(model, seed=seed).detach())
        ids = mixed_ids(span.first, seed=seed)[:, : 5 + seed]  # a length of its own
        with torch.no_grad():
            expected = model(input_ids=ids).logits

        @torch.no_grad()
        def forward(ids: Tensor = ids, expected: Tensor = expected) -> None:
            for _ in range(60):
                assert torch.equal(model(input_ids=ids).logits, expected)

        works += [forward, forward]

    def come_and_go() -> None:
        injector.remove(injector.add(torch.randn(2, 32)))
        attached[0] += 1

    together(*works, beside=come_and_go)
    assert attached[0] > 10 and len(injector.spans) == 3


def test_who_attaches_without_gradients_takes_none_from_another_thread() -> None:
    model = tiny.model().requires_grad_(False)
    injector = Injector(model)
    rows = rows_for(model)
    span = injector.add(rows)

    def change(work: Callable[[], Any]) -> None:
        with torch.no_grad():
            work()

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            together(lambda: change(lambda: injector.add(torch.randn(2, 32))))
        output = input_embedding(model)(torch.tensor([[span.first + 1, 5]]))
        assert gradient(output.sum(), rows)[1].eq(1).all()


def test_rows_served_to_a_thread_are_seen_by_it_alone() -> None:
    model = tiny.model().requires_grad_(False)
    injector = Injector(model)
    first, second = injector.add(torch.zeros(COUNT, 32)), injector.add(torch.ones(1, 32))
    rows, ids = rows_for(model), torch.tensor([[first.first, second.first, 5]])
    look = lambda: input_embedding(model)(ids)  # noqa: E731
    with injector.serving({first: rows}):
        mine = look()
        (others,) = together(look)
        with injector.serving({first: rows * 2}):
            assert torch.equal(look()[0, 0], 2 * rows[0])
        assert torch.equal(look(), mine)
    assert torch.equal(mine[0, 0], rows[0]) and mine[0, 1].eq(1).all()
    assert gradient(mine.sum(), rows)[0].eq(1).all()
    assert others[0, 0].eq(0).all() and not others.requires_grad
    assert look()[0, 0].eq(0).all()


def test_rows_served_alone_equal_those_beside_others() -> None:
    model = tiny.model()
    injector = Injector(model)
    injector.add(torch.randn(2, 32))
    rows = rows_for(model)
    span = injector.add(rows)
    inputs = {"input_ids": mixed_ids(span.first), "attention_mask": MASK}
    expected = model(**inputs).logits
    with injector.serving({span: rows}, alone=True):
        got = model(**inputs).logits
    assert torch.equal(got, expected)
    mine, plain = (gradient(weighted_loss(logits, MASK), rows) for logits in (got, expected))
    assert torch.equal(mine, plain)


def test_a_forward_joins_the_graph_of_no_rows_but_those_that_its_ids_name() -> None:
    model = tiny.model().requires_grad_(False)
    injector = Injector(model)
    rows = rows_for(model)
    span, other, third = (injector.add(r) for r in (rows * 1, torch.ones(1, 32), torch.ones(1, 32)))
    embed = input_embedding(model)
    for ids in ([5], [other.first], [other.first, third.first, 5]):
        assert not embed(torch.tensor([ids])).requires_grad
    both = embed(torch.tensor([[span.first, other.first, third.first]]))
    assert torch.equal(both[0, 0], rows[0]) and both[0, 1:].eq(1).all()
    assert gradient(both.sum(), rows)[0].eq(1).all()


def test_threads_that_train_beside_each_other_get_the_numbers_of_one_alone() -> None:
    model = tiny.model().requires_grad_(False)
    injector = Injector(model)
    spans = [injector.add(torch.zeros(COUNT, 32)) for _ in range(3)]

    def train(number: int, steps: int = 25) -> Tensor:
        span, rows = spans[number], rows_for(model, seed=number)
        ids = mixed_ids(span.first, seed=number)
        for _ in range(steps):
            with injector.serving({span: rows * 1}, alone=number == 0):
                loss = weighted_loss(model(input_ids=ids, attention_mask=MASK).logits, MASK)
            rows = (rows - gradient(loss, rows)).detach().requires_grad_()
        return rows

    @torch.no_grad()
    def come_and_go() -> None:
        injector.remove(injector.add(torch.randn(2, 32)))

    alone = [train(number) for number in range(3)]
    for _ in range(4):
        got = together(*(partial(train, n) for n in range(3)), beside=come_and_go)
        assert all(map(torch.equal, got, alone))


def test_attaching_while_another_thread_is_inside_the_embedding_leaves_it_alone() -> None:
    model = tiny.model()
    ids = plain_ids()
    expected = model(input_ids=ids).logits
    injector = Injector(model)

    def attach_elsewhere(*_: Any) -> None:
        if not injector.spans:
            other = threading.Thread(target=injector.add, args=(torch.randn(2, 32),))
            other.start()
            other.join()

    handle = input_embedding(model).register_forward_pre_hook(attach_elsewhere)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert len(injector.spans) == 1
    handle.remove()


def test_detaching_while_another_thread_is_inside_the_embedding_leaves_it_alone() -> None:
    model = tiny.model()
    ids = plain_ids()
    expected = model(input_ids=ids).logits
    injector = Injector(model)
    span = injector.add(torch.randn(2, 32))

    def detach_elsewhere(*_: Any) -> None:
        other = threading.Thread(target=injector.remove, args=(span,))
        other.start()
        other.join()

    handle = input_embedding(model).register_forward_pre_hook(detach_elsewhere)
    assert torch.equal(model(input_ids=ids).logits, expected)
    handle.remove()
    assert hooks_of(model) == 0


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_compiled_model_in_one_graph_gives_the_same(family: str) -> None:
    torch._dynamo.reset()
    model = tiny.model(family)
    rows = rows_for(model)
    injector = Injector(model)
    span = injector.add(rows)
    ids = mixed_ids(VOCABULARY)[:1]
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask).logits
    expected_grad = gradient(weighted_loss(expected, mask), rows)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    grad = gradient(weighted_loss(logits, mask), rows)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)
    injector.write(span, torch.zeros_like(rows))
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(input_ids=ids, attention_mask=mask).logits,
            model(input_ids=ids, attention_mask=mask).logits,
            atol=1e-5,
            rtol=1e-5,
        )
    torch._dynamo.reset()


@pytest.mark.parametrize("alone", [True, False])
def test_rows_that_a_training_serves_anew_in_each_step_need_no_other_graph(alone: bool) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = tiny.model().requires_grad_(False)
    injector = Injector(model)
    span = injector.add(torch.zeros(COUNT, 32))
    inputs = {"input_ids": mixed_ids(span.first), "attention_mask": MASK}
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        rows = rows_for(model, seed=seed)
        with injector.serving({span: rows}, alone=alone):
            logits, expected = compiled(**inputs).logits, model(**inputs).logits
        grads = [gradient(weighted_loss(one, MASK), rows) for one in (logits, expected)]
        torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_keep_a_float32_gradient_under_a_half_precision_model(dtype: torch.dtype) -> None:
    model = tiny.model()
    rows = rows_for(model)
    ids = mixed_ids(VOCABULARY)
    injector = Injector(model)
    injector.add(rows)
    exact = gradient(weighted_loss(model(input_ids=ids, attention_mask=MASK).logits, MASK), rows)
    model.to(dtype)
    output = input_embedding(model)(ids)
    assert output.dtype == dtype
    logits = model(input_ids=ids, attention_mask=MASK).logits
    assert logits.dtype == dtype
    grad = gradient(weighted_loss(logits, MASK), rows)
    assert grad.dtype == torch.float32
    assert (grad - exact).norm() < 0.05 * exact.norm()


def test_gradients_of_one_row_used_often_add_up_in_float32() -> None:
    model = tiny.model().to(torch.bfloat16)
    rows = torch.zeros(1, 32).requires_grad_()
    Injector(model).add(rows)
    output = input_embedding(model)(torch.full((1, 1000), VOCABULARY))
    assert gradient(output.sum(), rows).eq(1000).all()  # bfloat16 would stop at 256


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_state_dict_and_saved_files_are_the_same_while_attached(
    family: str, tmp_path: Path
) -> None:
    model = tiny.model(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = [name for name, _ in model.named_parameters()]
    model.save_pretrained(tmp_path / "before")
    Injector(model).add(rows_for(model))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert [name for name, _ in model.named_parameters()] == parameters
    model.save_pretrained(tmp_path / "attached")
    names = sorted(p.name for p in (tmp_path / "before").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "attached").iterdir())
    assert names
    for name in names:
        attached = (tmp_path / "attached" / name).read_bytes()
        assert attached == (tmp_path / "before" / name).read_bytes(), name


def test_gradients_are_the_same_bits_each_time_with_several_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = tiny.model("llama", hidden_size=256)
        rows = torch.randn(3, 256, requires_grad=True)
        injector = Injector(model)
        span = injector.add(rows)
        ids = span.first + torch.randint(3, (64, 64))
        weight = torch.randn(64, 64, 256)
        gradients = []
        for _ in range(6):
            rows.grad = None
            (model.get_input_embeddings()(ids) * weight).sum().backward()
            assert rows.grad is not None
            gradients.append(rows.grad.clone())
        assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    finally:
        torch.set_num_threads(threads)
