"""Ranges of virtual ids, the rows that stand for them, and tables in which ids are looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Span:
    """A range of virtual ids and the rows that stand for them.

    Attributes:
        first: the first id.
        rows: ``(count, embedding width)``.
        users: how many callers hold the span; it leaves with the last.
    """

    def __init__(self, first: int, rows: Tensor):
        self.first = first
        self.rows = rows
        self.users = 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": self.rows.detach()}

    @property
    def end(self) -> int:
        """One past the last id."""
        return self.first + self.rows.shape[0]


class Lookup(NamedTuple):
    """What forwards read: never changed, but replaced as a whole.

    Attributes:
        spans: all of them.
        rows: of each span, on the embedding's device (those that carry a gradient, where they are).
        owner: ``(I,)`` for each id from one below the threshold on: 0 where it is a word, 1 where
            nobody owns it, 2 + the span's number elsewhere. The last one stands for all behind it.
        row: ``(I,)`` the id's row among those of all spans together; 0 where it has none.
    """

    spans: tuple[Span, ...]
    rows: tuple[Tensor, ...]
    owner: Tensor
    row: Tensor

    @classmethod
    def of(cls, spans: list[Span], threshold: int, device: torch.device) -> Lookup:
        """Of spans in the order of their ids, the first of which may be `threshold`."""
        rows = tuple(near(span.rows, device) for span in spans)
        counts = torch.tensor([of_span.shape[0] for of_span in rows])
        behind = torch.tensor([span.end for span in spans]) - counts.cumsum(0)
        number = torch.arange(len(rows)).repeat_interleave(counts)
        place = torch.arange(len(number))
        at = behind[number] + place - threshold + 1
        owner = torch.ones(spans[-1].end - threshold + 2).long()
        owner[0], row = 0, torch.zeros_like(owner)
        owner[at], row[at] = 2 + number, place
        return cls(tuple(spans), rows, owner.to(device), row.to(device))

    def having(self, rows: Mapping[Span, Tensor]) -> Lookup:
        """Other rows for some spans."""
        pairs = zip(self.spans, self.rows, strict=True)
        return self._replace(rows=tuple(rows.get(span, before) for span, before in pairs))

    def to(self, device: torch.device) -> Lookup:
        """The same on a device."""
        rows = tuple(rows.to(device) for rows in self.rows)
        return Lookup(self.spans, rows, self.owner.to(device), self.row.to(device))


def near(rows: Tensor, device: torch.device) -> Tensor:
    """On the embedding's device; a gradient's path is made in the forward that follows it."""
    return rows if rows.requires_grad else rows.to(device)
