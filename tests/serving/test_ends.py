"""A model may have several end tokens: a teacher's lesson ends at each, as the tokenizer's."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptuning.backbone.base_model import BaseModel
from ptuning.forward.engine import Engine
from ptuning.inference.teaching import ask, lessons, teacher_renderers
from ptuning.prompts.task import Task
from ptuning.rendering.lesson import Lesson

from . import servers


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_a_teachers_lesson_ends_where_the_model_does(place: Path, chat: bool, ends: bool) -> None:
    model, tokenizer = servers.model(place)
    task = Task("{country} is", chat=chat, answer_tokens=12, answer_end=ends)
    engine = Engine(BaseModel.of(model, tokenizer))
    rows = [{"country": "France"}, {"country": "Oslo"}]

    def taught() -> Lesson:
        said = ask(engine, teacher_renderers(engine, task), [0], rows)
        return lessons(engine.base, task, rows, said)[0]

    whole = taught().tokens
    at = next(n for n in range(2, 12) if whole[n] not in whole[:n])
    model.generation_config.eos_token_id = [2, whole[at]]
    lesson = taught()
    assert lesson.tokens == (*whole[:at], *[2] * ends)
    assert lesson.shares.shape[0] == len(lesson.tokens)
    if ends:  # a student has the tokenizer's end alone, so that is what it is taught
        assert lesson.likely[at][lesson.shares[at].argmax()] == 2
        assert whole[at] not in lesson.likely[at][lesson.shares[at] > 0]
