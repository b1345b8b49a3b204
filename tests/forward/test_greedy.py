from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers.generation import utils as generation

import ptuning
from ptuning.backbone.kinds import kind_of
from ptuning.backbone.lookups import input_embedding
from ptuning.backbone.traits import context_length
from ptuning.inference.attachment import placed
from ptuning.rendering.render import Renderer

from .. import tiny

TOKENIZER = tiny.tokenizer()
ROWS = [{"text": text} for text in ("Oslo", "The capital of France is Paris", "naïve café")]


def setting(family: str) -> tuple[Any, ptuning.Prompt]:
    model = tiny.model(family)
    prompt = ptuning.Prompt("[P*2] {text} [P] it is [MASK]", answer="answer")
    torch.manual_seed(1)
    prompt.vectors = torch.randn(3, input_embedding(model).embedding_dim)
    return model, prompt


def spoken(
    model: Any, prompt: ptuning.Prompt, limit: int, ends: list[int], watch: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    context = context_length(model, TOKENIZER)
    renderer = Renderer(TOKENIZER, prompt, kind_of(model), context)
    with placed(model, TOKENIZER, prompt) as first, torch.no_grad():
        engine = tiny.engine(model, TOKENIZER)
        examples = renderer.each(ROWS, "test", answered=False)
        batch = engine.batch([(example, 0) for example in examples], [first])
        return engine.continue_greedily(batch, limit, ends, watch)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_each_token_is_the_likeliest_and_as_likely_as_the_model_says(family: str) -> None:
    model, prompt = setting(family)
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: seen.append(out[:, -1].clone()))
    ids, scores = spoken(model, prompt, 5, [])
    handle.remove()
    assert ids.shape == scores.shape == (len(ROWS), 5)
    for step, logits in enumerate(seen):
        best = logits.float().log_softmax(-1).max(-1)
        assert torch.equal(ids[:, step], best.indices)
        torch.testing.assert_close(scores[:, step], best.values)


def test_steps_that_are_over_leave_no_logits_behind() -> None:
    """Kept to the end they were gigabytes: rows times tokens times the vocabulary."""
    model, prompt = setting("llama")
    held: list[int] = []

    def count(*_: Any) -> None:
        of_vocabulary = {
            x.data_ptr() for x in gc.get_objects() if torch.is_tensor(x) and vocabulary(x)
        }
        held.append(len(of_vocabulary))

    def vocabulary(x: torch.Tensor) -> bool:
        return x.ndim >= 2 and x.shape[0] == len(ROWS) and x.shape[-1] >= model.config.vocab_size

    handle = model.model.register_forward_pre_hook(count)
    spoken(model, prompt, 9, [])
    handle.remove()
    assert len(held) == 9
    assert held[-1] <= held[2] <= 2


def one_step_late() -> type:
    """How transformers 5.23 looks on Apple's GPUs: the end is seen when a step more is computed."""

    class OneStepLate(generation.StopCheck):
        def __init__(self, streamer: Any = None) -> None:
            super().__init__(streamer)
            self.over = False

        def __call__(self, unfinished: torch.Tensor, tokens: torch.Tensor, length: int) -> bool:
            before, self.over = self.over, bool(unfinished.max() == 0)
            return before

        def finish(self) -> int:
            return 1

    return OneStepLate


@pytest.mark.skipif(not hasattr(generation, "StopCheck"), reason="transformers looks at once")
@pytest.mark.parametrize("watched", [False, True])
def test_a_step_that_is_computed_after_the_end_is_not_part_of_the_answer(
    monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    model, prompt = setting("llama")
    ends = [] if watched else spoken(model, prompt, 4, [])[0][:, 2].unique().tolist()

    def at_once() -> Any:
        counts = iter(range(1, 9))
        return (lambda ids, _: torch.full_like(ids, next(counts) >= 3).bool()) if watched else None

    ids, scores = spoken(model, prompt, 6, ends, at_once())
    monkeypatch.setattr(generation, "StopCheck", one_step_late())
    late_ids, late_scores = spoken(model, prompt, 6, ends, at_once())
    assert torch.equal(ids, late_ids)
    torch.testing.assert_close(scores, late_scores)
