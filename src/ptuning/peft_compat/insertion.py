"""What an adapter inserts around a row's text: virtual tokens, and anchors if it has a template.

Without a template it is the reference's placement: the virtual tokens in front of the whole input,
special tokens included. A template has one field, which stands for the row's text, and its virtual
tokens and anchors stand inside the special tokens: ``[CLS] v v text anchors v [SEP]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbone.placement import padding
from ..errors import InputError
from ..prompts.template import Field, Slot, Template, Virtual, parse
from ..rendering.virtual_ids import SLOT, Names


@dataclass(frozen=True)
class Insertion:
    """Token ids around a row's text; virtual token i is ``-1 - i``.

    Attributes:
        before: in front of the text.
        after: behind it.
        opening: special tokens with which a row may begin and which stay in front of `before`.
        closing: special tokens with which a row may end and which stay behind `after`.
        template: the template that it was made from, or None.
    """

    before: tuple[int, ...]
    after: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    template: str | None = None

    @staticmethod
    def in_front(count: int) -> Insertion:
        """The reference's placement of `count` virtual tokens."""
        return Insertion(tuple(-1 - i for i in range(count)))

    @property
    def count(self) -> int:
        """The number of virtual tokens."""
        return sum(i < 0 for i in (*self.before, *self.after))

    @property
    def length(self) -> int:
        """The number of tokens that it inserts."""
        return len(self.before) + len(self.after)

    def special(self, input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """How many tokens of `opening` and `closing` each row has.

        Args:
            input_ids: ``(B, T)``.
            mask: ``(B, T)``, or None where there is no padding.

        Returns:
            Two of ``(B,)``, each `len` of the tokens or 0.
        """
        mask = torch.ones_like(input_ids) if mask is None else mask
        lead, trail = padding(mask)
        length = input_ids.shape[1]
        opening = _matches(input_ids, self.opening, lead)
        closing = _matches(input_ids, self.closing, length - trail - len(self.closing))
        return opening, closing


def _matches(input_ids: Tensor, expected: tuple[int, ...], start: Tensor) -> Tensor:
    """``len(expected)`` for the rows that have these ids from column `start` on, else 0."""
    if not input_ids.shape[1]:
        return input_ids.new_zeros(len(input_ids))
    columns = start + torch.arange(len(expected), device=input_ids.device)
    inside = (columns >= 0) & (columns < input_ids.shape[1])
    found = input_ids.gather(1, columns.clamp(0, input_ids.shape[1] - 1))
    wanted = torch.tensor(expected, dtype=found.dtype, device=found.device)
    return ((found == wanted) & inside).all(1) * len(expected)


def from_template(template: str, tokenizer: Any, *, causal: bool) -> Insertion:
    """What a template with one field inserts around it.

    Args:
        template: in the template language.
        tokenizer: of the base model.
        causal: the model answers at the end, so ``[MASK]`` and what follows it stay out; otherwise
            it becomes a mask token.

    Raises:
        InputError, TemplateError: no field or several, no virtual token, no tokenizer.
    """
    if tokenizer is None:
        raise InputError(f"the template {template!r} needs a tokenizer for its words; give one")
    parsed = parse(template)
    fields = sum(isinstance(piece, Field) for piece in parsed.pieces)
    if fields != 1:
        raise InputError(
            "a template beside a configuration has one field, which stands for the row's text, "
            f"such as '[P*3] {{text}} [P*3]'; this one has {fields}: {template}. "
            "For several fields use ptuning.Prompt and ptuning.train"
        )
    groups = parsed.virtual
    if not groups or not all(group.count for group in groups):
        raise InputError(
            "a template beside a configuration needs virtual tokens written [P] or [P*3]; it is: "
            f"{template}"
        )
    return _tokenized(parsed, tokenizer, causal)


def _tokenized(parsed: Template, tokenizer: Any, causal: bool) -> Insertion:
    count = sum(group.count for group in parsed.virtual)
    names = Names(tokenizer, count + 1)  # the last one stands for the text
    spelled = "".join(p.text for p in parsed.pieces if not isinstance(p, Field | Slot | Virtual))
    named = names.avoiding(spelled)
    parts, virtual = [], 0
    for piece in parsed.pieces:
        if isinstance(piece, Virtual):
            parts += [named.name(virtual + i) for i in range(piece.count)]
            virtual += piece.count
        elif isinstance(piece, Field):
            # The row's ids are given, so a space in front of them would be a token of its own.
            parts = [*parts[:-1], parts[-1].rstrip(" ")] if parts else parts
            parts.append(named.name(count))
        elif isinstance(piece, Slot):
            parts.append(named.slot)
        else:
            parts.append(piece.text)
    ids = named.rename(named.tokenizer("".join(parts))["input_ids"])
    inner = named.ids("".join(parts))
    start = next(i for i in range(len(ids)) if ids[i : i + len(inner)] == inner)
    opening, closing = tuple(ids[:start]), tuple(ids[start + len(inner) :])
    if SLOT in inner and causal:
        inner = inner[: inner.index(SLOT)]
        if sum(i < 0 for i in inner) != count + 1:
            raise InputError(
                "a causal model never sees what follows [MASK], and the field or virtual tokens "
                f"stand there: {parsed.text}; put them before it"
            )
    elif SLOT in inner:
        if tokenizer.mask_token_id is None:
            raise InputError(f"this tokenizer has no mask token for [MASK] in: {parsed.text}")
        inner = [tokenizer.mask_token_id if i == SLOT else i for i in inner]
    text = inner.index(-1 - count)
    return Insertion(tuple(inner[:text]), tuple(inner[text + 1 :]), opening, closing, parsed.text)
