"""Threads, queues, signals and files that go wrong under a running server."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import ptuning

from . import servers

CLIENTS = 64


def _until(condition: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def _ask(url: str, name: str, key: str | None = None, row: Any = None) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = {"fields": row or servers.ROWS[name]}
    path = f"{url}/v1/prompts/{name}/predict"
    return servers.post(path, json=body, headers=headers)


def _names(url: str) -> list[str]:
    return [m["id"] for m in servers.get(f"{url}/v1/models").json()["data"][:-1]]


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    """A copy of the prompts, to be spoilt."""
    shutil.copytree(place / "prompts", tmp_path / "prompts")
    return tmp_path / "prompts"


def test_64_clients_at_once_get_the_answers_of_predict_and_memory_stays(
    place: Path, server: servers.Server
) -> None:
    texts = ["France", "Oslo", "Italy and all of its many islands", "東京", ""]
    expected: dict[tuple[str, str], Any] = {}
    base, tokenizer = servers.model(place)
    rows = {
        (name, text): dict.fromkeys(servers.ROWS[name], text)
        for name in servers.PROMPTS
        for text in texts
    }
    for name in servers.PROMPTS:
        task = servers.prompt(place, name)
        of_name = [rows[name, text] for text in texts]
        found = ptuning.predict_details(base, tokenizer, task, of_name)
        expected |= {(name, text): p for text, p in zip(texts, found, strict=True)}
    cells = list(rows)

    def one_client(number: int) -> int:
        wrong = 0
        with httpx.Client(base_url=server.url, timeout=servers.WAIT) as client:
            for turn in range(5):
                name, text = cells[(number + turn) % len(cells)]
                path = f"/v1/prompts/{name}/predict"
                response = client.post(path, json={"fields": rows[name, text]})
                assert response.status_code == 200, response.text
                (said,) = response.json()["predictions"]
                right = expected[name, text]
                alike = abs(said["probability"] - right.probability) < 1e-5
                wrong += said["answer"] != right.answer or not alike
        return wrong

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert sum(pool.map(one_client, range(CLIENTS))) == 0
        before = server.memory()
        for _ in range(2):
            assert sum(pool.map(one_client, range(CLIENTS))) == 0
    assert server.memory() < before + 32 * 2**20
    sizes = servers.get(f"{server.url}/metrics").text
    single = re.search(r'ptuning_batch_rows_bucket\{le="1.0"\} (\S+)', sizes)
    every = re.search(r"ptuning_batch_rows_count (\S+)", sizes)
    assert single and every and float(single[1]) < float(every[1])  # rows met in batches


def test_sigterm_under_load_loses_no_accepted_request(place: Path) -> None:
    results: Counter[str] = Counter()
    started = threading.Event()
    lock = threading.Lock()

    def one_client(url: str) -> None:
        while True:
            try:
                response = _ask(url, "capital")
                kind = str(response.status_code)
                if response.status_code == 200:
                    assert response.json()["predictions"][0]["answer"]
            except httpx.TransportError:
                return  # nobody listens any more
            with lock:
                results[kind] += 1
                if results[kind] > 100:
                    started.set()

    with servers.serving(place / "prompts") as server:
        clients = [threading.Thread(target=one_client, args=[server.url]) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        assert started.wait(servers.WAIT)
        assert server.end() == 0
        for client in clients:
            client.join(servers.WAIT)
            assert not client.is_alive()
        (last,) = [line for line in server.said if line.startswith("stopped: ")]
    accepted, answered = map(int, re.findall(r"\d+", last))
    assert accepted == answered == results["200"]
    assert set(results) <= {"200", "503"}


def test_ctrl_c_while_answers_are_written_lets_them_be_written(place: Path) -> None:
    with servers.serving(place / "prompts") as server:
        body = {"fields": servers.ROWS["capital"], "max_tokens": 100, "stream": True}
        path = f"{server.url}/v1/prompts/capital/predict"
        with httpx.stream("POST", path, json=body, timeout=servers.WAIT) as response:
            lines = (line for line in response.iter_lines() if line)
            first = next(lines)
            server.process.send_signal(signal.SIGINT)
            last = [first, *lines][-1]
        assert json.loads(last.removeprefix("data: "))["answer"]
        assert server.process.wait(servers.WAIT) == 0


def test_a_client_that_leaves_its_stream_frees_the_model(server: servers.Server) -> None:
    body = {"fields": servers.ROWS["capital"], "max_tokens": 100, "stream": True}
    path = f"{server.url}/v1/prompts/capital/predict"
    for _ in range(20):
        with httpx.stream("POST", path, json=body, timeout=servers.WAIT) as response:
            next(response.iter_lines())
    assert _ask(server.url, "mood").status_code == 200
    _until(lambda: "ptuning_waiting_rows 0.0" in servers.get(f"{server.url}/metrics").text)


def test_clients_that_lose_patience_free_the_model(place: Path) -> None:
    with servers.serving(place / "prompts", "--timeout", "60") as server:
        body = {"rows": [servers.ROWS["capital"]] * 250, "max_tokens": 110}
        path = f"{server.url}/v1/prompts/capital/predict"
        for _ in range(4):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(path, json=body, timeout=0.3)
        assert _ask(server.url, "mood").status_code == 200
        metrics = servers.get(f"{server.url}/metrics").text
        assert "ptuning_waiting_rows 0.0" in metrics
        assert 'path="/v1/prompts/{name}/predict",status="499"} 4.0' in metrics
        assert server.end() == 0
        assert server.said[-1] == "stopped: 5 requests accepted, 5 answered"


def test_prompts_come_go_and_break_while_others_are_served(place: Path, folder: Path) -> None:
    with servers.serving(folder) as server:
        failed: list[str] = []
        stop = threading.Event()

        def steady() -> None:
            while not stop.is_set():
                response = _ask(server.url, "mood")
                if response.status_code != 200:
                    failed.append(response.text)

        client = threading.Thread(target=steady)
        client.start()
        try:
            shutil.rmtree(folder / "pair")
            _until(lambda: _ask(server.url, "pair").status_code == 404)
            tensors = folder / "capital" / "prompt.safetensors"
            tensors.write_bytes(tensors.read_bytes()[:-40])
            refused = lambda: servers.get(f"{server.url}/v1/models").json()["refused"]  # noqa: E731
            _until(lambda: "capital" in refused())
            assert "truncated or damaged" in refused()["capital"]
            assert _ask(server.url, "capital").status_code == 200  # as it was loaded
            servers.prompt(place, "pair", seed=5).save(folder / "newcomer")
            _until(lambda: "newcomer" in _names(server.url))
            before = _ask(server.url, "newcomer", row=servers.ROWS["pair"]).json()
            servers.prompt(place, "pair", seed=6).save(folder / "newcomer")
            ask = lambda: _ask(server.url, "newcomer", row=servers.ROWS["pair"]).json()  # noqa: E731
            _until(lambda: bool(ask() != before))
            servers.prompt(place, "capital").save(folder / "capital")
            _until(lambda: not refused())
        finally:
            stop.set()
            client.join(servers.WAIT)
        assert failed == []
        assert _names(server.url) == ["capital", "mood", "newcomer"]


def test_without_the_key_nobody_gets_in(folder: Path) -> None:
    with servers.serving(folder, PTUNING_API_KEY=servers.KEY) as server:
        described = servers.get(
            f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {servers.KEY}"}
        ).json()
        wrong = [
            {},
            {"Authorization": "Bearer another"},
            {"Authorization": f"Bearer {servers.KEY}x"},
            {"Authorization": f"Bearer {servers.KEY[:-1]}"},
            {"Authorization": f"Basic {servers.KEY}"},
            {"Authorization": servers.KEY},
            {"Authorization": "Bearer"},
            {"X-Api-Key": servers.KEY},
            {"Authorization": b"Bearer \xff\xfe"},
        ]
        tried = 0
        paths = [(path, method) for path, ways in described["paths"].items() for method in ways]
        for path, method in [*paths, ("/openapi.json", "get"), ("/nowhere", "get")]:
            if path == "/health":
                continue
            for headers in wrong:
                url = server.url + path.replace("{name}", "mood")
                response = servers.request(method, f"{url}?key={servers.KEY}", headers=headers)
                assert response.status_code == 401, (path, headers)
                assert response.headers["www-authenticate"] == "Bearer"
                tried += 1
        assert tried > 70
        assert _ask(server.url, "mood", servers.KEY).status_code == 200
        assert servers.get(f"{server.url}/health").status_code == 200
        assert all("mood" not in servers.get(f"{server.url}{path}").text for path in ("/", "/docs"))


def test_names_that_leave_the_folder_are_refused(place: Path, folder: Path) -> None:
    outside = folder.parent / "outside"
    servers.prompt(place, "mood").save(outside)
    (folder / "link").symlink_to(outside)
    auth = {"Authorization": f"Bearer {servers.KEY}"}
    with servers.serving(folder, "--api-key", servers.KEY) as server:
        host, port = server.url.removeprefix("http://").split(":")

        def put(name: str) -> int:
            """As it is, which a client library would tidy up."""
            with socket.create_connection((host, int(port))) as raw:
                line = f"PUT /v1/prompts/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                raw.sendall(f"{line}Authorization: Bearer {servers.KEY}\r\n\r\n".encode())
                return int(raw.makefile("rb").readline().split()[1])

        names = ["..", "../outside", "..%2Foutside", "%2E%2E%2Foutside", "..%5Coutside", ".hidden"]
        names += [
            str(outside),
            "%2F" + str(outside).lstrip("/"),
            "link",
            "C:outside",
            "a%00b",
            "%0A",
        ]
        for name in names:
            assert put(name) in (400, 404, 405, 422), name
        models = servers.get(f"{server.url}/v1/models", headers=auth).json()
        assert [m["id"] for m in models["data"]] == ["capital", "mood", "pair", "model"]
        assert "leads out of" in models["refused"]["link"]
        # What is inside can be taken off and put back.
        prompts = f"{server.url}/v1/prompts"
        assert servers.delete(f"{prompts}/mood", headers=auth).json() == {"deleted": "mood"}
        assert _ask(server.url, "mood", servers.KEY).status_code == 404
        assert servers.delete(f"{prompts}/mood", headers=auth).status_code == 404
        assert servers.put(f"{prompts}/mood", headers=auth).json()["name"] == "mood"
        assert _ask(server.url, "mood", servers.KEY).status_code == 200


def test_more_than_may_wait_is_refused_and_the_rest_is_answered(place: Path) -> None:
    with servers.serving(place / "prompts", "--max-waiting", "8", "--max-batch", "2") as server:

        def one(number: int) -> int:
            body = {"rows": [servers.ROWS["capital"]] * 4, "max_tokens": 20}
            path = f"{server.url}/v1/prompts/capital/predict"
            response = servers.post(path, json=body)
            if response.status_code == 429:
                assert "8 may" in response.json()["error"]["message"]
                assert response.headers["retry-after"] == "1"
            else:
                assert len(response.json()["predictions"]) == 4
            return response.status_code

        with ThreadPoolExecutor(CLIENTS) as pool:
            counts = Counter(pool.map(one, range(CLIENTS)))
        assert set(counts) == {200, 429} and sum(counts.values()) == CLIENTS
        assert one(0) == 200


def test_an_answer_that_takes_too_long_is_given_up(place: Path) -> None:
    with servers.serving(place / "prompts", "--timeout", "0.3") as server:
        body = {"rows": [servers.ROWS["capital"]] * 256, "max_tokens": 110}
        path = f"{server.url}/v1/prompts/capital/predict"
        response = servers.post(path, json=body)
        assert response.status_code == 504
        assert "send fewer rows" in response.json()["error"]["message"]
        _until(lambda: _ask(server.url, "mood").status_code == 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{place}/nowhere"], "is not a folder"),
        (["{place}/prompts/mood", "{place}/prompts/../prompts/mood"], "have one name, 'mood'"),
        (["{place}/prompts", "--port", "{taken}"], "cannot listen on 127.0.0.1"),
        (["{place}/prompts", "--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
        (["{place}/prompts", "--host", "..a"], "cannot listen on ..a port 8000"),
        (["{place}/prompts", "--backend", "vllm"], "--backend vllm and --url go together"),
        (["{place}/prompts", "--api-key", "short"], "at least 8 ASCII characters"),
        (["{place}/broken"], "does not exist"),
        (["{place}/prompts/mood", "--model", "{place}/prompts"], "folder without config.json"),
    ],
    ids=lambda value: value[-1].split("/")[-1] if isinstance(value, list) else "",
)
def test_a_server_that_cannot_begin_says_why_in_a_line(
    place: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (place / "broken").mkdir(exist_ok=True)
    (place / "broken" / "prompt.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        filled = {"place": place, "taken": taken.getsockname()[1]}
        command = [
            sys.executable,
            "-m",
            "ptuning",
            "serve",
            *(a.format(**filled) for a in arguments),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=servers.WAIT, check=False
        )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_second_ctrl_c_ends_it_at_once(place: Path) -> None:
    with servers.serving(place / "prompts", "--timeout", "600") as server:
        body = {"rows": [servers.ROWS["capital"]] * 256, "max_tokens": 110}
        path = f"{server.url}/v1/prompts/capital/predict"
        asking = [threading.Thread(target=_unanswered, args=[path, body]) for _ in range(4)]
        for one in asking:  # far more than is answered before the second signal
            one.start()
        _until(lambda: "ptuning_waiting_rows 0.0" not in servers.get(f"{server.url}/metrics").text)
        server.process.send_signal(signal.SIGINT)
        _until(lambda: not _listens(server.url))  # the first has come
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(servers.WAIT) == 130
        for one in asking:
            one.join(servers.WAIT)
            assert not one.is_alive()


def _unanswered(path: str, body: Any) -> None:
    with suppress(httpx.TransportError):
        servers.post(path, json=body)


def _listens(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def test_a_prompt_taken_off_and_put_back_under_load_loses_no_request(folder: Path) -> None:
    auth = {"Authorization": f"Bearer {servers.KEY}"}
    with servers.serving(folder, PTUNING_API_KEY=servers.KEY) as server:
        stop, counts = threading.Event(), Counter[int]()

        def steady() -> None:
            while not stop.is_set():
                counts[_ask(server.url, "mood", servers.KEY).status_code] += 1

        clients = [threading.Thread(target=steady) for _ in range(8)]
        for client in clients:
            client.start()
        try:
            for _ in range(5):
                for change in (servers.delete, servers.put):
                    told = change(f"{server.url}/v1/prompts/mood", headers=auth)
                    assert told.status_code in (200, 201), told.text
                before = counts[200]
                _until(lambda least=before: counts[200] > least)  # type: ignore[misc]
        finally:
            stop.set()
            for client in clients:
                client.join(servers.WAIT)
        assert set(counts) <= {200, 404} and counts[404]
        assert _ask(server.url, "mood", servers.KEY).status_code == 200
