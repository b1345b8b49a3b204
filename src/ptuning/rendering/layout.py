"""One string of a template, tokenized: where virtual tokens, fields and answer stand in it.

The string is tokenized at once (`virtual_ids`), so it has the ids that a merged model's tokenizer
gives. Virtual token i of the prompt is written as id ``-1 - i``; `collate` puts attached ids in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy

from ..errors import DataError, InputError
from ..prompts.task import Task
from ..prompts.template import Field, Slot, Virtual
from .known import Known, Tokenize
from .virtual_ids import SLOT, NamedTokenizer, Names

Spans = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Sequence:
    """One tokenized input with one answer.

    Attributes:
        ids: input ids; virtual token i is ``-1 - i``. For causal models they end before the answer,
            for masked ones the answer slot holds mask ids, for seq2seq they are the encoder's.
        slot: index of the answer's first token.
        answer: ids of the answer, empty where none was given.
        fields: token ranges ``(name, start, end)`` of each field, in the order of the template;
            empty for tokenizers that report no offsets, and for chats that change what is said.
        shortened: a field was cut to fit the length limit.
    """

    ids: tuple[int, ...]
    slot: int
    answer: tuple[int, ...] = ()
    fields: Spans = ()
    shortened: bool = False

    @cached_property
    def numbers(self) -> Any:
        """`ids` as an array, made once for all batches that the sequence will be in."""
        return numpy.array(self.ids, dtype=numpy.int64)

    def without(self, virtual: Container[int]) -> Sequence:
        """The same input without some of the prompt's virtual tokens, by their numbers."""
        kept = [i for i, token in enumerate(self.ids) if not (token < 0 and -1 - token in virtual)]
        if len(kept) == len(self.ids):
            return self

        def moved(place: int) -> int:
            return bisect_left(kept, place)

        fields = tuple((name, moved(start), moved(end)) for name, start, end in self.fields)
        ids = tuple(self.ids[i] for i in kept)
        return Sequence(ids, moved(self.slot), self.answer, fields, self.shortened)

    @cached_property
    def plain_prefix(self) -> int:
        """How many tokens stand in front of the first virtual one, without the last of all."""
        virtual = (self.numbers < 0).nonzero()[0]
        return int(virtual[0]) if len(virtual) else max(0, len(self.ids) - 1)

    @property
    def opening(self) -> int:
        """How many tokens stand in front of the first field, without the last of all."""
        return min(self.fields[0][1], len(self.ids) - 1) if self.fields else 0


@dataclass(frozen=True, eq=False)
class Written:
    """An example as one string, before it is tokenized.

    Attributes:
        named: has names that do not occur in the example.
        text: with names for virtual tokens and slot.
        characters: the fields' ranges.
        space: the answer begins with a space.
        tail: the end of what stands before the answer, which decides how that is tokenized.
    """

    named: NamedTokenizer
    text: str
    characters: list[tuple[str, int, int]]
    space: bool
    tail: str

    def continued(self, word: str) -> str:
        """The answer as it continues the text."""
        return f" {word}" if self.space and not word.startswith(" ") else word


Draft = tuple[Written, str | None]
"""An example's string, and its answer if there is one."""


class Layout:
    """Tokenizes a task's template with its fields filled in.

    Args:
        tokenizer: stays unchanged.
        task: gives template and policies.
        kind: of the model, as `traits.kind_of` says.
        sizes: virtual tokens of each group in the template.
    """

    def __init__(self, tokenizer: Any, task: Task, kind: str, sizes: list[int]):
        self.tokenizer, self.task, self.kind, self.sizes = tokenizer, task, kind, sizes
        self.count = sum(sizes)
        self._names = Names(tokenizer, self.count)

    def __call__(self, fields: dict[str, str], word: str | None) -> Sequence:
        """Tokenize an example's fields, with `word` as the answer if there is one."""
        return next(self.each(self.drafts(fields, [word]), Known()))

    def drafts(self, fields: dict[str, str], words: Iterable[str | None]) -> list[Draft]:
        """An example's string, written for each of several answers."""
        spelled, before = self._spelled(fields)
        written: dict[str, Written] = {}
        drafts = []
        for word in words:
            named = self._names.avoiding(f"{spelled}\n{before}{word or ''}")
            if named.prefix not in written:
                text, characters, space = self.string(fields, named)
                tail = named.tail(text.partition(named.slot)[0])
                written[named.prefix] = Written(named, text, characters, space, tail)
            drafts.append((written[named.prefix], word))
        return drafts

    def wanted(self, drafts: Iterable[Draft]) -> Iterator[tuple[Tokenize, str]]:
        """The strings that `each` will look up, but for rare cases."""
        for written, word in drafts:
            yield self._whole(written), written.text
            if word is None:
                continue
            if self.kind == "seq2seq":
                yield self._decoder_answers, word
            else:
                yield written.named.ids_of, written.tail
                yield written.named.ids_of, written.tail + written.continued(word)

    def each(self, drafts: Iterable[Draft], known: Known) -> Iterator[Sequence]:
        """The sequences of an example; what is not known yet is tokenized."""
        last = None
        for written, word in drafts:
            if written is not last:
                ids, spans = self._read(written, known)
                last = written
            answer = () if word is None else self._answer(word, written, known)
            yield self._fill_slot(ids, answer, spans)

    def _whole(self, written: Written) -> Tokenize:
        return written.named.inner if self.task.chat else written.named.whole

    def _read(self, written: Written, known: Known) -> tuple[list[int], Spans]:
        ids, offsets = known(self._whole(written), written.text)
        shift = self.count if self.task.special_tokens == "after" else 0
        spans = () if offsets is None else _token_spans(written.characters, offsets, shift)
        return [-1 - i for i in range(shift)] + ids, spans

    def _spelled(self, fields: dict[str, str]) -> tuple[str, str]:
        """All text of the example, joined as it is tokenized, and what stands before the answer."""
        parts: list[str] = []
        slot = -1
        for piece in self.task.parsed.pieces:
            if isinstance(piece, Slot):
                slot = len(parts)
            elif not isinstance(piece, Virtual):
                parts.append(fields[piece.name] if isinstance(piece, Field) else piece.text)
        return "".join(parts), "".join(parts if slot < 0 else parts[:slot])

    def _fill_slot(self, ids: list[int], answer: tuple[int, ...], spans: Spans) -> Sequence:
        at = ids.index(SLOT)
        if self.kind == "causal":
            return Sequence(tuple(ids[:at]), at, answer, spans)
        filling: list[int] = []
        if self.kind == "masked":
            filling = [self.tokenizer.mask_token_id] * (len(answer) or self.task.answer_tokens or 1)
        grown = len(filling) - 1  # fields behind the slot move by what it grew
        moved = [(n, a, b) if a < at else (n, a + grown, b + grown) for n, a, b in spans]
        return Sequence((*ids[:at], *filling, *ids[at + 1 :]), at, answer, tuple(moved))

    def string(
        self, fields: dict[str, str], named: NamedTokenizer
    ) -> tuple[str, list[tuple[str, int, int]], bool]:
        """The string that is tokenized, with names for virtual tokens and slot.

        Returns:
            with it the fields' character ranges, and whether the answer begins with
            a space. Under ``special_tokens="after"`` the virtual tokens are not in it.
        """
        text, spans, space = self._of_template(fields, named)
        if self.task.chat:
            said = text.removesuffix(named.slot)
            chat = self._as_chat(said)
            at = chat.find(said) if chat.count(said) == 1 else None
            spans = [] if at is None else [(name, at + a, at + b) for name, a, b in spans]
            text, space = chat + named.slot, False
        return text, spans, space

    def turn(self, fields: dict[str, str], named: NamedTokenizer) -> str:
        """What a chat's user says: the template without the chat around it."""
        return self._of_template(fields, named)[0].removesuffix(named.slot)

    def _of_template(
        self, fields: dict[str, str], named: NamedTokenizer
    ) -> tuple[str, list[tuple[str, int, int]], bool]:
        parts: list[str] = []
        spans: list[tuple[str, int, int]] = []
        sizes = iter(self.sizes)
        virtual = 0
        space: bool | None = None
        leading = self.task.special_tokens == "after"
        for piece in self.task.parsed.pieces:
            if isinstance(piece, Virtual):
                size = next(sizes)
                if not leading:
                    parts += [named.name(virtual + i) for i in range(size)]
                virtual += size
            elif isinstance(piece, Field):
                start = sum(map(len, parts))
                parts.append(fields[piece.name])
                spans.append((piece.name, start, start + len(parts[-1])))
            elif isinstance(piece, Slot):
                space = piece.space
                parts.append(named.slot)
                if self.kind == "causal":
                    break
            else:
                parts.append(piece.text if parts or not leading else piece.text.removeprefix(" "))
        text = "".join(parts)
        if space is None:  # without [MASK] the answer stands at the end
            space = not text.endswith(("\n", "\t"))
            text = text.removesuffix(" ") + named.slot
        return text, spans, space

    def _as_chat(self, text: str) -> str:
        turns = self.task.turns(text)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # what the chat template raises, or its engine
            reason = (str(error) or type(error).__name__).splitlines()[0]
            who = " and ".join(turn["role"] for turn in turns)
            raise InputError(
                f"this model's chat template takes no turns of {who} ({reason})"
            ) from error

    def _answer(self, word: str, written: Written, known: Known) -> tuple[int, ...]:
        if self.kind == "seq2seq":
            ids = known(self._decoder_answers, word)
        else:
            named, tail, answer = written.named, written.tail, written.continued(word)
            alone, both = known(named.ids_of, tail), known(named.ids_of, tail + answer)
            if len(both) > len(alone) and both[: len(alone)] == alone:
                ids = both[len(alone) :]
            else:  # the answer would merge with the word before it: keep the two apart
                apart = named.ids(tail + named.slot + answer)
                ids = apart[len(apart) - apart[::-1].index(SLOT) :]
        if not ids:
            raise DataError(f"the answer {word!r} has no token in this tokenizer")
        if self.kind == "causal" and self.task.ends_answer:
            ids = [*ids, self.tokenizer.eos_token_id]
        return tuple(ids)

    def _decoder_answers(self, words: list[str]) -> list[list[int]]:
        """The decoder's labels, with the special tokens that the model was trained on."""
        return [self._decoder_answer(word) for word in words]

    def _decoder_answer(self, word: str) -> list[int]:
        ids = list(self.tokenizer(text_target=word)["input_ids"])
        if not self.task.ends_answer:
            while ids and ids[-1] in self.tokenizer.all_special_ids:
                ids.pop()
        return ids


def _token_spans(
    spans: list[tuple[str, int, int]], offsets: tuple[list[int], list[int]], shift: int
) -> Spans:
    """Character ranges as token ranges: the tokens that overlap a field's text."""
    result = []
    for name, start, end in spans:
        places = enumerate(zip(*offsets, strict=True))
        inside = [i for i, (a, b) in places if a < end and b > start]
        if inside:
            result.append((name, inside[0] + shift, inside[-1] + 1 + shift))
    return tuple(result)
