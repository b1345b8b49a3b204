"""What stands in front of requests, and what is refused before anything is loaded."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from typer.testing import CliRunner

from ptuning.cli.app import app as commands
from ptuning.errors import InputError
from ptuning.serving import gate
from ptuning.serving.gate import Gate, Limits, Refused, check_json
from ptuning.serving.run import listening


class Application:
    """Answers at once, but at /slow when it is let."""

    def __init__(self) -> None:
        self.let, self.inside, self.bodies = asyncio.Event(), 0, list[bytes]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        if scope["path"] == "/slow":
            self.inside += 1
            await self.let.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def _ask(before: Gate, path: str, receive: Any = None, headers: Any = ()) -> int:
    sent: list[Any] = []

    async def nothing() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), *headers]
    method = "GET" if receive is None else "POST"
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    await before(scope, receive or nothing, send)
    return int(sent[0]["status"])


@pytest.mark.parametrize("path", ["/health", "/", "/docs", "/metrics"])
def test_a_full_server_says_that_it_lives(path: str) -> None:
    async def run() -> tuple[int, int, int]:
        application = Application()
        limits = Limits(waiting=600, batch=2)
        full = Gate(application, None, limits)
        slow = [asyncio.create_task(_ask(full, "/slow")) for _ in range(limits.requests)]
        while application.inside < len(slow):
            await asyncio.sleep(0)
        answers = await _ask(full, path), await _ask(full, "/v1/models"), len(slow)
        application.let.set()
        assert set(await asyncio.gather(*slow)) == {200}
        assert await _ask(full, "/v1/models") == 200  # all others have gone
        return answers

    health, other, inside = asyncio.run(run())
    assert (health, other) == (200, 429)
    assert inside == 602  # with one row each all that may wait, and a batch


def test_an_open_page_waits_for_no_body() -> None:
    async def never() -> Any:
        raise AssertionError("the body was asked for")

    async def run() -> tuple[int, list[bytes]]:
        application = Application()
        return await _ask(Gate(application, None, Limits()), "/health", never), application.bodies

    assert asyncio.run(run()) == (200, [b""])


def test_a_request_whose_client_leaves_in_its_midst_is_not_worked_on() -> None:
    messages = iter(
        [
            {"type": "http.request", "body": b'{"a": 1}', "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> Any:
        return next(messages)

    application = Application()
    assert asyncio.run(_ask(Gate(application, None, Limits()), "/v1", receive)) == 400
    assert application.bodies == []


def test_what_nobody_has_a_word_for_is_told_as_other_errors_are(
    capfd: pytest.CaptureFixture[str],
) -> None:
    ended: list[tuple[str, int]] = []
    sent: list[Any] = []

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError("of a division")

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    before = Gate(failing, None, Limits(), lambda path, status, _: ended.append((path, status)))
    scope = {"type": "http", "method": "GET", "path": "/v1", "headers": []}
    asyncio.run(before(scope, receive, send))
    error = json.loads(sent[1]["body"])["error"]
    assert (sent[0]["status"], error["type"]) == (500, "server_error")
    assert error["message"] == "the server failed (ZeroDivisionError)"
    assert ended == [("(none)", 500)]
    assert "of a division" in capfd.readouterr().err  # the log has the whole


def test_a_body_is_json_where_it_is_called_so() -> None:
    for kind in (b"application/json", b"Application/JSON ; charset=utf-8"):
        check_json(b"{}", kind)
    for other in (b"text/json", b"text/plain;application/json", b"application/x-json", b""):
        with pytest.raises(Refused, match="send application/json") as refused:
            check_json(b"{}", other)
        assert refused.value.status == 415


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 413)])
@pytest.mark.parametrize("told", [False, True])
def test_a_body_may_be_as_large_as_the_limit(told: bool, more: int, status: int) -> None:
    body = b'{"a": "b"}' + b" " * more

    async def whole() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    told_length = [(b"content-length", str(len(body)).encode())] if told else []
    before = Gate(Application(), None, Limits(body=10))
    assert asyncio.run(_ask(before, "/v1/models", whole, told_length)) == status


def test_a_refusal_is_said_before_the_rest_of_the_body_is_heard() -> None:
    sent: list[Any] = []
    told = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def chunks() -> Any:
        told.append(len(sent))
        return {"type": "http.request", "body": b" " * 8, "more_body": len(told) < 9}

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1", "headers": headers}
    asyncio.run(Gate(Application(), None, Limits(body=20))(scope, chunks, send))
    assert told == [0, 0, 0, *[2] * 6]  # the status and the reason stand before the rest
    assert sent[0]["status"] == 413 and b"larger than 20 bytes" in sent[1]["body"]
    assert [message.get("more_body") for message in sent] == [None, True, None]


def test_a_body_that_never_ends_is_not_heard_for_ever() -> None:
    async def endless() -> Any:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b" " * 8, "more_body": True}

    before = Gate(Application(), None, Limits(body=20, body_seconds=0.2))
    assert asyncio.run(_ask(before, "/v1", endless)) == 413


@pytest.mark.parametrize(("size", "apart"), [(10, False), (10**6, True)])
def test_a_large_body_is_read_beside_the_other_requests(
    size: int, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, read = b'{"a": "' + b"a" * size + b'"}', list[bool]()

    def check(body: bytes, kind: bytes) -> None:
        read.append(threading.current_thread() is not threading.main_thread())
        check_json(body, kind)

    async def whole() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    monkeypatch.setattr(gate, "check_json", check)
    application = Application()
    assert asyncio.run(_ask(Gate(application, None, Limits()), "/v1", whole)) == 200
    assert read == [apart] and application.bodies == [body]


def test_a_host_that_is_no_name_is_refused_in_a_line() -> None:
    with pytest.raises(InputError, match=r"cannot listen on \.\.a port 0"):
        listening("..a", 0)


@pytest.mark.parametrize(
    ("option", "value"), [("--dtype", "float16"), ("--max-batch", "8"), ("--frozen", "int8")]
)
def test_options_of_the_model_here_are_refused_in_front_of_vllm(option: str, value: str) -> None:
    command = ["serve", "x", "--backend", "vllm", "--url", "http://127.0.0.1:9/v1", option, value]
    error = CliRunner().invoke(commands, command).exception
    assert isinstance(error, InputError)
    assert f"{option} is for --backend local" in str(error)


@pytest.mark.parametrize("option", ["--timeout", "--body-timeout"])
@pytest.mark.parametrize("seconds", ["0", "inf", "nan"])
def test_times_that_never_come_are_refused_before_anything_is_loaded(
    option: str, seconds: str
) -> None:
    found = CliRunner().invoke(commands, ["serve", "x", option, seconds])
    assert found.exit_code == 2 and option in found.output


@pytest.mark.parametrize(
    "key", ["", "short", "a key of tests", "a-key-of-tests\n", "a-key-öf-tests"]
)
def test_a_key_that_nobody_could_send_is_refused(key: str) -> None:
    error = CliRunner().invoke(commands, ["serve", "x"], env={"PTUNING_API_KEY": key}).exception
    assert isinstance(error, InputError)
    assert ("PTUNING_API_KEY is empty" if not key else "at least 8 ASCII characters") in str(error)
