"""The base model of a command, in a number format that is named or chosen."""

from __future__ import annotations

from typing import Any

from .. import distributed
from . import console

_OWN = "own"


def chosen(
    name: str,
    dtype: str,
    instead: tuple[str, str] | None = None,
    usual: bool = False,
    frozen: str = _OWN,
) -> str:
    """The format to load a model in; of one that the machine decided for says which and why.

    Args:
        name: of the model.
        dtype: as the option has it.
        instead: what ``auto`` is here and why, whatever the machine is.
        usual: say it of float32 too, and of one that is named.
        frozen: as the option has it.

    Raises:
        InputError: there is no such model or format.
    """
    from ..backbone.eight_bits import check_frozen
    from ..backbone.load import AUTO, check_dtype, choose_dtype
    from ..backbone.number_format import FULL, Choice
    from ..devices import best_device

    check_dtype(dtype)
    check_frozen(frozen, None if frozen == _OWN else best_device())
    if dtype == AUTO and instead is not None:
        found = Choice(*instead)
    else:
        found = distributed.from_main(lambda: choose_dtype(name, dtype))
    if usual or (found.why and found.dtype != FULL) or frozen != _OWN:
        console.say(found.told(name, frozen))
    return found.dtype


def base_model(name: str, dtype: str, frozen: str = _OWN) -> tuple[Any, Any]:
    """Model and tokenizer to answer with, in the formats that are named or `chosen`."""
    from ..backbone.load import load_model

    dtype = chosen(name, dtype, frozen=frozen)
    return load_model(name, dtype=dtype, frozen=frozen, gradients=False)
