"""The benchmarks' own sides still run: what they time is the package as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

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


def test_the_sweep_of_architectures_sees_every_column_of_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import architectures

    found = {}
    for kind in (transformers.LlamaConfig, transformers.CpmAntConfig):
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        told = architectures.tried(kind, mapping, architectures.tokenizer_of(False), masks=False)
        found[kind.__name__] = told
    assert set(found["LlamaConfig"]) == {*architectures.COLUMNS} - {"error"}
    assert found["LlamaConfig"].pop("merged") == "yes"
    assert max(found["LlamaConfig"].values()) < architectures.LIMIT
    assert set(found["CpmAntConfig"]) == {"error"}
    assert "| Bloom |" in architectures.report({"causal": found | {"Bloom": {"batch": 1.0}}}, 60.0)
    assert architectures._cell("batch", 1.0) == "**1e+00**"
