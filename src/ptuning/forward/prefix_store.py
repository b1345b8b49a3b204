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

import torch
from torch import Tensor, nn
from transformers import Cache

from ..backbone.traits import reads_caches
from ..rendering.collate import IGNORED, Batch, plain_prefix
from ..rendering.render import Rendered
from .kv_cache import cache_of, keys_and_values
from .packing import Packed, pack
from .plain import Shortened, positions

KeyValues = list[Tensor]
"""Of each layer the keys and then the values of one prefix: ``(heads, tokens, head width)``."""
Common = dict[tuple[int, ...], tuple[int, ...]]
"""Prefix -> the part of it that other prompts on the same row begin with."""
_SMALLEST = 8


class PrefixStore:
    """Keys and values of prefixes of one model, up to a number of bytes.

    What was admitted first stays: a shuffled epoch would drive everything out of a store that keeps
    what was used last. What has no room is computed again. On an accelerator the device's memory is
    filled first, then pinned memory of the host.

    Args:
        model: a causal model.
        most: bytes that may be kept; by default part of the memory that is free.

    Attributes:
        bytes: what is kept.
        computed: how many prefixes were computed so far.
        multiple: of which the columns behind the kept ones are, so that shapes repeat.
    """

    def __init__(self, model: nn.Module, most: int | None = None):
        self.model = model
        self._kept: dict[tuple[int, ...], KeyValues] = {}
        self._most = most
        self._budgets: dict[str, int] | None = None
        self.bytes = 0
        self.computed = 0
        self.multiple = 1

    def __call__(self, batch: Batch) -> Shortened | None:
        """What is left to compute of a batch, or None where nothing can be saved."""
        if not self._serves(batch):
            return None
        packed = pack(self.model, batch)
        if packed is not None:
            return self._packed(packed)
        total, count = batch.input_ids.shape[1], batch.answers.shape[1]
        columns = self._suffix(batch)
        inputs = {
            "input_ids": batch.input_ids[:, total - columns :],
            "attention_mask": batch.attention_mask,
            "past_key_values": self._stacked(batch, columns),
            **positions(self.model, batch.attention_mask, columns, count),
        }
        return Shortened(inputs, lambda logits: logits[:, -count:])

    def cache(self, batch: Batch) -> Cache | None:
        """Keys and values of a batch's first columns, to generate behind them; or None."""
        return self._stacked(batch, self._suffix(batch)) if self._serves(batch) else None

    def _suffix(self, batch: Batch) -> int:
        columns = -(-longest_suffix(batch) // self.multiple) * self.multiple
        return min(columns, batch.input_ids.shape[1])

    def _serves(self, batch: Batch) -> bool:
        """The prefixes are long enough to be worth it, and the model reads caches."""
        total = max(batch.lengths)
        kept = total - longest_suffix(batch)
        return kept >= _SMALLEST and 4 * kept >= total and reads_caches(self.model)

    def _packed(self, packed: Packed) -> Shortened:
        counts = [len(prefix) for prefix in packed.prefixes]
        device = packed.input_ids.device
        return packed.behind(self._cache(packed.prefixes, counts, max(counts), device))

    def _stacked(self, batch: Batch, suffix: int) -> Cache:
        counts = [max(0, length - suffix) for length in batch.lengths]
        kept = batch.input_ids.shape[1] - suffix
        return self._cache(batch.prefixes, counts, kept, batch.input_ids.device)

    def _cache(
        self,
        prefixes: tuple[tuple[int, ...], ...],
        counts: list[int],
        kept: int,
        device: torch.device,
    ) -> Cache:
        """A new cache of `kept` columns: the first `counts` of each row's prefix at its end.

        The store stays as it is.
        """
        found = self._of(dict.fromkeys(prefixes), device)
        made: list[Tensor] = []
        for number, first in enumerate(found[prefixes[0]]):
            if len(found) == 1 and min(counts) == kept:  # one document: a view serves all rows
                shared = first[None, :, :kept].to(device, non_blocking=True)
                made.append(shared.expand(len(prefixes), -1, -1, -1))
                continue
            heads, _, width = first.shape
            stacked = first.new_empty(len(prefixes), heads, kept, width, device=device)
            for row, (prefix, count) in enumerate(zip(prefixes, counts, strict=True)):
                stacked[row, :, : kept - count] = 0
                values = found[prefix][number].to(device, non_blocking=True)  # whole: it is pinned
                stacked[row, :, kept - count :] = values[:, :count]
            made.append(stacked)
        return cache_of(zip(made[::2], made[1::2], strict=True))

    def _of(
        self, prefixes: Iterable[tuple[int, ...]], device: torch.device
    ) -> dict[tuple[int, ...], KeyValues]:
        known = {prefix: self._kept.get(prefix) for prefix in prefixes}
        missing = [prefix for prefix, values in known.items() if values is None]
        if missing:
            for prefix, values in zip(missing, self._compute(missing, device), strict=True):
                known[prefix] = values
                self._admit(prefix, values)
        return {prefix: values for prefix, values in known.items() if values is not None}

    @torch.no_grad()
    def _compute(self, prefixes: list[tuple[int, ...]], device: torch.device) -> list[KeyValues]:
        self.computed += len(prefixes)
        length = max(1, max(map(len, prefixes)))
        ids = torch.zeros(len(prefixes), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prefix in enumerate(prefixes):
            if prefix:
                ids[row, -len(prefix) :] = torch.tensor(prefix)
                mask[row, -len(prefix) :] = 1
        mask[:, -1] = 1  # an empty prefix: some column must be seen; it is cut off below
        layers = keys_and_values(self.model, ids.to(device), mask.to(device))
        return [
            [tensor[row, :, length - n :].clone() for layer in layers for tensor in layer]
            for row, n in enumerate(map(len, prefixes))
        ]

    def _admit(self, prefix: tuple[int, ...], values: KeyValues) -> None:
        size = sum(value.numel() * value.element_size() for value in values)
        if self._budgets is None:
            self._budgets = budgets(self._most, values[0].device)
        for place, room in self._budgets.items():
            if size <= room:
                if place == "host":
                    values = [_pinned(value.cpu()) for value in values]
                self._kept[prefix] = values
                self._budgets[place] -= size
                self.bytes += size
                return


def _pinned(tensor: Tensor) -> Tensor:
    try:
        return tensor.pin_memory()
    except RuntimeError:  # the system lets no more be pinned
        return tensor


def longest_suffix(batch: Batch) -> int:
    """Columns from the first virtual token on, or from the last token on, of the longest row."""
    return max(n - len(p) for n, p in zip(batch.lengths, batch.prefixes, strict=True))


def in_common(tasks: Sequence[Sequence[Rendered]]) -> Common:
    """What prompts on the same rows have in common in front: one document, many ways to ask.

    Args:
        tasks: for each task its rows, rendered for a causal model.

    Returns:
        prefix, as `Batch.prefixes` has it -> its part that other tasks have too; empty where more
        is saved by keeping the prefixes as they are.
    """
    rows = [
        [tuple(s.ids[: plain_prefix(s)]) for e in of_row for s in e.sequences]
        for of_row in zip(*tasks, strict=True)
    ]
    shared: Common = {}
    for prefixes in rows:
        alike: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for prefix in prefixes:
            alike.setdefault(prefix[:_SMALLEST], []).append(prefix)
        for group in alike.values():
            first, last = min(group), max(group)  # what these have in common, all have
            differs = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
            shared |= dict.fromkeys(group, first[: next(differs, len(first))])
    apart = sum(map(len, shared))
    behind = sum(len(prefix) - len(shared[prefix]) for prefixes in rows for prefix in prefixes)
    return shared if sum(map(len, set(shared.values()))) + behind < apart else {}


def for_prediction(batch: Batch, common: Common | None = None) -> Batch:
    """The batch with the prefixes that can be shared when nothing is trained.

    The rows of one example, which differ in the answer that they score, share all in front of it;
    other rows share what stands in front of their first field, virtual tokens included.

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
    answers = batch.answers.shape[1] - (batch.answers == IGNORED).sum(1)
    shared = []
    for row, ids in enumerate(batch.input_ids.tolist()):
        length = batch.lengths[row]
        context = length - max(0, int(answers[row]) - 1)
        kept = context - 1 if several else len(batch.openings[row])
        start = len(ids) - length
        shared.append(tuple(ids[start : start + kept]))
    return replace(batch, prefixes=tuple(shared))


def budgets(most: int | None, device: torch.device) -> dict[str, int]:
    """Bytes that may be kept on the model's device, and in the host's memory behind it."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that share the host's memory
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 // beside
    if device.type != "cuda":
        return {"device": host if most is None else most}
    free, _ = torch.cuda.mem_get_info(device)
    if most is None:
        return {"device": free // 2, "host": host}
    here = min(most, free // 2)
    return {"device": here, "host": min(most - here, host)}
