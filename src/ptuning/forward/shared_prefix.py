"""The shared prefix: what a prompt's rows have in front of their first field, computed once.

In a causal model the tokens before the first field, virtual ones among them, are the same in every
row of a prompt: its *opening*. Nothing behind an opening changes its keys and values.

    plain     R rows of    [pad | v v words text]
    here      one row of   [v v words], its keys and values given to R rows of [text]

In training these keys and values have gradients: the rows' gradients add up in a leaf and go on
through the opening once (`SharedPrefix.backward`). Where the model allows it and much would be
padding, the rows of a prompt stand one behind the other (`packing`). Elsewhere, as in
`prefix_store`, a row with a shorter text computes the end of its opening again, so that no padding
stands inside a row. The plain path is `plain.answer_logits`; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from ..backbone.kinds import ModelKind
from ..backbone.traits import packs_rows, reads_caches
from ..backbone.upstream import cpu_has_amx
from ..devices import sent
from ..rendering.collate import Batch
from .batching import busy_with
from .kv_cache import cache_of, keys_and_values
from .packing import pack
from .plain import Shortened, behind

_PRICE = 1 / 8
"""What a pass of its own for the openings costs, of the tokens that keep a device busy: on a CPU
64, measured with 2 to 32 rows of 15 to 148 tokens."""
_IN_TILES = 2
"""So many times as much in bfloat16 on a CPU with AMX: tokens are cheap there, passes as before."""


class SharedPrefix:
    """Keys and values of openings, with gradients where gradients are on.

    Args:
        model: a causal model, the prompts' vectors in its embedding.
        openings: their ids.
        device: that takes the model's inputs.
    """

    def __init__(self, model: nn.Module, openings: Sequence[tuple[int, ...]], device: torch.device):
        self.model = model
        self._row = {opening: number for number, opening in enumerate(openings)}
        self._width = max(map(len, openings))
        layers = keys_and_values(model, openings, device)
        self._values = [tensor for layer in layers for tensor in layer]
        self._leaves = [_by_token(tensor) for tensor in self._values]

    def __call__(self, batch: Batch) -> Shortened | None:
        """What is left to compute of a batch, or None where nothing is saved."""
        openings = tuple(opening if opening in self._row else () for opening in batch.openings)
        if not any(openings):  # such as rows whose first field is empty
            return None
        packed = pack(self.model, replace(batch, prefixes=openings))
        if packed is not None:
            counts = [len(opening) for opening in packed.prefixes]
            return packed.behind(self._cache(packed.prefixes, counts, max(counts)))
        total = batch.input_ids.shape[1]
        # The answers' places are among them: an opening goes without a row's last token.
        columns = max(n - len(opening) for n, opening in zip(batch.lengths, openings, strict=True))
        if columns == total:
            return None
        counts = [max(0, length - columns) for length in batch.lengths]
        cache = self._cache(openings, counts, total - columns)
        return behind(self.model, batch, columns, cache)

    def _cache(self, openings: Sequence[tuple[int, ...]], counts: list[int], kept: int) -> Cache:
        """A cache of `kept` columns: the first `counts` tokens of each row's opening at its end."""
        rows = []
        for opening, count in zip(openings, counts, strict=True):
            first = self._row.get(opening, 0) * self._width + self._width - len(opening)
            rows.append([-1] * (kept - count) + list(range(first, first + count)))
        # Padding is zeros: a token of another prompt might not be finite, and 0 x nan is nan.
        index = sent(torch.tensor(rows) % len(self._leaves[0]), self._leaves[0].device)
        tensors = [
            _by_row(F.embedding(index, leaf), values)
            for leaf, values in zip(self._leaves, self._values, strict=True)
        ]
        return cache_of(zip(tensors[::2], tensors[1::2], strict=True))

    def backward(self) -> None:
        """Bring the gradients that the rows left here on to the prompts' vectors."""
        shape = (len(self._row), self._width)
        reached = [
            (values, leaf.grad[:-1].view(*shape, values.shape[1], -1).transpose(1, 2))
            for values, leaf in zip(self._values, self._leaves, strict=True)
            if leaf.grad is not None
        ]
        if reached:
            values, gradients = zip(*reached, strict=True)
            torch.autograd.backward(
                values, [g.to(v.dtype) for v, g in zip(values, gradients, strict=True)]
            )


def share_openings(model: nn.Module, batches: Sequence[Batch]) -> SharedPrefix | None:
    """The openings with virtual tokens in them of the rows of some batches; None where it is not
    worth it."""
    if not batches or batches[0].kind != ModelKind.CAUSAL or not reads_caches(model):
        return None
    # Without a virtual token the opening is part of the frozen prefix, which is kept for longer.
    openings = [
        [opening if len(opening) > len(prefix) else () for opening, prefix in pairs]
        for pairs in (zip(batch.openings, batch.prefixes, strict=True) for batch in batches)
    ]
    distinct = list(
        dict.fromkeys(opening for of_batch in openings for opening in of_batch if opening)
    )
    packs = packs_rows(model)
    saved = -sum(map(len, distinct))
    for batch, of_batch in zip(batches, openings, strict=True):
        rests = [n - len(opening) for n, opening in zip(batch.lengths, of_batch, strict=True)]
        saved += len(rests) * max(batch.lengths)
        saved -= sum(rests) if packs else len(rests) * max(rests)
    device = batches[0].input_ids.device
    if not distinct or saved < _price(model, device):
        return None
    return SharedPrefix(model, distinct, device)


def _price(model: nn.Module, device: torch.device) -> float:
    """Tokens that must be saved."""
    in_tiles = device.type == "cpu" and getattr(model, "dtype", None) == torch.bfloat16
    return _PRICE * busy_with(device) * (_IN_TILES if in_tiles and cpu_has_amx() else 1)


def _by_token(tensor: Tensor) -> Tensor:
    """``(D, heads, tokens, width)`` -> a leaf ``(D x tokens + 1, heads x width)``, zeros in the
    last row, in float32 so that gradients of half precision add up in it."""
    flat = tensor.detach().transpose(1, 2).flatten(2).flatten(0, 1).float()
    return F.pad(flat, (0, 0, 0, 1)).requires_grad_(tensor.requires_grad)


def _by_row(tokens: Tensor, like: Tensor) -> Tensor:
    """``(R, kept, heads x width)`` -> ``(R, heads, kept, width)``."""
    return tokens.unflatten(2, (like.shape[1], -1)).transpose(1, 2).to(like.dtype)
