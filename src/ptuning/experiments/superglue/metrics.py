"""SuperGLUE's official metrics, as fractions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ...data import Row

_LEADING = {"a", "an", "the", "his", "her", "its", "their", "my", "our", "your"}


def accuracy(gold: Sequence[str], said: Sequence[str], rows: Sequence[Row]) -> float:
    """The share of right labels."""
    return sum(a == b for a, b in zip(gold, said, strict=True)) / len(gold)


def macro_f1(gold: Sequence[str], said: Sequence[str], rows: Sequence[Row]) -> float:
    """The mean F1 of all labels that are right or said somewhere (CB)."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold, said, average="macro", zero_division=0))


def f1a(gold: Sequence[str], said: Sequence[str], rows: Sequence[Row]) -> float:
    """F1 of the right answers, over all answers of all questions (MultiRC)."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold, said, pos_label="1", average="binary", zero_division=0))


def em(gold: Sequence[str], said: Sequence[str], rows: Sequence[Row]) -> float:
    """The share of questions with every answer right (MultiRC)."""
    right: dict[str, bool] = defaultdict(lambda: True)
    for a, b, row in zip(gold, said, rows, strict=True):
        right[row["of_question"]] &= a == b
    return sum(right.values()) / len(right)


def same_noun(said: str, noun: str) -> bool:
    """A generated noun phrase means the candidate: one's words are among the other's.

    Articles and possessives in front, case and punctuation do not count (as in PET's evaluation of
    WSC).
    """
    one, other = _words(said), _words(noun)
    return bool(one and other) and (one <= other or other <= one)


def _words(phrase: str) -> set[str]:
    words = ["".join(c for c in w if c.isalnum()) for w in phrase.lower().split()]
    return {word for word in words if word and word not in _LEADING}


METRICS = {"accuracy": accuracy, "macro_f1": macro_f1, "f1a": f1a, "em": em}
