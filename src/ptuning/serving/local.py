"""Prompts attached to a model in this process; questions of all of them share batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from ..backbone.base_model import BaseModel
from ..backbone.identity import difference, name_of
from ..backbone.kinds import ModelKind
from ..backbone.modes import eval_mode
from ..backbone.traits import remembers_rows
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
    in_time,
    is_plain,
    shown_name,
)
from .batcher import Batcher, Item

_KEPT = 64 * 2**20
"""Bytes that the engine keeps of what rows have in common."""
_MOMENT = 8
"""Tokens of a free answer at most for which others' long answers are interrupted."""
_NEAR = 16
"""Tokens in front of what is said that decide how it is spelled: a space, half a character."""


@dataclass(eq=False)
class Handle:
    """A task on the model.

    Attributes:
        task: a prompt or a manual template.
        renderers: the task's, or of an ensemble each member's.
        attachment: of a prompt.
        by_hand: the task without virtual tokens; made when it is first asked.
        nearest: what `nearest_words` says, once it was asked.
        gone: it was let go.
    """

    task: Task
    renderers: list[Renderer]
    attachment: Attachment | None = None
    by_hand: Handle | None = None
    nearest: Future[list[dict[str, Any]]] | None = None
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
        self._engine = Engine(base, _KEPT)
        self._can_wait = not remembers_rows(base.model)
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
        brief = self._is_brief(handle, wish)
        items = [Item(_Asked(handle, row, wish), wish.deadline, brief) for row in rows]
        self.batcher.ask(items)
        try:
            async with in_time(wish.deadline):
                return list(await asyncio.gather(*(asyncio.wrap_future(i.answer) for i in items)))
        finally:
            for item in items:
                item.abandoned = True

    async def stream(self, handle: Handle, row: Row, wish: Wish) -> AsyncIterator[str | Answer]:
        """Parts of a free answer as they come, and at last the whole."""
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[str | None] = asyncio.Queue()
        passed_on = ""

        def heard(text: str) -> None:
            nonlocal passed_on  # in the model's thread; a row that is asked again goes on here
            if text.startswith(passed_on) and len(text) > len(passed_on):
                loop.call_soon_threadsafe(parts.put_nowait, text[len(passed_on) :])
                passed_on = text

        brief = self._is_brief(handle, wish)
        item = Item(_Asked(handle, row, wish, heard), wish.deadline, brief)
        item.answer.add_done_callback(lambda _: loop.call_soon_threadsafe(parts.put_nowait, None))
        self.batcher.ask([item])
        said = ""
        try:
            while True:
                async with in_time(wish.deadline):
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

    async def nearest(self, handle: Handle, deadline: float) -> list[dict[str, Any]]:
        """Nearest words of a prompt's virtual tokens; looked for once, however many ask."""

        def look() -> list[dict[str, Any]]:
            prompt = handle.task
            if not isinstance(prompt, Prompt):
                return []
            found, mean = nearest_words(self.base.model, self.base.tokenizer, prompt)
            return [
                {"norm": n.norm, "mean_norm": mean, "nearest": [list(w) for w in n.words]}
                for n in found
            ]

        if handle.nearest is None or (handle.nearest.done() and handle.nearest.exception()):
            handle.nearest = self.batcher.begin(look)
        async with in_time(deadline):
            return await asyncio.shield(asyncio.wrap_future(handle.nearest))

    @property
    def depth(self) -> int:
        """Questions that wait."""
        return self.batcher.depth

    async def alive(self) -> bool:
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

    def _is_brief(self, handle: Handle, wish: Wish) -> bool:
        compares = handle.renderers[0].compares or self.base.kind is ModelKind.MASKED
        return self._can_wait and (compares or wish.tokens(handle.task) <= _MOMENT)

    # In the model's thread.

    def _handle(self, task: Task) -> Handle:
        attachment = None
        if isinstance(task, Prompt):
            attachment = attach(self.base.model, self.base.tokenizer, task)
            self._renew()
        try:
            members = members_of(task)
            renderers = [self._engine.renderer(one).asking() for one in members]
            return Handle(task, renderers, attachment)
        except BaseException:
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
                limit = wish.tokens(handle.task, 1 if masked else LONGEST)
                readings = handle.readings(item.question.row, limit, self._engine)
            except PtuningError as error:
                yield item, error
                continue
            before = readings[0].example.sequences[0].ids if handle.goes_on else None
            ends = self._engine.ends(handle.task)
            listener = _Listener(item, self.base.tokenizer, ends, before)
            question = Question.of(readings, limit=limit, watch=self._interruptible(listener))
            asked.append((item, listener, question))
        with eval_mode(self.base.model):
            found = answers(self._engine, [question for *_, question in asked], self._most)
            for number, prediction in found:
                item, listener, question = asked[number]
                text, written, complete = prediction.answer, 1, True
                if not question.renderer.compares:
                    if masked:
                        text = cut_at(text, item.question.wish.stop).strip()
                        written = question.most or 1  # a token for each mask
                    else:
                        text, complete = listener.whole, listener.complete
                        written = len(listener.tokens)
                answer = Answer(
                    text,
                    prediction.probability,
                    prediction.probabilities,
                    question.example.shortened,
                    len(question.example.sequences[0].ids),
                    written,
                    complete,
                )
                yield item, answer

    def _interruptible(self, listener: _Listener) -> Callable[[int], bool]:
        def watch(token: int) -> bool:
            enough = listener(token)
            self.batcher.let_in()
            return enough

        return watch

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
        ends: tokens that end the answer, and are none of it.
        before: the ids of a text that it goes on with, to the last space; None for an answer.
    """

    def __init__(
        self,
        item: Item,
        tokenizer: Any,
        ends: Sequence[int],
        before: tuple[int, ...] | None = None,
    ):
        self._item, self._tokenizer, self._ends = item, tokenizer, ends
        self._goes_on = before is not None
        self._ids = list((before or ())[-_NEAR:])
        self._before = self._decoded(self._ids)
        self._stop: tuple[str, ...] = item.question.wish.stop
        self._heard: Callable[[str], None] | None = item.question.heard
        self._settled, self._from, self._to = "", 0, len(self._ids)
        self.tokens: list[int] = []
        self.complete = False

    def __call__(self, token: int) -> bool:
        """A token; says whether it is enough."""
        self.tokens.append(token)
        self._ids.append(token)
        if token in self._ends:
            self.complete = True
        if self.complete or not (self._stop or self._heard):
            return self.complete or self._item.over
        text = self._text()
        whole = cut_at(text, self._stop)
        self.complete = len(whole) < len(text)
        if self._heard is not None:
            self._heard(self._certain(whole))
        return self.complete or self._item.over

    @property
    def whole(self) -> str:
        """All that was said, up to an end or a stop."""
        ended = bool(self.tokens) and self.tokens[-1] in self._ends
        text = self._decoded(self._ids[: len(self._ids) - ended])[len(self._before) :]
        text = cut_at(text, self._stop)
        return text if self._goes_on else text.strip()

    def _text(self) -> str:
        """All that was said; of a long answer only the last tokens are decoded again.

        Those in front of `_to` are settled: their text stays what it is whatever comes. Decoding
        begins at `_from`, some tokens before, since spelling depends on what stands in front.
        """
        ids = self._ids
        settled, text = self._decoded(ids[self._from : self._to]), self._decoded(ids[self._from :])
        if (to := len(ids) - _NEAR) >= self._to + _NEAR:
            more = self._decoded(ids[self._from : to])
            if text.startswith(more):  # not in the middle of a character, or of a tidied space
                self._settled += more[len(settled) :]
                self._from, self._to, settled = self._to, to, more
        return self._settled + text[len(settled) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        clean = {"clean_up_tokenization_spaces": False} if self._goes_on else {}
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, **clean))

    def _certain(self, text: str) -> str:
        """What is certain of the text: not half a character, half a stop or its last spaces."""
        certain = text.rstrip("\ufffd")
        if not self.complete and self._stop:
            certain = certain[: max(0, len(certain) - max(map(len, self._stop)) + 1)]
        return certain if self._goes_on else certain.strip()
