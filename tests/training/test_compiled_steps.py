"""Steps on a CPU with compiled layers against plain ones."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
import torch

import ptuning
from ptuning.forward import compiled
from ptuning.training import loop

from .. import tiny
from .test_cuda_graphs import AFTER, FRONT, ROWS, WORDS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's are in its graphs")
LONG = [{**row, "text": row["text"] * 2} for row in ROWS]


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
        **options: Any,
    ):
        self.notes: list[str] = []
        self.ran = self.kinds = 0
        tokenizer = tiny.tokenizer()
        column = {"answer": "label", "verbalizer": words} if words else {"answer": "answer"}
        self.prompt = ptuning.Prompt(template, **column)
        model = tiny.model(family, vocab_size=len(tokenizer))

        def heard(*args: Any) -> Any:
            *others, say = args
            return made(*others, lambda text: (self.notes.append(text), say(text)))

        def counted(graph: Any, inputs: Any) -> Any:
            self.kinds += 1

            def run(*given: Any) -> Any:
                self.ran += 1
                return graph.forward(*given)

            return run

        made = loop.compiled_or_plain
        torch.compiler.reset()
        with monkeypatch.context() as patch:
            patch.setattr(loop, "compiled_or_plain", heard)
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
    assert fast.notes == ["compiled layers: the first step agrees"]
    assert fast.ran > 10
    for got, expected in zip(fast.result.history, plain.result.history, strict=True):
        assert got == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(
        fast.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("options", "kinds"),
    [({}, 1), ({"template": AFTER}, 1), ({"rows": LONG}, 2)],
    ids=["whole rows", "behind kept text", "behind a shared head, and whole rows"],
)
def test_a_layer_is_compiled_once_for_rows_behind_something_and_once_for_whole_ones(
    options: dict[str, Any], kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Trained(monkeypatch, "on", **options).kinds == kinds


@pytest.mark.parametrize("encoder_dropout", [0.0, 0.3])
def test_the_first_step_that_is_compared_trains_nobody(
    encoder_dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"grid": {"encoder_dropout": [encoder_dropout]}, "epochs": 1}
    plain, fast = (Trained(monkeypatch, setting, **options) for setting in ("off", "on"))
    torch.testing.assert_close(
        fast.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-6, rtol=0
    )


def test_without_a_compiler_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler is here\nmore")

    plain = Trained(monkeypatch, "off")
    monkeypatch.setattr(compiled.CompiledLayers, "_forward", broken)
    fast = Trained(monkeypatch, "on")
    assert fast.notes == [
        "compiled layers are off: no compiler is here; the layers run as they are"
    ]
    assert torch.equal(fast.prompt.trained_vectors(), plain.prompt.trained_vectors())


def test_layers_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, number: int, layer: Any, *args: Any, **more: Any) -> Any:
        return 1.1 * type(layer).forward(layer, *args, **more)

    plain = Trained(monkeypatch, "off")
    monkeypatch.setattr(compiled.CompiledLayers, "_forward", wrong)
    fast = Trained(monkeypatch, "on")
    (note,) = fast.notes
    assert note.startswith("compiled layers are off: they are off by ")
    assert torch.equal(fast.prompt.trained_vectors(), plain.prompt.trained_vectors())


@pytest.mark.parametrize(
    "options",
    [
        {"family": "bert", "template": "{text} [P*2] is [MASK]", "words": WORDS},
        {"tune_model": True},
        {"mixed_precision": "no", "setting": "auto"},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_what_is_not_for_them_runs_plainly(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Trained(monkeypatch, options.pop("setting", "on"), **options)
    assert found.notes == [] and found.ran == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("template", [FRONT, AFTER])
def test_the_compiler_s_own_kernels_give_the_same(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trained(monkeypatch, "off", template=template)
    fast = Trained(monkeypatch, "on", template=template, backend="inductor")
    assert fast.notes == ["compiled layers: the first step agrees"]
    torch.testing.assert_close(
        fast.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-4, rtol=0
    )
