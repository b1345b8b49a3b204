from __future__ import annotations

import copy
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import ptuning
from ptuning.backbone.identity import describe
from ptuning.backbone.injection import Injector
from ptuning.backbone.lookups import input_embedding
from ptuning.errors import InputError, PromptFileError, PtuningWarning
from ptuning.forward.plain import position_ids
from ptuning.inference.attachment import placed
from ptuning.peft_compat import PromptEncoderConfig, get_peft_model
from ptuning.prompts.task import Task

from .. import tiny
from ..scaffold import hooks_of, together

TOKENIZER = tiny.tokenizer()


def prompt_for(model: nn.Module, *, count: int = 3, seed: int = 1) -> ptuning.Prompt:
    prompt = ptuning.Prompt(num_virtual_tokens=count)
    width = input_embedding(model).embedding_dim
    generator = torch.Generator().manual_seed(seed)
    prompt.vectors = torch.randn(count, width, generator=generator)
    return prompt


def test_a_context_manager_attaches_and_restores_exactly() -> None:
    model = tiny.model()
    prompt = prompt_for(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert hooks_of(model) == 0
    with ptuning.attach(model, TOKENIZER, prompt) as attached:
        assert isinstance(attached, ptuning.Attachment)
        assert attached.ids(prompt) == range(400, 403) and attached.first_id(prompt) == 400
        got = input_embedding(model)(torch.tensor(attached.ids(prompt)))
        assert torch.equal(got, prompt.trained_vectors())
        assert attached.ids(replace(prompt, answer_tokens=3)) == range(400, 403)  # of these vectors
    assert hooks_of(model) == 0 and Injector.of(model) is None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match="not attached here"):
        attached.ids(prompt)


def test_an_object_attaches_until_detach_which_may_be_repeated() -> None:
    model = tiny.model()
    attached = ptuning.attach(model, TOKENIZER, prompt_for(model))
    assert hooks_of(model) == 2
    attached.detach()
    attached.detach()
    assert hooks_of(model) == 0


def test_an_error_inside_the_block_restores_the_model_and_is_not_swallowed() -> None:
    model = tiny.model()
    with (
        pytest.raises(ZeroDivisionError),
        ptuning.attach(model, TOKENIZER, prompt_for(model), prompt_for(model)),
    ):
        _ = 1 / 0
    assert hooks_of(model) == 0


def test_two_prompts_get_disjoint_ids_and_their_own_vectors() -> None:
    model = tiny.model()
    first, second = prompt_for(model, seed=1), prompt_for(model, seed=2, count=2)
    with ptuning.attach(model, TOKENIZER, first, second) as attached:
        assert not set(attached.ids(first)) & set(attached.ids(second))
        for prompt in (first, second):
            got = input_embedding(model)(torch.tensor(attached.ids(prompt)))
            assert torch.equal(got, prompt.trained_vectors())


def test_the_same_prompt_attached_twice_serves_the_same_vectors() -> None:
    model = tiny.model()
    prompt = prompt_for(model)
    with ptuning.attach(model, TOKENIZER, prompt, prompt) as both:
        assert len(both.ids(prompt)) == 3
        with ptuning.attach(model, TOKENIZER, prompt) as again:
            assert again.first_id(prompt) == 406
            got = input_embedding(model)(torch.arange(400, 409))
            assert torch.equal(got, prompt.trained_vectors().repeat(3, 1))
        assert torch.equal(
            input_embedding(model)(torch.tensor(both.ids(prompt))), prompt.trained_vectors()
        )
    assert hooks_of(model) == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_nested_attachments_leave_in_any_order(order: tuple[int, ...]) -> None:
    model = tiny.model()
    prompts = [prompt_for(model, seed=s, count=s + 1) for s in range(3)]
    attachments = [ptuning.attach(model, TOKENIZER, p) for p in prompts]
    for number, leaving in enumerate(order):
        for index in order[number:]:
            ids = torch.tensor(attachments[index].ids(prompts[index]))
            assert torch.equal(input_embedding(model)(ids), prompts[index].trained_vectors())
        gone = torch.tensor(attachments[leaving].ids(prompts[leaving]))
        attachments[leaving].detach()
        with pytest.raises((InputError, IndexError)):
            input_embedding(model)(gone)
    assert hooks_of(model) == 0


@pytest.mark.parametrize(("vocabulary", "first"), [(400, 400), (350, 400), (450, 450)])
def test_virtual_ids_start_behind_tokenizer_and_embedding(vocabulary: int, first: int) -> None:
    model = tiny.model(vocab_size=vocabulary)
    prompt = prompt_for(model)
    with ptuning.attach(model, TOKENIZER, prompt) as attached:
        assert len(TOKENIZER) == 400 and attached.first_id(prompt) == first
    with ptuning.attach(model, None, prompt) as attached:
        assert attached.first_id(prompt) == vocabulary


def test_ids_lie_behind_rows_that_the_embedding_got_after_attaching() -> None:
    model = tiny.model()
    prompt = prompt_for(model)
    with ptuning.attach(model, None, prompt) as attached:
        model.resize_token_embeddings(420)
        first, *_ = ids = attached.ids(prompt)
        assert first == 420
        vectors = input_embedding(model)(torch.tensor(ids))
        assert torch.equal(vectors, prompt.trained_vectors())


@pytest.mark.parametrize("number", range(3))
def test_a_warning_names_the_line_that_called_the_package(number: int) -> None:
    model = tiny.model()
    prompt = ptuning.Prompt("{text} [P*3] [MASK] thanks", verbalizer={"yes": "Yes", "no": "No"})
    prompt.vectors, prompt.base_model = torch.randn(3, 32), describe(model, None)
    stranger = replace(prompt, base_model=describe(tiny.model(seed=7), None))
    plain = get_peft_model(model, PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids = torch.tensor([[15, 16]])
    calls: list[Callable[[], Any]] = [
        lambda: ptuning.attach(model, TOKENIZER, stranger).detach(),
        lambda: ptuning.predict(model, TOKENIZER, prompt, [{"text": "a"}]),  # drops what follows
        lambda: plain(input_ids=ids, token_type_ids=torch.zeros_like(ids)),
    ]
    with pytest.warns(PtuningWarning) as seen:
        calls[number]()
    assert [one.filename for one in seen] == [__file__]


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "PEFT's"])
def test_a_model_that_puts_a_prompt_in_front_itself_is_refused(ours: bool) -> None:
    model = tiny.model()
    prompt = ptuning.Prompt("{text} [P*3] [MASK]", answer="a", verbalizer={"y": "Yes", "n": "No"})
    prompt.vectors = torch.randn(3, 32)
    config = PromptEncoderConfig if ours else peft.PromptEncoderConfig
    get: Any = get_peft_model if ours else peft.get_peft_model
    wrapped = get(model, config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    rows = [{"text": "a", "a": "y"}]
    for call in (ptuning.predict, ptuning.evaluate, partial(ptuning.train, epochs=1)):
        with pytest.raises(InputError, match=r"puts a prompt of its own.*get_base_model"):
            call(wrapped, TOKENIZER, prompt, rows)
    lora = peft.get_peft_model(tiny.model(), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert ptuning.predict(lora, TOKENIZER, prompt, rows)[0] in ("y", "n")


@pytest.mark.parametrize("copied", [False, True], ids=["new", "copied with its hooks"])
def test_prompts_stay_on_a_model_whose_embedding_was_replaced(copied: bool) -> None:
    model = tiny.model()
    first, second = prompt_for(model), prompt_for(model, seed=2)
    old = input_embedding(model)
    with ptuning.attach(model, None, first) as attached:
        other = nn.Embedding.from_pretrained(old.weight.detach())
        model.set_input_embeddings(copy.deepcopy(old) if copied else other)
        with ptuning.attach(model, None, second) as more:
            assert attached.ids(first) == range(400, 403) and more.ids(second) == range(403, 406)
            vectors = input_embedding(model)(torch.arange(400, 406))
            assert torch.equal(vectors, torch.cat([first.vectors, second.vectors]))
        model.set_input_embeddings(nn.Embedding.from_pretrained(old.weight.detach()))
        ids = torch.tensor(attached.ids(first))
        assert torch.equal(input_embedding(model)(ids), first.vectors)
    assert hooks_of(model) == 0 == len(old._forward_hooks) and Injector.of(model) is None


def test_virtual_ids_avoid_the_ids_of_a_tokenizer_with_holes() -> None:
    class Holes:
        def __len__(self) -> int:
            return 2

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 500}

    model = tiny.model()
    prompt = prompt_for(model)
    with ptuning.attach(model, Holes(), prompt) as attached:
        assert attached.first_id(prompt) == 501


def test_no_prompt_is_an_error() -> None:
    with pytest.raises(InputError, match="no prompt to attach"):
        ptuning.attach(tiny.model(), TOKENIZER)


def test_an_untrained_prompt_is_an_error_and_takes_the_others_off_again() -> None:
    model = tiny.model()
    with pytest.raises(InputError, match="no vectors yet: train it"):
        ptuning.attach(model, TOKENIZER, prompt_for(model), ptuning.Prompt("[P] {a} [MASK]"))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("known", [True, False])
def test_a_prompt_of_another_width_is_an_error_and_leaves_the_model_as_it_was(known: bool) -> None:
    model, wider = tiny.model(), tiny.model(hidden_size=64)
    prompt = prompt_for(wider)
    message = r"another width"
    if known:
        wider.config._name_or_path = "makers/wide"
        prompt.base_model = describe(wider, TOKENIZER)
        message = r"'makers/wide' with embedding width 64; .* has 32"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        ptuning.attach(model, TOKENIZER, prompt_for(model), prompt)
    assert isinstance(caught.value, PromptFileError) == known
    assert hooks_of(model) == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_failed_attach_leaves_earlier_attachments_alone() -> None:
    model = tiny.model()
    prompt = prompt_for(model)
    with ptuning.attach(model, TOKENIZER, prompt) as attached:
        with pytest.raises(InputError):
            ptuning.attach(model, TOKENIZER, prompt_for(tiny.model(hidden_size=64)))
        got = input_embedding(model)(torch.tensor(attached.ids(prompt)))
        assert torch.equal(got, prompt.trained_vectors())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_batch_that_mixes_prompts_equals_its_rows_apart(family: str) -> None:
    model = tiny.model(family)
    prompts = [prompt_for(model, seed=s) for s in range(3)]
    text = torch.randint(5, 400, (3, 6))
    with torch.no_grad(), ptuning.attach(model, TOKENIZER, *prompts) as attached:
        rows = [attached.prepend(p, text[i : i + 1])["input_ids"] for i, p in enumerate(prompts)]
        mixed = model(input_ids=torch.cat(rows)).logits
        apart = [model(input_ids=row).logits[0] for row in rows]
    torch.testing.assert_close(mixed, torch.stack(apart), atol=1e-5, rtol=1e-5)
    alone = []
    for index, prompt in enumerate(prompts):
        with torch.no_grad(), ptuning.attach(model, TOKENIZER, prompt) as attached:
            inputs = attached.prepend(prompt, text[index : index + 1])
            alone.append(model(**inputs).logits[0])
    torch.testing.assert_close(mixed, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_prepend_puts_virtual_tokens_behind_the_left_padding() -> None:
    model = tiny.model()
    prompt = prompt_for(model, count=2)
    ids = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8], [0, 9, 9, 9]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    with ptuning.attach(model, TOKENIZER, prompt) as attached:
        result = attached.prepend(prompt, ids, mask, labels)
        v, w = attached.ids(prompt)
    assert set(result) == {"input_ids", "attention_mask", "labels"}
    assert result["input_ids"].tolist() == [
        [0, 0, v, w, 7, 8],
        [v, w, 5, 6, 7, 8],
        [0, v, w, 9, 9, 9],
    ]
    assert result["attention_mask"].tolist() == [
        [0, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1],
    ]
    assert result["labels"].tolist() == [
        [-100, -100, -100, -100, 7, 8],
        [-100, -100, 5, 6, 7, 8],
        [-100, -100, -100, 9, 9, 9],
    ]


def test_prepend_leaves_right_padding_at_the_end() -> None:
    model = tiny.model()
    prompt = prompt_for(model, count=2)
    ids = torch.tensor([[5, 6, 0], [5, 6, 7]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with ptuning.attach(model, TOKENIZER, prompt) as attached:
        result = attached.prepend(prompt, ids, mask)
        v, w = attached.ids(prompt)
        without_mask = attached.prepend(prompt, ids)
    assert result["input_ids"].tolist() == [[v, w, 5, 6, 0], [v, w, 5, 6, 7]]
    assert result["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert set(result) == {"input_ids", "attention_mask"}
    assert without_mask["attention_mask"].eq(1).all()


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_left_padding_never_changes_a_rows_result(family: str) -> None:
    model = tiny.model(family)
    prompt = prompt_for(model)
    lengths = (12, 9, 3)
    texts = [torch.randint(5, 400, (length,)) for length in lengths]
    ids = torch.stack([torch.cat([torch.zeros(12 - len(t)).long(), t]) for t in texts])
    mask = torch.stack([(torch.arange(12) >= 12 - length).long() for length in lengths])
    with torch.no_grad(), ptuning.attach(model, TOKENIZER, prompt) as attached:
        batch = attached.prepend(prompt, ids, mask)
        extra = {}
        if family != "opt":  # OPT counts positions from the mask itself
            extra["position_ids"] = position_ids(batch["attention_mask"])
        padded = model(**batch, **extra).logits
        for row, text in enumerate(texts):
            alone = model(**attached.prepend(prompt, text[None])).logits[0]
            torch.testing.assert_close(padded[row, -len(alone) :], alone, atol=1e-5, rtol=1e-5)


@contextmanager
def peft_model(base: Any, **settings: Any) -> Iterator[Any]:
    """PEFT's model around `base`, which is as before afterwards."""
    trainable = [p for p in base.parameters() if p.requires_grad]
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", **settings)
    torch.manual_seed(7)
    model = peft.get_peft_model(base, config).eval()
    try:
        yield model
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def compare_with_peft(
    base: Any, tokenizer: Any, ids: Tensor, mask: Tensor, **settings: Any
) -> None:
    labels = ids.masked_fill(mask == 0, -100)
    with peft_model(base, **settings) as theirs, torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels)
        vectors = theirs.get_prompt(batch_size=1)[0].clone()
    prompt = ptuning.Prompt(num_virtual_tokens=settings["num_virtual_tokens"])
    prompt.vectors = vectors
    with torch.no_grad(), ptuning.attach(base, tokenizer, prompt) as attached:
        batch = attached.prepend(prompt, ids, mask, labels)
        got = base(**batch)
    real = batch["attention_mask"].bool()
    assert got.logits.shape == expected.logits.shape
    torch.testing.assert_close(got.logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert hooks_of(base) == 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("head", ["MLP", "LSTM"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prepending_equals_peft_on_tiny_models(family: str, head: str, padded: bool) -> None:
    ids = torch.randint(5, 400, (2, 8))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, 5:], mask[1, 5:] = 0, 0
    compare_with_peft(
        tiny.model(family),
        TOKENIZER,
        ids,
        mask,
        num_virtual_tokens=4,
        encoder_reparameterization_type=head,
        encoder_hidden_size=24,
    )


@pytest.mark.parametrize("padded", [False, True])
def test_prepending_equals_peft_on_smollm2(smollm2: tuple[Any, Any], padded: bool) -> None:
    model, tokenizer = smollm2
    texts = ["The capital of France is Paris.", "Rain fell on the old harbour town."]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = min(map(len, rows))
    ids = torch.tensor([row[:width] for row in rows], device=model.device)
    mask = torch.ones_like(ids)
    if padded:
        ids[0, -2:], mask[0, -2:] = tokenizer.pad_token_id, 0
    compare_with_peft(model, tokenizer, ids, mask, num_virtual_tokens=5, encoder_hidden_size=64)


@pytest.mark.parametrize("padded", [False, True])
def test_generate_with_virtual_ids_equals_generate_via_inputs_embeds(padded: bool) -> None:
    model = tiny.model()
    prompt = prompt_for(model)
    ids = torch.randint(5, 400, (2, 6))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :3], mask[1, :3] = 0, 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with torch.no_grad(), ptuning.attach(model, TOKENIZER, prompt) as attached:
        batch = attached.prepend(prompt, ids, mask)
        ours = model.generate(**batch, **options)
        vectors = input_embedding(model)(batch["input_ids"])
    plain = model.generate(inputs_embeds=vectors, attention_mask=batch["attention_mask"], **options)
    assert torch.equal(ours[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    assert torch.equal(ours[:, batch["input_ids"].shape[1] :], plain)
    assert plain.shape == (2, 12) and int(plain.max()) < 400
    without = model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    assert not torch.equal(without, plain)  # the prompt matters


def test_a_compiled_models_wrapper_is_attached_to_the_model_inside() -> None:
    model = tiny.model()
    wrapped = torch.compile(model, backend="eager")
    prompt = prompt_for(model)
    with ptuning.attach(wrapped, TOKENIZER, prompt):
        assert Injector.of(model) is not None
    assert hooks_of(model) == 0


def vectors_at(model: nn.Module, first: int, count: int = 3) -> Tensor:
    return input_embedding(model)(torch.arange(first, first + count))


def test_placed_serves_an_attached_prompt_and_leaves_it_attached() -> None:
    model = tiny.model()
    prompt = prompt_for(model)
    with ptuning.attach(model, TOKENIZER, prompt_for(model, seed=2), prompt) as attached:
        with placed(model, TOKENIZER, prompt) as first:
            assert torch.equal(vectors_at(model, first), prompt.trained_vectors())
        served = vectors_at(model, attached.first_id(prompt))
        assert torch.equal(served, prompt.trained_vectors()) and hooks_of(model) == 2
    assert hooks_of(model) == 0


def test_placed_keeps_its_ids_when_another_user_of_the_same_prompt_leaves_first() -> None:
    model = tiny.model()
    prompt = prompt_for(model)
    earlier, later = (placed(model, TOKENIZER, prompt) for _ in range(2))
    earlier.__enter__()
    first = later.__enter__()
    earlier.__exit__(None, None, None)
    assert torch.equal(vectors_at(model, first), prompt.trained_vectors())
    later.__exit__(None, None, None)
    assert hooks_of(model) == 0


def test_placed_attaches_meanwhile_and_knows_manual_tasks() -> None:
    model = tiny.model()
    with placed(model, TOKENIZER, prompt_for(model)) as first:
        assert first == 400 and hooks_of(model) == 2
    assert hooks_of(model) == 0
    with placed(model, TOKENIZER, Task("{a} [MASK]")) as first:
        assert first == 0 and hooks_of(model) == 0


def test_threads_that_attach_at_the_same_time_share_one_injector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model()
    prompts = [prompt_for(model, seed=s) for s in range(2)]
    both_looked = threading.Barrier(2, timeout=1)
    look = Injector.of

    def look_together(of: nn.Module) -> Injector | None:
        found = look(of)
        with suppress(threading.BrokenBarrierError):  # the other one may have to wait outside
            both_looked.wait()
        return found

    monkeypatch.setattr(Injector, "of", staticmethod(look_together))
    attached: dict[int, ptuning.Attachment] = {}

    def attach(index: int) -> None:
        attached[index] = ptuning.attach(model, TOKENIZER, prompts[index])

    threads = [threading.Thread(target=attach, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [attached[i].ids(prompts[i]) for i in range(2)]
    assert not set(ids[0]) & set(ids[1])
    for index in range(2):
        got = input_embedding(model)(torch.tensor(ids[index]))
        assert torch.equal(got, prompts[index].trained_vectors())
    for attachment in attached.values():
        attachment.detach()
    assert hooks_of(model) == 0


@pytest.mark.parametrize("same", [False, True], ids=["other_prompts", "same_prompt"])
def test_threads_that_predict_with_unattached_prompts_get_single_thread_results(
    same: bool,
) -> None:
    model = tiny.model()
    rows = [{"text": "rain in Oslo"}, {"text": "Berlin, Madrid, Lisbon"}]
    prompts = []
    for seed in range(3):
        prompt = ptuning.Prompt(
            "[P*3] {text} [MASK]", verbalizer={"a": "yes", "b": "Paris", "c": "Rome"}
        )
        prompt.vectors = prompt_for(model, seed=seed).vectors
        prompts.append(prompts[0] if same and prompts else prompt)
    details = partial(ptuning.predict_details, model, TOKENIZER)
    expected = [details(prompt, rows) for prompt in prompts]

    def work(index: int) -> None:
        for _ in range(15):
            assert details(prompts[index], rows) == expected[index]

    together(*(partial(work, index) for index in range(3)))
    assert hooks_of(model) == 0


def test_an_attachment_that_two_threads_detach_leaves_once() -> None:
    model = tiny.model()
    prompt = prompt_for(model)
    for _ in range(200):
        attached = ptuning.attach(model, TOKENIZER, prompt)
        with placed(model, TOKENIZER, prompt) as first:
            together(attached.detach, attached.detach)
            assert torch.equal(vectors_at(model, first), prompt.trained_vectors())
    assert hooks_of(model) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_forked_while_a_thread_attaches_can_attach() -> None:
    model, other = tiny.model(), tiny.model()
    prompt = prompt_for(model)
    codes = []

    def attach_often() -> None:
        with ptuning.attach(model, TOKENIZER, prompt, prompt, prompt):
            pass

    def fork_often() -> None:
        for _ in range(15):
            child = os.fork()
            if child == 0:
                signal.alarm(10)  # who waits for ever is ended
                with ptuning.attach(other, TOKENIZER, prompt):
                    os._exit(0)
            codes.append(os.waitpid(child, 0)[1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that threads and fork are risky
        together(fork_often, beside=attach_often)
    assert codes == [0] * 15


def test_attaching_to_the_same_model_does_not_warn() -> None:
    model = tiny.model()
    prompt = prompt_for(model)
    prompt.base_model = describe(model, TOKENIZER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ptuning.attach(model, TOKENIZER, prompt).detach()


@pytest.mark.parametrize("wrong", [[], ["a"], "capital/", 3, iter([])])
def test_what_is_no_prompt_is_not_attached(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"expected a Prompt|no prompt to attach"):
        ptuning.attach(tiny.model("llama"), tiny.tokenizer(), wrong)
