from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="ptuning serve needs the extra 'serve'")
pytest.importorskip("prometheus_client", reason="ptuning serve needs the extra 'serve'")
httpx = pytest.importorskip("httpx", reason="ptuning serve needs the extra 'serve'")

from . import servers  # noqa: E402


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its prompts; leave it as it is."""
    folder = tmp_path_factory.mktemp("serving")
    servers.make(folder)
    return folder


@pytest.fixture(scope="session")
def server(place: Path) -> Iterator[servers.Server]:
    """A running server of these prompts, without a key; leave it as it is."""
    limits = ["--max-body", "20000", "--body-timeout", "5", "--max-rows", "40"]
    with servers.serving(place / "prompts", *limits) as running:
        yield running


@pytest.fixture
def client(server: servers.Server) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, timeout=300) as made:
        yield made
