"""Static shapes for batches: what they are padded to, and the buffers that they are copied into.

    columns    on the left, to a multiple of 16
    rows       the last one again, without an answer, to a power of two or a multiple of 8

Neither changes a result. Nothing here captures or replays (`cuda_graphs`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forward.plain import Shortened
from ..forward.prefix_store import longest_suffix
from ..rendering.collate import IGNORED, Batch

SUFFIXES = 4
"""Columns behind a frozen prefix are a multiple of this."""
_LENGTHS = 16
GIVEN = "given "
"""Before the names of what the frozen prefix leaves to the model."""
_HAVE_NO_ROWS = ("divisor", "table", GIVEN + "logits_to_keep")
_WITHOUT_ANSWER = ("answers", "labels")


def widened(batch: Batch) -> Batch:
    """A causal batch with more padding on the left, to a multiple of 16 columns."""
    more = -batch.input_ids.shape[1] % _LENGTHS
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (more, 0)),
        attention_mask=F.pad(batch.attention_mask, (more, 0)),
    )


def rows_for(count: int) -> int:
    """Examples of the static batch that serves `count`: a power of two, or a multiple of 8."""
    return 1 << (count - 1).bit_length() if count < 8 else -(-count // 8) * 8


def buffers_for(tensors: dict[str, Tensor], examples: int) -> dict[str, Tensor]:
    """Static buffers for tensors of a batch of so many examples, with room for `rows_for` them."""
    rows = rows_for(examples)
    return {
        name: value.new_zeros(
            value.shape
            if name in _HAVE_NO_ROWS
            else (len(value) * rows // examples, *value.shape[1:])
        )
        for name, value in tensors.items()
    }


@torch.no_grad()
def fill(buffers: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy a batch into static buffers; rows that it lacks repeat its last one, without answer."""
    for name, buffer in buffers.items():
        value = tensors[name]
        buffer[: len(value)].copy_(value)
        buffer[len(value) :] = IGNORED if name in _WITHOUT_ANSWER else value[-1:]


def shape_of(wide: Batch) -> tuple[Any, ...]:
    """What decides the shapes of all buffers."""
    examples = len(wide.member)
    words = None if wide.label_ids is None else wide.label_ids.shape[1]
    suffix = -(-longest_suffix(wide) // SUFFIXES)
    compares = wide.labels is not None
    rows = len(wide.input_ids) // examples
    sizes = (*wide.input_ids.shape[1:], *wide.answers.shape[1:], suffix)
    return rows_for(examples), rows, words, compares, *sizes


def tensors_of(
    wide: Batch, divisor: Tensor, table: Tensor, given: Shortened | None
) -> dict[str, Tensor]:
    """All tensors that a step reads, by names of their own."""
    found = {name: value for name, value in vars(wide).items() if isinstance(value, Tensor)}
    found |= {"divisor": divisor, "table": table.detach()}
    if given is not None:
        for name, value in given.inputs.items():
            if isinstance(value, Tensor):
                found[GIVEN + name] = value
        for number, layer in enumerate(given.inputs["past_key_values"].layers):
            found[f"keys {number}"], found[f"values {number}"] = layer.keys, layer.values
    return found
