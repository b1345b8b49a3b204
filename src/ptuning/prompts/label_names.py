"""Labels as words: what a table's labels are called, and which words of a name tell most.

    lost_or_stolen_card    lost or stolen card    stolen, lost, card

The texts of a label show which words of its name stand for it: in "lost or stolen card" these are
"stolen" and "lost", while "card" stands in every label's texts.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from unicodedata import normalize

from ..data.columns import Columns, are_labels, have_letters
from ..data.values import plain, text_of
from ..errors import DataError, warn
from .task import as_label, whole_number

_TRUTH = {
    **{"0": "no", "false": "no", "False": "no", "FALSE": "no"},
    **{"1": "yes", "true": "yes", "True": "yes", "TRUE": "yes"},
}
_SIGNS = {"-1": "negative", "0": "neutral", "1": "positive"}
_NUMBERED = re.compile(r"([a-z]+[\W_]+|[a-z])?-?\d+(\.0)?|true|false|[a-z]", re.IGNORECASE)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def label_words(rows: Sequence[Mapping[str, Any]], columns: Columns) -> dict[str, str] | None:
    """The name of each label in words that differ; None where answers are free text.

    Raises:
        DataError: there are several examples, and one label or none for some of them.
    """
    cells = [plain(row.get(columns.answer)) for row in rows]
    labels = _labels(columns.answer, cells)
    known = list(dict.fromkeys(label for label in labels if label))
    if len(known) < 2 and len(labels) > 1:
        if not all(labels):
            raise DataError(
                f"example {labels.index('') + 1}: the answer column {columns.answer!r} is empty; "
                "give its answer, or leave the example out"
            )
        raise DataError(
            f"every answer in the column {columns.answer!r} is {known[0]!r}; give examples of at "
            "least two kinds, or another column (answer=, --answer)"
        )
    if not (are_labels(labels) or all(isinstance(cell, bool) for cell in cells)):
        return None
    if pair := _alike(known):
        warn(
            f"the labels {pair[0]!r} and {pair[1]!r} differ only in case, spaces or the coding of "
            "letters, and count as two; make them one in the data if that is what they are"
        )
    names = _names(known)
    if columns.twin is not None and not have_letters(known):
        twins: dict[str, str] = {}
        for label, row in zip(labels, rows, strict=True):
            twins.setdefault(label, text_of(columns.twin, row[columns.twin]).strip())
        names = [twins[label] for label in known]
    return dict(zip(known, _distinct(known, names), strict=True))


def say_nothing(labels: Collection[str]) -> bool:
    """Labels are numbers, truths or letters, such as 0 and 1, ``LABEL_2`` or ``B``."""
    return bool(labels) and all(map(_NUMBERED.fullmatch, labels))


def telling_words(
    names: Mapping[str, str], rows: Sequence[Mapping[str, Any]], columns: Columns
) -> dict[str, tuple[str, ...]]:
    """The words of each label's name, those that tell most of it first.

    That is a word that no other name has; of these one that stands in more of the label's texts,
    compared with the label that has it most often of the others; of these the longest. Words of one
    name alone that others' texts have more often are left out, but for the first.

    Args:
        names: label -> its name.
        rows: column -> value.
        columns: of the rows.
    """
    words = {label: list(dict.fromkeys(_words(name))) for label, name in names.items()}
    asked = {word.casefold() for of_label in words.values() for word in of_label}
    examples: Counter[str] = Counter()
    having: defaultdict[str, Counter[str]] = defaultdict(Counter)  # word -> label -> examples
    labels = _labels(columns.answer, [row.get(columns.answer) for row in rows])
    for row, label in zip(rows, labels, strict=True):
        if label in names:
            text = " ".join(text_of(name, row.get(name)) for name in columns.read)
            examples[label] += 1
            for word in asked.intersection(_words(text.casefold())):
                having[word][label] += 1

    def tells(word: str, label: str) -> float:
        shares = {other: n / examples[other] for other, n in having[word].items()}
        own = shares.pop(label, 0.0)
        return own - max(shares.values(), default=0.0)

    sharing = names_having(words)
    made = {}
    for label, of_label in words.items():
        gain = {word: tells(word.casefold(), label) for word in of_label}
        of_label.sort(key=lambda word: (sharing[word.casefold()], -gain[word], -len(word)))
        kept = (w for w in of_label[1:] if sharing[w.casefold()] > 1 or gain[w] >= 0)
        made[label] = (*of_label[:1], *kept)
    return made


def names_having(words: Mapping[str, Iterable[str]]) -> Counter[str]:
    """How many labels' names have each word, in lower case."""
    return Counter(word for of in words.values() for word in {one.casefold() for one in of})


def _labels(column: str, cells: Iterable[Any]) -> list[str]:
    """The cells of the answer column as labels. Files of several kinds write one truth in several
    ways; it is called as it came first."""
    known: dict[str, None] = {}
    labels = []
    for cell in cells:
        labels.append(_label(column, as_label(cell, known)))
        known.setdefault(labels[-1])
    return labels


def _label(column: str, cell: Any) -> str:
    """A cell of the answer column as a label: JSON's true is ``true``, and 1.0 is ``1``."""
    if isinstance(cell, bool):
        return json.dumps(cell)
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return text_of(column, cell).strip()


def _names(labels: Sequence[str]) -> list[str]:
    """What labels of numbers and truths stand for, and the others as they are."""
    labels = [whole_number(label) or label for label in labels]
    for meaning in (_TRUTH, _SIGNS):
        if set(labels) <= set(meaning) and len({meaning[label] for label in labels}) == len(labels):
            return [meaning[label] for label in labels]
    numbers = {str(n): word for n, word in enumerate(_NUMBERS)}
    return [numbers.get(label, label) for label in labels]


def _distinct(labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Readable names, but for those that would be alike: these labels stay as they are."""
    words = [readable(name) for name in names]
    count = Counter(words)
    return [w if count[w] == 1 and w else label for w, label in zip(words, labels, strict=True)]


def readable(name: str) -> str:
    """``top_up-failed`` as words, ``top up failed``; of ``topUpFailed``: ``top Up Failed``."""
    spaced = re.sub(r"(?<=[^\W_])[_\s/-]+(?=[^\W_])|(?<=[a-z])(?=[A-Z][a-z])", " ", name)
    return " ".join(spaced.split())


def _alike(labels: Sequence[str]) -> tuple[str, str] | None:
    """The first two labels that differ in case, spaces or the coding of letters alone."""
    first: dict[str, str] = {}
    for label in labels:
        read = " ".join(normalize("NFC", label.casefold()).split())
        if (other := first.setdefault(read, label)) != label:
            return other, label
    return None


def as_verbalizer(words: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Label -> words as a verbalizer, in which braces would name columns."""
    return {
        label: tuple(word.replace("{", "{{").replace("}", "}}") for word in of_label)
        for label, of_label in words.items()
    }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)
