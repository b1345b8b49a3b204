"""Replayed micro-steps against plain ones; a stand-in replays by running on the static buffers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import ptuning
from ptuning.errors import InputError
from ptuning.forward import chunked, compiled, engine, static_shapes
from ptuning.forward.compiled import Work
from ptuning.forward.graphs import CudaGraph
from ptuning.forward.prefix_store import PrefixStore
from ptuning.forward.static_shapes import COARSE, FINE, StaticInputs, rows_for, shape_of
from ptuning.rendering.collate import IGNORED, Batch
from ptuning.rendering.lesson import Lesson, Lessons
from ptuning.training import checkpoint, loop
from ptuning.training.cuda_graphs import GraphedStep, obstacle
from ptuning.training.update import Update

from .. import replaying, tiny
from ..replaying import AFTER, FRONT, WORDS, Again, Failing, FailingAtItsEnd, Stale

ROWS = replaying.ROWS[:19]


class Wrong(Again):
    def replay(self) -> Any:
        outputs = self.function()
        return outputs and (outputs[0] * 1.01, outputs[1])


class WrongGradient(Again):
    def replay(self) -> Any:
        outputs = self.function()
        return outputs and (outputs[0], 1.01 * outputs[1])


def _lessons(rows: list[dict[str, str]], words: dict[str, Any] | None) -> Lessons:
    """What a teacher might say to rows: to each something else."""
    made = []
    for number in range(len(rows)):
        draw = torch.Generator().manual_seed(number)
        if words:
            shares = torch.rand(len(words), generator=draw).softmax(-1).numpy()
            made.append(Lesson(list(words)[int(shares.argmax())], shares))
        else:
            count = 2 + number % 2
            shares = torch.rand(count, 5, generator=draw).softmax(-1).numpy()
            likely = torch.randint(9, 300, (count, 5), generator=draw).numpy()
            made.append(Lesson("", shares, (*likely[:-1, 0].tolist(), 2), likely))
    return Lessons({}, made, made[:4])


class Trained:
    """A training on the tiny model, with graphs or without."""

    def __init__(self, graph: type[Again] | None, monkeypatch: pytest.MonkeyPatch, **options: Any):
        family = options.pop("family", "llama")
        template, words = options.pop("template", FRONT), options.pop("words", None)
        rows = options.pop("rows", ROWS)
        lessons = _lessons(rows, words) if options.pop("taught", False) else None
        self.made: list[GraphedStep] = []
        self.notes: list[str] = []

        def chosen(population: Any, plain: Any, _: Any, __: Any, say: Any) -> Any:
            if graph is None:
                return plain

            def note(text: str) -> None:  # a slow machine makes the training say more
                self.notes.append(text)
                say(text)

            self.made.append(GraphedStep(population, plain, nullcontext, graph, 1e-3, note))
            return self.made[-1]  # of a refit its own

        tokenizer = tiny.tokenizer()
        column = {"answer": "label", "verbalizer": words} if words else {"answer": "answer"}
        self.prompt = ptuning.Prompt(template, **column)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "graphs_or_plain", chosen)
            # What is compiled is what is traced; the compiler's own kernels are torch's to test.
            patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
            # Graphs compute whole rows, and the exact comparisons want that of the plain side too.
            patch.setattr(engine, "share_openings", lambda model, batches: None)
            self.result = ptuning.train(
                tiny.model(family, vocab_size=len(tokenizer)),
                tokenizer,
                self.prompt,
                rows,
                rows[:4],
                lessons=lessons,
                **{"epochs": 5, "batch_size": 4, "learning_rate": 1e-2, **options},
            )

    @property
    def replays(self) -> int:
        return self.made[0].replays


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder": "lstm"},
        {"encoder": "lstm", "dropout": 0.2},
        {"gradient_accumulation": 2},
        {"template": AFTER},
        {"template": AFTER, "family": "gemma2"},
        {"template": AFTER, "family": "gpt2"},
        {"family": "opt"},
        {"words": WORDS},
        {"words": {"yes": "of", "no": "not"}, "template": AFTER},
        {"words": {"yes": "not a city", "no": "Ra"}},
        {"words": WORDS, "refit": True, "word_noise": 0.5},
        {"words": WORDS, "label_matrix": True, "refit": True},
        {
            **{"words": {"yes": "of", "no": "not"}, "template": AFTER},
            **{"label_matrix": True, "population": 3},
        },
        {"words": WORDS, "label_matrix": True, "grid": {"encoder": ["mlp", "none", "lstm"]}},
        {"words": {"yes": "of", "no": "not"}, "template": AFTER, "refit": True},
        {"words": WORDS, "taught": True},
        {"words": {"yes": "not a city", "no": "Ra"}, "taught": True},
        {"taught": True, "template": AFTER},
        {"population": 3},
        {"grid": {"encoder": ["mlp", "none"]}, "template": AFTER, "epochs": 9},
        {"population": 4, "epochs": 6},
        {"grid": {"encoder": ["mixture", "none"]}, "population": 2},
        {"grid": {"init": ["words", "encoder"]}, "population": 2},
        {
            "grid": {
                "encoder": ["lstm", "none", "mlp", "residual"],
                "encoder_dropout": [0.2],
            },
            "epochs": 9,
        },
    ],
    ids=str,
)
def test_a_training_with_replayed_steps_is_the_plain_one(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # cuDNN's LSTM rounds to 10 bits by itself, and not alike in a graph.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if encoder := options.get("encoder"):
        dropout = [options.get("dropout", 0.0)]
        options = {"grid": {"encoder": [encoder], "encoder_dropout": dropout}}
    plain = Trained(None, monkeypatch, **options)
    graphed = Trained(Again, monkeypatch, **options)
    assert all(graphs.replays > 3 for graphs in graphed.made), "nothing was replayed"
    assert len(graphed.notes) == len(graphed.made)
    assert all("are replayed" in note for note in graphed.notes)
    assert graphed.result.refit == pytest.approx(plain.result.refit, abs=1e-5)
    for got, expected in zip(graphed.result.members, plain.result.members, strict=True):
        assert got["best"] == pytest.approx(expected["best"], abs=1e-5)
    for got, expected in zip(graphed.result.history, plain.result.history, strict=True):
        assert got == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(
        graphed.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )
    if "label_matrix" in options:
        made, expected = (one.prompt.label_matrix for one in (graphed, plain))
        assert made is not None and made.numbers.abs().max() > 1e-2
        # Its numbers are ten times as large as those of vectors.
        torch.testing.assert_close(made.numbers, expected.numbers, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": [{"text": "France", "answer": "Paris"}, {"text": "Italy", "answer": "Rome"}] * 5},
        {"template": AFTER},
        {"template": AFTER, "family": "gemma2"},
        {"family": "gpt2"},
        {"words": WORDS, "population": 2},
    ],
    ids=str,
)
def test_compiled_layers_are_the_plain_ones(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 4, **options}
    plain = Trained(None, monkeypatch, **options, compile="off")
    fast = Trained(Again, monkeypatch, **options, compile="on")
    assert fast.replays > 3 and "with compiled layers" in fast.notes[0], fast.notes
    torch.testing.assert_close(
        fast.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


def test_layers_that_cannot_be_compiled_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler is here\nmore")

    monkeypatch.setattr(compiled.CompiledLayers, "_forward", broken)
    graphed = Trained(Again, monkeypatch, compile="on")
    assert graphed.replays > 3 and "are replayed" in graphed.notes[1]
    assert graphed.notes[0] == (
        "compiled layers are off: no compiler is here; the layers run as they are"
    )


def test_compiled_layers_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = compiled._own
    monkeypatch.setattr(
        compiled, "_own", lambda value, n: value * 1.1 if value is not None and n == 1 and
        isinstance(value, torch.Tensor) and value.is_floating_point() else original(value, n),
    )  # fmt: skip
    plain = Trained(None, monkeypatch)
    graphed = Trained(Again, monkeypatch, compile="on")
    assert graphed.replays > 3 and "compiled layers are off: they are off by" in graphed.notes[0]
    torch.testing.assert_close(
        graphed.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


def test_compilation_is_weighed_against_the_steps_to_come() -> None:
    model = tiny.model()
    auto = Work("auto", tokens=100.0, steps=10**9)
    made = partial(compiled.layers_worth_it, model)
    assert made(auto) and not made(auto._replace(steps=10))
    assert not made(auto._replace(seconds=60.0)) and made(auto._replace(seconds=10**4))
    assert not made(auto._replace(setting="off"))
    one = Work("on", tokens=100.0, steps=1, seconds=1.0)
    assert made(one) and not compiled.layers_worth_it(torch.compile(model), one)
    with pytest.raises(InputError, match="compile is 'always'; expected one of auto, on, off"):
        replace(ptuning.TrainSettings(), compile="always")


def test_a_member_that_is_not_finite_takes_no_step_and_is_read_of_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"grid": {"learning_rate": [1e30, 1e-2]}, "halving": False}
    plain = Trained(None, monkeypatch, **options)
    graphed = Trained(Again, monkeypatch, **options)
    assert graphed.replays > 5 and graphed.result.winner == plain.result.winner == 1
    assert graphed.result.members[0]["epochs"] == plain.result.members[0]["epochs"] < 5
    torch.testing.assert_close(
        graphed.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


def test_a_run_with_graphs_resumes_plainly_and_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trained(None, monkeypatch).prompt.trained_vectors()
    for first, second in ((Again, None), (None, Again)):
        options: dict[str, Any] = {"output": tmp_path / str(first), "checkpoint_seconds": 0.0}
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", stopping_at(8))
            with pytest.raises(KeyboardInterrupt):
                Trained(first, monkeypatch, **options)
        resumed = Trained(second, monkeypatch, **options, resume=True)
        torch.testing.assert_close(resumed.prompt.trained_vectors(), whole, atol=1e-4, rtol=0)


def stopping_at(step: int) -> Any:
    save = checkpoint.save

    def stop(output: Path, at: int, state: dict[str, Any]) -> None:
        save(output, at, state)
        if at == step:
            raise KeyboardInterrupt

    return stop


def test_batches_with_and_without_a_prefix_may_have_one_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(static_shapes, "LITTLE", 0)
    template = "{text} [P*3] is this or that, is it not [P*2] [MASK]"
    rows = [{"text": f"{n}" + " is" * n, "answer": "not"} for n in range(14)]
    options: dict[str, Any] = {"template": template, "rows": rows, "batch_size": 1, "epochs": 6}
    plain = Trained(None, monkeypatch, **options)
    graphed = Trained(Again, monkeypatch, **options)
    captured = [shape[:-1] for shape in graphed.made[0].shapes]
    assert len(set(captured)) < len(captured)
    torch.testing.assert_close(
        graphed.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        (Wrong, "off by 1.0e-02"),
        (WrongGradient, "off by 1.0e-02"),
        (Failing, "failed (operation not permitted when stream is capturing)"),
        (FailingAtItsEnd, "failed (operation not permitted when stream is capturing)"),
    ],
)
def test_a_wrong_graph_is_refused_and_training_goes_on(
    graph: type[Again], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, refused = Trained(None, monkeypatch), Trained(graph, monkeypatch)
    assert refused.replays == 0 and not refused.made[0].shapes
    assert len(refused.notes) == 1 and why in refused.notes[0]
    assert "every step runs plain" in refused.notes[0]
    torch.testing.assert_close(
        refused.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


def test_memory_is_given_back_while_no_thread_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch raises an error otherwise, which would end the training."""
    waited: list[bool] = []
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: waited.append(CudaGraph.capturing.locked())
    )
    Trained(Failing, monkeypatch, epochs=1)
    assert waited == [True]


def test_a_shape_that_is_off_runs_plain_where_another_has_agreed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(static_shapes, "LITTLE", 0)
    made: list[Again] = []

    class OneIsWrong(Again):
        def replay(self) -> Any:
            outputs = self.function()
            return outputs and (outputs[0], (1.5 if made[1:2] == [self] else 1.0) * outputs[1])

        def capture(self, function: Callable[[], Any]) -> None:
            if not isinstance(function, Update):
                made.append(self)
            super().capture(function)

    options: dict[str, Any] = {"rows": ROWS, "epochs": 9}
    plain, graphed = (
        Trained(None, monkeypatch, **options),
        Trained(OneIsWrong, monkeypatch, **options),
    )
    assert len(made) > 1 and len(graphed.made[0].shapes) == len(made) - 1 and graphed.replays > 3
    assert len(graphed.notes) == 1 and "are replayed" in graphed.notes[0]
    torch.testing.assert_close(
        graphed.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


def test_where_memory_is_short_graphs_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trained(None, monkeypatch)
    original, failed, graphs = GraphedStep._plain, [], []

    class Seen(Again):
        def __init__(self) -> None:
            graphs.append(weakref.ref(self))

    def short(self: GraphedStep, batch: Any, divisor: Any) -> Any:
        own = self.plain

        def once(*arguments: Any) -> Any:
            there = sum(graph() is not None for graph in graphs)
            assert not (failed and there), "a graph holds the memory of all"
            if self.replays > 2 and not failed:
                assert there == len(self.shapes) + 1  # the update's
                failed.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return own(*arguments)

        self.plain = once
        try:
            return original(self, batch, divisor)
        finally:
            self.plain = own

    monkeypatch.setattr(GraphedStep, "_plain", short)
    graphed = Trained(Seen, monkeypatch)
    assert failed and not graphed.made[0].shapes and "too little memory" in graphed.notes[-1]
    torch.testing.assert_close(
        graphed.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("place", "name"), [(PrefixStore, "slots"), (engine.Engine, "losses_and_right")]
)
def test_graphs_make_room_for_prefixes_and_for_a_look_at_dev_too(
    place: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trained(None, monkeypatch, template=AFTER)
    original, graphs, failed = getattr(place, name), [], []

    def short(self: Any, *arguments: Any) -> Any:
        if any(one.replays > 2 for one in graphs) and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *arguments)

    made = GraphedStep.__init__

    def noted(self: GraphedStep, *arguments: Any) -> None:
        made(self, *arguments)
        graphs.append(self)

    monkeypatch.setattr(GraphedStep, "__init__", noted)
    monkeypatch.setattr(place, name, short)
    graphed = Trained(Again, monkeypatch, template=AFTER)
    assert failed and not graphs[0].shapes and "too little memory" in graphed.notes[-1]
    torch.testing.assert_close(
        graphed.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


def test_steps_that_read_in_chunks_run_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LARGEST", 10)
    assert Trained(Again, monkeypatch).replays == 0


def test_the_comparison_of_trajectories_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, stale = Trained(None, monkeypatch), Trained(Stale, monkeypatch)
    difference = stale.prompt.trained_vectors() - plain.prompt.trained_vectors()
    assert difference.abs().max() > 1e-3


def batch_of(ids: list[list[int]], answers: list[int]) -> Batch:
    inputs, rows = torch.tensor(ids), len(ids)
    return Batch(
        "causal",
        inputs,
        torch.ones_like(inputs),
        slots=torch.zeros(rows),
        answers=torch.tensor(answers)[:, None],
        example=torch.arange(rows),
        member=torch.zeros(rows, dtype=torch.long),
    )


def test_a_prefix_that_padding_leaves_no_column_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight tokens of text and 24 behind them: both are 32 columns of the coarse grain."""
    template, text = "{text} [P*18] is it so [MASK]", "is " * 7
    rows = [{"text": text, "answer": "not"}] * 6
    options: dict[str, Any] = {"template": template, "rows": rows, "epochs": 6, "batch_size": 2}
    plain = Trained(None, monkeypatch, **options)
    graphed = Trained(Again, monkeypatch, **options)
    assert graphed.replays > 3, graphed.notes
    assert [(shape.columns, shape.kept) for shape in graphed.made[0].shapes] == [(32, 0)]
    torch.testing.assert_close(
        graphed.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


def test_rows_and_columns_that_are_missing_are_filled_without_an_answer() -> None:
    whole = batch_of([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [5, 6, 7])
    shape = shape_of(whole, FINE, kept=False)._replace(kept=4)
    inputs = StaticInputs(whole, shape, 2, torch.device("cpu"))
    slots = torch.arange(12).view(3, 4).numpy()
    inputs.fill(whole, [3.0, 1.5], slots)
    inputs.fill(batch_of([[1, 2], [3, 4]], [5, 6]), [2.0, 0.25], slots[:2])
    made = inputs.tensors
    assert made["answers"].flatten().tolist() == [5, 6, IGNORED, IGNORED]
    assert made["input_ids"].tolist() == [[0] * 6 + ids for ids in ([1, 2], [3, 4], [3, 4], [3, 4])]
    assert made["attention_mask"].tolist() == [[0] * 6 + [1, 1]] * 4
    assert made["slots"][:, 0].tolist() == [0, 4, 4, 4]
    assert made["divisor"].tolist() == [2.0, 0.25]
    counts = (1, 2, 3, 5, 8, 9, 24, 25)
    assert [rows_for(n, FINE) for n in counts] == [1, 2, 4, 8, 8, 16, 24, 32]
    assert [rows_for(n, COARSE) for n in counts] == [16] * 6 + [32] * 2


def test_little_work_is_captured_once_for_all_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "is " * (n % 9), "answer": "not"} for n in range(20)]
    options: dict[str, Any] = {"rows": rows, "epochs": 9, "batch_size": 3}
    plain, coarse = Trained(None, monkeypatch, **options), Trained(Again, monkeypatch, **options)
    monkeypatch.setattr(static_shapes, "LITTLE", 0)
    fine = Trained(Again, monkeypatch, **options)
    assert len(coarse.made[0].shapes) < len(fine.made[0].shapes)
    assert coarse.replays > fine.replays
    torch.testing.assert_close(
        coarse.prompt.trained_vectors(), plain.prompt.trained_vectors(), atol=1e-5, rtol=0
    )


def test_what_cannot_be_captured_is_named() -> None:
    accelerator = Accelerator(cpu=True)
    assert obstacle(tiny.model(), accelerator) is None
    assert "causal" in str(obstacle(tiny.model("bert"), accelerator))
    assert "causal" in str(obstacle(tiny.model("t5"), accelerator))
    model = tiny.model()
    model.hf_device_map = {"model": 0, "lm_head": 0}
    assert obstacle(model, accelerator) is None
    model.hf_device_map["lm_head"] = 1
    assert "spread over devices" in str(obstacle(model, accelerator))
    model = tiny.model()
    model.config._attn_implementation_internal = "flash_attention_2"
    assert "FlashAttention" in str(obstacle(model, accelerator))
    model = tiny.model()
    model.gradient_checkpointing_enable()
    assert "checkpointing" in str(obstacle(model, accelerator))
    with pytest.raises(InputError, match="graphs is 'always'; expected one of auto, off"):
        replace(ptuning.TrainSettings(), graphs="always")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("template", [FRONT, AFTER])
def test_on_a_gpu_the_captured_steps_are_the_plain_ones(template: str) -> None:
    notes, vectors = [], []
    for setting in ("off", "auto"):
        tokenizer = tiny.tokenizer()
        prompt = ptuning.Prompt(template, answer="answer")
        ptuning.train(
            tiny.model("llama", vocab_size=len(tokenizer)),
            tokenizer,
            prompt,
            ROWS,
            epochs=5,
            batch_size=4,
            graphs=setting,
            listener=lambda heard: notes.append(heard.note),
        )
        vectors.append(prompt.trained_vectors())
    assert any("are replayed" in note for note in notes)
    torch.testing.assert_close(vectors[1], vectors[0], atol=1e-5, rtol=0)


def test_a_batch_that_is_small_only_without_its_padding_is_not_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    stands_still = engine.Engine.stands_still

    def heard(self: Any, batch: Any, padded: float = 1.0) -> bool:
        sizes.append((batch.answers.numel() * padded, stands_still(self, batch, padded)))
        return sizes[-1][1]

    monkeypatch.setattr(engine.Engine, "stands_still", heard)
    Trained(Again, monkeypatch)
    most = max(size for size, _ in sizes)
    assert all(still for _, still in sizes)
    words = len(tiny.tokenizer())
    monkeypatch.setattr(chunked, "LARGEST", int(most * words) - 1)
    sizes.clear()
    graphed = Trained(Again, monkeypatch)
    assert [still for size, still in sizes] == [size < most for size, _ in sizes]
    assert all("are off" not in note for note in graphed.notes)
