"""Prompts attached to a model in this process; questions of all of them share batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..backbone.base_model import BaseModel
from ..backbone.identity import difference, name_of
from ..backbone.modes import eval_mode
from ..backbone.traits import ModelKind
from ..errors import InputError, PtuningError
from ..forward.engine import Engine
from ..inference.answering import Question, Reading, answers
from ..inference.attachment import Attachment, attach
from ..inference.nearest_words import nearest_words
from ..inference.prediction import members_of
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..rendering.render import Renderer
from .backend import (
    LONGEST,
    PLAIN,
    PLAIN_CHAT,
    Answer,
    Gone,
    Row,
    Wish,
    as_it_is,
    cut_at,
    is_plain,
    shown_name,
)
from .batcher import Batcher, Item, TooLate

_KEPT = 64 * 2**20
"""Bytes that the engine keeps of what rows have in common."""
_NEAR = 16
"""Tokens in front of what is said that decide how it is spelled: a space, half a character."""
_SETTLED = 64
"""Tokens behind which what was said is not decoded again."""


@dataclass(eq=False)
class Handle:
    """A task on the model.

    Attributes:
        task: a prompt or a manual template.
        renderers: the task's, or of an ensemble each member's.
        attachment: of a prompt.
        by_hand: the task without virtual tokens; made when it is first asked.
        nearest: what `nearest_words` said, once it was asked.
        gone: it was let go.
    """

    task: Task
    renderers: list[Renderer]
    attachment: Attachment | None = None
    by_hand: Handle | None = None
    nearest: list[dict[str, Any]] | None = None
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


@dataclass(frozen=True)
class _Asked:
    handle: Handle
    row: Row
    wish: Wish
    heard: Callable[[str], None] | None = None


class Local:
    """The backend that has the model: one thread runs it (`Batcher`).

    Args:
        base: the frozen model; nobody else may use it meanwhile.
        most: rows of a batch.
        waiting: rows that may wait.
    """

    def __init__(self, base: BaseModel, most: int = 32, waiting: int = 1024):
        self.base, self.name = base, shown_name(name_of(base.model))
        self._most = most
        self._ends = ends_of(base.model)
        self._engine = Engine(base, _KEPT)
        self.batcher = Batcher(self._answer, most, waiting)
        causal = base.kind is ModelKind.CAUSAL
        self.plain = self._if_it_fits(PLAIN)
        self.plain_chat = self._if_it_fits(PLAIN_CHAT) if causal else None

    def take_on(self, name: str, prompt: Prompt) -> Handle:
        """Attach a prompt, behind the questions that wait.

        Raises:
            InputError: it was trained on other weights; another tokenizer is warned of.
        """

        def attached() -> Handle:
            if unlike := difference(prompt.base_model, self.base.model, None):
                raise InputError(unlike)
            return self._handle(prompt)

        return self.batcher.run(attached)

    def let_go(self, handle: Handle) -> None:
        """Take a prompt off, behind the questions that wait."""

        def detach() -> None:
            handle.gone = True
            if handle.attachment is not None:
                handle.attachment.detach()
            self._renew()

        self.batcher.run(detach)

    async def answer(self, handle: Handle, rows: Sequence[Row], wish: Wish) -> list[Answer]:
        """An answer for each row."""
        items = [Item(_Asked(handle, row, wish), wish.deadline) for row in rows]
        self.batcher.ask(items)
        try:
            async with _until(wish.deadline):
                return list(await asyncio.gather(*(asyncio.wrap_future(i.answer) for i in items)))
        finally:
            for item in items:
                item.abandoned = True

    async def stream(self, handle: Handle, row: Row, wish: Wish) -> AsyncIterator[str | Answer]:
        """Parts of a free answer as they come, and at last the whole."""
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[str | None] = asyncio.Queue()

        def heard(text: str | None) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, text)

        item = Item(_Asked(handle, row, wish, heard), wish.deadline)
        item.answer.add_done_callback(lambda _: heard(None))
        self.batcher.ask([item])
        said = ""
        try:
            while True:
                async with _until(wish.deadline):
                    part = await parts.get()
                if part is None:
                    break
                said += part
                yield part
            answer = item.answer.result()
            if answer.text.startswith(said) and len(answer.text) > len(said):
                yield answer.text[len(said) :]
            yield answer
        finally:
            item.abandoned = True

    def nearest(self, handle: Handle, count: int) -> list[dict[str, Any]] | None:
        """Nearest words of a prompt's virtual tokens."""

        def look() -> None:
            prompt = handle.task
            if handle.nearest is not None or not isinstance(prompt, Prompt):
                return  # somebody has asked meanwhile
            found, mean = nearest_words(self.base.model, self.base.tokenizer, prompt, count)
            handle.nearest = [
                {"norm": n.norm, "mean_norm": mean, "nearest": [list(w) for w in n.words]}
                for n in found
            ]

        if handle.nearest is None:
            self.batcher.run(look)
        return handle.nearest or []

    @property
    def depth(self) -> int:
        """Questions that wait."""
        return self.batcher.depth

    @property
    def alive(self) -> bool:
        """The model's thread works."""
        return self.batcher.alive

    async def close(self) -> None:
        """Answer what waits, and end the thread."""
        await asyncio.to_thread(self.batcher.close)

    def _if_it_fits(self, task: Task) -> Handle | None:
        """A task that not every model can do: a masked one writes no text."""
        try:
            return self.batcher.run(lambda: self._handle(task))
        except PtuningError:
            return None

    # In the model's thread.

    def _handle(self, task: Task) -> Handle:
        attachment = None
        if isinstance(task, Prompt):
            attachment = attach(self.base.model, self.base.tokenizer, task)
            self._renew()
        try:
            members = members_of(task)
            return Handle(task, [self._engine.renderer(one) for one in members], attachment)
        except PtuningError:
            if attachment is not None:
                attachment.detach()
            raise

    def _renew(self) -> None:
        """What was kept may belong to ids that now are another prompt's."""
        self._engine = Engine(self.base, _KEPT)

    def _answer(self, items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
        """The batcher's function: items with their answers."""
        store = self._engine.store
        if store is not None and store.bytes > _KEPT // 2:
            self._renew()
        masked = self.base.kind is ModelKind.MASKED
        asked: list[tuple[Item, _Listener, Question]] = []
        for item in items:
            try:
                wish: Wish = item.question.wish
                handle = self._wanted(item.question)
                limit = wish.limit_of(handle.task, 1 if masked else LONGEST)
                first, *others = handle.readings(item.question.row, limit, self._engine)
            except PtuningError as error:
                yield item, error
                continue
            before = first.example.sequences[0].ids if handle.goes_on else None
            ends = self._ends if is_plain(handle.task) else ()
            listener = _Listener(item, self.base.tokenizer, before, ends)
            watched: Any = {"limit": limit, "watch": listener, "others": tuple(others)}
            asked.append((item, listener, Question(**vars(first), **watched)))
        with eval_mode(self.base.model):
            found = answers(self._engine, [question for *_, question in asked], self._most)
            for number, prediction in found:
                item, listener, question = asked[number]
                handle = item.question.handle
                example = question.example
                compares = question.renderer.compares
                text = prediction.answer
                if not compares:
                    text = cut_at(text, item.question.wish.stop).strip()
                if handle.plain:  # its turn may have ended in a way of the model's own
                    text = listener.whole if handle.goes_on else listener.whole.strip()
                at_once = masked or compares
                yield (
                    item,
                    Answer(
                        text,
                        prediction.probability,
                        prediction.probabilities,
                        example.shortened,
                        len(example.sequences[0].ids),
                        1 if at_once else len(listener.tokens),
                        at_once or listener.complete,
                    ),
                )

    def _wanted(self, asked: _Asked) -> Handle:
        handle = asked.handle
        if handle.gone:
            raise Gone("the prompt was taken off; GET /v1/models lists those that are there")
        if asked.wish.virtual:
            return handle
        if handle.by_hand is None:
            handle.by_hand = self._handle(handle.task.manual())
        return handle.by_hand


class _Listener:
    """Hears the tokens of one free answer: passes its text on, and ends it at a stop or in time.

    Args:
        item: what was asked.
        tokenizer: of the model.
        before: the ids of a text that it goes on with, to the last space; None for an answer.
        ends: ids that end it, beside the tokenizer's end of text.
    """

    def __init__(
        self,
        item: Item,
        tokenizer: Any,
        before: tuple[int, ...] | None = None,
        ends: Collection[int] = (),
    ):
        self._item, self._tokenizer = item, tokenizer
        self._goes_on = before is not None
        self._context = list(before or ())[-_NEAR:]
        self._settled, self._from = "", 0
        self._ends = {*ends, tokenizer.eos_token_id}
        self._stop: tuple[str, ...] = item.question.wish.stop
        self._heard: Callable[[str], None] | None = item.question.heard
        self._said = ""
        self.tokens: list[int] = []
        self.complete = False

    def __call__(self, token: int) -> bool:
        """A token; says whether it is enough."""
        self.tokens.append(token)
        if token in self._ends:
            self.complete = True
        if self.complete or not (self._stop or self._heard):
            return self.complete or self._item.over
        text = self._text()
        whole = cut_at(text, self._stop)
        self.complete = len(whole) < len(text)
        if self._heard is not None:
            self._pass_on(whole)
        return self.complete or self._item.over

    @property
    def whole(self) -> str:
        """All that was said, up to a stop."""
        return cut_at(self._text(), self._stop)

    def _text(self) -> str:
        """What is said; what was said long ago is not looked at again."""
        new = [token for token in self.tokens[self._from :] if token not in self._ends]
        before = len(self._decoded(self._context))
        text = self._settled + self._decoded([*self._context, *new])[before:]
        if len(new) >= _SETTLED and not text.endswith("\ufffd"):
            self._settled, self._from = text, len(self.tokens)
            self._context = [*self._context, *new][-_NEAR:]
        return text

    def _decoded(self, ids: Sequence[int]) -> str:
        clean = {"clean_up_tokenization_spaces": False} if self._goes_on else {}
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, **clean))

    def _pass_on(self, text: str) -> None:
        """What is certain of the text: not its last spaces, half a character or half a stop."""
        certain = (text if self._goes_on else text.strip()).rstrip("\ufffd")
        if not self.complete and self._stop:
            certain = certain[: len(certain) - max(map(len, self._stop)) + 1]
        if certain.startswith(self._said) and len(certain) > len(self._said):
            assert self._heard is not None
            self._item.begun = True
            self._heard(certain[len(self._said) :])
            self._said = certain


def ends_of(model: Any) -> tuple[int, ...]:
    """Ids that end what a model writes by itself, such as a turn of its chats."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return (ends,) if isinstance(ends, int) else tuple(ends or ())


@asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    """A block that ends in time, whatever it waits for."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            yield
    except TimeoutError:
        raise TooLate("the answer took too long") from None
