"""The backend in this process, without HTTP."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

import ptuning
from ptuning.backbone.base_model import BaseModel
from ptuning.serving.backend import Wish
from ptuning.serving.local import Local

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
