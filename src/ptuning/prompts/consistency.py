"""What must agree in a prompt: its vectors and its template, the members of an ensemble."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import InputError, briefly


def check_kind(prompt: Any, kind: type) -> None:
    """Refuse what is no prompt, such as the name of its folder.

    Args:
        prompt: what came.
        kind: `Prompt`, or `Task` where a manual template will do.

    Raises:
        InputError: says what came.
    """
    if not isinstance(prompt, kind):
        raise InputError(
            f"prompt is {briefly(prompt)}; expected a Prompt (Prompt.load reads a folder)"
        )


def check_vectors(vectors: Tensor, count: int | None) -> None:
    """Refuse what are no vectors of so many virtual tokens.

    Raises:
        InputError: says what came.
    """
    if not isinstance(vectors, Tensor) or vectors.dim() != 2:
        what = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise InputError(
            f"vectors is {what}; expected a tensor (num_virtual_tokens, embedding width)"
        )
    if count not in (None, len(vectors)):
        raise InputError(
            f"the prompt has {count} virtual tokens, and its vectors are {len(vectors)}: they "
            "belong to another template"
        )


def check_alike(first: Any, other: Any) -> None:
    """Refuse a member that cannot answer together with the first.

    Raises:
        InputError: it is an ensemble itself, or answers something else.
    """
    if not hasattr(other, "others") or other.others or other.modules or first.modules:
        raise InputError(
            f"a member of an ensemble is {other!r}; expected a trained prompt that is no ensemble "
            "and was trained without further modules"
        )
    for name in ("labels", "label_mode", "answer_end"):
        one, another = getattr(first, name), getattr(other, name)
        same = one == another
        if name == "labels":  # each may say them in its own words
            counts = [[(k, len(words)) for k, words in labels.items()] for labels in (one, another)]
            same = counts[0] == counts[1]
        if not same:
            raise InputError(
                f"members of an ensemble answer the same: {name} is {one!r} of one and "
                f"{another!r} of another"
            )
