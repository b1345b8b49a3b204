"""The backend in this process, without HTTP."""

from __future__ import annotations

import asyncio
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
from ptuning.serving.asking import Desk
from ptuning.serving.backend import Gone, Wish
from ptuning.serving.gate import Limits, Refused
from ptuning.serving.local import Local
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
