"""In front of a server with the merged model: the answers of `predict`.

The server here speaks as vLLM does (token ids in, `prompt_logprobs` out), run by transformers. The
virtual tokens have no probability in it: a real model gives them 1e-6, a tiny random one a percent.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

import ptuning
from ptuning.errors import InputError, PromptFileError
from ptuning.inference.merged_tokenizer import free_names
from ptuning.inference.merging import unmerge
from ptuning.prompts.label_matrix import LabelMatrix
from ptuning.serving.backend import Answer, Unreachable, Wish
from ptuning.serving.batcher import Overloaded, Stopping, TooLate

from . import servers

fastapi = pytest.importorskip("fastapi")

from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402

from ptuning.serving.remote import Remote  # noqa: E402


def _table(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "prompts.json").read_text()))


def _vllm(folder: Path) -> Any:
    """What vLLM says to the questions that `Remote` asks, by an ordinary transformers model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    app = fastapi.FastAPI()
    app.state.asked = []

    @app.get("/v1/models")
    def models() -> Any:
        return {"data": [{"id": "served", "max_model_len": 128}]}

    virtual = [i for e in _table(folder).values() for i in e["virtual_ids"]]

    def likely(ids: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([ids])).logits[0]
        logits[:, virtual] = -torch.inf
        return logits.log_softmax(-1)

    @torch.no_grad()
    def choice(index: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        scores = likely(ids)
        asked: list[Any] = [None]
        for at, token in enumerate(ids[1:]):
            asked.append({str(token): {"logprob": max(float(scores[at, token]), -1e4)}})
        new: list[int] = []
        likelihoods: list[float] = []
        while len(new) < body["max_tokens"] and tokenizer.eos_token_id not in new:
            last = likely(ids + new)[-1]
            likelihoods.append(float(last.max()))
            new.append(int(last.argmax()))
        ended = tokenizer.eos_token_id in new
        made: dict[str, Any] = {
            "index": index,
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "finish_reason": "stop" if ended else "length",
            "logprobs": {"token_logprobs": likelihoods} if "logprobs" in body else None,
        }
        return {**made, "prompt_logprobs": asked} if "prompt_logprobs" in body else made

    @app.post("/v1/completions")
    def completions(body: dict[str, Any]) -> Any:
        app.state.asked.append(body)
        assert body["model"] == "served" and body["temperature"] == 0
        if body["max_tokens"] == 99:
            time.sleep(2)
        made = [choice(n, ids, body) for n, ids in enumerate(body["prompt"])]
        if not body.get("stream"):
            return JSONResponse({"choices": made[::-1]})

        async def parts() -> AsyncIterator[str]:
            (whole,) = made
            text, known = whole["text"], whole["logprobs"]["token_logprobs"]
            space = "" if body["max_tokens"] == 7 else " "
            halves = (space + text[:3], None, known), (text[3:] + space, "length", [])
            for part, end, logs in halves:
                said = {"text": part, "finish_reason": end, "logprobs": {"token_logprobs": logs}}
                yield f"data: {json.dumps({'choices': [said]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    return app


@pytest.fixture(scope="module")
def merged(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    prompts = {name: servers.prompt(place, name) for name in servers.PROMPTS}
    ptuning.merge(*servers.model(place), prompts).save(folder)
    return folder


@contextmanager
def served(app: Any) -> Iterator[str]:
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as at:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{at.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(200)


@pytest.fixture(scope="module")
def there(merged: Path) -> Iterator[tuple[str, Any]]:
    app = _vllm(merged)
    with served(app) as url:
        yield url, app


def _wish(seconds: float = 300, **options: Any) -> Wish:
    return Wish(time.monotonic() + seconds, **options)


@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("mode", ["labels", "vocabulary"])
@pytest.mark.parametrize("name", list(servers.PROMPTS))
def test_answers_are_those_of_predict(
    place: Path, merged: Path, there: tuple[str, Any], name: str, mode: str, virtual: bool
) -> None:
    remote = Remote(there[0], str(merged))
    prompt: Any = replace(servers.prompt(place, name), label_mode=mode)
    handle = remote.take_on(name, prompt)
    row = servers.ROWS[name]
    rows = [row, {**row, next(iter(row)): "Italy and all of its many islands"}]

    async def ask() -> list[Answer]:
        try:
            return await remote.answer(handle, rows, _wish(virtual=virtual))
        finally:
            await remote.close()

    task = prompt if virtual else prompt.manual()
    alone = ptuning.predict_details(*servers.model(place), task, rows)
    for answer, right in zip(asyncio.run(ask()), alone, strict=True):
        assert answer.text == right.answer
        assert answer.probability == pytest.approx(right.probability, abs=1e-5)
        assert answer.probabilities == pytest.approx(right.probabilities, abs=1e-5)


def test_a_stream_is_passed_on(place: Path, merged: Path, there: tuple[str, Any]) -> None:
    remote = Remote(there[0], str(merged))
    handle = remote.take_on("capital", servers.prompt(place, "capital"))

    async def ask() -> tuple[list[Any], list[Answer]]:
        row, wish = servers.ROWS["capital"], _wish()
        parts = [part async for part in remote.stream(handle, row, wish)]
        return parts, await remote.answer(handle, [row], wish)

    (*parts, last), (whole,) = asyncio.run(ask())
    assert "".join(parts) == last.text == whole.text and len(parts) == 2
    assert last.probability == pytest.approx(whole.probability)


@pytest.mark.parametrize("name", ["mood", "pair"])
def test_a_streamed_label_is_said_and_then_told_whole(
    place: Path, merged: Path, there: tuple[str, Any], name: str
) -> None:
    remote = Remote(there[0], str(merged))
    handle = remote.take_on(name, servers.prompt(place, name))

    async def ask() -> list[Any]:
        return [part async for part in remote.stream(handle, servers.ROWS[name], _wish())]

    said, whole = asyncio.run(ask())
    (right,) = ptuning.predict(
        *servers.model(place), servers.prompt(place, name), [servers.ROWS[name]]
    )
    assert said == whole.text == right


def test_text_goes_there_to_the_last_space_and_comes_back_as_it_is(
    place: Path, merged: Path, there: tuple[str, Any]
) -> None:
    remote, text = Remote(there[0], str(merged)), "def f(x):\n    "
    there[1].state.asked.clear()

    async def ask() -> tuple[list[Any], list[Answer]]:
        row, wish = {"text": text}, _wish(limit=7)
        parts = [part async for part in remote.stream(remote.plain, row, wish)]
        return parts, await remote.answer(remote.plain, [row], wish)

    (*parts, last), (whole,) = asyncio.run(ask())
    tokenizer = servers.model(place)[1]
    for body in there[1].state.asked:
        assert body["prompt"] == [tokenizer(text)["input_ids"]] and body["max_tokens"] == 7
    assert len(there[1].state.asked) == 2 and "".join(parts) == last.text == whole.text
    made = transformers.AutoModelForCausalLM.from_pretrained(merged)
    ids = torch.tensor(there[1].state.asked[0]["prompt"])
    virtual = [[i] for e in _table(merged).values() for i in e["virtual_ids"]]
    said = made.generate(
        ids, max_new_tokens=7, do_sample=False, pad_token_id=0, bad_words_ids=virtual
    )[0, ids.shape[1] :]
    assert whole.text == tokenizer.decode(said, skip_special_tokens=True)


def test_a_chat_of_the_base_models_goes_there_whole(
    place: Path, merged: Path, there: tuple[str, Any]
) -> None:
    remote = Remote(there[0], str(merged))
    said = [("system", "Be brief."), ("user", "France"), ("assistant", "Oslo"), ("user", "Rome?")]
    turns = [{"role": role, "content": text} for role, text in said]
    there[1].state.asked.clear()
    (answer,) = asyncio.run(remote.answer(remote.plain_chat, [{"turns": turns}], _wish(limit=3)))
    (body,) = there[1].state.asked
    text = "".join(f"<s>{content}" for _, content in said) + " Answer:"
    tokenizer = servers.model(place)[1]
    assert body["prompt"] == [tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert answer.read == len(body["prompt"][0]) and 0 < answer.written <= 3


def test_text_that_spells_a_virtual_token_never_becomes_one(
    place: Path, merged: Path, there: tuple[str, Any]
) -> None:
    remote = Remote(there[0], str(merged))
    handle = remote.take_on("capital", servers.prompt(place, "capital"))
    row = {"country": "France<|capital:0|>"}
    virtual = {i for e in _table(merged).values() for i in e["virtual_ids"]}
    there[1].state.asked.clear()
    (answer,) = asyncio.run(remote.answer(handle, [row], _wish()))
    (body,) = there[1].state.asked
    assert len([i for i in body["prompt"][0] if i in virtual]) == 4  # those of the template
    (right,) = ptuning.predict_details(
        *servers.model(place), servers.prompt(place, "capital"), [row]
    )
    assert answer.text == right.answer


def test_text_that_spells_a_removed_prompts_token_is_refused(
    merged: Path, place: Path, there: tuple[str, Any], tmp_path: Path
) -> None:
    fewer = unmerge(ptuning.Merged.load(merged), ["mood"])
    fewer.save(tmp_path / "fewer")
    (free, *_) = free_names(fewer.tokenizer)
    remote = Remote(there[0], str(tmp_path / "fewer"))
    handle = remote.take_on("capital", servers.prompt(place, "capital"))
    with pytest.raises(InputError, match="a field spells the virtual token"):
        asyncio.run(remote.answer(handle, [{"country": free}], _wish()))


def test_it_is_alive_while_the_server_behind_is(merged: Path) -> None:
    app, status = fastapi.FastAPI(), 200

    @app.get("/v1/models")
    def models() -> Any:
        return JSONResponse({"data": [{"id": "served"}]}, status)

    async def ask() -> list[bool]:
        nonlocal status
        found = []
        with served(app) as url:
            remote = Remote(url, str(merged))
            found.append(await remote.alive())
            status = 503
            found.append(await remote.alive())
        found.append(await remote.alive())  # nobody is there
        await remote.close()
        return [*found, await remote.alive()]

    assert asyncio.run(ask()) == [True, False, False, False]


def test_a_table_of_an_older_merge_tells_prompts_by_their_number_of_virtual_tokens(
    place: Path, merged: Path, there: tuple[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(merged, tmp_path / "merged")
    table = _table(merged)
    for entry in table.values():
        del entry["vectors"]
    (tmp_path / "merged" / "prompts.json").write_text(json.dumps(table))
    remote = Remote(there[0], str(tmp_path / "merged"))
    assert remote.take_on("capital", servers.prompt(place, "capital")).ids
    with pytest.raises(InputError, match="merge it again"):
        remote.take_on("capital", servers.prompt(place, "mood"))


@pytest.mark.parametrize("entry", [3, {"text": "x"}, {"text": "x", "virtual_ids": [1]}])
def test_a_table_that_is_another_models_is_refused(
    merged: Path, there: tuple[str, Any], tmp_path: Path, entry: Any
) -> None:
    shutil.copytree(merged, tmp_path / "merged")
    (tmp_path / "merged" / "prompts.json").write_text(json.dumps({"capital": entry}))
    with pytest.raises(PromptFileError, match=r"prompts\.json: the prompt 'capital' and the token"):
        Remote(there[0], str(tmp_path / "merged"))


def test_faults_of_the_server_behind_are_told(
    place: Path, merged: Path, there: tuple[str, Any], tmp_path: Path
) -> None:
    url = there[0]
    with pytest.raises(Unreachable, match="is vLLM up"):
        Remote("http://127.0.0.1:9/v1", str(merged))
    with pytest.raises(InputError, match="ptuning merge"):
        Remote(url, str(place / "model"))
    remote = Remote(url, str(merged), waiting=2)
    with pytest.raises(InputError, match="'rome' is not merged into this model; it has 'capital'"):
        remote.take_on("rome", servers.prompt(place, "capital"))
    with pytest.raises(InputError, match="merge it again"):
        remote.take_on("mood", servers.prompt(place, "capital"))
    again = servers.prompt(place, "capital")
    again.vectors = again.trained_vectors() + 1  # as another training gives
    with pytest.raises(InputError, match="other vectors"):
        remote.take_on("capital", again)
    handle = remote.take_on("capital", servers.prompt(place, "capital"))
    row = servers.ROWS["capital"]
    with pytest.raises(TooLate):
        asyncio.run(Remote(url, str(merged)).answer(handle, [row], _wish(0.5, limit=99)))
    with pytest.raises(Overloaded):
        asyncio.run(remote.answer(handle, [row] * 3, _wish()))


def test_the_command_stands_in_front_of_it(
    place: Path, merged: Path, there: tuple[str, Any]
) -> None:

    options = ["--backend", "vllm", "--url", there[0], "--model", str(merged)]
    with servers.serving(str(place / "prompts"), *options) as server:
        path = f"{server.url}/v1/prompts/mood/predict"
        (said,) = servers.post(path, json={"fields": servers.ROWS["mood"]}).json()["predictions"]
        about = servers.get(f"{server.url}/v1/prompts/mood").json()
        assert server.end() == 0
    (right,) = ptuning.predict_details(
        *servers.model(place), servers.prompt(place, "mood"), [servers.ROWS["mood"]]
    )
    assert said["answer"] == right.answer
    assert said["probabilities"] == pytest.approx(right.probabilities, abs=1e-5)
    assert about["virtual_tokens"] is None


def test_the_first_fault_of_a_request_ends_the_rest_of_it(
    place: Path, merged: Path, there: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote(there[0], str(merged))
    handle = remote.take_on("capital", servers.prompt(place, "capital"))
    waiting: list[int] = []

    async def post(body: dict[str, Any], wish: Wish) -> Any:
        if len(waiting) == 2:
            raise Unreachable("vLLM says 500")
        waiting.append(1)
        try:
            await asyncio.Event().wait()
        finally:
            waiting.remove(1)

    monkeypatch.setattr(remote, "_post", post)

    async def ask() -> int:
        with pytest.raises(Unreachable, match="vLLM says 500"):
            await remote.answer(handle, [servers.ROWS["capital"]] * 3, _wish())
        return len(waiting)

    assert asyncio.run(ask()) == 0 == remote.depth


@pytest.mark.parametrize("name", ["capital", "mood", "pair"])
@pytest.mark.parametrize("limit", [None, 7])
def test_what_goes_there_has_room_in_its_context(
    place: Path, merged: Path, there: tuple[str, Any], name: str, limit: int | None
) -> None:
    remote = Remote(there[0], str(merged))
    prompt = servers.prompt(place, name)
    prompt.answer_tokens = None
    handle = remote.take_on(name, prompt)
    row = dict.fromkeys(servers.ROWS[name], "is of it " * 80)  # words of one token
    there[1].state.asked.clear()
    (answer,) = asyncio.run(remote.answer(handle, [row], _wish(limit=limit)))
    (body,) = there[1].state.asked
    assert answer.shortened and body["max_tokens"] == (limit or 64 if name == "capital" else 1)
    longest = max(map(len, body["prompt"])) + body["max_tokens"]
    assert 126 <= longest <= 128  # as vLLM counts; and no more is cut than must be


def test_no_more_is_written_there_than_the_server_writes(
    place: Path, merged: Path, there: tuple[str, Any]
) -> None:
    remote = Remote(there[0], str(merged))
    handle = remote.take_on("capital", servers.prompt(place, "capital"))
    there[1].state.asked.clear()

    async def ask() -> None:
        for asked, row in ((handle, servers.ROWS["capital"]), (remote.plain, {"text": "Rome"})):
            await remote.answer(asked, [row], _wish(most=3))

    asyncio.run(ask())
    assert [body["max_tokens"] for body in there[1].state.asked] == [3, 3]


def test_streamed_labels_need_room_too(place: Path, merged: Path, there: tuple[str, Any]) -> None:
    remote = Remote(there[0], str(merged), waiting=0)
    handle = remote.take_on("mood", servers.prompt(place, "mood"))

    async def ask() -> list[Any]:
        return [part async for part in remote.stream(handle, servers.ROWS["mood"], _wish())]

    with pytest.raises(Overloaded):
        asyncio.run(ask())


def _said(remote: Remote, told: Callable[[], Any], status: int = 200) -> list[Any]:
    """What stands behind `remote` says, whatever it is asked; gives the bodies that come there."""
    asked: list[Any] = []

    async def answered(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(status, content=told())

    transport = httpx.MockTransport(answered)
    remote._there = lambda: httpx.AsyncClient(transport=transport, base_url="http://x")
    return asked


def test_a_stream_that_takes_too_long_says_so_to_whoever_reads_on(
    merged: Path, there: tuple[str, Any]
) -> None:
    remote = Remote(there[0], str(merged))

    async def slow() -> AsyncIterator[bytes]:
        yield b'data: {"choices": [{"text": "Oslo"}]}\n\n'
        await asyncio.Event().wait()

    async def ask() -> str:
        _said(remote, slow)
        parts = remote.stream(remote.plain, {"text": "Rome"}, _wish(1))
        first = await asyncio.create_task(_next(parts))  # as the server looks for an early fault
        began = time.monotonic()
        with pytest.raises(TooLate):
            await asyncio.wait_for(asyncio.create_task(_next(parts)), 60)
        assert time.monotonic() - began < 30  # and was not ended from here
        return str(first)

    assert asyncio.run(ask()) == "Oslo"
    assert remote.depth == 0


@pytest.mark.parametrize("end", ["stop", "length"])
def test_a_stream_says_whether_the_answer_has_ended(
    merged: Path, there: tuple[str, Any], end: str
) -> None:
    remote = Remote(there[0], str(merged))
    ends = (("Os", None, [-1.0]), ("lo", end, [-2.0]), ("", None, []))
    said = [
        {"text": part, "finish_reason": reason, "logprobs": {"token_logprobs": known}}
        for part, reason, known in ends
    ]
    told = b"".join(b"data: " + json.dumps({"choices": [one]}).encode() + b"\n\n" for one in said)
    told += b'data: {"choices": []}\n\ndata: [DONE]\n\n'

    async def ask() -> list[Any]:
        _said(remote, lambda: told)
        return [part async for part in _streamed(remote, {"text": "Rome"})]

    *parts, last = asyncio.run(ask())
    assert parts == ["Os", "lo"] and last.text == "Oslo" and last.complete == (end == "stop")
    assert last.written == 2 and last.probability == pytest.approx(math.exp(-3))


async def _next(parts: AsyncIterator[Any]) -> Any:
    return await anext(parts)


@pytest.mark.parametrize("said", [b"<html>busy</html>", b'{"choices": null}', b"[]", b"7"])
def test_an_answer_of_another_kind_is_the_fault_of_the_server_behind(
    merged: Path, there: tuple[str, Any], said: bytes
) -> None:
    remote = Remote(there[0], str(merged))
    shown = re.escape(said.decode())

    async def ask() -> None:
        _said(remote, lambda: said)
        with pytest.raises(Unreachable, match=f"not answer as it should: {shown}"):
            await remote.answer(remote.plain, [{"text": "Rome"}], _wish())
        _said(remote, lambda: b"data: " + said + b"\n\n")
        with pytest.raises(Unreachable, match=f"not answer as it should: {shown}"):
            await _next(remote.stream(remote.plain, {"text": "Rome"}, _wish()))

    asyncio.run(ask())


@pytest.mark.parametrize(
    "choices",
    [
        [{"index": 0, "text": " a"}, {"index": 1, "text": " a"}],
        [{"index": 0, "prompt_logprobs": None}, {"index": 1, "prompt_logprobs": None}],
        [{"index": 0, "prompt_logprobs": [None, {"5": {"logprob": -1.0}}]}],
        [{"text": " a"}],
    ],
)
def test_a_server_behind_that_compares_no_labels_is_told_of(
    place: Path, merged: Path, there: tuple[str, Any], choices: list[Any]
) -> None:
    remote, row = Remote(there[0], str(merged)), servers.ROWS["mood"]
    handle = remote.take_on("mood", servers.prompt(place, "mood"))
    _said(remote, lambda: json.dumps({"choices": choices}).encode())
    with pytest.raises(Unreachable, match="it tells no prompt_logprobs"):
        asyncio.run(remote.answer(handle, [row], _wish()))


def test_a_label_matrix_is_applied_to_what_the_server_tells_of_the_words(
    place: Path, merged: Path, there: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote(there[0], str(merged))
    matrix = torch.tensor([[0.0, 0.5], [-1.0, 2.0]])
    mood = servers.prompt(place, "mood")
    mood.label_matrix = LabelMatrix.trained(matrix, mood.labels)
    handle = remote.take_on("mood", mood)

    async def post(body: dict[str, Any], wish: Wish) -> Any:
        told = []
        for number, ids in enumerate(body["prompt"]):
            known = [{str(i): {"logprob": 0.0}} for i in ids]
            known[-1][str(ids[-1])]["logprob"] = (-2.0, -1.0)[number]
            told.append({"index": number, "prompt_logprobs": known})
        return told

    monkeypatch.setattr(remote, "_post", post)
    (answer,) = asyncio.run(remote.answer(handle, [servers.ROWS["mood"]], _wish()))
    # Around their mean of -1.5: -2 + 0.5 * 0.5 and -1 + 0.5 + 2 * 0.5.
    expected = torch.tensor([-1.75, 0.5]).softmax(0).tolist()
    assert list(answer.probabilities.values()) == pytest.approx(expected)


def test_a_large_bias_is_weighed_against_as_small_a_share(
    place: Path, merged: Path, there: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote(there[0], str(merged))
    prompt = replace(servers.prompt(place, "mood"), label_bias={"good": 0.0, "bad": 900.0})
    handle = remote.take_on("mood", prompt)

    async def post(body: dict[str, Any], wish: Wish) -> Any:
        told = []
        for number, ids in enumerate(body["prompt"]):
            known = [{str(i): {"logprob": 0.0}} for i in ids]
            known[-1][str(ids[-1])]["logprob"] = (0.0, -901.0)[number]
            told.append({"index": number, "prompt_logprobs": known})
        return told

    monkeypatch.setattr(remote, "_post", post)
    (answer,) = asyncio.run(remote.answer(handle, [servers.ROWS["mood"]], _wish()))
    expected = torch.tensor([0.0, -1.0]).softmax(0).tolist()
    assert answer.text == "good"
    assert list(answer.probabilities.values()) == pytest.approx(expected)


def test_the_key_of_the_server_behind_goes_there(
    merged: Path, there: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = httpx.get, list[Any]()
    monkeypatch.setattr(httpx, "get", lambda url, **o: seen.append(o["headers"]) or real(url, **o))
    remote = Remote(there[0], str(merged), key="theirs")
    assert seen == [{"Authorization": "Bearer theirs"}]
    assert remote._there().headers["authorization"] == "Bearer theirs"
    assert "authorization" not in Remote(there[0], str(merged))._there().headers


def test_what_is_asked_there_is_greedy_and_ends_at_the_stops(
    place: Path, merged: Path, there: tuple[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(merged, tmp_path / "merged")
    (tmp_path / "merged" / "logit_bias.json").write_text('{"5": -100}')
    remote = Remote(there[0], str(tmp_path / "merged"))
    handle = remote.take_on("capital", servers.prompt(place, "capital"))
    choice = {
        "text": " Oslo is it",
        "finish_reason": "length",
        "logprobs": {"token_logprobs": [-1, -2]},
    }
    told = json.dumps({"choices": [choice]}).encode()

    async def ask() -> list[Answer]:
        asked = _said(remote, lambda: told)
        wish = _wish(stop=("no such text", " is"))
        answers = await remote.answer(handle, [servers.ROWS["capital"]], wish)
        (body,) = asked
        assert body["stop"] == ["no such text", " is"] and body["logit_bias"] == {"5": -100}
        assert (body["temperature"], body["repetition_penalty"]) == (0, 1.0)
        with pytest.raises(TooLate):
            await remote.answer(handle, [servers.ROWS["capital"]], _wish(-1))
        assert len(asked) == 1
        return answers

    (answer,) = asyncio.run(ask())
    assert (answer.text, answer.complete, answer.written) == ("Oslo", False, 2)
    assert answer.probability == pytest.approx(math.exp(-3))


@pytest.mark.parametrize(
    ("status", "told", "message"),
    [
        (400, b'{"error": {"message": "too long"}}', "vLLM says 400: too long$"),
        (503, b"busy", "vLLM says 503: busy$"),
        (200, b'{"error": "of the model"}', "vLLM says: of the model$"),
    ],
)
def test_faults_of_the_server_behind_are_told_in_its_words(
    merged: Path, there: tuple[str, Any], status: int, told: bytes, message: str
) -> None:
    remote, row = Remote(there[0], str(merged)), {"text": "Rome"}

    async def ask() -> None:
        _said(remote, lambda: told, status)
        with pytest.raises(Unreachable, match=message):
            await remote.answer(remote.plain, [row], _wish())
        _said(remote, lambda: told if status >= 400 else b"data: " + told + b"\n\n", status)
        with pytest.raises(Unreachable, match=message):
            await _next(remote.stream(remote.plain, row, _wish()))
        await remote.close()
        for asked in (remote.answer(remote.plain, [row], _wish()), _next(_streamed(remote, row))):
            with pytest.raises(Stopping):
                await asked

    asyncio.run(ask())


def _streamed(remote: Remote, row: dict[str, str]) -> AsyncIterator[Any]:
    return remote.stream(remote.plain, row, _wish())
