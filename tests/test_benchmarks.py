"""The benchmarks' own sides still run: what they time is the package as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import tiny

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("after", [False, True])
def test_both_sides_take_a_step(after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sides import Ours, Theirs, rendered
    from workloads import texts

    base = tiny.model("llama")
    given = texts(base, 2, 16)
    side = Ours(base)
    try:
        before = side.population.tables().detach().clone()
        side.step(rendered(given, after=after), lambda: None)()
        assert not torch.equal(side.population.tables(), before)
    finally:
        side.population.close()
    Theirs(tiny.model("llama")).step(given)()
