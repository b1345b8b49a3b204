"""The backend in this process, without HTTP."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import ptuning
from ptuning import DataError, InputError, Prompt
from ptuning.backbone.base_model import BaseModel
from ptuning.backbone.identity import describe
from ptuning.backbone.traits import remembers_rows
from ptuning.serving import local as module
from ptuning.serving.asking import Desk
from ptuning.serving.backend import Gone, Wish
from ptuning.serving.batcher import Item, Overloaded, TooLate
from ptuning.serving.gate import Limits, Refused
from ptuning.serving.listening import Listener, Turn
from ptuning.serving.local import Local
from ptuning.serving.metrics import Metrics

from .. import tiny
from ..multimodal import DECODERS
from . import servers


@pytest.mark.parametrize("name", list(servers.PROMPTS))
def test_an_ensemble_is_served_with_all_its_members(place: Path, name: str) -> None:
    model, tokenizer = servers.model(place)
    others = [servers.prompt(place, name, seed) for seed in (1, 2)]
    ensemble, row = replace(servers.prompt(place, name), others=others), servers.ROWS[name]
    (expected,) = ptuning.predict_details(model, tokenizer, ensemble, [row])
    local = Local(BaseModel.of(model, tokenizer))
    handle = local.take_on(name, ensemble)
    wish = Wish(time.monotonic() + 60)
    (answer,) = asyncio.run(local.answer(handle, [row], wish))
    assert answer.text == expected.answer
    assert answer.probability == pytest.approx(expected.probability, abs=1e-5)
    assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    local.let_go(handle)
    assert not model.get_input_embeddings()._forward_hooks
    asyncio.run(local.close())


def answered(local: Local, handle: Any, row: dict[str, Any], **wish: Any) -> Any:
    (answer,) = asyncio.run(local.answer(handle, [row], Wish(time.monotonic() + 60, **wish)))
    return answer


@pytest.fixture
def local(place: Path) -> Iterator[Local]:
    model, tokenizer = servers.model(place)
    made = Local(BaseModel.of(model, tokenizer))
    yield made
    asyncio.run(made.close())


@pytest.mark.parametrize("text", ["The capital of ", "def f(x):\n    ", " Rome", "it is"])
def test_text_is_gone_on_with_to_the_last_space(local: Local, text: str) -> None:
    base = local.base
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
    whole = base.model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)[0]
    expected, before = (base.tokenizer.decode(x, skip_special_tokens=True) for x in (whole, ids[0]))
    answer = answered(local, local.plain, {"text": text}, limit=7)
    assert answer.text == expected[len(before) :] and answer.read == ids.shape[1]

    async def streamed() -> list[Any]:
        wish = Wish(time.monotonic() + 60, limit=7)
        return [part async for part in local.stream(local.plain, {"text": text}, wish)]

    *parts, last = asyncio.run(streamed())
    assert "".join(parts) == last.text == answer.text


def test_an_answer_has_room_behind_its_row(place: Path, local: Local) -> None:
    room, handle = local.base.context, local.take_on("capital", servers.prompt(place, "capital"))
    assert room is not None
    answer = answered(local, handle, {"country": "France " * room}, limit=40)
    assert answer.shortened and answer.read <= room + 1 - 40
    with pytest.raises(DataError, match=f"longer than the {room} tokens"):
        answered(local, handle, {"country": "France"}, limit=room + 1)
    text = "The capital of France " * 20
    read = len(local.base.tokenizer(text)["input_ids"])  # nobody reads the last token that is said
    assert answered(local, local.plain, {"text": text}, limit=room + 1 - read).read == read
    with pytest.raises(InputError, match=f"the model has room for {room} in all"):
        answered(local, local.plain, {"text": text}, limit=room + 2 - read)


def test_an_empty_text_is_not_gone_on_with_where_nothing_stands_in_front(local: Local) -> None:
    with pytest.raises(InputError, match="the text is empty"):
        answered(local, local.plain, {"text": ""}, limit=3)


def test_a_prompt_of_another_model_is_not_taken_on(place: Path) -> None:
    tokenizer = servers.model(place)[1]
    other = BaseModel.of(tiny.model("llama", vocab_size=len(tokenizer), seed=9), tokenizer)
    local = Local(other)
    with pytest.raises(InputError, match="has other weights"):
        local.take_on("capital", servers.prompt(place, "capital"))
    assert not other.model.get_input_embeddings()._forward_hooks
    asyncio.run(local.close())


def test_what_is_asked_of_a_prompt_that_was_let_go_is_asked_of_its_successor(
    place: Path, local: Local
) -> None:
    old, new = (local.take_on("capital", servers.prompt(place, "capital")) for _ in range(2))
    local.let_go(old)
    row = servers.ROWS["capital"]
    with pytest.raises(Gone, match="the prompt was taken off"):
        answered(local, old, row)
    registry: Any = SimpleNamespace(served={"capital": SimpleNamespace(handle=new)}, refused={})
    desk = Desk(local, registry, Limits(), Metrics())
    wish = desk.wish()
    (said,) = asyncio.run(desk.answer("capital", old, [row], wish))
    assert said.text == answered(local, new, row).text
    *parts, whole = asyncio.run(_of_desk(desk, "capital", old, row))
    assert "".join(parts) == whole.text == said.text
    registry.served.clear()
    with pytest.raises(Refused) as refused:
        asyncio.run(desk.answer("capital", old, [row], wish))
    assert refused.value.status == 404
    (fault,) = asyncio.run(_of_desk(desk, "capital", old, row))
    assert isinstance(fault, Refused) and fault.status == 404


async def _of_desk(desk: Desk, name: str, handle: Any, row: dict[str, Any]) -> list[Any]:
    return [part async for part in desk.stream(name, handle, row, desk.wish())]


async def _streamed(local: Local, handle: Any, row: dict[str, Any], **wish: Any) -> list[Any]:
    asked = Wish(time.monotonic() + 60, **wish)
    return [part async for part in local.stream(handle, row, asked)]


@pytest.mark.parametrize("name", ["capital", None])
def test_no_answer_is_longer_than_the_server_writes(
    place: Path, local: Local, name: str | None
) -> None:
    registry: Any = SimpleNamespace(served={}, refused={})
    desk = Desk(local, registry, Limits(tokens=3), Metrics())
    handle = local.take_on(name, servers.prompt(place, name)) if name else local.plain
    row = servers.ROWS[name] if name else {"text": "The capital of"}
    (answer,) = asyncio.run(desk.answer("x", handle, [row], desk.wish()))
    assert answer.written == 3 and not answer.complete
    longer = answered(local, handle, row)
    assert longer.written > 3 and longer.text.startswith(answer.text)


def test_more_rows_than_may_ever_wait_are_too_many(local: Local) -> None:
    registry: Any = SimpleNamespace(served={}, refused={})
    desk = Desk(local, registry, Limits(rows=9, waiting=5), Metrics())
    desk.check_count([{}] * 5)
    with pytest.raises(Refused, match="6 rows came; at most 5 may at once") as refused:
        desk.check_count([{}] * 6)
    assert refused.value.status == 413


@pytest.mark.parametrize("virtual", [True, False])
def test_labels_that_were_trained_over_the_vocabulary_are_compared(
    place: Path, local: Local, virtual: bool
) -> None:
    prompt = replace(servers.prompt(place, "mood"), label_mode="vocabulary")
    task: Any = prompt if virtual else prompt.manual()
    row = servers.ROWS["mood"]
    (expected,) = ptuning.predict_details(*servers.model(place), task, [row])
    answer = answered(local, local.take_on("mood", prompt), row, virtual=virtual)
    assert answer.text == expected.answer and answer.complete and answer.written == 1
    assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_a_stop_ends_written_text_and_cuts_no_label(place: Path, local: Local) -> None:
    handle = local.take_on("mood", servers.prompt(place, "mood"))
    whole = answered(local, handle, servers.ROWS["mood"])
    assert answered(local, handle, servers.ROWS["mood"], stop=("oo", "ad")) == whole


def test_a_stop_ends_a_free_answer_in_front_of_it(place: Path, local: Local) -> None:
    handle = local.take_on("capital", servers.prompt(place, "capital"))
    whole = answered(local, handle, servers.ROWS["capital"], limit=12)
    stops = (whole.text[5:8], "no such text", whole.text[2:4])
    answer = answered(local, handle, servers.ROWS["capital"], limit=12, stop=stops)
    assert answer.text == whole.text[: whole.text.find(stops[2])].strip()
    assert answer.complete and answer.written < whole.written and not whole.complete


def test_a_streamed_answer_is_sent_once_though_its_batch_fails(place: Path, local: Local) -> None:
    handle = local.take_on("capital", servers.prompt(place, "capital"))
    gate, sizes = threading.Event(), list[int]()

    def failing(_: Any, __: Any, options: dict[str, Any]) -> None:
        sizes.append(len(options["input_ids"]))
        if sizes[-1] == 2 and sizes.count(2) == 8:
            raise RuntimeError("two rows are too much")

    async def both() -> list[list[Any]]:
        local.batcher.begin(lambda: gate.wait(60))
        rows = [servers.ROWS["capital"], {"country": "Oslo"}]
        asked = [asyncio.create_task(_streamed(local, handle, row, limit=20)) for row in rows]
        while local.depth < 2:
            await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*asked)

    with local.base.model.register_forward_pre_hook(failing, with_kwargs=True):
        answers = asyncio.run(both())
    for *parts, last in answers:
        assert len(parts) > 1 and "".join(parts) == last.text
    assert sizes.count(2) == 8 and sizes.count(1) > 20


def test_an_answer_is_told_when_it_is_over_though_its_batch_goes_on(
    place: Path, local: Local
) -> None:
    handle = local.take_on("capital", servers.prompt(place, "capital"))
    rows = [servers.ROWS["capital"], {"country": "Oslo"}]
    alone = [answered(local, handle, row, limit=n) for row, n in zip(rows, (3, 9), strict=True)]
    gate, told, forwards = threading.Event(), threading.Event(), list[int]()

    def forward(*_: Any) -> None:
        forwards.append(1)
        if len(forwards) == 6:
            assert told.wait(60)

    async def both() -> list[Any]:
        local.batcher.begin(lambda: gate.wait(60))
        asked = [
            asyncio.create_task(local.answer(handle, [row], Wish(time.monotonic() + 60, limit=n)))
            for row, n in zip(rows, (3, 9), strict=True)
        ]
        while local.depth < 2:
            await asyncio.sleep(0)
        gate.set()
        (brief,) = await asked[0]
        told.set()
        (long,) = await asked[1]
        return [brief, long]

    with local.base.model.register_forward_pre_hook(forward):
        for answer, right in zip(asyncio.run(both()), alone, strict=True):
            assert replace(answer, probability=0) == replace(right, probability=0)
            assert answer.probability == pytest.approx(right.probability, rel=1e-4)


@pytest.mark.parametrize("way", ["answer", "stream", "nearest"])
def test_what_takes_too_long_is_given_up_while_the_model_still_works(
    place: Path, local: Local, way: str
) -> None:
    handle, row = local.take_on("mood", servers.prompt(place, "mood")), servers.ROWS["mood"]
    begun, gate = threading.Event(), threading.Event()
    local.batcher.begin(lambda: (begun.set(), gate.wait(30)))
    assert begun.wait(30)

    async def ask() -> None:
        wish = Wish(time.monotonic() + 0.05)
        if way == "answer":
            await local.answer(handle, [row], wish)
        elif way == "stream":
            _ = [part async for part in local.stream(handle, row, wish)]
        else:
            await local.nearest(handle, wish.deadline)

    with pytest.raises(TooLate):
        asyncio.run(ask())
    assert local.depth == 1  # the model has not even begun with it
    gate.set()
    assert answered(local, handle, row).text


def test_nearest_words_are_looked_for_once_however_many_ask(
    place: Path, local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, real = local.take_on("mood", servers.prompt(place, "mood")), module.nearest_words
    looked: list[int] = []

    def counted(*arguments: Any) -> Any:
        looked.append(1)
        if len(looked) == 1:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(module, "nearest_words", counted)

    async def ask(count: int) -> list[Any]:
        deadline = time.monotonic() + 60
        asked = [local.nearest(handle, deadline) for _ in range(count)]
        return await asyncio.gather(*asked, return_exceptions=True)

    assert {type(found) for found in asyncio.run(ask(4))} == {MemoryError}
    found = asyncio.run(ask(4))
    assert found == [found[0]] * 4 and len(found[0]) == 3
    assert len(looked) == 2


def test_a_stream_has_no_space_more_than_the_answer_before_a_stop() -> None:
    tokenizer = tiny.tokenizer()
    said: list[str] = []
    wish = Wish(time.monotonic() + 600, stop=("of ",))
    question = SimpleNamespace(wish=wish, heard=said.append)
    listener = Listener(Item(question, wish.deadline), tokenizer, [2], 99)
    ids = tokenizer(" cities of Europe", add_special_tokens=False)["input_ids"]
    assert any([listener(token, -0.5) for token in ids])
    assert listener.whole == "cities" == said[-1] and not any(text.endswith(" ") for text in said)


_LONG = " ".join(tiny.TEXTS) + " 東京 москва — \U0001f44d\U0001f3fd . , ! don 't" * 3


@pytest.mark.parametrize("stop", [(), ("no such text",)])
@pytest.mark.parametrize("tidied", [False, True])
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_a_long_streamed_text_is_whole_and_decoded_in_linear_time(
    kind: str, goes_on: bool, tidied: bool, stop: tuple[str, ...]
) -> None:
    tokenizer = tiny.tokenizer(kind)
    tokenizer.clean_up_tokenization_spaces = tidied
    decoded, real = list[int](), tokenizer.decode

    def decode(ids: list[int], **options: Any) -> str:
        decoded.append(len(ids))
        return str(real(ids, **options))

    tokenizer.decode = decode
    before = tuple(tokenizer("The capital of", add_special_tokens=False)["input_ids"])
    said: list[str] = []
    wish = Wish(time.monotonic() + 600, stop=stop)
    question = SimpleNamespace(wish=wish, heard=said.append)
    item = Item(question, wish.deadline)
    listener = Listener(item, tokenizer, [2], 9999, before if goes_on else None)
    ids = tokenizer(_LONG, add_special_tokens=False)["input_ids"]
    for token in ids:
        assert not listener(token, -0.5)
    assert max(decoded) < 60 < len(ids)
    listener(2, -0.5)
    assert listener.enough and listener.score == -0.5 * len(listener.tokens)
    whole = listener.whole
    clean = {"clean_up_tokenization_spaces": False} if goes_on else {}
    first, text = (
        real(list(one), skip_special_tokens=True, **clean)
        for one in (before if goes_on else (), (*(before if goes_on else ()), *ids))
    )
    assert whole == (text[len(first) :] if goes_on else text.strip())
    held = max(map(len, stop), default=1)
    assert whole.startswith(said[-1]) and len(said[-1]) > len(whole) - held - 8


def _chatting(local: Local, count: int) -> tuple[list[dict[str, str]], list[int]]:
    """A chat and what the model says to it, in tokens."""
    turns = [{"role": "user", "content": "France and Italy"}]
    tokenizer = local.base.tokenizer
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    said = local.base.model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return turns, said[0, ids.shape[1] :].tolist()


def test_each_of_the_models_ends_ends_its_own_answers(place: Path, local: Local) -> None:
    config, row = local.base.model.generation_config, servers.ROWS["capital"]
    handle = local.take_on("capital", servers.prompt(place, "capital"))
    learnt = answered(local, handle, row)
    turns, said = _chatting(local, 12)
    at = next(n for n in range(2, 12) if said[n] not in said[:n])
    own = answered(local, handle, row, virtual=False)
    config.eos_token_id = [2, said[at]]
    assert _chatting(local, 12)[1] == said[: at + 1]
    answer = answered(local, local.plain_chat, {"turns": turns}, limit=12)
    assert answer.complete and answer.written == at + 1
    assert answer.text == local.base.tokenizer.decode(said[:at]).strip()
    # One row that goes on beside it changes nothing of it.
    rows = [{"turns": turns}, {"turns": [{"role": "user", "content": "Oslo"}]}]

    async def both() -> list[Any]:
        wish = Wish(time.monotonic() + 60, limit=40)
        return await local.answer(local.plain_chat, rows, wish)

    beside = asyncio.run(both())[0]
    assert beside.text == answer.text
    assert beside.probability == pytest.approx(answer.probability, abs=1e-6)
    config.eos_token_id = list(range(400))  # a trained prompt has learnt the tokenizer's end
    assert answered(local, handle, row) == learnt
    assert answered(local, handle, row, virtual=False).written == 1 < own.written


def test_a_prompt_in_anothers_place_has_nothing_that_was_kept_for_it(
    place: Path, local: Local
) -> None:
    row, answers = servers.ROWS["mood"], []
    for seed in (1, 2):
        prompt = servers.prompt(place, "mood", seed)
        handle = local.take_on("mood", prompt)
        assert handle.attachment is not None
        first = handle.attachment.first_id(prompt)
        answers.append((first, answered(local, handle, row).probabilities))
        (right,) = ptuning.predict_details(*servers.model(place), prompt, [row])
        assert answers[-1][1] == pytest.approx(right.probabilities, abs=1e-5)
        local.let_go(handle)
    assert answers[0][0] == answers[1][0] and answers[0][1] != answers[1][1]


def test_the_other_rows_of_a_request_that_failed_are_not_computed(place: Path) -> None:
    local = Local(BaseModel.of(*servers.model(place)), most=1)
    handle = local.take_on("mood", servers.prompt(place, "mood"))
    gate, batches = threading.Event(), list[int]()

    def begun(size: int) -> None:
        batches.append(size)
        if len(batches) == 2:
            gate.wait(60)

    local.batcher.sizes = begun
    rows = [{"text": "\ud800"}, *[servers.ROWS["mood"]] * 5]
    with pytest.raises(DataError, match="half a surrogate pair"):
        asyncio.run(local.answer(handle, rows, Wish(time.monotonic() + 60)))
    gate.set()
    asyncio.run(local.close())
    assert 1 <= len(batches) <= 2


def test_nothing_is_written_on_for_a_stream_that_nobody_reads(place: Path, local: Local) -> None:
    handle = local.take_on("capital", servers.prompt(place, "capital"))
    left, forwards = threading.Event(), list[int]()

    def forward(*_: Any) -> None:
        forwards.append(1)
        if len(forwards) == 20:
            left.wait(60)

    async def leave() -> None:
        wish = Wish(time.monotonic() + 60, limit=100)
        parts: Any = local.stream(handle, servers.ROWS["capital"], wish)
        await anext(parts)
        await parts.aclose()
        left.set()
        await asyncio.to_thread(local.batcher.run, lambda: None)

    with local.base.model.register_forward_pre_hook(forward):
        asyncio.run(leave())
    assert len(forwards) < 30


@pytest.mark.parametrize(
    ("family", "remembers"), [("llama", False), ("gemma2", False), ("t5", False), ("llama", True)]
)
def test_brief_questions_are_answered_between_the_tokens_of_a_long_answer(
    family: str, remembers: bool
) -> None:
    tokenizer = tiny.tokenizer(around=family == "t5")
    made = tiny.model(family, vocab_size=len(tokenizer))
    made.generation_config.eos_token_id = made.config.eos_token_id = None
    if remembers:
        made.model.rope_deltas = None
    weight, prompts = made.get_input_embeddings().weight, []
    for options in ({"verbalizer": {"good": "Paris", "bad": "Rome"}}, {"answer_tokens": 4}, {}):
        prompt = Prompt("[P*2] {text} [P]: [MASK]", **options)
        prompt.vectors = torch.randn(3, weight.shape[1]) * float(weight.std())
        prompt.base_model = describe(made, tokenizer)
        prompts.append(prompt)
    local, row = Local(BaseModel.of(made, tokenizer)), {"text": "it rains in Oslo"}
    local._joins = local._joins and not remembers
    labels, few, many = (local.take_on(str(n), p) for n, p in enumerate(prompts))
    alone = [answered(local, handle, row) for handle in (labels, few)]
    *_, whole = asyncio.run(_streamed(local, many, row, limit=40))
    order, forwards, asked = list[str](), list[int](), threading.Event()

    def forward(*_: Any) -> None:
        forwards.append(1)
        if len(forwards) == 3:
            asked.wait(60)

    async def ask(name: str, handle: Any, **wish: Any) -> Any:
        *_, answer = await _streamed(local, handle, row, **wish)
        order.append(name)
        return answer

    async def all_of_them() -> list[Any]:
        long = asyncio.create_task(ask("long", many, limit=40))
        while len(forwards) < 3:
            await asyncio.sleep(0)
        others = [ask("labels", labels), ask("few", few), ask("many", many, limit=30)]
        tasks = [asyncio.create_task(other) for other in others]
        while local.depth < 3:
            await asyncio.sleep(0)
        asked.set()
        return await asyncio.gather(long, *tasks)

    with made.register_forward_pre_hook(forward):
        streamed, *brief, _ = asyncio.run(all_of_them())
    assert order[0] == "long" if remembers else sorted(order[:2]) == ["few", "labels"]
    for answer, right in zip([streamed, *brief], [whole, *alone], strict=True):
        assert answer.text == right.text
        assert answer.probability == pytest.approx(right.probability, rel=1e-4)
    asyncio.run(local.close())


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_an_answer_that_others_join_at_every_token_is_the_one_it_has_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made = tiny.model(family, vocab_size=len(tokenizer))
    weight = made.get_input_embeddings().weight
    prompt, other = (Prompt(t) for t in ("[P*2] {text} [P]: [MASK]", "{text} [P*3] [MASK]"))
    for seed, one in enumerate((prompt, other)):
        one.vectors = torch.randn(3, weight.shape[1], generator=torch.manual_seed(seed))
        one.vectors *= weight.std().detach()
        one.base_model = describe(made, tokenizer)
    local = Local(BaseModel.of(made, tokenizer))
    both = replace(prompt, others=[replace(prompt, vectors=torch.roll(prompt.vectors, 1, 0))])
    handles = [local.take_on(str(number), one) for number, one in enumerate([prompt, other, both])]
    asked: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (handles[0], {"text": "it rains in Oslo"}, {"limit": 20}),
        (handles[1], {"text": "Rome"}, {"limit": 13}),
        (handles[2], {"text": "it rains in Oslo"}, {"limit": 30}),
        (handles[0], {"text": "Rome"}, {"limit": 20, "virtual": False}),
        (local.plain, {"text": "The capital of "}, {"limit": 16}),
        (local.plain_chat, {"turns": [{"role": "user", "content": "it"}]}, {"limit": 9}),
    ]
    *_, stopped = asyncio.run(_streamed(local, handles[0], {"text": "Rome"}, limit=20))
    asked.append((handles[0], {"text": "Rome"}, {"limit": 20, "stop": (stopped.text[8:10],)}))
    alone = [asyncio.run(_streamed(local, h, row, **wish)) for h, row, wish in asked]
    sizes: list[int] = []
    monkeypatch.setattr(local.batcher, "sizes", sizes.append)
    monkeypatch.setattr(Turn, "over", lambda *_: True)

    async def together() -> list[list[Any]]:
        return await asyncio.gather(*(_streamed(local, h, row, **wish) for h, row, wish in asked))

    for (*parts, last), (*_, right) in zip(asyncio.run(together()), alone, strict=True):
        assert replace(last, probability=0) == replace(right, probability=0)
        assert last.probability == pytest.approx(right.probability, rel=1e-3)
        assert "".join(parts) == last.text
    assert len(sizes) >= 30 and max(sizes) == len(asked)
    asyncio.run(local.close())


def test_a_long_answer_begins_while_another_one_goes_on(place: Path, local: Local) -> None:
    handle, row = local.take_on("capital", servers.prompt(place, "capital")), {"country": "Rome"}
    order, forwards, asked = list[str](), list[int](), threading.Event()

    def forward(*_: Any) -> None:
        forwards.append(1)
        if len(forwards) == 3:
            asked.wait(60)

    async def ask(name: str, limit: int) -> None:
        async for part in local.stream(handle, row, Wish(time.monotonic() + 60, limit=limit)):
            order.append(name if isinstance(part, str) else f"{name} ends")

    async def both() -> None:
        first = asyncio.create_task(ask("first", 100))
        while len(forwards) < 3:
            await asyncio.sleep(0)
        second = asyncio.create_task(ask("second", 10))
        while not local.depth:
            await asyncio.sleep(0)
        asked.set()
        await asyncio.gather(first, second)

    local.base.model.config.eos_token_id = None
    with local.base.model.register_forward_pre_hook(forward):
        asyncio.run(both())
    assert order.index("second ends") < order.index("first ends")


def test_a_prompt_is_attached_and_looked_at_while_a_long_answer_is_written(
    place: Path, local: Local
) -> None:
    local.base.model.config.eos_token_id = None
    handle, row = local.take_on("capital", servers.prompt(place, "capital")), {"country": "Rome"}
    long = answered(local, handle, row, limit=100)
    order, forwards, asked = list[str](), list[int](), threading.Event()

    def forward(*_: Any) -> None:
        forwards.append(1)
        if len(forwards) == 3:
            asked.wait(60)
        elif len(forwards) > 3 and len(order) < 2:
            time.sleep(0.05)

    async def ask() -> Any:
        wish = Wish(time.monotonic() + 60, limit=100)
        (answer,) = await local.answer(handle, [row], wish)
        order.append("long")
        return answer

    async def take_on() -> None:
        mood = await asyncio.to_thread(local.take_on, "mood", servers.prompt(place, "mood", 1))
        order.append("attached")
        assert (await local.nearest(mood, time.monotonic() + 60))[0]["nearest"]
        order.append("looked at")

    async def both() -> list[Any]:
        first = asyncio.create_task(ask())
        while len(forwards) < 3:
            await asyncio.sleep(0)
        second = asyncio.create_task(take_on())
        while not local.depth:
            await asyncio.sleep(0)
        asked.set()
        return await asyncio.gather(first, second)

    with local.base.model.register_forward_pre_hook(forward):
        assert asyncio.run(both())[0] == long
    assert order == ["attached", "looked at", "long"]


def test_a_prompt_is_taken_off_when_what_was_asked_of_it_is_answered_and_not_later(
    place: Path, local: Local
) -> None:
    local.base.model.config.eos_token_id = None
    one, other = (local.take_on("capital", servers.prompt(place, "capital", n)) for n in range(2))
    row = servers.ROWS["capital"]
    long = answered(local, one, row, limit=30)
    forwards, order, taken_off = list[int](), list[str](), threading.Event()

    def forward(*_: Any) -> None:
        forwards.append(1)
        if len(forwards) == 20:  # the other is taken off long before the text ends
            assert taken_off.wait(60)

    async def ask() -> Any:
        (answer,) = await local.answer(one, [row], Wish(time.monotonic() + 60, limit=30))
        order.append("answered")
        return answer

    async def let_go(handle: Any, name: str) -> None:
        await asyncio.to_thread(local.let_go, handle)
        order.append(name)
        taken_off.set()

    async def all_three() -> Any:
        asked = asyncio.create_task(ask())
        while len(forwards) < 3:
            await asyncio.sleep(0)
        await asyncio.gather(let_go(one, "one is off"), let_go(other, "other is off"))
        return await asked

    with local.base.model.register_forward_pre_hook(forward):
        assert asyncio.run(all_three()) == long
    assert order[0] == "other is off" and set(order[1:]) == {"answered", "one is off"}
    assert not local.base.model.get_input_embeddings()._forward_hooks
    with pytest.raises(Gone):
        answered(local, one, row)


def test_questions_that_were_refused_keep_no_prompt(place: Path) -> None:
    local = Local(BaseModel.of(*servers.model(place)), waiting=1)
    handle = local.take_on("mood", servers.prompt(place, "mood"))
    with pytest.raises(Overloaded):
        asyncio.run(local.answer(handle, [servers.ROWS["mood"]] * 2, Wish(time.monotonic() + 60)))
    local.let_go(handle)
    assert handle.gone
    asyncio.run(local.close())


def test_free_answers_that_are_too_many_for_one_batch_take_turns(place: Path) -> None:
    base = BaseModel.of(*servers.model(place))
    base.model.config.eos_token_id = None
    others = [servers.prompt(place, "capital", seed) for seed in (1, 2)]
    ensemble = replace(servers.prompt(place, "capital"), others=others)
    local = Local(base, most=4)  # of three rows each
    handle = local.take_on("capital", ensemble)
    rows = [servers.ROWS["capital"], {"country": "Oslo"}]
    alone = [answered(local, handle, row, limit=60) for row in rows]
    order, gate = list[int](), threading.Event()

    async def ask(number: int) -> Any:
        wish = Wish(time.monotonic() + 60, limit=60)
        parts: list[Any] = []
        async for part in local.stream(handle, rows[number], wish):
            order.append(number)
            parts.append(part)
        return parts[-1]

    async def both() -> list[Any]:
        local.batcher.begin(lambda: gate.wait(60))
        asked = [asyncio.create_task(ask(number)) for number in range(2)]
        while local.depth < 2:
            await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*asked)

    for answer, right in zip(asyncio.run(both()), alone, strict=True):
        assert answer.text == right.text
        assert answer.probability == pytest.approx(right.probability, rel=1e-3)
    turns = sum(one != other for one, other in pairwise(order))
    assert turns > 2
    asyncio.run(local.close())


def test_models_that_keep_what_they_know_of_rows_are_known() -> None:
    config = transformers.RecurrentGemmaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, lru_width=16
    )
    recurrent = transformers.RecurrentGemmaForCausalLM(config)
    assert remembers_rows(recurrent) and remembers_rows(DECODERS["qwen2_vl"]()[0])
    assert not any(remembers_rows(tiny.model(family)) for family in tiny.FAMILIES)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_masked_and_encoder_decoder_models_answer_as_in_predict(family: str) -> None:
    tokenizer = tiny.tokenizer(around=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = tiny.model(family, vocab_size=len(tokenizer))
    local, row = Local(BaseModel.of(model, tokenizer)), {"text": "it rains in Oslo"}
    weight = model.get_input_embeddings().weight
    masked = family == "bert"
    for options in ({"verbalizer": {"good": "Paris", "bad": "Rome"}}, {}):
        prompt = Prompt("[P*2] {text} [P]: [MASK].", **options)
        prompt.vectors = torch.randn(3, weight.shape[1]) * float(weight.std())
        prompt.base_model = describe(model, tokenizer)
        handle = local.take_on("mood", prompt)
        for limit in (None, 3):
            for virtual in (True, False):
                task: Any = prompt if virtual else prompt.manual()
                length = limit or (1 if masked else 64)
                (right,) = ptuning.predict_details(
                    model, tokenizer, task, [row], answer_tokens=length
                )
                answer = answered(local, handle, row, virtual=virtual, limit=limit)
                assert answer.text == right.answer
                assert answer.probability == pytest.approx(right.probability, abs=1e-5)
                assert answer.probabilities == pytest.approx(right.probabilities, abs=1e-5)
                if masked or options:
                    assert answer.written == (1 if options else length)
                asked = _streamed(local, handle, row, virtual=virtual, limit=limit)
                *parts, last = asyncio.run(asked)
                assert "".join(parts) == last.text == answer.text
    stop = answer.text[2:4]
    stopped = answered(local, handle, row, virtual=False, limit=3, stop=(stop,))
    assert stopped.text == answer.text[: answer.text.find(stop)].strip()
    assert local.plain_chat is None and (local.plain is None) == masked
    asyncio.run(local.close())


def test_a_prompt_that_does_not_fit_leaves_nothing_on_the_model(place: Path, local: Local) -> None:
    local.base.tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        local.take_on("capital", replace(servers.prompt(place, "capital"), chat=True))
    assert not local.base.model.get_input_embeddings()._forward_hooks
