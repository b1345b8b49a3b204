"""Steps on a CPU with compiled layers against plain ones."""

from __future__ import annotations

import math
import shutil
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ptuning
from ptuning.forward import attention_products, compiled_on_cpu, shared_prefix
from ptuning.forward.compiled_on_cpu import LayersOnCpu
from ptuning.forward.engine import Engine, Work
from ptuning.training import compiled_steps
from ptuning.training.compiled_steps import CompiledSteps

from .. import tiny
from .test_cuda_graphs import AFTER, FRONT, ROWS, WORDS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's are in its graphs")
LONG = [{**row, "text": row["text"] * 2} for row in ROWS]
LONGER = [{**row, "text": row["text"] * 4} for row in ROWS]  # so that heads pay off there, too
HALF = torch.bfloat16
AGREE = "compiled layers: they agree with the layers as they are"


class Trained:
    """A short training of a tiny model.

    Attributes:
        notes: what was said of the layers.
        ran: how many layers ran compiled.
        kinds: how many kinds of input the layer was compiled for.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        setting: str,
        template: str = FRONT,
        words: dict[str, Any] | None = None,
        family: str = "llama",
        rows: list[dict[str, str]] = ROWS,
        backend: str = "eager",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ):
        self.notes: list[str] = []
        self.ran = self.kinds = 0
        tokenizer = tiny.tokenizer()
        column = {"answer": "label", "verbalizer": words} if words else {"answer": "answer"}
        self.prompt = ptuning.Prompt(template, **column)
        model = tiny.model(family, vocab_size=len(tokenizer)).to(dtype)

        class Heard(CompiledSteps):
            def __init__(heard, plain: Any, layers: Any, say: Any):
                super().__init__(plain, layers, lambda text: (self.notes.append(text), say(text)))

        def counted(graph: Any, inputs: Any) -> Any:
            self.kinds += 1

            def run(*given: Any) -> Any:
                self.ran += 1
                return graph.forward(*given)

            return run

        torch.compiler.reset()
        with monkeypatch.context() as patch:
            patch.setattr(compiled_steps, "CompiledSteps", Heard)
            if backend == "eager":  # what is traced; the kernels are torch's to test
                patch.setattr(torch, "compile", partial(torch.compile, backend=counted))
            self.result = ptuning.train(
                model,
                tokenizer,
                self.prompt,
                rows,
                rows[:4],
                compile=setting,
                **{"epochs": 3, "batch_size": 4, "learning_rate": 1e-2, **options},
            )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"family": "gemma2"},
        {"family": "gpt2"},
        {"template": AFTER},
        {"words": WORDS, "population": 2},
        {"words": WORDS, "rows": LONG},
        {"gradient_accumulation": 2, "prefix_cache": "off"},
        {"batch_size": 6, "rows": ROWS[:13]},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_they_give_what_plain_steps_give(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trained(monkeypatch, "off", **options)
    assert plain.notes == [] and plain.ran == 0
    fast = Trained(monkeypatch, "on", **options)
    assert fast.notes == [AGREE]
    assert fast.ran > 10
    for got, expected in zip(fast.result.history, plain.result.history, strict=True):
        assert got == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(
        fast.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("options", "kinds"),
    [({}, 1), ({"template": AFTER}, 1), ({"rows": LONG}, 2), ({"rows": LONGER, "dtype": HALF}, 2)],
    ids=["whole rows", "behind kept text", "behind a shared head, and whole rows", "in bfloat16"],
)
def test_a_layer_is_compiled_once_for_rows_behind_something_and_once_for_whole_ones(
    options: dict[str, Any], kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attention_products, shared_prefix):
        monkeypatch.setattr(module, "cpu_has_amx", lambda: True)
    assert Trained(monkeypatch, "on", **options).kinds == kinds


def test_an_encoder_s_dropout_is_drawn_as_in_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = {"encoder": ["lstm"], "encoder_dropout": [0.3]}
    plain, fast = (Trained(monkeypatch, on, grid=grid, epochs=1) for on in ("off", "on"))
    torch.testing.assert_close(
        fast.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("after", [0, 9])
def test_what_cannot_be_compiled_runs_plainly_from_then_on(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = LayersOnCpu._run, []

    def breaks(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise RuntimeError("no compiler is here\nmore")
        return run(self, *args)

    plain = Trained(monkeypatch, "off")
    monkeypatch.setattr(LayersOnCpu, "_run", breaks)
    fast = Trained(monkeypatch, "on")
    assert fast.notes[-1] == (
        "compiled layers are off: no compiler is here; the layers run as they are"
    )
    assert len(calls) == after + 1
    torch.testing.assert_close(
        fast.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("spoilt", ["output", "gradient"])
def test_a_layer_that_differs_is_not_used(
    number: int, spoilt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, seen = compiled_on_cpu._tried, []

    def wrong(*args: Any) -> Any:
        seen.append(args)
        found = list(tried(*args))
        if len(seen) == 2 * number + 2:  # a layer's plain run comes before its compiled one
            found[spoilt == "gradient"] *= 1.01
        return tuple(found)

    plain = Trained(monkeypatch, "off")
    monkeypatch.setattr(compiled_on_cpu, "_tried", wrong)
    fast = Trained(monkeypatch, "on")
    assert fast.notes == [
        "compiled layers are off: a layer is off by 1.0e-02; the layers run as they are"
    ]
    torch.testing.assert_close(
        fast.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"family": "bert", "template": "{text} [P*2] is [MASK]", "words": WORDS},
            "the model is not a causal one",
        ),
        ({"tune_model": True}, "the model is trained too"),
    ],
)
def test_what_is_not_for_them_runs_plainly_and_says_so_where_it_was_asked_for(
    options: dict[str, Any],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = Trained(monkeypatch, "on", **options)
    assert found.ran == 0
    assert f"compiled layers are off: {why}" in capsys.readouterr().err
    Trained(monkeypatch, "auto", **options)
    assert "compiled" not in capsys.readouterr().err


def test_rows_without_a_mask_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = [{"text": "France", "answer": "Paris"}] * 8
    found = Trained(monkeypatch, "on", rows=alike, template="{text} is [P*2] [MASK]",
                    prefix_cache="off")  # fmt: skip
    assert found.ran == 0 and found.notes == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("template", [FRONT, AFTER])
def test_the_compiler_s_own_kernels_give_the_same(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trained(monkeypatch, "off", template=template)
    fast = Trained(monkeypatch, "on", template=template, backend="inductor")
    assert fast.notes == [AGREE]
    torch.testing.assert_close(
        fast.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-4, rtol=0
    )


def test_the_minutes_that_a_training_may_take_are_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Work] = []
    monkeypatch.setattr(Engine, "layers_on_cpu", lambda engine, work: asked.append(work))
    # Reading the examples takes of the time, and here takes none.
    clock = SimpleNamespace(monotonic=lambda: 0.0)
    for module in ("train", "clock"):
        monkeypatch.setattr(import_module(f"ptuning.training.{module}"), "time", clock)
    Trained(monkeypatch, "auto", max_minutes=2.5)
    Trained(monkeypatch, "auto")
    assert [work.seconds for work in asked] == [150, math.inf]
    assert asked[0][:3] == asked[1][:3] and asked[0].steps == 3 * 5
