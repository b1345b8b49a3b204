"""One string of a template, tokenized: where virtual tokens, first field and answer stand in it.

The string is tokenized at once (`virtual_ids`), so it has the ids that a merged model's tokenizer
gives. Virtual token i of the prompt is written as id ``-1 - i``; `collate` puts attached ids in.
A group of virtual tokens is one name in the string. Where the first field stands right behind one,
nobody asks the tokenizer for places, which takes it two thirds of its time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy

from ..errors import DataError, InputError
from ..prompts.task import Task
from ..prompts.template import Field, Slot, Virtual
from .chat import as_chat
from .known import Known, Tokenize
from .virtual_ids import SLOT, NamedTokenizer, Names


@dataclass(frozen=True)
class Sequence:
    """One tokenized input with one answer.

    Attributes:
        ids: input ids; virtual token i is ``-1 - i``. For causal models they end before the answer,
            for masked ones the answer slot holds mask ids, for seq2seq they are the encoder's.
        slot: index of the answer's first token.
        answer: ids of the answer, empty where none was given.
        opening: how many tokens stand in front of the first field, without the last of all; 0
            where that is empty or nobody knows: the tokenizer reports no offsets, or the chat
            changes what is said.
        shortened: a field was cut to fit the length limit.
    """

    ids: tuple[int, ...]
    slot: int
    answer: tuple[int, ...] = ()
    opening: int = 0
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

        ids = tuple(self.ids[i] for i in kept)
        return Sequence(ids, moved(self.slot), self.answer, moved(self.opening), self.shortened)

    def followed_by(self, said: Iterable[int]) -> Sequence:
        """The same input of a causal model with tokens of a free answer behind it."""
        ids = (*self.ids, *said)
        return Sequence(ids, len(ids), (), self.opening, self.shortened)

    @cached_property
    def plain_prefix(self) -> int:
        """How many tokens stand in front of the first virtual one, without the last of all."""
        virtual = (self.numbers < 0).nonzero()[0]
        return int(virtual[0]) if len(virtual) else max(0, len(self.ids) - 1)


@dataclass(frozen=True, eq=False)
class Written:
    """An example as one string, before it is tokenized.

    Attributes:
        named: has names that do not occur in the example.
        text: with names for groups of virtual tokens and for the slot.
        field: the characters of the first field; none where it has no place of its own.
        space: the answer begins with a space.
        tail: the end of what stands before the answer, which decides how that is tokenized.
    """

    named: NamedTokenizer
    text: str
    field: range
    space: bool
    tail: str

    def continued(self, word: str) -> str:
        """The answer as it continues the text."""
        return spaced(word, self.space)


def spaced(word: str, space: bool) -> str:
    """An answer that begins with a space if it is to; with one of its own it has no second."""
    return f" {word}" if space and not word.startswith(" ") else word


Draft = tuple[Written, str | None]
"""An example's string, and its answer if there is one."""


class Layout:
    """Tokenizes a task's template with its fields filled in.

    Args:
        tokenizer: stays unchanged.
        task: gives template and policies.
        kind: of the model, as `kinds.kind_of` says.
        sizes: virtual tokens of each group in the template.

    Raises:
        InputError: no model of this kind, or none with this tokenizer, can be asked so.
    """

    def __init__(self, tokenizer: Any, task: Task, kind: str, sizes: list[int]):
        _check_fits(task, tokenizer, kind)
        self.tokenizer, self.task, self.kind = tokenizer, task, kind
        self.count = sum(sizes)
        ends = accumulate(sizes)
        self._groups = [
            [-1 - i for i in range(end - size, end)] for size, end in zip(sizes, ends, strict=True)
        ]
        self._leads = task.special_tokens == "after"
        self._behind = _group_before_field(task)
        self._names = Names(tokenizer, len(sizes))

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
                text, field, space = self.string(fields, named)
                tail = named.tail(text.partition(named.slot)[0])
                written[named.prefix] = Written(named, text, field, space, tail)
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

    def tails(self, drafts: Iterable[Draft]) -> set[str]:
        """What each answer is tokenized behind."""
        return set() if self.kind == "seq2seq" else {written.tail for written, _ in drafts}

    def each(self, drafts: Iterable[Draft], known: Known) -> Iterator[Sequence]:
        """The sequences of an example; what is not known yet is tokenized."""
        last = None
        for written, word in drafts:
            if written is not last:
                ids, opening = self._read(written, known)
                asked, last = None, written
            answer = () if word is None else self._answer(word, written, known)
            if asked is None or self.kind == "masked":  # with a mask for each token of the answer
                asked = self._filled(ids, answer, opening)
            yield Sequence(asked.ids, asked.slot, answer, asked.opening)

    def _whole(self, written: Written) -> Tokenize:
        named = written.named
        if self._behind is not None:
            return named.whole
        return named.placed if self.task.chat else named.whole_placed

    def _read(self, written: Written, known: Known) -> tuple[list[int], int]:
        """The ids, and how many of them stand in front of the first field."""
        found = known(self._whole(written), written.text)
        if self._behind is not None:
            ids = self._expanded(found)
            return ids, ids.index(self._groups[self._behind][-1]) + 1 if written.field else 0
        names, offsets = found
        before = _tokens_before(written.field, offsets)
        if before is None:
            return self._expanded(names), 0
        groups = [self._groups[-1 - i] for i in names[:before] if SLOT < i < 0]
        more = self.count if self._leads else sum(map(len, groups)) - len(groups)
        return self._expanded(names), before + more

    def _expanded(self, names: list[int]) -> list[int]:
        """Ids with all virtual tokens of a group instead of its name."""
        if self._leads:
            return [*range(-1, -1 - self.count, -1), *names]
        ids = [*names]
        for number in reversed(range(len(self._groups))):
            at = ids.index(-1 - number)
            ids[at : at + 1] = self._groups[number]
        return ids

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

    def _filled(self, ids: list[int], answer: tuple[int, ...], opening: int) -> Sequence:
        """The input with the slot filled: by masks, by nothing, or as a causal model's end."""
        at = ids.index(SLOT)
        filling: list[int] = []
        if self.kind == "masked":
            filling = [self.tokenizer.mask_token_id] * (len(answer) or self.task.answer_tokens or 1)
        if self.kind == "causal":
            filled = tuple(ids[:at])
        else:
            filled = (*ids[:at], *filling, *ids[at + 1 :])
            opening += len(filling) - 1 if opening > at else 0  # it moves by what the slot grew
        return Sequence(filled, at, answer, max(0, min(opening, len(filled) - 1)))

    def string(self, fields: dict[str, str], named: NamedTokenizer) -> tuple[str, range, bool]:
        """The string that is tokenized, with names for groups of virtual tokens and for the slot.

        Returns:
            with it the characters of the first field, and whether the answer begins with a space.
            Under ``special_tokens="after"`` the virtual tokens are not in it.

        Raises:
            InputError: the chat template loses or repeats virtual tokens.
        """
        text, field, space = self._of_template(fields, named)
        if self.task.chat:
            said = text.removesuffix(named.slot)
            chat = as_chat(self.tokenizer, self.task.turns(said))
            if chat.count(named.prefix) != said.count(named.prefix):
                raise InputError(
                    "this model's chat template does not write what the user says once and as it "
                    "is, so virtual tokens in it are lost or repeated; give chat=False, and a "
                    "template that writes the chat's own words"
                )
            at = chat.find(said) if chat.count(said) == 1 else None
            field = range(0) if at is None else range(at + field.start, at + field.stop)
            text, space = chat + named.slot, False
        return text, field, space

    def turn(self, fields: dict[str, str], named: NamedTokenizer) -> str:
        """What a chat's user says: the template without the chat around it."""
        return self._of_template(fields, named)[0].removesuffix(named.slot)

    def _of_template(
        self, fields: dict[str, str], named: NamedTokenizer
    ) -> tuple[str, range, bool]:
        parts: list[str] = []
        field: range | None = None
        groups = iter(enumerate(self._groups))
        space: bool | None = None
        for piece in self.task.parsed.pieces:
            if isinstance(piece, Virtual):
                number, group = next(groups)
                if not self._leads:
                    parts.append(named.group(number, range(-1 - group[0], -group[-1])))
            elif isinstance(piece, Field):
                parts.append(fields[piece.name])
                if field is None:
                    start = sum(map(len, parts[:-1]))
                    field = range(start, start + len(parts[-1]))
            elif isinstance(piece, Slot):
                space = piece.space
                parts.append(named.slot)
                if self.kind == "causal":
                    break
            else:
                parts.append(
                    piece.text if parts or not self._leads else piece.text.removeprefix(" ")
                )
        text = "".join(parts)
        if space is None:  # without [MASK] the answer stands at the end
            space = not text.endswith(("\n", "\t"))
            text = text.removesuffix(" ") + named.slot
        return text, field or range(0), space

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
        found = self.tokenizer(text_target=word, return_special_tokens_mask=True)
        ids, added = list(found["input_ids"]), list(found["special_tokens_mask"])
        if not self.task.ends_answer:  # what is put behind; the word itself may end in <unk>
            while added and added.pop():
                ids.pop()
        return ids


def _check_fits(task: Task, tokenizer: Any, kind: str) -> None:
    template = task.parsed
    if kind == "masked" and template.slot is None:
        raise InputError(f"a masked LM answers at [MASK]; the template has none: {template.text}")
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise InputError("this tokenizer has no mask token, so [MASK] has no meaning with it")
    if kind == "causal" and any(isinstance(piece, Virtual) for piece in template.after_slot):
        raise InputError(
            "a causal model never sees what follows [MASK], and virtual tokens stand there: "
            f"{template.text}; put them before it"
        )
    if task.chat and (kind != "causal" or not tokenizer.chat_template):
        raise InputError("chat=True needs a causal model whose tokenizer has a chat template")


def _group_before_field(task: Task) -> int | None:
    """The number of the group of virtual tokens right in front of the first field, if one is."""
    if task.chat or task.special_tokens == "after":
        return None
    group, number = None, 0
    for piece in task.parsed.pieces:
        if isinstance(piece, Field):
            return group
        if isinstance(piece, Virtual):
            group, number = number, number + 1
        elif isinstance(piece, Slot) or piece.text.strip():
            group = None
    return None


def _tokens_before(field: range, offsets: tuple[list[int], list[int]] | None) -> int | None:
    """How many tokens stand in front of the first that has to do with a field's characters."""
    places = zip(*offsets, strict=True) if offsets else ()
    inside = (i for i, (a, b) in enumerate(places) if a < field.stop and b > field.start)
    return next(inside, None)
