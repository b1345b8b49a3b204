"""What the server answers: the same as `predict`, and a clear word where it cannot."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
import torch

import ptuning
from ptuning.serving import app as app_module
from ptuning.serving.app import application
from ptuning.serving.registry import Registry

from . import servers


def _post(client: Any, path: str, body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def _message(response: Any) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


@pytest.mark.parametrize("name", list(servers.PROMPTS))
@pytest.mark.parametrize("virtual", [True, False])
def test_answers_are_those_of_predict(place: Path, client: Any, name: str, virtual: bool) -> None:
    row = servers.ROWS[name]
    field = next(iter(row))
    rows = [row, {**row, field: "Italy and all of its many islands"}, {**row, field: None}]
    body = {"rows": rows, "virtual_tokens": virtual}
    said = _post(client, f"/v1/prompts/{name}/predict", body)["predictions"]
    task: Any = servers.prompt(place, name)
    task = task if virtual else task.manual()
    for answer, alone in zip(
        said, ptuning.predict_details(*servers.model(place), task, rows), strict=True
    ):
        assert answer["answer"] == alone.answer
        assert answer["probability"] == pytest.approx(alone.probability, abs=1e-5)
        assert answer["probabilities"] == pytest.approx(alone.probabilities, abs=1e-5)


def test_models_are_the_prompts_and_then_the_base_model(client: Any) -> None:
    listed = client.get("/v1/models").json()
    assert [entry["id"] for entry in listed["data"]] == ["capital", "mood", "pair", "model"]
    mood = listed["data"][1]
    assert mood["fields"] == ["text"] and mood["labels"] == ["good", "bad"]
    assert mood["base_model"] == "model"  # not a path of the server
    assert listed["refused"] == {}
    for entry in listed["data"]:
        assert client.get(f"/v1/models/{entry['id']}").json() == entry


@pytest.mark.parametrize("path", ["/v1/models/%s", "/v1/prompts/%s", "/%s"])
def test_a_long_name_of_nothing_is_told_short(client: Any, path: str) -> None:
    response = client.get(path % ("x" * 5000))
    assert response.status_code == 404 and len(response.content) < 600
    assert "xxx" in _message(response)


def test_a_client_that_sends_all_before_it_listens_hears_why_it_is_refused(
    server: servers.Server,
) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {_PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = b" " * 2**25  # more than the sockets' buffers hold
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (
            response.status == 413
            and "larger than" in json.loads(response.read())["error"]["message"]
        )


def test_a_prompt_tells_its_nearest_words_and_its_training(client: Any) -> None:
    about = client.get("/v1/prompts/capital").json()
    assert about["template"] == servers.PROMPTS["capital"][0]
    assert about["by_hand"] == "{country} is [MASK]"
    assert [len(token["nearest"]) for token in about["virtual_tokens"]] == [5, 5, 5, 5]
    assert about["history"] == []


def test_a_stream_tells_the_answer_part_by_part(client: Any) -> None:
    body = {"fields": servers.ROWS["capital"]}
    whole = _post(client, "/v1/prompts/capital/predict", body)["predictions"][0]
    with client.stream("POST", "/v1/prompts/capital/predict", json={**body, "stream": True}) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in got.iter_lines() if line]
    *parts, last = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(part["text"] for part in parts) == whole["answer"] == last["answer"]
    assert len(parts) > 1
    assert last["probability"] == pytest.approx(whole["probability"], abs=1e-6)


def test_openais_client_completes_and_chats(server: servers.Server, client: Any) -> None:
    openai = pytest.importorskip("openai")
    theirs = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    body = {"rows": [{"country": "France"}, {"country": "Oslo"}]}
    said = [p["answer"] for p in _post(client, "/v1/prompts/capital/predict", body)["predictions"]]
    made = theirs.completions.create(model="capital", prompt=["France", "Oslo"], temperature=0)
    assert [choice.text for choice in made.choices] == said
    assert made.usage.prompt_tokens > 0
    turns: Any = [{"role": "user", "content": [{"type": "text", "text": "France"}]}]
    chat = theirs.chat.completions.create(model="capital", messages=turns)
    assert chat.choices[0].message.content == said[0]
    short = theirs.chat.completions.create(model="capital", messages=turns, max_completion_tokens=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)
    parts = theirs.chat.completions.create(model="capital", messages=turns, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == said[0]
    with theirs.chat.completions.stream(model="mood", messages=turns) as events:
        joined = events.get_final_completion().choices[0]
    assert (joined.message.role, joined.finish_reason) == ("assistant", "stop")
    pair = theirs.completions.create(
        model="pair", prompt="", extra_body={"fields": servers.ROWS["pair"]}
    )
    as_text = theirs.completions.create(model="pair", prompt=json.dumps(servers.ROWS["pair"]))
    assert pair.choices[0].text == as_text.choices[0].text in ("x", "y", "z")
    base = theirs.completions.create(model="model", prompt="The capital of", max_tokens=3)
    assert base.usage.completion_tokens <= 3
    assert [theirs.models.retrieve(name).id for name in ("mood", "model")] == ["mood", "model"]
    with pytest.raises(openai.NotFoundError, match="there is no model 'rome'"):
        theirs.models.retrieve("rome")
    for usage in (False, True):
        told = theirs.completions.create(
            model="capital", prompt="France", stream=True, stream_options={"include_usage": usage}
        )
        assert [part.usage is not None for part in told if not part.choices] == [True] * usage
    with pytest.raises(openai.NotFoundError, match="there is no prompt 'rome'"):
        theirs.completions.create(model="rome", prompt="x")
    with pytest.raises(openai.UnprocessableEntityError, match="greedy"):
        theirs.completions.create(model="capital", prompt="x", temperature=0.7)


def test_the_base_model_answers_a_whole_chat_by_its_template(place: Path, client: Any) -> None:
    turns = [
        {"role": "system", "content": "Say Rome."},
        {"role": "user", "content": "France"},
        {"role": "assistant", "content": "Oslo"},
        {"role": "user", "content": [{"type": "text", "text": "and Italy"}]},
    ]
    body = {"model": "model", "messages": turns, "max_tokens": 4}
    said = _post(client, "/v1/chat/completions", body)
    model, tokenizer = servers.model(place)
    ids = tokenizer("<s>Say Rome.<s>France<s>Oslo<s>and Italy Answer:", add_special_tokens=False)
    ids = torch.tensor([ids["input_ids"]])
    made = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(made, skip_special_tokens=True).strip()
    assert said["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert said["usage"]["prompt_tokens"] == ids.shape[1]


def test_a_stop_ends_a_free_answer_for_its_row_alone(client: Any) -> None:
    body = {"model": "capital", "prompt": "France", "max_tokens": 12}
    whole = _post(client, "/v1/completions", body)["choices"][0]["text"]
    stop = whole[2:4]
    stopped = _post(client, "/v1/completions", {**body, "stop": stop})["choices"][0]
    assert stopped["text"] == whole[: whole.find(stop)].strip()
    assert stopped["finish_reason"] == "stop"


def _chat(model: str, count: int, said: str = "a", **others: Any) -> bytes:
    turns = [{"role": "user", "content": said}] * count
    return json.dumps({"model": model, "messages": turns, **others}).encode()


def _text(model: str, said: str) -> bytes:
    return json.dumps({"model": model, "prompt": said}).encode()


_PREDICT = "/v1/prompts/mood/predict"
_WRONG: list[tuple[str, bytes, int, str]] = [
    (_PREDICT, b'{"fields": {"text": "\xff"}}', 400, "no UTF-8: byte 21 is 0xff"),
    (_PREDICT, b'{"fields": ', 400, "no JSON: line 1 column 12"),
    (_PREDICT, b'{"fields": {"text": NaN}}', 400, "NaN is no JSON number"),
    (_PREDICT, b'{"fields": {"text": ' + b"9" * 5000 + b"}}", 400, "no JSON that can be read"),
    (_PREDICT, b"[" * 19_000, 400, "nested too deeply"),
    (_PREDICT, b'{"fields":' * 99 + b"1" + b"}" * 99, 400, "nested deeper than 64"),
    (_PREDICT, b'{"fields": {"text": "a", "text": "b"}}', 400, "the key 'text' stands there twice"),
    (_PREDICT, b"[1]", 422, "a JSON list; send an object"),
    (_PREDICT, b"null", 422, "a JSON null; send an object"),
    (_PREDICT, b"{}", 422, "send 'fields' for one row, or 'rows' for many"),
    (_PREDICT, b"", 422, "Field required"),
    (_PREDICT, b'{"rows": []}', 422, "rows: "),
    (_PREDICT, b'{"fields": {"text": ["a"]}}', 422, "fields.text: expected text, a number"),
    (_PREDICT, b'{"fields": {"text": "\\ud800"}}', 422, "half a surrogate pair"),
    (_PREDICT, b'{"fields": {"text": "a"}, "\\uD800": 1}', 422, "surrogate pair, '\\ud800'"),
    (_PREDICT, b'{"fields": {"text": "a", "\\udc00": 1}}', 422, "half a surrogate pair"),
    (_PREDICT, b'{"fields": {"words": "a"}}', 422, "'text' is missing; the prompt 'mood' takes"),
    (_PREDICT, b'{"fields": {"text": "a", "b": 1}}', 422, "there is no field 'b'"),
    (_PREDICT, b'{"fields": {"text": "a"}, "colour": 1}', 422, "colour is no field"),
    (_PREDICT, b'{"fields": {"text": "a"}, "max_tokens": 0}', 422, "max_tokens: "),
    (_PREDICT, b'{"fields": {"text": "a"}, "max_tokens": 9999}', 422, "at most 1024"),
    (_PREDICT, b'{"fields": {"text": "a"}, "stop": [""]}', 422, "stop: at most 4 texts"),
    (_PREDICT, json.dumps({"rows": [{"text": ""}] * 41}).encode(), 413, "at most 40 may at once"),
    (_PREDICT, b'{"fields": {"text": "' + b"a" * 20_000 + b'"}}', 413, "larger than 20000 bytes"),
    ("/v1/prompts/nobody/predict", b'{"fields": {}}', 404, "there is no prompt 'nobody'"),
    ("/v1/prompts/mood/predikt", b"{}", 404, "Not Found; see /docs"),
    ("/v1/completions", b'{"model": "pair", "prompt": "a"}', 422, "'a', 'b'; send them as"),
    (_PREDICT, b'{"fields": {"text": "\\ud800"}, "stream": true}', 422, "half a surrogate pair"),
    (
        "/v1/chat/completions",
        _chat("model", 9, "so many words " * 130, stream=True),
        422,
        "shorter",
    ),
    ("/v1/completions", _text("model", "a \ud800"), 422, "half a surrogate pair"),
    ("/v1/completions", _text("pair", "[" * 19_000), 422, "'a', 'b'; send them as"),
    ("/v1/completions", _text("pair", '{"a": NaN, "b": 1}'), 422, "'a', 'b'; send them as"),
    ("/v1/completions", b'{"model": "mood", "prompt": "a", "n": 2}', 422, "n: "),
    ("/v1/completions", b'{"model": "mood", "prompt": []}', 422, "prompt"),
    (
        "/v1/completions",
        b'{"model": "mood", "prompt": ["a", "b"], "stream": true}',
        422,
        "2 prompts came; a stream answers one",
    ),
    (_PREDICT, b'{"rows": [{"text": "a"}, {"text": "b"}], "stream": true}', 422, "2 rows came"),
    (_PREDICT, b'{"fields": {"text": "a"}, "rows": [{"text": "b"}]}', 422, "or 'rows' for many"),
    ("/v1/completions", b'{"model": "mood", "prompt": "a", "fields": {"text": "b"}}', 422, "both"),
    ("/v1/completions", b'{"model": "mood", "stream_options": {"x": 1}}', 422, "stream_options.x"),
    ("/v1/chat/completions", b'{"model": "mood", "messages": []}', 422, "messages: "),
    ("/v1/chat/completions", _chat("mood", 2), 422, "a prompt answers one message of the user"),
    ("/v1/chat/completions", _chat("model", 1, fields={}), 422, "messages and no fields"),
    ("/v1/chat/completions", _chat("model", 9, "so many words " * 130), 422, "send a shorter text"),
    ("/v1/completions", json.dumps({"model": "model", "prompt": ["a"] * 41}).encode(), 413, "40"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), _WRONG)
def test_a_wrong_request_is_told_what_is_wrong(
    client: Any, path: str, body: bytes, status: int, message: str
) -> None:
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert (response.status_code, message in _message(response)) == (status, True), response.text


def test_another_kind_of_content_and_another_method_are_refused(client: Any) -> None:
    response = client.post(_PREDICT, data={"text": "a"})
    assert response.status_code == 415 and "send application/json" in _message(response)
    response = client.get(_PREDICT)
    assert response.status_code == 405 and "Method Not Allowed" in _message(response)


def test_an_oversized_body_of_unknown_length_is_refused(client: Any) -> None:
    response = client.post(
        _PREDICT,
        content=(b" " * 5000 for _ in range(10)),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413 and "larger than 20000 bytes" in _message(response)
    assert response.headers["connection"] == "close"  # nobody reads the rest


def test_a_body_that_does_not_come_is_refused_while_others_are_served(
    server: servers.Server, client: Any
) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {_PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    slow = [socket.create_connection((host, int(port))) for _ in range(20)]
    for one in slow:
        one.sendall((head + 'Content-Length: 500\r\n\r\n{"fields"').encode())
    _post(client, _PREDICT, {"fields": {"text": "meanwhile"}})
    for one in slow:
        response = http.client.HTTPResponse(one)
        response.begin()
        assert response.status == 408
        assert "not whole after 5 seconds" in json.loads(response.read())["error"]["message"]
        one.close()
    cut = socket.create_connection((host, int(port)))
    cut.sendall((head + 'Content-Length: 500\r\n\r\n{"fields"').encode())
    cut.close()  # the client dies in the middle of its body
    body = {"fields": {"text": "afterwards"}}  # by a connection that was not idle meanwhile
    assert servers.post(server.url + _PREDICT, json=body).status_code == 200


def test_health_metrics_and_the_description_of_the_addresses(client: Any) -> None:
    assert client.get("/health").json() == {"status": "ok", "prompts": 3}
    for path in ("/", "/docs", "/health"):  # as balancers ask
        looked = client.head(path)
        assert looked.status_code == 200 and not looked.content
    _post(client, _PREDICT, {"rows": [{"text": "a"}, {"text": "b"}]})
    text = client.get("/metrics").text
    assert "ptuning_prompts 3.0" in text and "ptuning_prompts_refused 0.0" in text
    assert 'ptuning_requests_total{path="/v1/prompts/{name}/predict",status="200"}' in text
    assert 'ptuning_rows_total{prompt="mood"}' in text and "ptuning_batch_rows_bucket" in text
    assert "nobody" not in text  # names that clients make up are no labels
    described = client.get("/openapi.json").json()
    assert {"/v1/prompts/{name}/predict", "/v1/completions"} <= set(described["paths"])


def test_the_pages_load_nothing_from_elsewhere(client: Any) -> None:
    for path in ("/", "/docs"):
        response = client.get(path)
        assert response.status_code == 200
        assert "default-src 'none'" in response.headers["content-security-policy"]
        for other in ("http://", "https://", 'src="', "@import", "url("):
            assert other not in response.text.replace("http://www.w3.org/2000/svg", ""), other


def test_without_a_key_nothing_is_changed_by_http(client: Any) -> None:
    for method in ("PUT", "DELETE"):
        response = client.request(method, "/v1/prompts/mood")
        assert response.status_code == 403 and "--api-key" in _message(response)
        assert response.json()["error"]["type"] == "authentication_error"
    assert client.get("/v1/prompts/mood").status_code == 200


def _asked(backend: Any, registry: Any, method: str, path: str, **options: Any) -> Any:
    """What an application says that no server runs."""
    app = application(backend, registry, **options)

    async def ask() -> Any:
        headers = {"Authorization": f"Bearer {servers.KEY}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize(("alive", "status"), [(True, 200), (False, 503)])
def test_health_tells_whether_the_model_answers(alive: bool, status: int) -> None:
    backend = SimpleNamespace(alive=AsyncMock(return_value=alive), depth=0, name="model")
    registry = SimpleNamespace(served={}, refused={})
    assert _asked(backend, registry, "GET", "/health").status_code == status


def test_a_prompt_that_cannot_be_put_is_told_of_without_paths(place: Path) -> None:
    def take_on(name: str, prompt: Any) -> Any:
        raise ptuning.InputError(f"{place / 'prompts' / name} does not fit")

    registry = Registry([str(place / "prompts")], take_on, lambda handle: None)
    backend = SimpleNamespace(depth=0, name="model")
    for name, status in (("mood", 422), ("nobody", 404)):
        response = _asked(backend, registry, "PUT", f"/v1/prompts/{name}", key=servers.KEY)
        assert response.status_code == status and str(place) not in response.text


def test_a_look_at_the_folders_that_fails_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    looks: list[int] = []

    def rescan() -> None:
        looks.append(1)
        raise OSError(f"look {len(looks)}")

    async def look() -> None:
        looking = asyncio.create_task(app_module._look_again(SimpleNamespace(rescan=rescan)))
        while len(looks) < 3:
            assert not looking.done()
            await asyncio.sleep(0.01)
        looking.cancel()

    monkeypatch.setattr(app_module, "_RESCAN_SECONDS", 0.0)
    asyncio.run(look())
    assert "look 2" in capfd.readouterr().err
