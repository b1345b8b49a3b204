"""Rows behind one prefix, one behind the other in a row of the model.

    document | prompt A | prompt B | prompt C        one prefill, one copy of its keys and values

Each segment sees the prefix and itself: the mask is block diagonal behind the prefix, and positions
begin anew in each segment. So sixteen prompts on one document, or the candidates of one question,
cost a row or two; and rows of unlike length need little padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..backbone.traits import packs_rows
from ..backbone.upstream import CACHE
from ..devices import sent
from ..rendering.collate import Batch
from .plain import Shortened

_COPY = 32
"""What a kept column costs a row, in keys that a token attends to: a copy, and its memory."""
_WORTH = 0.95
"""Packed rows must cost at most so much of what the rows cost as they are."""

Owner = tuple[tuple[int, ...], int]


@dataclass(frozen=True)
class Packed:
    """A causal batch of R rows as G packed rows of W columns.

    Attributes:
        prefixes: of the packed rows; each has rows of one prefix and one member.
        input_ids: ``(G, W)`` the segments, without the prefixes.
        attention_mask: ``(G, 1, W, prefix + W)``, True where a column is seen.
        position_ids: ``(G, W)``.
        keep: ``(C,)`` the columns that predict an answer, of any row.
        group: ``(R,)`` the packed row of each row.
        answers: ``(R, K)`` the index in `keep` of each row's answer positions.
    """

    prefixes: tuple[tuple[int, ...], ...]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    keep: Tensor
    group: Tensor
    answers: Tensor

    def behind(self, cache: Cache) -> Shortened:
        """What is left to compute behind the prefixes' keys and values, each at the right end."""
        inputs = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "logits_to_keep": self.keep,
            "use_cache": True,
            CACHE: cache,
        }
        return Shortened(inputs, lambda logits: logits[self.group[:, None], self.answers])


def pack(model: nn.Module, batch: Batch) -> Packed | None:
    """The batch in packed rows; None where the model takes none, or they would not cost less.

    The rows' prefixes are left out of the packed rows, and shorter ones stand at the right.
    """
    owners = _owners(batch)
    if len(set(owners)) == len(owners) or not packs_rows(model):
        return None
    rests = [n - len(p) for n, p in zip(batch.lengths, batch.prefixes, strict=True)]
    count = batch.answers.shape[1]
    work = _Work.of(model, max(map(len, batch.prefixes)))
    plans = list(_plans(owners, rests, count))
    costs = [work(len(plan.owners), plan.width, len(plan.kept)) for plan in plans]
    if min(costs) > _WORTH * work(len(rests), max(rests), count):
        return None
    return _packed(batch, rests, plans[costs.index(min(costs))])


@dataclass(frozen=True)
class _Work:
    """What rows cost, in keys that one token attends to in every layer.

    A token costs as much in the layers' matrices as attention to 6 x `width` keys, and half of that
    counted, since products as small as attention's run slower.
    """

    token: int
    logits: float
    kept: int

    @staticmethod
    def of(model: nn.Module, kept: int) -> _Work:
        config: Any = model.config
        text = config.get_text_config()
        logits = text.vocab_size / (4 * text.num_hidden_layers)
        return _Work(3 * text.hidden_size, logits, kept)

    def __call__(self, rows: int, columns: int, answers: int) -> float:
        """Of `rows` behind kept columns, with logits at `answers` of their `columns`."""
        behind = columns * (self.token + self.kept + columns)
        return rows * (behind + _COPY * self.kept + answers * self.logits)


@dataclass(frozen=True)
class _Plan:
    """Where the segments go.

    Attributes:
        owners: of the packed rows.
        width: of the packed rows.
        starts: for each segment its packed row and first column.
        columns: for each segment those that predict its answer.
    """

    owners: list[Owner]
    width: int
    starts: list[tuple[int, int]]
    columns: list[list[int]]

    @property
    def kept(self) -> set[int]:
        """The columns that get logits, in every row."""
        return {column for columns in self.columns for column in columns}


def _plans(owners: Sequence[Owner], rests: Sequence[int], count: int) -> Iterator[_Plan]:
    """Every owner's segments in one row, in rows of about half that width, and so on, in ever
    larger steps."""
    totals = dict.fromkeys(owners, 0)
    for owner, rest in zip(owners, rests, strict=True):
        totals[owner] += rest
    order = sorted(range(len(rests)), key=rests.__getitem__, reverse=True)
    widest, most = max(totals.values()), max(totals.values()) // max(rests)
    parts = 1
    while parts <= most:
        rows = {owner: round(n * parts / widest) or 1 for owner, n in totals.items()}
        yield _plan(owners, rests, order, count, rows)
        parts += max(1, parts // 4)


def _plan(
    owners: Sequence[Owner],
    rests: Sequence[int],
    order: Sequence[int],
    count: int,
    rows: Mapping[Owner, int],
) -> _Plan:
    """Each owner's segments in so many rows, in this order, each into the emptiest."""
    of_row = [owner for owner, number in rows.items() for _ in range(number)]
    emptiest: dict[Owner, list[tuple[int, int]]] = {owner: [] for owner in rows}
    for row, owner in enumerate(of_row):
        emptiest[owner].append((0, row))  # in the order of a heap
    starts, columns = [(0, 0)] * len(rests), [[0]] * len(rests)
    for segment in order:
        heap = emptiest[owners[segment]]
        start, row = heap[0]
        end = start + rests[segment]
        heapreplace(heap, (end, row))
        starts[segment] = row, start
        columns[segment] = [max(start, end - count + k) for k in range(count)]
    return _Plan(
        of_row, max(used for heap in emptiest.values() for used, _ in heap), starts, columns
    )


def _packed(batch: Batch, rests: Sequence[int], plan: _Plan) -> Packed:
    ids: list[list[int]] = [[] for _ in plan.owners]
    segments: list[list[int]] = [[] for _ in plan.owners]
    offsets: list[list[int]] = [[] for _ in plan.owners]
    inputs = batch.here.input_ids.tolist()
    for number in sorted(range(len(rests)), key=plan.starts.__getitem__):
        (row, _), rest = plan.starts[number], rests[number]
        ids[row] += inputs[number][len(inputs[number]) - rest :]
        segments[row] += [number] * rest
        offsets[row] += range(rest)
    device, width = batch.input_ids.device, plan.width
    segment, offset = _filled(segments, width, -1), _filled(offsets, width, 0)
    prefixes = tuple(prefix for prefix, _ in plan.owners)
    lengths = torch.tensor([len(prefix) for prefix in prefixes])
    keep, answers = torch.tensor(plan.columns).unique(return_inverse=True)
    return Packed(
        prefixes,
        sent(_filled(ids, width, 0), device),
        sent(_mask(segment, offset, lengths), device),
        sent(lengths[:, None] + offset, device),
        sent(keep, device),
        sent(torch.tensor([row for row, _ in plan.starts]), device),
        sent(answers, device),
    )


def _owners(batch: Batch) -> list[Owner]:
    """Whose packed row each row belongs to: rows of one prefix and one member of a population, for
    what is not finite in one member would reach others in its row, masked or not."""
    here = batch.here
    return list(zip(batch.prefixes, here.member[here.example].tolist(), strict=True))


def _mask(segment: Tensor, offset: Tensor, lengths: Tensor) -> Tensor:
    alike = segment[:, :, None] == segment[:, None, :]
    alike = alike & (offset[:, None, :] <= offset[:, :, None])
    kept = int(lengths.max())
    seen = torch.arange(kept) >= kept - lengths[:, None]
    prefix = seen[:, None, :].expand(-1, segment.shape[1], -1)
    return torch.cat([prefix, alike], dim=2).unsqueeze(1)


def _filled(rows: list[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
