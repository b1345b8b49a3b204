"""A label matrix in training: some rows behind a member's virtual tokens.

    table of a member = [ vectors            (virtual tokens, width)
                          M, packed          (ceil(W W / width), width) ]   of W label words

So all that drives a table (parts, CUDA graphs, clipping, AdamW) drives the matrix, too. It begins
at zero, where labels are compared as they are without (`forward.label_scores`), and its rate is in
proportion to the encoder's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..prompts.prompt import Prompt
from ..prompts.task import named_fields
from .settings import TrainSettings

RATE = 1e-2
"""AdamW's for the matrix where the encoder has its usual one; its numbers have no unit."""
MOST = 256
"""Label words up to which there is one: it has a number for each two of them."""
_FROM = 12
"""Labels from which on there is one by default (benchmarks/README.md, "A label matrix")."""


def settled_matrix(
    settings: TrainSettings, prompts: Iterable[Prompt], taught: bool = False
) -> bool:
    """Whether the members' label words get a matrix, as it is asked for or as it is usual: for
    many labels, and for prompts that have one.

    Args:
        settings: of the training.
        prompts: of all its members.
        taught: they learn what a teacher says.

    Raises:
        InputError: it is asked for, and these labels can have none.
    """
    prompts = list(prompts)
    why = next(filter(None, map(_obstacle, prompts)), None)
    if settings.label_matrix is None:
        usual = [not taught and len(one.labels) >= _FROM for one in prompts]
        begun = [one.label_matrix is not None for one in prompts]
        return why is None and (all(usual) or all(begun))
    if settings.label_matrix and why is not None:
        raise InputError(f"label_matrix is given, and {why}; leave it out")
    return settings.label_matrix


def too_many_words(settings: TrainSettings, prompts: Iterable[Prompt]) -> str | None:
    """That the usual matrix is left out for words which labels could do without, or None."""
    if settings.label_matrix is not None:
        return None
    for prompt in prompts:
        labels, words = len(prompt.labels), len(_words(prompt))
        if prompt.label_mode == "labels" and _FROM <= labels <= MOST < words:
            return (
                f"{labels} labels have {words} words, and a label matrix is for "
                f"{MOST} at most: they are trained without; give each label fewer (--labels, "
                "verbalizer=)"
            )
    return None


def _words(prompt: Prompt) -> list[str]:
    return [word for words in prompt.labels.values() for word in words]


def _obstacle(prompt: Prompt) -> str | None:
    """Why a prompt's labels can have no matrix."""
    words = _words(prompt)
    if not words or prompt.label_mode != "labels":
        return "no labels are compared"
    if any(map(named_fields, words)):
        return "the label words name columns, so that they change from row to row"
    if len(words) > MOST:
        return f"there are {len(words)} label words, more than the {MOST} that can have one"
    return None


def rows_of(words: int, width: int) -> int:
    """Rows of a table that the matrix of so many words takes."""
    return -(-words * words // width)


def packed(matrix: Tensor, width: int) -> Tensor:
    """A matrix ``(W, W)`` as rows ``(ceil(W W / width), width)``."""
    flat = matrix.flatten()
    return F.pad(flat, (0, rows_of(len(matrix), width) * width - len(flat))).view(-1, width)


def unpacked(rows: Tensor, words: int) -> Tensor:
    """The matrix ``(words, words)`` that such rows are."""
    return rows.flatten()[: words * words].view(words, words)
