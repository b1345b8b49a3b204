"""The backend in this process, without HTTP."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ptuning
from ptuning import DataError, InputError
from ptuning.backbone.base_model import BaseModel
from ptuning.serving import local as local_module
from ptuning.serving.asking import Desk
from ptuning.serving.backend import Gone, Wish
from ptuning.serving.batcher import Item, TooLate
from ptuning.serving.gate import Limits, Refused
from ptuning.serving.local import Local, _Listener, ends_of
from ptuning.serving.metrics import Metrics

from .. import tiny
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
    with pytest.raises(InputError, match=f"the model has room for {room} in all"):
        answered(local, local.plain, {"text": "a b"}, limit=room)


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
    registry.served.clear()
    with pytest.raises(Refused) as refused:
        asyncio.run(desk.answer("capital", old, [row], wish))
    assert refused.value.status == 404


def test_what_a_request_names_no_limit_for_has_the_servers(place: Path, local: Local) -> None:
    registry: Any = SimpleNamespace(served={}, refused={})
    desk = Desk(local, registry, Limits(tokens=3), Metrics())
    handle = local.take_on("capital", servers.prompt(place, "capital"))
    for asked, row in ((handle, servers.ROWS["capital"]), (local.plain, {"text": "a b"})):
        (answer,) = asyncio.run(desk.answer("capital", asked, [row], desk.wish()))
        assert answer.written <= 3
    assert answered(local, handle, servers.ROWS["capital"]).written > 3


def test_an_answer_that_is_late_is_given_up_while_its_batch_goes_on(
    place: Path, local: Local
) -> None:
    handle = local.take_on("capital", servers.prompt(place, "capital"))
    gate = threading.Event()

    def hangs(items: Any) -> Any:
        gate.wait(200)
        return iter(())

    local.batcher._answer = hangs
    row = servers.ROWS["capital"]

    async def asked() -> None:
        await local.answer(handle, [row], Wish(time.monotonic() + 0.2))

    async def streamed() -> None:
        async for _ in local.stream(handle, row, Wish(time.monotonic() + 0.2)):
            pass

    for late in (asked, streamed):
        with pytest.raises(TooLate, match="took too long"):
            asyncio.run(late())
    gate.set()


def test_a_stop_does_not_cut_a_label(place: Path, local: Local) -> None:
    prompt = servers.prompt(place, "mood")
    prompt.verbalizer = {"not_good": ["Paris"], "not_bad": ["Rome"]}
    answer = answered(local, local.take_on("mood", prompt), servers.ROWS["mood"], stop=("_",))
    assert answer.text in answer.probabilities


def test_a_chat_ends_where_the_model_ends_its_turns(place: Path, local: Local) -> None:
    row = {"turns": [{"role": "user", "content": "France"}]}
    base = local.base
    ids = base.tokenizer("<s>France Answer:", return_tensors="pt", add_special_tokens=False)
    written = base.model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    tokens = written[0, ids["input_ids"].shape[1] :].tolist()
    whole = answered(local, local.plain_chat, row, limit=12)
    assert whole.text == base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    local._ends = (tokens[4],)  # as a generation config may name several
    ended = answered(local, local.plain_chat, row, limit=12)
    assert ended.complete and ended.written == 1 + tokens.index(tokens[4]) < whole.written
    assert whole.text.startswith(ended.text) and ended.text != whole.text
    several = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 9]))
    assert ends_of(several) == (2, 9)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_long_stream_is_the_text_that_its_tokens_are(local: Local, goes_on: bool) -> None:
    tokenizer = local.base.tokenizer
    text = " ".join(f"The capital of {n} is Rome, naïve 東京 \U0001f600!" for n in range(40))
    before, *ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts: list[str] = []
    item: Any = Item(SimpleNamespace(wish=Wish(0.0), heard=parts.append), time.monotonic() + 300)
    listener = _Listener(item, tokenizer, (before,) if goes_on else None)
    seen: list[int] = []
    decode = tokenizer.decode
    tokenizer.decode = lambda tokens, **more: seen.append(len(tokens)) or decode(tokens, **more)
    try:
        for token in ids:
            assert not listener(token)
    finally:
        del tokenizer.decode
    expected = decode(ids) if not goes_on else decode([before, *ids])[len(decode([before])) :]
    assert "".join(parts).strip() == expected.strip() and listener.whole == expected
    assert max(seen) < 200 < len(ids)


def test_many_first_looks_at_a_prompt_compute_its_words_once(
    place: Path, local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = local.take_on("mood", servers.prompt(place, "mood"))
    counted: list[int] = []
    real = local_module.nearest_words

    def counting(*given: Any) -> Any:
        counted.append(1)
        return real(*given)

    monkeypatch.setattr(local_module, "nearest_words", counting)
    gate = threading.Event()
    holding = threading.Thread(target=local.batcher.run, args=(lambda: gate.wait(200),))
    holding.start()
    found: list[Any] = []
    lookers = [
        threading.Thread(target=lambda: found.append(local.nearest(handle, 3))) for _ in range(4)
    ]
    for looker in lookers:
        looker.start()
    while local.depth < 4:
        time.sleep(0.001)
    gate.set()
    for thread in (holding, *lookers):
        thread.join(200)
    assert counted == [1] and len(found) == 4 and all(one == found[0] and one for one in found)
