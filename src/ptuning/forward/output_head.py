"""A model's output head: which module it is, what it is given, and what the model does behind it.

Who computes logits of some positions or some words only (`chunked`, `label_words`) runs the model
with a head that sees less, takes down what it would have seen, and holds the result against the
model's own logits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, or None."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    return head if isinstance(head, nn.Module) else None


@contextmanager
def seeing(head: nn.Module, positions: slice) -> Iterator[list[Tensor]]:
    """The head sees some positions of each row only; gives what it would have seen.

    The hook serves this thread's call alone, so other threads may use the model meanwhile.
    """
    caller = threading.get_ident()
    given: list[Tensor] = []

    def take(module: nn.Module, args: Any) -> Any:
        if threading.get_ident() != caller:
            return None
        given.append(args[0])
        return (args[0][:, positions], *args[1:])

    handle = head.register_forward_pre_hook(take)
    try:
        yield given
    finally:
        handle.remove()


def behind_the_head(model: nn.Module, logits: Tensor) -> Tensor:
    """What models do to their head's logits, found by the names that transformers gives it."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    scale = getattr(model, "logit_scale", None)  # Cohere
    if isinstance(scale, float | int):
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)  # Granite
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
