"""Virtual tokens as names in a tokenizer.

A whole rendered string is tokenized at once by a copy of the tokenizer in which each group of
virtual tokens, and the answer slot, is an added token. The names are chosen to occur in no text of
the example, so text never becomes a virtual token.

A copy takes a tenth of a second, so the last one of a tokenizer is kept for all who render with it,
as long as the tokenizer is what it was.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import AddedToken

from ..backbone.tokens import takes_tokens, tokenizer_state
from ..errors import InputError
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..threads import CHANGING
from .spaces import cuts_at_spaces, last_word

SLOT = -(10**9)
"""The answer slot among rendered ids; virtual token i is ``-1 - i``."""


@dataclass(frozen=True, eq=False)
class NamedTokenizer:
    """A tokenizer extended by names for virtual tokens and the slot.

    Attributes:
        tokenizer: the extended copy.
        prefix: what every name begins with.
        meaning: an added token's id -> what it is among rendered ids.
        spaced: cuts text at spaces (`spaces.cuts_at_spaces`).
        by_group: a group of virtual tokens has one name; else each of its tokens.
    """

    tokenizer: Any
    prefix: str
    meaning: dict[int, int]
    spaced: bool = False
    by_group: bool = True

    def name(self, index: int) -> str:
        """The name of number `index`."""
        return f"{self.prefix}{index}|>"

    def group(self, number: int, tokens: range) -> str:
        """How a group of virtual tokens is written."""
        return self.name(number) if self.by_group else "".join(map(self.name, tokens))

    @property
    def slot(self) -> str:
        """The name of the answer slot."""
        return f"{self.prefix}slot|>"

    def ids(self, text: str) -> list[int]:
        """Ids without special tokens around; names as negative numbers."""
        return self.rename(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ids_of(self, texts: list[str]) -> list[list[int]]:
        """`ids` of each text."""
        return self._ids_of(texts, special=False)

    def whole(self, texts: list[str]) -> list[list[int]]:
        """Each text with the tokenizer's special tokens around."""
        return self._ids_of(texts, special=True)

    def placed(self, texts: list[str]) -> list[Placed]:
        """`ids` of each text, and where they stand in it."""
        return self._placed(texts, special=False)

    def whole_placed(self, texts: list[str]) -> list[Placed]:
        """The same with the tokenizer's special tokens around."""
        return self._placed(texts, special=True)

    def _ids_of(self, texts: list[str], special: bool) -> list[list[int]]:
        if not self.tokenizer.is_fast:
            return [ids for ids, _ in self._placed(texts, special)]
        backend = self.tokenizer.backend_tokenizer
        found = backend.encode_batch_fast(texts, add_special_tokens=special)
        return [self.rename(encoding.ids) for encoding in found]

    def _placed(self, texts: list[str], special: bool) -> list[Placed]:
        if not self.tokenizer.is_fast:
            found = [self.tokenizer(text, add_special_tokens=special) for text in texts]
            return [(self.rename(one["input_ids"]), None) for one in found]
        made: list[Placed] = []
        for one in self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=special):
            # In two lists: pairs by the thousand would keep the garbage collector busy.
            offsets = one.offsets
            begins, ends = [a for a, _ in offsets], [b for _, b in offsets]
            made.append((self.rename(one.ids), (begins, ends)))
        return made

    def rename(self, ids: list[int]) -> list[int]:
        """Replace the added tokens' ids by what they mean here."""
        meaning = self.meaning.get
        return [meaning(i, i) for i in ids]

    def tail(self, text: str) -> str:
        """The end of a text that decides how what continues it is tokenized.

            <|virtual-0:0|> It rains.<|virtual-0:1|> The answer is   text
                                     <|virtual-0:1|> The answer is   of a fast tokenizer
                                              <|virtual-0:slot|> is   of one that cuts at spaces

        Fast tokenizers look for added tokens first, and at what stands between them part by part.
        """
        if not self.tokenizer.is_fast:
            return text
        start = max(0, text.rfind(self.prefix))
        word = last_word(text, start) if self.spaced else -1
        return text[start:] if word < 0 else self.slot + text[word:]


Placed = tuple[list[int], tuple[list[int], list[int]] | None]
"""A text's ids, names as negative numbers; and where the characters of each begin and end, if the
tokenizer tells."""


class Names:
    """Extended tokenizers for texts of any content.

    Args:
        tokenizer: stays unchanged.
        count: how many names there are to be.
    """

    def __init__(self, tokenizer: Any, count: int):
        self.tokenizer, self.count = tokenizer, count
        self._usual: NamedTokenizer | None = None
        self._other: NamedTokenizer | None = None

    def avoiding(self, text: str) -> NamedTokenizer:
        """A tokenizer whose names do not occur in `text`. Beside the usual one there is one other,
        whose names nobody can guess: no text makes copies by the dozen."""
        if _USUAL not in text:
            self._usual = self._usual or self._make()
            return self._usual
        other = self._other
        while other is None or other.prefix in text:
            prefix = f"<|virtual-{secrets.token_hex(8)}:"
            other = self._other = _extended(self.tokenizer, prefix, self.count)
        return other

    def _make(self) -> NamedTokenizer:
        state = tokenizer_state(self.tokenizer)
        if state is None:
            return _extended(self.tokenizer, _USUAL, self.count)
        with CHANGING:
            kept = _kept.get(self.tokenizer)
        if kept is None or kept.state != state or kept.size < self.count:
            count = -(-self.count // _ROUND) * _ROUND
            kept = _Kept(state, count, _extended(self.tokenizer, _USUAL, count))
            with CHANGING:
                _kept[self.tokenizer] = kept
        return kept.named


class _Kept(NamedTuple):
    """The extended copy of a tokenizer in some state; nobody changes it any more."""

    state: str
    size: int
    named: NamedTokenizer


_USUAL = "<|virtual-0:"
_ROUND = 32
"""Copies for more names than are asked for serve the next prompt too."""
_kept: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()


def _extended(tokenizer: Any, prefix: str, count: int) -> NamedTokenizer:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 10**30  # rendering sees to the length, without a warning
    named = NamedTokenizer(tokenizer, prefix, {}, cuts_at_spaces(tokenizer))
    names = {named.name(i): -1 - i for i in range(count)} | {named.slot: SLOT}
    add_virtual_tokens(tokenizer, names)
    for name, meaning in names.items():
        named.meaning[tokenizer.convert_tokens_to_ids(name)] = meaning
    named.ids("")  # ends padding and truncation of the owner's last call: threads only read then
    return named


def add_virtual_tokens(tokenizer: Any, names: Iterable[str]) -> None:
    """Give a tokenizer names in the one form that leaves the tokens around them as they are.

    They are special, unless the tokenizer splits special tokens of a text: names stay whole.

    Raises:
        InputError: the tokenizer splits all tokens that were added to it, or takes none.
    """
    if not takes_tokens(tokenizer):
        raise InputError(
            f"this tokenizer ({type(tokenizer).__name__}) takes no further tokens, so no virtual "
            "ones; take that of the model's tokenizer.json (transformers' "
            "PreTrainedTokenizerFast.from_pretrained; ptuning.load_model does where there is one)"
        )
    splits = getattr(tokenizer, "split_special_tokens", False)
    if splits and not tokenizer.is_fast:
        raise InputError(
            f"this tokenizer ({type(tokenizer).__name__}) splits every added token of a text, and "
            "virtual tokens are such; load it with split_special_tokens=False"
        )
    form = {"special": not splits, "normalized": False, "lstrip": False, "rstrip": False}
    tokenizer.add_tokens([AddedToken(name, **form) for name in names])


def resolve_words(tokenizer: Any, task: Task) -> list[list[int | None]]:
    """For each group of virtual tokens the ids that initialise them, or None where there are none.

    Also fixes the prompt's number of virtual tokens, which the words of ``[P:…]`` decide.

    Raises:
        InputError: words that this tokenizer has no token for.
    """
    groups: list[list[int | None]] = []
    for position, group in enumerate(task.parsed.virtual):
        if group.words is None:
            groups.append([None] * group.count)
            continue
        first = position == 0 and task.parsed.pieces[0] == group
        text = group.spelled.removeprefix(" ") if first else group.spelled
        groups.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
        if not groups[-1]:
            raise InputError(f"the words of [P:{group.words}] have no token in this tokenizer")
    if isinstance(task, Prompt):
        task.set_count(sum(map(len, groups)))
    return groups
