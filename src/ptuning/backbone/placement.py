"""Where a prompt's tokens stand among the tokens of a padded batch.

    [pad pad | [CLS] | before | text | after | [SEP] | pad]

One index map serves ids, masks, labels, token types and embeddings; turned around it finds the
text's positions in a model's output. This module knows nothing of prompts or models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Placement:
    """The index map of one batch of B rows and T columns to P = T + N columns.

    Args:
        length: T.
        before: for each row the number of tokens put before its text.
        after: likewise behind it. N is the largest sum of both; rows with fewer are padded.
        mask: attention mask ``(B, T)``; None where there is no padding.
        specials_before: ``(B,)`` special tokens of each row that stay in front of `before`; none by
            default.
        specials_after: likewise those that stay behind `after`.
        behind_padding: False puts `before` in front of the left padding, as the reference does.
        pads_right: move left padding to the right, for encoders: they count positions from the
            first column, or pool it.
        fill_left: pad the rows with fewer inserted tokens on the left.

    Attributes:
        columns: ``(B, T)`` the column in the result of each column of the text.
        lead: ``(B,)`` padding in front of each row of the result.
        rolled: ``(B,)`` padding that was moved from the left to the right.
        may_roll: some may have been, which is known without a look at values.
    """

    def __init__(
        self,
        length: int,
        before: Sequence[int],
        after: Sequence[int],
        mask: Tensor | None = None,
        *,
        specials_before: Tensor | None = None,
        specials_after: Tensor | None = None,
        behind_padding: bool = True,
        pads_right: bool = False,
        fill_left: bool = True,
        device: torch.device | str = "cpu",
    ):
        self.length = length
        self.inserted = max(b + a for b, a in zip(before, after, strict=True))
        self.ragged = any(b + a < self.inserted for b, a in zip(before, after, strict=True))
        start = torch.tensor(before, device=device).unsqueeze(1)
        end = torch.tensor(after, device=device).unsqueeze(1)
        none = torch.zeros_like(start)
        lead, trail = padding(mask) if mask is not None else (none, none)
        rolled = lead if pads_right else none
        self.may_roll = pads_right and mask is not None
        if pads_right:
            lead, trail = none, lead + trail
        if not behind_padding:
            lead = none
        missing = self.inserted - start - end if fill_left else none
        self.lead, self.rolled = (lead + missing).squeeze(1), rolled.squeeze(1)
        column = torch.arange(length + self.inserted, device=device)
        at = column - missing
        first = lead + (none if specials_before is None else specials_before.unsqueeze(1))
        last = (
            length
            - trail
            - (none if specials_after is None else specials_after.unsqueeze(1))
            + start
        )
        # The text's own columns first, then the inserted tokens, then one column of padding.
        text = torch.where(at < first, at, at - start)
        text = torch.where(at < last, text, at - start - end)
        text = (text + rolled) % max(1, length)
        source = torch.where((at >= first) & (at < first + start), length + at - first, text)
        source = torch.where((at >= last) & (at < last + end), length + start + at - last, source)
        outside = (at < 0) | (at >= length + start + end)
        self._source = source.masked_fill(outside, length + self.inserted)
        columns = torch.zeros(
            len(before), length + self.inserted + 1, dtype=torch.long, device=device
        )
        self.columns = columns.scatter_(1, self._source, column.expand(len(before), -1))[:, :length]

    def __call__(self, text: Tensor, inserted: Tensor | float, pad: float = 0) -> Tensor:
        """Place `inserted` among `text`.

        Args:
            text: ``(B, T, …)``, or ``(1, T, …)`` for all rows alike.
            inserted: ``(B, N, …)``, each row's tokens before the text and then those behind it; or
                one value for all.
            pad: value of the padding of rows with fewer inserted tokens.

        Returns:
            ``(B, P, …)``
        """
        rest = text.shape[2:]
        text = text.expand(len(self._source), *text.shape[1:])
        if not isinstance(inserted, Tensor):
            inserted = text.new_full((len(text), self.inserted, *rest), inserted)
        padding = text.new_full((len(text), 1, *rest), pad)
        joined = torch.cat([text, inserted.to(text.dtype), padding], dim=1)
        return joined.gather(1, _wide(self._source, rest))

    def text_of(self, placed: Tensor) -> Tensor:
        """The text's part ``(B, T, …)`` of an output ``(B, P, …)``."""
        return placed.gather(1, _wide(self.columns, placed.shape[2:]))

    def unrolled(self, placed: Tensor) -> Tensor:
        """An output ``(B, P, …)`` with its padding on the left again, where it was moved."""
        column = torch.arange(self._source.shape[1], device=placed.device)
        index = (column - self.rolled.unsqueeze(1)) % len(column)
        return placed.gather(1, _wide(index, placed.shape[2:]))

    def position_ids(self) -> Tensor:
        """``(B, P)`` positions that do not count the padding in front."""
        column = torch.arange(self._source.shape[1], device=self._source.device)
        return (column - self.lead.unsqueeze(1)).clamp(min=0)


def padding(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked positions in front of and behind each row of a mask ``(B, T)``: two of ``(B, 1)``."""
    real = mask != 0
    lead = (real.cumsum(1) == 0).sum(1, keepdim=True)
    trail = (real.flip(1).cumsum(1) == 0).sum(1, keepdim=True)
    return lead, trail.masked_fill(lead == mask.shape[1], 0)  # a row of padding only


def _wide(index: Tensor, rest: torch.Size) -> Tensor:
    """An index ``(B, X)`` for tensors ``(B, Y, *rest)``."""
    return index.view(*index.shape, *(1 for _ in rest)).expand(*index.shape, *rest)
