"""Template + example + tokenizer -> token ids, and where fields and answer stand.

What an example says is `example`'s, and how one string becomes ids is `layout`'s; here answers and
strings are settled, and what must be cut for them to fit. Knows nothing of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self

from ..backbone.tokens import check_tokenizer
from ..data.rows import in_blocks
from ..errors import DataError, InputError, warn
from ..prompts.prompt import Prompt
from ..prompts.task import Task, fill
from .example import Example, column_texts, columns_in_words, right_answer
from .known import Known
from .layout import Draft, Layout, Sequence
from .lesson import Lesson
from .short_words import settle_words
from .virtual_ids import resolve_words

_ROWS, _CHARACTERS = 256, 2**18
"""At most so many are tokenized together."""
_WITH_WORDS = 2**22
"""Characters of what stands before the answers, once for each word that is compared."""


@dataclass(frozen=True)
class Rendered:
    """An example ready for the model.

    Attributes:
        sequences: one, or one per label word where label words have several tokens.
        label_ids: token id of each label word, where each is a single token; else empty.
        label: index of the right label; None for free answers or unlabelled examples.
        lesson: of a teacher, whose answer the right one is then; else None.
    """

    sequences: tuple[Sequence, ...]
    label_ids: tuple[int, ...] = ()
    label: int | None = None
    lesson: Lesson | None = None

    @property
    def compares(self) -> bool:
        """The loss compares label words."""
        return bool(self.label_ids) or len(self.sequences) > 1

    @property
    def weight(self) -> int:
        """What this example counts in the loss: its answer tokens, or 1 for a label."""
        return 1 if self.compares else len(self.sequences[0].answer)

    @property
    def shortened(self) -> bool:
        """A field was cut to fit the length limit."""
        return any(sequence.shortened for sequence in self.sequences)


@dataclass(frozen=True, eq=False)
class Asked:
    """An example before it is tokenized.

    Attributes:
        fields: field -> text.
        words: the answers that it is rendered with; None for none.
        label: index of the right label.
        drafts: its strings.
    """

    fields: dict[str, str]
    words: list[str | None]
    label: int | None
    drafts: list[Draft]


class Renderer:
    """Renders examples for one task (a prompt or a manual template), tokenizer and kind of model.

    Args:
        tokenizer: stays unchanged.
        task: gives template, verbalizer and policies.
        kind: ``"causal"``, ``"masked"`` or ``"seq2seq"`` (`kinds.kind_of`).
        context: the model's context length; the task's ``max_length`` may be smaller.
        candidates: compare these answers instead of the verbalizer's labels.
        longest_answer: tokens that a decoder of its own has room for.
        known_tokens: how many ids the model has rows for; None for all of the tokenizer's.

    Attributes:
        groups: for each group of virtual tokens the ids that initialise them, or None.
        labels: label -> words that are compared; empty for free answers.
        owner: for each word that is compared the index of its label.
        bias, matrix: the task's, in the order of labels and of words; None without.
        limit: the longest input in tokens, or None.
        known_tokens: how many ids the model has rows for, where the tokenizer has more; else None.
        layout: makes ids of one string.

    Raises:
        InputError: task, tokenizer and model kind do not fit together.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: Task,
        kind: str,
        context: int | None = None,
        candidates: list[str] | None = None,
        longest_answer: int | None = None,
        known_tokens: int | None = None,
    ):
        check_tokenizer(tokenizer)
        self.tokenizer, self.task, self.kind = tokenizer, task, kind
        self.groups = resolve_words(tokenizer, task)
        self.count = sum(map(len, self.groups))
        limits = [limit for limit in (task.max_length, context) if limit]
        self.limit = min(limits) if limits else None
        if self.limit is not None and self.count >= self.limit:
            raise InputError(
                f"num_virtual_tokens is {self.count}, and an input has room for {self.limit} "
                "tokens; use fewer virtual tokens"
            )
        if isinstance(task, Prompt):
            settle_words(task, tokenizer, kind)
        if candidates and not all(candidate.strip() for candidate in candidates):
            raise InputError("a candidate is empty; every answer needs a text")
        self.labels = {c: (c,) for c in candidates} if candidates else task.labels
        self.compares = bool(candidates) or (bool(task.labels) and task.label_mode == "labels")
        self.owner = [n for n, words in enumerate(self.labels.values()) for _ in words]
        given = None if candidates else task.label_bias
        self.bias = None if given is None else [given[label] for label in self.labels]
        matrix = task.label_matrix if isinstance(task, Prompt) and not candidates else None
        self.matrix = None if matrix is None else matrix.of(self.labels)
        self._in_words = () if candidates else columns_in_words(task)
        self._literal, self._told_alike = bool(candidates), False
        self._longest_answer = longest_answer
        fewer = known_tokens is not None and known_tokens < len(tokenizer)
        self.known_tokens = known_tokens if fewer else None
        self.layout = Layout(tokenizer, task, kind, [len(group) for group in self.groups])
        self._check_kind()

    def asking(self) -> Self:
        """For predictions: labels are compared among each other, however they were trained."""
        self.compares = bool(self.labels)
        return self

    def _check_kind(self) -> None:
        task, template = self.task, self.task.parsed
        if self._longest_answer is not None and (task.answer_tokens or 0) > self._longest_answer:
            raise InputError(
                f"answer_tokens is {task.answer_tokens}, and the model's decoder has room for "
                f"{self._longest_answer} tokens; give fewer"
            )
        if self.kind == "causal" and template.after_slot:
            warn(f"a causal model answers at [MASK]; what follows it is dropped: {template.text}")
        if self.kind == "causal" and task.ends_answer and self.tokenizer.eos_token_id is None:
            raise InputError(
                "this tokenizer has no end-of-sequence token to end answers with; give "
                "answer_end=False, and answer_tokens to predict"
            )

    def __call__(self, example: Example, *, answered: bool = True) -> Rendered:
        """Render one example.

        Args:
            example: column -> value.
            answered: the answer column must be there, and it is tokenized.

        Raises:
            DataError: a column is missing, the answer is empty or no known label, or the example
                does not fit the model's context, or has a token that the model has not.
        """
        asked = self._asked(example, answered)
        return self._rendered(asked, self._known([asked]))

    def each(
        self, rows: Iterable[Example], what: str, *, answered: bool = True, first: int = 1
    ) -> list[Rendered]:
        """Render examples, the strings of many in one call of the tokenizer.

        Args:
            rows: column -> value.
            what: they are for, such as ``"training"``.
            answered: the answer column must be there, and it is tokenized.
            first: the number of the first of them.

        Raises:
            DataError: names the example at fault by its number.
        """
        rendered: list[Rendered] = []
        read = in_blocks(rows, _ROWS, _CHARACTERS)
        blocks = ([self._asked_or_wrong(row, answered) for row in block] for block in read)
        for asked in chain.from_iterable(map(self._together, blocks)):
            known = self._known(one for one in asked if isinstance(one, Asked))
            for number, one in enumerate(asked, first + len(rendered)):
                try:
                    if isinstance(one, Exception):
                        raise one
                    rendered.append(self._rendered(one, known))
                except DataError as error:
                    raise DataError(f"{what} example {number}: {error}") from None
        return rendered

    def _together(self, block: list[Asked | Exception]) -> Iterator[list[Asked | Exception]]:
        """A block in parts to be tokenized together. Where a tokenizer's parts are not known to
        cut at spaces, each word that is compared is tokenized with all the text before it."""
        part: list[Asked | Exception] = []
        seen: set[str] = set()
        characters = 0
        for one in block:
            part.append(one)
            if isinstance(one, Asked):
                new = self.layout.tails(one.drafts) - seen
                seen |= new
                characters += len(one.drafts) * sum(map(len, new))
            if characters >= _WITH_WORDS:
                yield part
                part, seen, characters = [], set(), 0
        if part:
            yield part

    def _asked_or_wrong(self, example: Example, answered: bool) -> Asked | Exception:
        """What an example asks, or what is wrong with it: the rows before it come first."""
        try:
            return self._asked(example, answered)
        except Exception as error:
            return error

    def _asked(self, example: Example, answered: bool) -> Asked:
        """What an example asks of the tokenizer; the first half of rendering it.

        Raises:
            DataError: a column is missing, or the answer is empty or no known label.
        """
        fields = column_texts(example, self.task.parsed.fields, "template")
        in_words = column_texts(example, self._in_words, "verbalizer")
        gold = right_answer(self.task, example, self.labels) if answered else None
        label = list(self.labels).index(gold) if gold is not None and self.labels else None
        words: list[str | None] = [gold]
        if self.compares:
            words = [self._word(w, in_words) for words in self.labels.values() for w in words]
        elif gold is not None and self.labels:
            words = [self._word(self.labels[gold][0], in_words)]
        return Asked(fields, words, label, self.layout.drafts(fields, words))

    def _known(self, examples: Iterable[Asked]) -> Known:
        """What some examples ask for, tokenized together."""
        known = Known()
        known.ahead(chain.from_iterable(self.layout.wanted(one.drafts) for one in examples))
        return known

    def _rendered(self, asked: Asked, known: Known) -> Rendered:
        """The second half of rendering.

        Raises:
            DataError: the example does not fit the model's context.
        """
        sequences = self._fitting(asked.drafts, known) or self._shortened(asked, known)
        if not self.compares:
            return Rendered(sequences, label=asked.label)
        self._check_words(sequences)
        if all(len(s.answer) == 1 for s in sequences):  # of one input then, with one mask
            return Rendered(sequences[:1], tuple(s.answer[0] for s in sequences), asked.label)
        return Rendered(sequences, label=asked.label)

    def _check_words(self, sequences: tuple[Sequence, ...]) -> None:
        """Refuse words of two labels that are the same tokens, such as unknown ones: no training
        could tell them apart. Of one label they are told of, once: what a trained prompt makes of
        them stays. (An example's own words and candidates may be alike.)"""
        if self._literal or self._in_words or len({s.answer for s in sequences}) == len(sequences):
            return
        spelled = [(label, word) for label, words in self.labels.items() for word in words]
        seen: dict[tuple[int, ...], tuple[str, str]] = {}
        for this, sequence in zip(spelled, sequences, strict=True):
            first = seen.setdefault(sequence.answer, this)
            (other, its_word), (label, word) = first, this
            if other != label:
                raise InputError(
                    f"the words {its_word!r} of the label {other!r} and {word!r} of {label!r} are "
                    "the same to this tokenizer; give each label words that it tells apart"
                )
            if first is not this and not self._told_alike:
                self._told_alike = True
                warn(
                    f"the words {its_word!r} and {word!r} of the label {label!r} are the same to "
                    "this tokenizer, so it counts twice; leave one of them out"
                )

    def _word(self, word: str, columns: dict[str, str]) -> str:
        if self._literal:
            return word
        filled = fill(word, columns)
        if not filled.strip():
            raise DataError(f"the label word {word!r} is empty in this example")
        return filled

    def _shortened(self, asked: Asked, known: Known) -> tuple[Sequence, ...]:
        """One sequence per word, all with the same fields: as much of them as fits."""
        low, high = 0, max(map(len, asked.fields.values()), default=0)
        best: tuple[Sequence, ...] = ()
        while low <= high:  # the longest fields are cut to one common length: as long as fits
            middle = (low + high) // 2
            fields = {name: _cut(text, middle) for name, text in asked.fields.items()}
            shorter = self._fitting(self.layout.drafts(fields, asked.words), known)
            if shorter:
                best, low = shorter, middle + 1
            else:
                high = middle - 1
        if not best:
            raise DataError(
                f"anchors, virtual tokens and answer alone are longer than the {self.limit} tokens "
                "there is room for; use a shorter template, fewer virtual tokens, or a shorter "
                "answer"
            )
        return tuple(replace(sequence, shortened=True) for sequence in best)

    def _fitting(self, drafts: Iterable[Draft], known: Known) -> tuple[Sequence, ...]:
        """The sequences, or none where one of them does not fit."""
        sequences = []
        for sequence in self.layout.each(drafts, known):
            if len(sequence.answer) > (self._longest_answer or math.inf):
                raise DataError(
                    f"the answer has {len(sequence.answer)} tokens, its end included, and the "
                    f"model's decoder has room for {self._longest_answer}; shorten it"
                )
            self._check_tokens(sequence)
            room = self._room(sequence)
            if room is not None and len(sequence.ids) > room:
                return ()
            sequences.append(sequence)
        return tuple(sequences)

    def _check_tokens(self, sequence: Sequence) -> None:
        """Refuse what was added to the tokenizer alone."""
        if self.known_tokens is None:
            return
        highest = max((*sequence.ids, *sequence.answer), default=0)
        if highest >= self.known_tokens:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise DataError(
                f"{token!r} stands here, which is token {highest} of the tokenizer, and the model "
                f"has tokens 0 to {self.known_tokens - 1}; take it out of the text, or give the "
                "model rows for it (resize_token_embeddings)"
            )

    def _room(self, sequence: Sequence) -> int | None:
        if self.limit is None or self.kind != "causal":
            return self.limit
        return self.limit + 1 - max(len(sequence.answer), self.task.answer_tokens or 1)


def _cut(text: str, length: int) -> str:
    """At most `length` characters, without the broken word at the end."""
    if len(text) <= length:
        return text
    kept = text[:length]
    if length and not text[length].isspace() and (space := kept.rfind(" ")) > 0:
        kept = kept[:space]
    return kept.rstrip()


def render_all(
    renderer: Renderer, rows: Iterable[Example], what: str, *, answered: bool = True
) -> list[Rendered]:
    """Render examples; says how many were shortened.

    Raises:
        DataError: names the example at fault by its number, counted from 1.
    Warns:
        UserWarning: fields were cut to fit the length limit.
    """
    rendered = renderer.each(rows, what, answered=answered)
    shortened = sum(example.shortened for example in rendered)
    tell_shortened(renderer, shortened, len(rendered), what)
    return rendered


def taught(example: Rendered, lesson: Lesson, labels: Iterable[str]) -> Rendered:
    """An example that was rendered without its answer, with a teacher's.

    Args:
        example: of a training.
        lesson: the teacher's for it.
        labels: the verbalizer's, in order.
    """
    if example.compares:
        return replace(example, label=list(labels).index(lesson.answer), lesson=lesson)
    (sequence,) = example.sequences
    return replace(example, sequences=(replace(sequence, answer=lesson.tokens),), lesson=lesson)


def tell_shortened(renderer: Renderer, shortened: int, count: int, what: str) -> None:
    """Warn of examples that were cut, if there are any among `count`."""
    if shortened:
        warn(f"{shortened} of {count} {what} examples were shortened to {renderer.limit} tokens")
