"""The frozen prefix: keys and values of the text before the first virtual token, computed once.

In a causal model that text does not depend on the prompt, so its keys and values never change while
the prompt is trained: they are computed without a graph, kept, and only what follows has gradients.

    plain     [pad | prefix | v v suffix]            all columns forward and backward
    here      [pad | kept KV ][ v v suffix ]         the last S columns forward and backward

S is the longest suffix of the batch; a row with a shorter one computes the end of its prefix again,
so that no padding stands inside a row and sliding windows see what they see in the plain path. The
plain path is `plain.answer_logits`; a test holds the two together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy
import psutil
import torch
from torch import Tensor, nn
from transformers import Cache

from ..backbone.traits import reads_caches
from ..devices import sent
from ..rendering.collate import IGNORED, Batch, longest_suffix
from ..rendering.render import Rendered
from .kv_cache import cache_of, keys_and_values
from .kv_pool import KeyValuePool
from .packing import pack
from .plain import Shortened, behind

Ids = tuple[int, ...]
Common = dict[Ids, Ids]
"""Prefix -> the part of it that other prompts on the same row begin with."""
_SMALLEST = 8


class PrefixStore:
    """Keys and values of prefixes of one model, up to a number of bytes.

    What was admitted first stays: a shuffled epoch would drive everything out of a store that keeps
    what was used last. What has no room is computed again. On an accelerator the device's memory is
    filled first, then pinned memory of the host, from where it comes while the device still
    computes what was asked of it before.

    Args:
        model: a causal model.
        most: bytes that may be kept; by default part of the memory that is free.

    Attributes:
        bytes: what is kept.
        computed: how many prefixes were computed so far.
        expected: tokens of all prefixes that will come, if that is known: room for them at once.
    """

    def __init__(self, model: nn.Module, most: int | None = None):
        self.model = model
        self.pool: KeyValuePool | None = None
        self._kept: dict[Ids, int | list[Tensor]] = {}
        """The first slot of what is on the device; else the tokens' own on the host."""
        self._used = 1
        self._reads: bool | None = None
        self._most = most
        self._budgets: dict[str, int] | None = None
        self._lane: _Lane | None = None
        self.bytes = 0
        self.computed = 0
        self.expected = 0

    def __call__(self, batch: Batch) -> Shortened | None:
        """What is left to compute of a batch, or None where nothing can be saved."""
        if not self.serves(batch):
            return None
        packed = pack(self.model, batch)
        if packed is not None:
            counts = [len(prefix) for prefix in packed.prefixes]
            device = batch.input_ids.device
            return packed.behind(self._cache(packed.prefixes, counts, max(counts), device))
        columns = longest_suffix(batch)
        return behind(self.model, batch, columns, self._stacked(batch, columns))

    def cache(self, batch: Batch) -> Cache | None:
        """Keys and values of a batch's first columns, to generate behind them; or None."""
        return self._stacked(batch, longest_suffix(batch)) if self.serves(batch) else None

    def serves(self, batch: Batch) -> bool:
        """The prefixes are long enough to be worth it, and the model reads caches."""
        total = max(batch.lengths)
        kept = total - longest_suffix(batch)
        if self._reads is None:
            self._reads = reads_caches(self.model)
        return self._reads and kept >= _SMALLEST and 4 * kept >= total

    def slots(
        self, prefixes: Sequence[Ids], counts: Sequence[int], kept: int, device: torch.device
    ) -> Any:
        """Where a batch's first columns stand in the pool, all of them on the device now.

        Args:
            prefixes: of the rows.
            counts: how many tokens of each are kept columns, at the right end of these.
            kept: columns.
            device: that computes them.

        Returns:
            numpy's ``(R, kept)``; 0, whose keys and values are zeros, where a row has none.
        """
        first = self._present(dict.fromkeys(prefixes), device)
        slots = numpy.zeros((len(prefixes), kept), dtype=numpy.int64)
        for row, (prefix, count) in enumerate(zip(prefixes, counts, strict=True)):
            slots[row, kept - count :] = numpy.arange(first[prefix], first[prefix] + count)
        return slots

    def _stacked(self, batch: Batch, suffix: int) -> Cache:
        counts = [max(0, length - suffix) for length in batch.lengths]
        kept = batch.input_ids.shape[1] - suffix
        return self._cache(batch.prefixes, counts, kept, batch.input_ids.device)

    def _cache(
        self, prefixes: tuple[Ids, ...], counts: list[int], kept: int, device: torch.device
    ) -> Cache:
        """A new cache of `kept` columns: the first `counts` of each row's prefix at its end.

        The store stays as it is.
        """
        slots = self.slots(prefixes, counts, kept, device)
        assert self.pool is not None
        if len(set(prefixes)) == 1 and min(counts) == kept:  # one document: a view serves all rows
            layers = self.pool.view(int(slots[0, 0]), kept, len(prefixes))
        else:
            layers = self.pool.read(sent(torch.from_numpy(slots), device))
        return cache_of(layers)

    def _present(self, prefixes: Iterable[Ids], device: torch.device) -> dict[Ids, int]:
        """The first slot of each prefix; what is not on the device comes there.

        It stands behind what is kept, until the next batch's takes its place.
        """
        places = {prefix: self._kept.get(prefix) for prefix in prefixes}
        first = {prefix: place for prefix, place in places.items() if isinstance(place, int)}
        missing = [prefix for prefix, place in places.items() if place is None]
        parked = {prefix: place for prefix, place in places.items() if isinstance(place, list)}
        if missing:
            first |= self._made(missing, device)
        if parked:
            behind = max([self._used, *(first[prefix] + len(prefix) for prefix in missing)])
            first |= self._brought(parked, behind)
        return first

    def _made(self, prefixes: list[Ids], device: torch.device) -> dict[Ids, int]:
        """Compute prefixes, and admit those that there is room for."""
        layers = self._compute(prefixes, device)
        if self.pool is None:
            self.pool = KeyValuePool(layers)
        places = {prefix: self._admit(prefix) for prefix in prefixes}
        order = sorted(prefixes, key=lambda prefix: places[prefix] != "device")
        self._reserve(self._used, sum(map(len, order)))
        first: dict[Ids, int] = {}
        columns: list[int] = []
        slot = self._used
        width = layers[0][0].shape[2]
        ends = {prefix: number * width for number, prefix in enumerate(prefixes, 1)}
        for prefix in order:
            end = ends[prefix]
            columns += range(end - len(prefix), end)
            first[prefix] = slot
            slot += len(prefix)
        self.pool.write(layers, sent(torch.tensor(columns, dtype=torch.long), device), self._used)
        for prefix in order:
            if places[prefix] == "device":
                self._kept[prefix] = first[prefix]
                self._used += len(prefix)
            elif places[prefix] == "host":
                lifted = self.pool.lift(first[prefix], len(prefix))
                self._kept[prefix] = [_pinned(tensor.cpu()) for tensor in lifted]
        return first

    def _reserve(self, start: int, more: int) -> None:
        """Room for so many tokens from a slot on; what stands in front of it stays."""
        assert self.pool is not None and self._budgets is not None
        needed = start + more
        if needed <= self.pool.capacity:
            return
        fits = self._used + self._budgets["device"] // max(1, self.pool.slot_bytes)
        wished = self.expected + 1 if self.expected else 2 * self.pool.capacity
        # Beyond the budget stands only what passes through.
        self.pool.reserve(max(needed, min(wished, fits)), start)

    def _brought(self, parked: dict[Ids, list[Tensor]], start: int) -> dict[Ids, int]:
        """Bring prefixes from the host."""
        assert self.pool is not None
        self._reserve(start, sum(map(len, parked)))
        self._lane = self._lane or _Lane(self.pool.device)
        first = {}
        here = self._lane.bring(list(parked.values()))
        for prefix, tokens in zip(parked, here, strict=True):
            self.pool.put_back(tokens, start)
            first[prefix] = start
            start += len(prefix)
        return first

    @torch.no_grad()
    def _compute(self, prefixes: list[Ids], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of prefixes, each at the right end of its row."""
        self.computed += len(prefixes)
        return keys_and_values(self.model, prefixes, device)

    def _admit(self, prefix: Ids) -> str | None:
        """Where there is room for a prefix; it is taken."""
        assert self.pool is not None
        size = len(prefix) * self.pool.slot_bytes
        if self._budgets is None:
            self._budgets = budgets(self._most, self.pool.device)
        for place, room in self._budgets.items():
            if size <= room:
                self._budgets[place] -= size
                self.bytes += size
                return place
        return None


class _Lane:
    """Copies from pinned memory beside the computation, from the moment that they are asked for."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def bring(self, parked: list[list[Tensor]]) -> list[list[Tensor]]:
        """The tensors on the device."""
        if self._stream is None:
            return [[tensor.to(self.device) for tensor in tensors] for tensors in parked]
        with torch.cuda.stream(self._stream):
            here = [[t.to(self.device, non_blocking=True) for t in tensors] for tensors in parked]
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._stream)
        for tensors in here:
            for tensor in tensors:
                tensor.record_stream(now)
        return here


def _pinned(tensor: Tensor) -> Tensor:
    try:
        return tensor.pin_memory()
    except RuntimeError:  # the system lets no more be pinned
        return tensor


def in_common(tasks: Sequence[Sequence[Rendered]]) -> Common:
    """What prompts on the same rows have in common in front: one document, many ways to ask.

    Args:
        tasks: for each task its rows, rendered for a causal model.

    Returns:
        prefix, as `Batch.prefixes` has it -> its part that other tasks have too; empty where more
        is saved by keeping the prefixes as they are.
    """
    rows = [
        [s.ids[: s.plain_prefix] for e in of_row for s in e.sequences]
        for of_row in zip(*tasks, strict=True)
    ]
    shared: Common = {}
    for prefixes in rows:
        alike: dict[Ids, list[Ids]] = {}
        for prefix in prefixes:
            alike.setdefault(prefix[:_SMALLEST], []).append(prefix)
        for group in alike.values():
            first, last = min(group), max(group)  # what these have in common, all have
            differs = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
            shared |= dict.fromkeys(group, first[: next(differs, len(first))])
    apart = sum(map(len, shared))
    behind = sum(len(prefix) - len(shared[prefix]) for prefixes in rows for prefix in prefixes)
    return shared if sum(map(len, set(shared.values()))) + behind < apart else {}


def for_prediction(batch: Batch, common: Common | None) -> Batch:
    """The batch with the prefixes that can be shared when nothing is trained.

    Rows share what stands in front of their first field, virtual tokens included. The rows of one
    example, which differ in the answer that they score, share all in front of it, where that leaves
    less to compute: a long opening, such as worked examples, is computed once for all batches.

    Args:
        batch: of a causal model.
        common: of several prompts: text in front of their virtual tokens, if any, is shared between
            them instead.
    """
    if common is not None:
        prefixes = tuple(common.get(prefix, prefix) for prefix in batch.prefixes)
        if min(map(len, prefixes)) >= _SMALLEST:
            return replace(batch, prefixes=prefixes)
    several = len(batch.example) > len(batch.member)
    if not several:
        return replace(batch, prefixes=batch.openings)
    answers = batch.answers.shape[1] - (batch.answers == IGNORED).sum(1)
    contexts = []
    for row, ids in enumerate(batch.input_ids.tolist()):
        context = batch.lengths[row] - max(0, int(answers[row]) - 1)
        start = len(ids) - batch.lengths[row]
        contexts.append(tuple(ids[start : start + context - 1]))
    behind = sum(len(c) - len(o) for c, o in zip(contexts, batch.openings, strict=True))
    once = sum(map(len, set(contexts)))
    return replace(batch, prefixes=batch.openings if behind < once else tuple(contexts))


def budgets(most: int | None, device: torch.device) -> dict[str, int]:
    """Bytes that may be kept on the model's device, and in the host's memory behind it."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that share the host's memory
    host = psutil.virtual_memory().available // 4 // beside
    if device.type != "cuda":
        return {"device": host if most is None else most}
    free, _ = torch.cuda.mem_get_info(device)
    if most is None:
        return {"device": free // 2, "host": host}
    here = min(most, free // 2)
    return {"device": here, "host": min(most - here, host)}
