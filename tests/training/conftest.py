"""A tiny model and its tokenizer, for what trains."""

from __future__ import annotations

from typing import Any

import pytest

from .. import tiny


@pytest.fixture
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return tiny.model("llama", vocab_size=len(tokenizer))
