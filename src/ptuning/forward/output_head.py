"""What a model's output head is given, taken down while the model runs.

Who computes logits of some positions or some words only (`chunked`, `label_words`) runs the model
with a head that sees less, takes down what it would have seen, and holds the result against the
model's own logits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def seeing(head: nn.Module, positions: slice) -> Iterator[list[Tensor]]:
    """The head sees some positions of each row only; gives what it would have seen: a list that
    gets the hidden states ``(R, T, width)`` of each call.

    The hook serves this thread's call alone, so other threads may use the model meanwhile.
    """
    caller = threading.get_ident()
    inputs: list[Tensor] = []

    def take(module: nn.Module, args: Any) -> Any:
        if threading.get_ident() != caller:
            return None
        inputs.append(args[0])
        return (args[0][:, positions], *args[1:])

    handle = head.register_forward_pre_hook(take)
    try:
        yield inputs
    finally:
        handle.remove()
