"""A task on the model in this process, and how it reads a row."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ..backbone.kinds import ModelKind
from ..forward.engine import Engine
from ..inference.answering import Reading
from ..inference.attachment import Attachment
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..rendering.render import Rendered, Renderer
from .backend import Row, as_it_is, is_plain


@dataclass(eq=False)
class Handle:
    """A task on the model.

    Attributes:
        task: a prompt or a manual template.
        renderers: the task's, or of an ensemble each member's.
        attachment: of a prompt.
        by_hand: the task without virtual tokens; made when it is first asked.
        nearest: what `nearest_words` says, once it was asked.
        asked: the answers to come.
        gone: it was let go.
    """

    task: Task
    renderers: list[Renderer]
    attachment: Attachment | None = None
    by_hand: Handle | None = None
    nearest: Future[list[dict[str, Any]]] | None = None
    asked: set[Future[Any]] = field(default_factory=set)
    gone: bool = False

    @property
    def plain(self) -> bool:
        """Rows are read as they are."""
        return is_plain(self.task) and self.renderers[0].kind == ModelKind.CAUSAL

    @property
    def goes_on(self) -> bool:
        """It goes on with text as it is, to the last space."""
        return self.plain and not self.task.chat

    def readings(self, row: Row, limit: int, engine: Engine) -> list[Reading]:
        """How the task reads a row, or each member of an ensemble does.

        Args:
            row: column -> value.
            limit: tokens of a free answer, for which there must be room behind the row.
            engine: of the renderers.

        Raises:
            InputError, DataError: the row does not fit.
        """
        readings = []
        for renderer in self.renderers:
            first_id, task = 0, renderer.task
            if self.attachment is not None and isinstance(task, Prompt):
                first_id = self.attachment.first_id(task)
            if not renderer.compares and limit != task.answer_tokens:
                renderer = engine.renderer(replace(task, answer_tokens=limit))
            example = (
                as_it_is(renderer, row, limit) if self.plain else renderer(row, answered=False)
            )
            readings.append(Reading(renderer, example, first_id))
        return readings


def behind(reading: Reading, said: Sequence[int]) -> Reading:
    """A row of a causal model with what was said behind it, to go on with."""
    (sequence,) = reading.example.sequences
    return replace(reading, example=Rendered((sequence.followed_by(said),)))
