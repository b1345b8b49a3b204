"""What answers: the model here (`local`), or a server with the merged model (`remote`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Protocol, TypeVar

from ..errors import InputError, PtuningError
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..rendering.chat import as_chat
from ..rendering.layout import Sequence as Tokens
from ..rendering.render import Rendered, Renderer
from .batcher import TooLate

LONGEST = 64
"""Tokens of a free answer where neither the prompt nor the request says how many."""
PLAIN = Task("{text}", answer_tokens=LONGEST)
"""Text that the base model goes on with, without any prompt."""
PLAIN_CHAT = Task("{text}", chat=True, answer_tokens=LONGEST)
"""A chat that the base model answers."""

Row = Mapping[str, Any]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Wish:
    """How a row is to be answered.

    Attributes:
        deadline: of `time.monotonic`.
        virtual: with the prompt's virtual tokens; else by its words alone.
        limit: longest free answer in tokens; None leaves it to the prompt.
        stop: texts that end a free answer.
        most: tokens of a free answer that the server writes at all.
    """

    deadline: float
    virtual: bool = True
    limit: int | None = None
    stop: tuple[str, ...] = ()
    most: int | None = None

    def tokens(self, task: Task, usual: int = LONGEST) -> int:
        """The longest free answer of a task, in tokens.

        Args:
            task: says how many where the request does not.
            usual: where neither says it.
        """
        wanted = self.limit or task.answer_tokens or usual
        return wanted if self.most is None else min(wanted, self.most)


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: a label, or the free answer.
        probability: as `Prediction.probability`.
        probabilities: label -> probability; empty for free answers.
        shortened: a field was cut to fit the model's context.
        read: tokens of the input.
        written: tokens of the answer.
        complete: it ended by itself, and not at the limit.
    """

    text: str
    probability: float
    probabilities: dict[str, float] = field(default_factory=dict)
    shortened: bool = False
    read: int = 0
    written: int = 0
    complete: bool = True


class Unreachable(PtuningError):
    """A server behind does not answer, or not as it should."""


class Gone(PtuningError):
    """A prompt was taken off, or renewed, between the question and its turn."""


class Backend(Protocol):
    """Answers for prompts that it took on."""

    name: str
    """Of the base model."""
    plain: Any
    """Handle of `PLAIN`; None where the model writes no text."""
    plain_chat: Any
    """Handle of `PLAIN_CHAT`; None where the model takes no chats."""

    def take_on(self, name: str, prompt: Prompt) -> Any:
        """A handle for a prompt; raises `PtuningError` where it does not fit."""

    def let_go(self, handle: Any) -> None:
        """The handle is not asked any more; what was asked is answered."""

    async def answer(self, handle: Any, rows: Sequence[Row], wish: Wish) -> list[Answer]:
        """An answer for each row."""

    def stream(self, handle: Any, row: Row, wish: Wish) -> AsyncIterator[str | Answer]:
        """Parts of a free answer as they come, and at last the whole."""

    async def nearest(self, handle: Any, deadline: float) -> list[dict[str, Any]] | None:
        """Nearest words of a prompt's virtual tokens; None where nobody here has the model."""

    @property
    def depth(self) -> int:
        """Questions that wait."""

    async def alive(self) -> bool:
        """It can answer."""

    async def close(self) -> None:
        """Answer what waits, and end."""


@asynccontextmanager
async def in_time(deadline: float) -> AsyncIterator[None]:
    """What is awaited here is given up at a time of `time.monotonic`.

    Raises:
        TooLate: it has come.
    """
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            yield
    except TimeoutError:
        raise TooLate("the answer took too long") from None


async def each_in_time(parts: AsyncIterator[_T], deadline: float) -> AsyncIterator[_T]:
    """What comes until a time of `time.monotonic`.

    Each step has a timeout of its own, since one ends the task that began it, and a generator's
    steps may be asked for by several: the first part here, the others by the response.

    Raises:
        TooLate: it has come.
    """
    while True:
        async with in_time(deadline):
            try:
                part = await anext(parts)
            except StopAsyncIteration:
                return
        yield part


def is_plain(task: Task) -> bool:
    """It is the base model's own, without any prompt, and rows are read `as_it_is`."""
    return task is PLAIN or task is PLAIN_CHAT


def as_it_is(renderer: Renderer, row: Row, limit: int) -> Rendered:
    """Text to go on with, to the last space, or a whole chat, as the tokenizer has it.

    Args:
        renderer: of `PLAIN` or `PLAIN_CHAT`, for a causal model.
        row: ``text``, or ``turns`` with their ``role`` and ``content``.
        limit: tokens that are to be written behind it.

    Raises:
        InputError: both are longer than the model's context, there is nothing to go on with, or the
            model's chat template does not take the turns.
    """
    if renderer.task.chat:
        text = as_chat(renderer.tokenizer, row["turns"])
        ids = tuple(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        ids = tuple(renderer.tokenizer(row["text"])["input_ids"])
        ids = ids or renderer(row, answered=False).sequences[0].ids
    if not ids:
        raise InputError(
            "the text is empty, and this model's tokenizer puts nothing in front of it; send a text"
        )
    if renderer.limit is not None and len(ids) + limit > renderer.limit + 1:
        raise InputError(
            f"the text has {len(ids)} tokens and max_tokens is {limit}, and the model has room for "
            f"{renderer.limit} in all; send a shorter text, or a smaller max_tokens"
        )
    return Rendered((Tokens(ids, len(ids)),))


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text in front of the first of the stops."""
    places = [at for at in (text.find(one) for one in stop if one) if at >= 0]
    return text[: min(places)] if places else text


def shown_name(model: str) -> str:
    """A model's name as clients see it: of a folder only the last part."""
    path = PurePath(model)
    return path.name if path.is_absolute() and path.name else model
