"""Predictions by replayed batches against plain ones; a stand-in replays on the static buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ptuning
from ptuning import Prompt
from ptuning.backbone.base_model import BaseModel
from ptuning.backbone.injection import Injector
from ptuning.forward import chunked
from ptuning.forward import engine as engines
from ptuning.forward import graphed_scores as module
from ptuning.forward.engine import Engine
from ptuning.forward.graphed_scores import GraphedScores
from ptuning.inference.answering import Question, answers

from .. import tiny
from ..replaying import Again, Failing, FailingAtItsEnd

WORDS = {"yes": "of", "no": "not"}
ROWS = [{"text": f"{n} " + "France and the cities " * (1 + n % 3)} for n in range(70)]


class Off(Again):
    def replay(self) -> Any:
        return self.function() * 1.01


class AsCaptured(Again):
    """As a real graph: reads the vectors where they were, and writes into one tensor each time."""

    model: Any

    def capture(self, function: Callable[[], Any]) -> None:
        self.function, injector = function, Injector.of(self.model)
        assert injector is not None
        self.injector, self.lookup = injector, injector._lookup
        self.scores = function().clone()

    def replay(self) -> Any:
        now, self.injector._lookup = self.injector._lookup, self.lookup
        try:
            self.scores.copy_(self.function())
        finally:
            self.injector._lookup = now
        return self.scores


class OfTheCapture(Again):
    """Gives what the captured batch gave, whatever is in the buffers."""

    def capture(self, function: Callable[[], Any]) -> None:
        self.scores = function()

    def replay(self) -> Any:
        return self.scores


def setting(family: str = "llama", seed: int = 0, **options: Any) -> tuple[Any, Any, Prompt]:
    tokenizer = tiny.tokenizer()
    model = tiny.model(family, vocab_size=len(tokenizer))
    settings = {"template": "[P*3] {text} [P*2] is [MASK]", "verbalizer": WORDS, **options}
    prompt = Prompt(**{"answer": "label", **settings})
    torch.manual_seed(seed)
    width = model.get_input_embeddings().embedding_dim
    prompt.vectors = 0.1 * torch.randn(prompt.num_virtual_tokens or 1, width)
    return model, tokenizer, prompt


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[GraphedScores]:
    """Every `GraphedScores` that an engine makes."""
    return made_with(Again, monkeypatch)


def made_with(graph: type[Again], monkeypatch: pytest.MonkeyPatch) -> list[GraphedScores]:
    found: list[GraphedScores] = []

    def graphed(model: Any) -> GraphedScores:
        found.append(GraphedScores(model, graph, 1e-5))
        return found[-1]

    monkeypatch.setattr(engines, "graphed_scores", graphed)
    return found


def shares(model: Any, tokenizer: Any, prompt: Any, size: int = 2) -> list[list[float]]:
    found = ptuning.predict_details(model, tokenizer, prompt, ROWS, batch_size=size)
    return [list(prediction.probabilities.values()) for prediction in found]


def plain(*args: Any) -> list[list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "graphed_scores", lambda model: None)
        return shares(*args)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_replayed_batches_give_the_plain_probabilities(
    family: str, made: list[GraphedScores]
) -> None:
    given = setting(family)
    expected = plain(*given)
    got = shares(*given)
    assert made[0].replays > 5
    assert torch.allclose(torch.tensor(got), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("graph", [Off, OfTheCapture, Failing, FailingAtItsEnd])
def test_graphs_that_give_something_else_or_cannot_be_made_are_not_used(
    graph: type[Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = setting()
    expected = plain(*given)
    used = made_with(graph, monkeypatch)
    assert torch.allclose(torch.tensor(shares(*given)), torch.tensor(expected), atol=1e-6)
    assert used[0].replays <= 1 and not used[0].shapes


@pytest.mark.parametrize(
    ("setting_of", "limits"),
    [
        ({"verbalizer": {"yes": "not a city", "no": "Ra"}}, {}),
        ({}, {"_STEPS": ((8, 8),)}),
        ({}, {"LITTLE": 0, "_MUCH": 1000}),
        ({}, {"LITTLE": 0, "_FILLED": 1.0}),
    ],
    ids=["several tokens", "long", "much work", "mostly filled up"],
)
def test_what_a_graph_is_of_no_use_for_stays_plain(
    setting_of: dict[str, Any],
    limits: dict[str, Any],
    made: list[GraphedScores],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(module, name, value)
    given = setting(**setting_of)
    assert shares(*given) == plain(*given)
    assert made[0].replays == 0


def test_words_of_several_tokens_are_scored_in_bounded_memory_where_graphs_are_made(
    made: list[GraphedScores], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where their rows are too short for what they open with to be kept."""
    given = setting(verbalizer={"yes": "not a city", "no": "Ra"})
    expected, seen = plain(*given), []
    monkeypatch.setattr(Engine, "serves_kept", lambda engine, batch: False)
    for name, value in {"LARGEST_OF_WORDS": 0, "COMPARED": 1, "POSITIONS": 2}.items():
        monkeypatch.setattr(chunked, name, value)
    head = given[0].get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: seen.append(logits.numel()))
    assert torch.allclose(torch.tensor(shares(*given)), torch.tensor(expected), atol=1e-5)
    assert made and max(seen) == 2 * head.out_features


def test_a_model_with_hooks_of_others_stays_plain(made: list[GraphedScores]) -> None:
    given = setting()
    seen: list[Any] = []
    given[0].model.layers[0].register_forward_hook(lambda *call: seen.append(call))
    shares(*given)
    assert made[0].replays == 0 and len(seen) == 35


def test_under_autocast_predictions_stay_plain(made: list[GraphedScores]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        shares(*setting())
    assert made[0].replays == 0


def test_kept_openings_are_not_computed_again(made: list[GraphedScores]) -> None:
    given = setting(template="The big old capital city of all these lands: [P*5] {text} [MASK]")
    rows = [{"text": "Rome"}] * 40
    ptuning.predict(*given, rows, batch_size=4)
    assert made[0].replays == 0


def test_a_prompt_that_comes_or_leaves_meanwhile_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer, prompt = setting()
    made = made_with(AsCaptured, monkeypatch)
    monkeypatch.setattr(AsCaptured, "model", model, raising=False)
    other = setting(seed=1)[2]
    expected = plain(model, tokenizer, prompt)
    base = BaseModel.of(model, tokenizer)
    engine, alone = Engine(base, repeats=True), Engine(base)
    renderer = engine.renderer(prompt)
    rendered = renderer.each(ROWS, "prediction", answered=False)

    def found(first_id: int, by: Engine = engine) -> torch.Tensor:
        questions = [Question(renderer, one, first_id) for one in rendered]
        got = sorted(answers(by, questions, 2), key=lambda pair: pair[0])
        return torch.tensor([list(one.probabilities.values()) for _, one in got])

    with ptuning.attach(model, tokenizer, prompt) as attached, torch.no_grad():
        first = attached.first_id(prompt)
        assert torch.allclose(found(first), torch.tensor(expected), atol=1e-5)
        assert len(made[0].shapes) > 1
        before = made[0].replays
        with ptuning.attach(model, tokenizer, other):
            assert torch.allclose(found(first), torch.tensor(expected), atol=1e-5)
        assert torch.allclose(found(first), torch.tensor(expected), atol=1e-5)
        assert made[0].replays > before
        injector = Injector.of(model)
        assert injector is not None
        for _ in range(3):  # other vectors at the same place, again and again
            injector.write(injector.spans[0], 0.1 * torch.randn(5, 32))
            assert torch.allclose(found(first), found(first, alone), atol=1e-5)
        assert not made[0].shapes  # graphs are not worth it any more


def test_prompts_that_are_mixed_in_a_batch_are_replayed_too(made: list[GraphedScores]) -> None:
    model, tokenizer, first = setting()
    second = setting(seed=1)[2]
    expected = [plain(model, tokenizer, prompt) for prompt in (first, second)]
    got = ptuning.predict_details(model, tokenizer, [first, second], ROWS, batch_size=4)
    assert made[0].replays > 5
    for of_one, wanted in zip(got, expected, strict=True):
        values = torch.tensor([list(one.probabilities.values()) for one in of_one])
        assert torch.allclose(values, torch.tensor(wanted), atol=1e-5)


def test_where_graphs_leave_too_little_memory_they_go(
    made: list[GraphedScores], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = setting()
    expected = plain(*given)
    compute = module.label_word_scores
    left = []

    def full(*args: Any) -> Any:
        if made[0].shapes and made[0].replays > 5 and not left:
            left.append(len(made[0].shapes))
            raise torch.OutOfMemoryError("full")
        return compute(*args)

    monkeypatch.setattr(module, "label_word_scores", full)
    monkeypatch.setattr(Again, "replay", lambda graph: compute(*graph.function.args))
    got = shares(*given)
    assert torch.allclose(torch.tensor(got), torch.tensor(expected), atol=1e-5)
    assert left and not made[0].shapes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_replayed_predictions_are_those_of_the_cpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[GraphedScores] = []
    make = engines.graphed_scores

    def graphed(model: Any) -> Any:
        made.append(make(model))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(engines, "graphed_scores", graphed)
    model, tokenizer, prompt = setting()
    expected = plain(model, tokenizer, prompt)
    got = shares(model.to("cuda", dtype), tokenizer, prompt)
    assert made[0].replays > 5
    close = 1e-4 if dtype == torch.float32 else 0.03
    assert torch.allclose(torch.tensor(got), torch.tensor(expected), atol=close)
