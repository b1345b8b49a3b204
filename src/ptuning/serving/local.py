"""Prompts attached to a model in this process; questions of all of them share batches."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

from ..backbone.base_model import BaseModel
from ..backbone.identity import difference, name_of
from ..backbone.kinds import ModelKind
from ..backbone.modes import eval_mode
from ..backbone.traits import reads_again, remembers_rows
from ..errors import InputError, PtuningError
from ..forward.engine import Engine
from ..inference.answering import Prediction, Question, Watch, answers
from ..inference.attachment import attach
from ..inference.nearest_words import nearest_words
from ..inference.prediction import members_of
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..rendering.render import Rendered
from .backend import (
    LONGEST,
    PLAIN,
    PLAIN_CHAT,
    Answer,
    Gone,
    Row,
    Wish,
    cut_at,
    in_time,
    shown_name,
)
from .batcher import GOES_ON, Batcher, Item, settle
from .handle import Handle, behind
from .listening import Listener, Turn

_KEPT = 64 * 2**20
"""Bytes that the engine keeps of what rows have in common."""
_MOMENT = 8
"""Tokens of a free answer at most for which others' long answers are interrupted."""


@dataclass
class _Asked:
    """A question.

    Attributes:
        handle: asked.
        row: of its columns.
        wish: how to answer.
        heard: is told what is said so far.
        said: so far, of a free answer that others have joined.
    """

    handle: Handle
    row: Row
    wish: Wish
    heard: Callable[[str], None] | None = None
    said: Listener | None = None


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
        self._pauses = not remembers_rows(base.model)
        causal, self._masked = base.kind is ModelKind.CAUSAL, base.kind is ModelKind.MASKED
        self._joins = causal and reads_again(base.model)
        self.batcher = Batcher(self._answer, most, waiting)
        self.plain = self._if_it_fits(PLAIN)
        self.plain_chat = self._if_it_fits(PLAIN_CHAT) if causal else None

    def take_on(self, name: str, prompt: Prompt) -> Handle:
        """Attach a prompt, though long answers are being written.

        Raises:
            InputError: it was trained on other weights; another tokenizer is warned of.
        """

        def attached() -> Handle:
            if unlike := difference(prompt.base_model, self.base.model, None):
                raise InputError(unlike)
            return self._handle(prompt)

        return self.batcher.run(attached)

    def let_go(self, handle: Handle) -> None:
        """Take a prompt off when what was asked of it is answered; others' questions go on."""

        def detached() -> bool:
            if handle.asked:
                return False
            handle.gone = True
            if handle.attachment is not None:
                handle.attachment.detach()
            self._renew()
            return True

        while not self.batcher.run(detached):
            wait(handle.asked.copy())

    async def answer(self, handle: Handle, rows: Sequence[Row], wish: Wish) -> list[Answer]:
        """An answer for each row."""
        brief = self._is_brief(handle, wish)
        items = [Item(_Asked(handle, row, wish), wish.deadline, brief) for row in rows]
        self._ask(handle, items)
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
        self._ask(handle, [item])
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

    def _ask(self, handle: Handle, items: Sequence[Item]) -> None:
        for item in items:
            handle.asked.add(item.answer)
            item.answer.add_done_callback(handle.asked.discard)
        try:
            self.batcher.ask(items)
        except PtuningError:
            for item in items:
                item.answer.cancel()
            raise

    def _if_it_fits(self, task: Task) -> Handle | None:
        """A task that not every model can do: a masked one writes no text."""
        try:
            return self.batcher.run(lambda: self._handle(task))
        except PtuningError:
            return None

    def _is_brief(self, handle: Handle, wish: Wish) -> bool:
        compares = handle.renderers[0].compares or self._masked
        return self._pauses and (compares or wish.tokens(handle.task) <= _MOMENT)

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
        """The batcher's function: items with their answers, or `GOES_ON`."""
        store = self._engine.store
        if store is not None and store.bytes > _KEPT // 2:
            self._renew()
        asked: list[tuple[Item, Rendered, Listener, Question]] = []
        writing: set[Item] = set()
        turn = Turn(lambda: len(writing) < self._most and self.batcher.others_wait)
        for item in items:
            try:
                wish: Wish = item.question.wish
                handle = self._wanted(item.question)
                limit = wish.tokens(handle.task, 1 if self._masked else LONGEST)
                readings = handle.readings(item.question.row, limit, self._engine)
            except PtuningError as error:
                yield item, error
                continue
            example = readings[0].example
            listener = self._listener(item, handle, example, limit)
            if said := listener.tokens:
                readings = [behind(reading, said) for reading in readings]
            watch = self._watch(item, example, listener, writing, turn)
            question = Question.of(readings, limit=limit - len(said), watch=watch)
            asked.append((item, example, listener, question))
            if not question.renderer.compares:
                writing.add(item)
                turn.add(item)
        with eval_mode(self.base.model):
            found = answers(self._engine, [question for *_, question in asked], self._most)
            for number, prediction in found:
                item, example, listener, question = asked[number]
                if question.renderer.compares or self._masked:
                    yield item, self._answer_at_once(item, example, question, prediction)
                elif listener.enough:
                    yield item, _written(example, listener)
                else:
                    item.question.said = listener
                    yield item, GOES_ON

    def _listener(self, item: Item, handle: Handle, example: Rendered, limit: int) -> Listener:
        said: Listener | None = item.question.said
        if said is not None:
            return said.again()
        before = example.sequences[0].ids if handle.goes_on else None
        return Listener(item, self.base.tokenizer, self._engine.ends(handle.task), limit, before)

    def _watch(
        self, item: Item, example: Rendered, listener: Listener, writing: set[Item], turn: Turn
    ) -> Watch:
        """Ends a free answer, or its turn; brief questions come in behind each token of it."""
        lasts = item.brief or not self._joins

        def watch(token: int, score: float) -> bool:
            turn.hear(item)
            if listener(token, score):
                writing.discard(item)
                if not math.isnan(listener.score):  # the batch fails then, and says why
                    settle(item, _written(example, listener))
                return True
            self.batcher.let_in()
            return not lasts and turn.over(item)

        return watch

    def _answer_at_once(
        self, item: Item, example: Rendered, question: Question, prediction: Prediction
    ) -> Answer:
        """Of a label, or of a masked model."""
        text, written = prediction.answer, 1
        if not question.renderer.compares:
            text = cut_at(text, item.question.wish.stop).strip()
            written = question.most or 1  # a token for each mask
        return Answer(
            text,
            prediction.probability,
            prediction.probabilities,
            example.shortened,
            len(example.sequences[0].ids),
            written,
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


def _written(example: Rendered, listener: Listener) -> Answer:
    """A free answer, whose text has come token by token."""
    return Answer(
        listener.whole,
        math.exp(listener.score),
        {},
        example.shortened,
        len(example.sequences[0].ids),
        len(listener.tokens),
        listener.complete,
    )
