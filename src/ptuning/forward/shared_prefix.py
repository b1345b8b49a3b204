"""The shared head: what a prompt's rows have in front of their first field, computed once for all.

In a causal model the tokens before the first field, virtual ones among them, are the same in every
row of a prompt, and nothing behind them changes their keys and values.

    plain     R rows of    [pad | v v words text]
    here      one row of   [v v words], its keys and values given to R rows of [text]

In training these keys and values have gradients: the rows' gradients add up in a leaf and go on
through the head once (`SharedHeads.backward`). Where the model allows it and much would be padding,
the rows of a prompt stand one behind the other (`packing`). Elsewhere, as in `prefix_store`, a row
with a shorter text computes the end of its head again, so that no padding stands inside a row. The
plain path is `plain.answer_logits` without a prefix; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from ..rendering.collate import Batch, busy_with
from .kv_cache import cache_of, keys_and_values, reads_caches
from .packing import can_pack, pack
from .plain import Prefix, Shortened, positions

_PRICE = 1 / 8
"""What a pass of its own for the heads costs, of the tokens that keep a device busy: on a CPU 64,
measured with 2 to 32 rows of 15 to 148 tokens."""


class SharedHeads:
    """Keys and values of heads, with gradients where gradients are on.

    Args:
        model: a causal model, the prompts' vectors in its embedding.
        heads: their ids.
        device: that takes the model's inputs.
    """

    def __init__(self, model: nn.Module, heads: Sequence[tuple[int, ...]], device: torch.device):
        self.model = model
        self._row = {head: number for number, head in enumerate(heads)}
        self._width = max(map(len, heads))
        ids = torch.tensor([[0] * (self._width - len(head)) + list(head) for head in heads])
        mask = torch.tensor([[0] * (self._width - len(head)) + [1] * len(head) for head in heads])
        layers = keys_and_values(model, ids.to(device), mask.to(device))
        self._made = [tensor for layer in layers for tensor in layer]
        self._kept = [_by_token(tensor) for tensor in self._made]

    def __call__(self, batch: Batch) -> Shortened | None:
        """What is left to compute of a batch, or None where nothing is saved."""
        heads = tuple(head if head in self._row else () for head in batch.heads)
        if not any(heads):  # such as rows whose first field is empty
            return None
        packed = pack(self.model, replace(batch, prefixes=heads))
        if packed is not None:
            counts = [len(head) for head in packed.prefixes]
            return packed.behind(self._cache(packed.prefixes, counts, max(counts)))
        total, count = batch.input_ids.shape[1], batch.answers.shape[1]
        rest = max(n - len(head) for n, head in zip(batch.lengths, heads, strict=True))
        columns = min(max(rest, count), total)
        if columns == total:
            return None
        counts = [max(0, length - columns) for length in batch.lengths]
        inputs = {
            "input_ids": batch.input_ids[:, -columns:],
            "attention_mask": batch.attention_mask,
            "past_key_values": self._cache(heads, counts, total - columns),
            **positions(self.model, batch.attention_mask, columns, count),
        }
        return Shortened(inputs, lambda logits: logits[:, -count:])

    def _cache(self, heads: Sequence[tuple[int, ...]], counts: list[int], kept: int) -> Cache:
        """A cache of `kept` columns: the first `counts` tokens of each row's head at its end."""
        rows = []
        for head, count in zip(heads, counts, strict=True):
            first = self._row.get(head, 0) * self._width + self._width - len(head)
            rows.append([-1] * (kept - count) + list(range(first, first + count)))
        # Padding is zeros: a token of another prompt might not be finite, and 0 x nan is nan.
        index = torch.tensor(rows, device=self._kept[0].device) % len(self._kept[0])
        given = [
            _by_row(F.embedding(index, flat), made)
            for flat, made in zip(self._kept, self._made, strict=True)
        ]
        return cache_of(zip(given[::2], given[1::2], strict=True))

    def backward(self) -> None:
        """Bring the gradients that the rows left here on to the prompts' vectors."""
        pairs = [
            (made, flat.grad[:-1].view(len(made), self._width, made.shape[1], -1).transpose(1, 2))
            for made, flat in zip(self._made, self._kept, strict=True)
            if flat.grad is not None
        ]
        if pairs:
            made, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(
                made, [g.to(m.dtype) for m, g in zip(made, gradients, strict=True)]
            )


def share_heads(model: nn.Module, batches: Sequence[Batch]) -> SharedHeads | None:
    """The heads with virtual tokens in them of the rows of some batches; None where it is not
    worth it."""
    if not batches or batches[0].kind != "causal" or not reads_caches(model):
        return None
    # Without a virtual token the head is part of the frozen prefix, which is kept for longer.
    heads = [
        [head if len(head) > len(prefix) else () for head, prefix in pairs]
        for pairs in (zip(batch.heads, batch.prefixes, strict=True) for batch in batches)
    ]
    distinct = list(dict.fromkeys(head for of_batch in heads for head in of_batch if head))
    packs = can_pack(model)
    saved = -sum(map(len, distinct))
    for batch, of_batch in zip(batches, heads, strict=True):
        rests = [n - len(head) for n, head in zip(batch.lengths, of_batch, strict=True)]
        saved += len(rests) * max(batch.lengths)
        saved -= sum(rests) if packs else len(rests) * max(rests)
    device = batches[0].input_ids.device
    if not distinct or saved < _PRICE * busy_with(device):
        return None
    return SharedHeads(model, distinct, device)


def first_of(*prefixes: Prefix | None) -> Prefix:
    """The first of some that saves anything."""

    def shorter(batch: Batch) -> Shortened | None:
        found = (prefix(batch) for prefix in prefixes if prefix is not None)
        return next((one for one in found if one is not None), None)

    return shorter


def _by_token(tensor: Tensor) -> Tensor:
    """``(D, heads, tokens, width)`` -> a leaf ``(D x tokens + 1, heads x width)``, zeros in the
    last row, in float32 so that gradients of half precision add up in it."""
    flat = tensor.detach().transpose(1, 2).flatten(2).flatten(0, 1).float()
    return F.pad(flat, (0, 0, 0, 1)).requires_grad_(tensor.requires_grad)


def _by_row(tokens: Tensor, like: Tensor) -> Tensor:
    """``(R, kept, heads x width)`` -> ``(R, heads, kept, width)``."""
    return tokens.unflatten(2, (like.shape[1], -1)).transpose(1, 2).to(like.dtype)
