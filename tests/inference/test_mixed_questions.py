"""Rows of different tasks in one batch: each has the answer that it has alone."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

import ptuning
from ptuning import Prompt, Task
from ptuning.backbone.base_model import BaseModel
from ptuning.backbone.modes import eval_mode
from ptuning.errors import InputError
from ptuning.forward.engine import Engine
from ptuning.inference.answering import Prediction, Question, answers
from ptuning.inference.attachment import placed

from .. import tiny

TEXTS = ["France", "Italy and all of its many islands", "Oslo", "Madrid"]
TASKS: list[tuple[str, dict[str, Any]]] = [
    ("[P*3] {text} [P] is [MASK]", {"answer_tokens": 4}),
    ("The big old capital city of [P*2] {text} [P] is [MASK]", {"answer_tokens": 7}),
    (
        "[P*2] {text} [P*2]: [MASK]",
        {"verbalizer": {"a": "Paris", "b": "Rome"}, "label_bias": {"a": 0.0, "b": 2.0}},
    ),
    ("{text} [P] is it? [MASK]", {"verbalizer": {"yes": ["yes", "does"], "no": ["not", "or"]}}),
    ("{text} [P] so [MASK]", {"verbalizer": {"x": "capital of Italy", "y": "Rome!"}}),
]


def _setting(family: str) -> tuple[Any, Any, list[Task]]:
    tokenizer = tiny.tokenizer(around=family not in tiny.CAUSAL)
    model = tiny.model(family, vocab_size=len(tokenizer))
    embedding = model.get_input_embeddings().weight
    tasks: list[Task] = [Task("A word on {text}: [MASK]", answer_tokens=5)]
    for template, options in TASKS:
        prompt = Prompt(template, **options)
        count = prompt.num_virtual_tokens
        prompt.vectors = torch.randn(count, embedding.shape[1]) * float(embedding.std())
        tasks.append(prompt)
    return model, tokenizer, tasks


def _asked(engine: Engine, tasks: list[Task], stack: ExitStack, **options: Any) -> list[Question]:
    base = engine.base
    stack.enter_context(eval_mode(base.model))
    first = [stack.enter_context(placed(base.model, base.tokenizer, task)) for task in tasks]
    made = []
    for text in TEXTS:
        for task, first_id in zip(tasks, first, strict=True):
            renderer = engine.renderer(task)
            example = renderer({"text": text}, answered=False)
            made.append(Question(renderer, example, first_id, **options))
    return made


def _close(one: Prediction, other: Prediction) -> bool:
    assert one.answer == other.answer
    assert one.probability == pytest.approx(other.probability, abs=1e-5)
    assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    return True


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.parametrize("size", [3, 32])
def test_mixed_rows_are_answered_as_each_prompt_does_alone(family: str, size: int) -> None:
    model, tokenizer, tasks = _setting(family)
    engine = Engine(BaseModel.of(model, tokenizer), 2**20)
    with ExitStack() as stack:
        asked = _asked(engine, tasks, stack)
        for _ in range(2):  # the second time on what the engine kept
            said = dict(answers(engine, asked, size))
            assert sorted(said) == list(range(len(asked)))
            number = 0
            for text in TEXTS:
                for task in tasks:
                    (alone,) = ptuning.predict_details(model, tokenizer, task, [{"text": text}])
                    assert _close(said[number], alone), (text, task.template)
                    number += 1


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_several_prompts_predict_as_each_does_alone(family: str) -> None:
    model, tokenizer, tasks = _setting(family)
    rows = [{"text": text} for text in TEXTS]
    if family not in tiny.MASKED:  # an end of the model's own, which the manual task alone has
        (long,) = ptuning.predict_details(model, tokenizer, tasks[0], rows[:1])
        model.generation_config.eos_token_id = tokenizer(long.answer)["input_ids"][2:3]
    several = ptuning.predict_details(model, tokenizer, tasks, rows)
    for task, of_task in zip(tasks, several, strict=True):
        alone = ptuning.predict_details(model, tokenizer, task, rows)
        assert all(map(_close, of_task, alone)), task.template


@pytest.mark.parametrize("family", [*tiny.CAUSAL, *tiny.SEQ2SEQ])
def test_rows_that_end_at_different_tokens_share_a_batch(family: str) -> None:
    model, tokenizer, tasks = _setting(family)
    engine = Engine(BaseModel.of(model, tokenizer), 0)
    free = [task for task in tasks if not task.labels]
    said: list[int] = []
    with ExitStack() as stack:
        asked = _asked(engine, free, stack)
        manual = asked[0]
        watched = replace(manual, watch=lambda token, _: bool(said.append(token)))
        dict(answers(engine, [watched]))
        model.generation_config.eos_token_id = said[1]  # a prompt has learnt the tokenizer's alone
        alone = [dict(answers(engine, [question]))[0] for question in asked]
        shorter = replace(manual, limit=said.index(said[1]) + 1)
        assert alone[0].probability == dict(answers(engine, [shorter]))[0].probability
        sizes: list[int] = []
        model.register_forward_hook(lambda *all_of_it: sizes.append(len(all_of_it[-1].logits)))
        together = dict(answers(engine, asked))
    assert max(sizes) == len(asked)
    for number, prediction in together.items():
        assert _close(prediction, alone[number])


@pytest.mark.parametrize("family", [*tiny.CAUSAL, *tiny.SEQ2SEQ])
def test_a_row_ends_where_its_watch_has_enough_and_no_other_does(family: str) -> None:
    model, tokenizer, tasks = _setting(family)
    engine = Engine(BaseModel.of(model, tokenizer), 0)
    free = [task for task in tasks if not task.labels]
    seen: list[float] = []

    def watch(token: int, score: float) -> bool:
        seen.append(score)
        return len(seen) == 2

    with ExitStack() as stack:
        asked = _asked(engine, free, stack)
        plain = dict(answers(engine, asked))
        first = asked[0]
        asked[0] = Question(first.renderer, first.example, first.first_id, watch=watch)
        watched = dict(answers(engine, asked))
        limited = Question(first.renderer, first.example, first.first_id, limit=len(seen))
        alone = dict(answers(engine, [limited]))[0]
        assert _close(watched[0], alone)
        assert math.exp(sum(seen)) == pytest.approx(alone.probability, rel=1e-4)
    assert len(seen) <= 2
    for number in range(1, len(asked)):
        assert _close(watched[number], plain[number])


def test_a_free_answer_without_a_limit_is_refused() -> None:
    model, tokenizer, tasks = _setting("llama")
    engine = Engine(BaseModel.of(model, tokenizer), 0)
    with ExitStack() as stack:
        asked = _asked(engine, [Task("{text} [MASK]"), *tasks[:1]], stack)
        with pytest.raises(InputError, match="how long may a free answer be"):
            list(answers(engine, asked))
        limited = [Question(q.renderer, q.example, q.first_id, 3) for q in asked]
        assert len(list(answers(engine, limited))) == len(limited)
