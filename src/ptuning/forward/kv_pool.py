"""Keys and values of many tokens, of all layers in one tensor, read by the numbers of their slots.

    planes    (layers x 2, slots, heads x head width)      what a slot holds, of every layer
    read      planes[:, numbers]                           one operation, for any rows and layers

Slot 0 is zeros, so that padding is a number like any other. Where layers differ in heads or widths
there is one tensor for each form of them. This module does not know whose tokens these are
(`prefix_store`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Layers = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, ``(R, heads, tokens, head width)``."""


@dataclass(frozen=True)
class Form:
    """What the keys, or the values, of a layer look like."""

    heads: int
    width: int
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> Form:
        """The form of ``(R, heads, tokens, head width)``."""
        return Form(tensor.shape[1], tensor.shape[3], tensor.dtype)

    @property
    def size(self) -> int:
        """Bytes of one token."""
        return self.heads * self.width * self.dtype.itemsize


class KeyValuePool:
    """Slots on one device, each with a token's keys and values of all layers.

    Args:
        layers: of some tokens; decide what a slot looks like, and where the pool is.

    Attributes:
        planes: for each form ``(tensors of it, capacity, heads x width)``.
        capacity: slots.
        version: changes when the planes move: who reads them by address looks at it.
    """

    def __init__(self, layers: Layers):
        tensors = [tensor for layer in layers for tensor in layer]
        of_tensor = [Form.of(tensor) for tensor in tensors]
        self.forms = list(dict.fromkeys(of_tensor))
        self.device = tensors[0].device
        self._places = [
            (self.forms.index(form), of_tensor[:number].count(form))
            for number, form in enumerate(of_tensor)
        ]
        counts = [of_tensor.count(form) for form in self.forms]
        self.slot_bytes = sum(
            count * form.size for count, form in zip(counts, self.forms, strict=True)
        )
        self.planes = [
            torch.zeros(count, 1, form.heads * form.width, dtype=form.dtype, device=self.device)
            for count, form in zip(counts, self.forms, strict=True)
        ]
        self.version = 0

    @property
    def capacity(self) -> int:
        """How many slots there are, in all planes."""
        return min(plane.shape[1] for plane in self.planes)

    @torch.no_grad()
    def reserve(self, slots: int, used: int) -> None:
        """Have at least so many slots; the first `used` ones keep what they hold."""
        if slots <= self.capacity:
            return
        self.version += 1  # also where memory ends behind the first plane
        for number, old in enumerate(self.planes):
            new = old.new_empty(old.shape[0], slots, old.shape[2])
            new[:, :used] = old[:, :used]
            self.planes[number] = new

    @torch.no_grad()
    def write(self, layers: list[Any], columns: Tensor, start: int) -> None:
        """Put some tokens into the slots from `start` on.

        Args:
            layers: keys and values; each is let go of as soon as it is read.
            columns: the tokens, as numbers in the flattened ``(R, tokens)``.
            start: the first slot.
        """
        end = start + len(columns)
        for layer in range(len(layers)):
            for half, tensor in enumerate(layers[layer]):
                plane, row = self._places[2 * layer + half]
                by_token = tensor.transpose(1, 2).flatten(2).flatten(0, 1)
                torch.index_select(by_token, 0, columns, out=self.planes[plane][row, start:end])
            del tensor, by_token
            layers[layer] = None

    @torch.no_grad()
    def read(self, slots: Tensor) -> Layers:
        """Keys and values ``(R, heads, kept, width)`` of slots ``(R, kept)``."""
        found = []
        for plane in self.planes:
            count, capacity, width = plane.shape
            starts = torch.arange(0, count * capacity, capacity, device=self.device)
            numbers = (starts[:, None] + slots.flatten()).flatten()
            # Of whole rows of one matrix: the fastest gather there is.
            found.append(F.embedding(numbers, plane.view(-1, width)).view(count, *slots.shape, -1))
        return self._layers(found)

    def view(self, start: int, kept: int, rows: int) -> Layers:
        """`rows` times the same `kept` slots, without a copy."""
        return self._layers(
            [p[:, None, start : start + kept].expand(-1, rows, -1, -1) for p in self.planes]
        )

    def planes_of(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """A layer's keys and values ``(slots, heads x width)``, and the number of heads."""
        (keys, k), (values, v) = self._places[2 * layer : 2 * layer + 2]
        return self.planes[keys][k], self.planes[values][v], self.forms[keys].heads

    @property
    def layers(self) -> int:
        """How many layers a slot serves."""
        return len(self._places) // 2

    def _layers(self, found: list[Tensor]) -> Layers:
        tensors = [
            found[form][row].unflatten(2, (self.forms[form].heads, -1)).transpose(1, 2)
            for form, row in self._places
        ]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def lift(self, start: int, count: int) -> list[Tensor]:
        """What slots hold, of each form ``(count, tensors, heads x width)``."""
        return [plane[:, start : start + count].transpose(0, 1) for plane in self.planes]

    @torch.no_grad()
    def put_back(self, lifted: Sequence[Tensor], start: int) -> None:
        """Put what `lift` gave into the slots from `start` on."""
        for plane, tokens in zip(self.planes, lifted, strict=True):
            plane[:, start : start + len(tokens)] = tokens.transpose(0, 1)
