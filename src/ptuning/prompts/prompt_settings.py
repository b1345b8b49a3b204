"""`PromptSettings`: what a user chooses of a prompt. `Prompt` adds what training gives.

Needs no torch, so that a command line can be made of it and a mistake is found at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..data.values import is_number, plain
from ..errors import InputError, excerpt
from .task import Task, at_least_one, one_of
from .template import MOST_VIRTUAL

ENCODERS = ("mlp", "lstm", "none", "residual", "mixture")
_SMALL = re.compile(r"\[p((?:\*\d+)?|:[^\[\]]+)\]")
MOST = {
    "num_virtual_tokens": MOST_VIRTUAL,
    "encoder_hidden_size": 32_768,
    "encoder_num_layers": 100,
}
"""Refused above this, before any work is done."""
_ENCODER = ("encoder", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")


@dataclass(eq=False)
class PromptSettings(Task):
    """A task with virtual tokens in it, and how they are made; takes all that `Task` takes, and:

    Args:
        num_virtual_tokens: must agree with the template. Without a template it is PEFT's placement:
            so many virtual tokens in front of everything.
        encoder: what makes the virtual tokens: ``mlp``, ``lstm``, ``none`` (they are trained
            themselves), ``residual`` (themselves plus a small network of them), or ``mixture``
            (learned mixtures of the vocabulary's vectors). A template that is made for a table has
            ``none``.
        encoder_hidden_size: width of the encoder; by default the embedding's, but at most 1,024
            (half of it for LSTM, so that both directions together are as wide, and for residual);
            of a mixture the number of words, by default 128.
        encoder_num_layers: LSTM layers.
        encoder_dropout: dropout between LSTM layers.

    Raises:
        InputError, TemplateError: settings that contradict each other or the template language.
    """

    num_virtual_tokens: int | None = None
    encoder: str = "mlp"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        kind = self.encoder.lower() if isinstance(self.encoder, str) else self.encoder
        self.encoder = one_of("encoder", kind, ENCODERS)
        self.encoder_dropout = float(share("encoder_dropout", self.encoder_dropout))
        for name, most in MOST.items():
            setattr(self, name, plain(getattr(self, name)))
            at_least_one(name, getattr(self, name), most)
        at_least_one("encoder_num_layers", self.encoder_num_layers, optional=kind != "lstm")
        if self.template is None:
            if self.num_virtual_tokens is None:
                raise InputError(
                    'a prompt needs a template, such as "[P*3] {country} [P*3] [MASK]", or '
                    "num_virtual_tokens for virtual tokens in front of the input"
                )
            self.special_tokens = "after"
        super().__post_init__()
        if self.template is not None:
            self._count_virtual_tokens()

    def _count_virtual_tokens(self) -> None:
        groups = self.parsed.virtual
        if not groups:
            raise InputError(_without_virtual(excerpt(self.parsed.text)))
        if all(group.count for group in groups):  # the words of [P:…] await a tokenizer
            self.set_count(sum(group.count for group in groups))

    def set_count(self, count: int) -> None:
        """Fix the number of virtual tokens.

        Raises:
            InputError: it disagrees with ``num_virtual_tokens``.
        """
        if self.num_virtual_tokens not in (None, count):
            raise InputError(
                f"num_virtual_tokens is {self.num_virtual_tokens}, and the template has {count} "
                f"virtual tokens: {excerpt(self.template or '')}; give one of the two, or make "
                "them agree"
            )
        self.num_virtual_tokens = count

    def settings(self) -> dict[str, Any]:
        """What a user chose, as plain values."""
        return {**super().settings(), **{name: getattr(self, name) for name in _ENCODER}}


def share(name: str, value: Any) -> float:
    """A share of a whole, as Python's own number.

    Raises:
        InputError: it is no number from 0 to below 1.
    """
    value = plain(value)
    if not is_number(value):
        raise InputError(f"{name} is {value!r}; expected a number")
    if not 0 <= value < 1:
        raise InputError(f"{name} is {value}; give a share, from 0 to below 1")
    return value


def _without_virtual(template: str) -> str:
    """What to say of a template that has no virtual token."""
    meant = _SMALL.sub(lambda found: f"[P{found[1]}]", template)
    if meant != template:
        return f"the template has no virtual token: [P] is written with a capital P; write: {meant}"
    return (
        "the template has no virtual token; write [P] or [P*3] where the prompt may learn, for "
        f"example: [P*3] {template}"
    )
