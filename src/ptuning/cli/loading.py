"""The base model of a command, in a number format that is named or chosen."""

from __future__ import annotations

from typing import Any

from .. import distributed
from . import console


def chosen(
    name: str, dtype: str, instead: tuple[str, str] | None = None, usual: bool = False
) -> str:
    """The format to load a model in; of one that the machine decided for says which and why.

    Args:
        name: of the model.
        dtype: as the option has it.
        instead: what ``auto`` is here and why, whatever the machine is.
        usual: say it of float32 too, and of one that is named.

    Raises:
        InputError: there is no such model or format.
    """
    from ..backbone.load import AUTO, check_dtype, choose_dtype
    from ..backbone.number_format import FULL

    check_dtype(dtype)
    found, why = (
        instead
        if dtype == AUTO and instead is not None
        else distributed.from_main(lambda: choose_dtype(name, dtype))
    )
    if usual or (why and found != FULL):
        console.say(f"loading {name} in {found}{f': {why}' if why else ''}")
    return found


def base_model(name: str, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer, in the format that is named or `chosen`."""
    from ..backbone.load import load_model

    return load_model(name, dtype=chosen(name, dtype))
