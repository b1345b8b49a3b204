"""What the columns of a table hold: the answer, what is worth reading, and the rest.

Knows texts and how often they repeat; what a model makes of them is the prompt's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import DataError, excerpt
from .rows import listed, names_in
from .values import text_of

_FIRST = ("answer", "label")
_USUAL = re.compile(r"(?i:(?:^|[\W_])(labels?|class|category|target|intent|sentiment|topic))$")
_MOST_LABELS, _LONGEST_LABEL = 500, 100
_OFTEN = 4
"""Rows of each value by which two columns say the same, and do not only happen to."""
_SELDOM = 10
"""Of so many rows one at least has to have something in a column."""
_MANY = 50
"""Codes that are more than that are no kinds of anything."""
_MOST_READ = 12
"""Columns that are read; of more those with the longest texts."""
_ID = "id|uuid|guid|index|idx"
_ID_NAME, _MAY_BE_ID = (
    re.compile(rf"(?i:(?:^|[\W_])(?:{words}))$|[a-z](?:Id|ID)$")
    for words in (_ID, f"{_ID}|key|nr|no|number")
)
_TWIN = "the answer in other words"
_CODE = "a code of its own in every row"
_CODES = "codes, as its name says"
_NUMBER = "the row's number"
_MOMENT = "a moment of its own in most rows"
_TIME = (
    r"[T, ]+\d{1,2}[:.]\d\d([:.]\d\d([.,]\d+)?)?"
    r"(\s?[AaPp]\.?[Mm]\.?)?(\s?(Z|UTC|GMT|[+-]\d\d:?\d\d))?"
)
_DATE_AND_TIME = re.compile(rf"\d{{1,4}}[-/. ]\w{{1,9}}[-/. ]\d{{1,4}}{_TIME}")
_DATE = re.compile(  # "1 of 5" and "1-2-10" may be labels
    r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/. ](\d{1,2}|[A-Za-z]{3,9})\.?[-/. ]\d{4}"
    r"|\d{1,2}[-/. ][A-Za-z]{3,9}\.?[-/. ]\d\d|\d{1,2}/\d{1,2}/\d\d)"
    rf"({_TIME})?"
)


@dataclass(frozen=True)
class Columns:
    """What a table's columns are for.

    Attributes:
        answer: the column of the right answer.
        read: the columns to answer from, in their order.
        left_out: every other column -> why.
        twin: a column that says the answers in other words, one for each, or None.
    """

    answer: str
    read: tuple[str, ...]
    left_out: Mapping[str, str]
    twin: str | None = None


def columns_of(
    rows: Sequence[Mapping[str, Any]],
    answer: str | None = None,
    *,
    reads: bool = True,
    dev: Sequence[Mapping[str, Any]] = (),
) -> Columns:
    """Find the answer of a table and what to read for it.

    Args:
        rows: column -> value.
        answer: the answer's column; by default ``answer``, else ``label``, else the one column
            with few values that are no dates.
        reads: something must be left to read.
        dev: other rows, which say nothing of the answer, but have to have what is read.

    Raises:
        DataError: it is not clear which column is the answer, there is none of that name, or
            nothing else to read.
    """
    if not rows:
        raise DataError("there is no example to look at; give at least one")
    table = {name: _texts(rows, name) for name in dict.fromkeys(n for row in rows for n in row)}
    if all(texts is None for texts in table.values()):
        raise DataError(
            f"no column holds text in every row: the data has {names_in(rows[0])}; give a table "
            "with a column of text and one of answers"
        )
    answer = _answer(table, answer)
    answers = _order(table[answer])
    read, left_out, twin = [], {}, None
    unusable = False  # there is a column that a person may have meant
    for name, texts in table.items():
        if name == answer:
            continue
        if why := _unfit(name, texts):
            left_out[name] = why
            unusable |= bool(name.strip())
        elif dev and _texts(dev, name) is None:
            had = all(name in row for row in dev)
            left_out[name] = "it is no text in every dev row" if had else "not every dev row has it"
            unusable = True
        elif answers and _order(texts) == answers:
            left_out[name], twin = _TWIN, twin or name
        elif why := _says_nothing(name, texts or []):
            left_out[name] = why
        else:
            read.append(name)
    for reasons in ((_TWIN,), (_CODE, _CODES, _NUMBER, _MOMENT)):  # they may be all there is
        if not read and not unusable:
            read = [name for name, why in left_out.items() if why in reasons]
            left_out = {name: why for name, why in left_out.items() if name not in read}
    if not read and reads:
        why = "; ".join(f"{excerpt(name, most=60)!r}: {text}" for name, text in left_out.items())
        raise DataError(
            f"there is nothing to answer {answer!r} from: {why or 'it is the only column'}; give a "
            "table with a column of text, or a template of your own"
        )
    if len(read) > _MOST_READ:
        length = {name: sum(map(len, table[name] or [])) for name in read}
        kept = sorted(read, key=lambda name: -length[name])[:_MOST_READ]
        left_out |= {name: f"{len(read)} are too many" for name in read if name not in kept}
        read = [name for name in read if name in kept]
    return Columns(answer, tuple(read), left_out, twin if twin in left_out else None)


def are_labels(answers: Sequence[str]) -> bool:
    """Most answers come again: they are labels, no free text."""
    counts = Counter(answers)
    again = sum(count for count in counts.values() if count > 1)
    short = max(map(len, counts), default=0) <= _LONGEST_LABEL
    return short and 2 * again >= len(answers) and len(counts) <= _MOST_LABELS


def _texts(rows: Sequence[Mapping[str, Any]], name: str) -> list[str] | None:
    """A column's texts; None where a value has none, or a row has no such column."""
    try:
        return [text_of(name, row[name]).strip() for row in rows]
    except (DataError, KeyError):
        return None


def _answer(table: Mapping[str, list[str] | None], given: str | None) -> str:
    if given is not None:
        if not isinstance(given, str) or given not in table:
            raise DataError(
                f"the data has no answer column {given!r}; it has {listed(map(repr, table))}; "
                "correct the name (answer=, --answer)"
            )
        return given
    for wanted in _FIRST:
        alike = [name for name in table if name.strip().lower() == wanted]
        if alike:
            return wanted if wanted in alike else alike[0]
    few = [name for name, texts in table.items() if texts and _has_few_values(texts)]
    few = [name for name in few if all(table[name] or ())] or few  # every example has an answer
    usual = [name for name in few if _USUAL.search(name.strip())]
    found = _without_twins(usual or few, table)
    for unlikely in (_are_measures, _are_prose):
        found = [name for name in found if not unlikely(table[name] or [])] or found
    if len(found) == 1:
        return found[0]
    one = [name for name, texts in table.items() if texts and len(set(texts)) == 1 < len(texts)]
    seen = "several columns have few values" if found else "no column has few values"
    if one and not found:
        seen += f", and of {listed(map(repr, one))} all are one, where labels are at least two"
    unnamed = any(name in (texts or ()) for name, texts in table.items())
    hint = "; if the file has no header, name its columns (columns=, --columns)" if unnamed else ""
    raise DataError(
        f"it is not clear which column is the answer ({seen}): the data has "
        f"{listed(map(repr, found or table))}; name it (answer=, --answer COLUMN){hint}"
    )


def _has_few_values(texts: list[str]) -> bool:
    """Labels may stand here. Dates come again in a table of some length, and are none."""
    dated = all(_DATE.fullmatch(text) for text in texts if text)
    return len(set(texts)) > 1 and not dated and are_labels(texts)


def _without_twins(names: list[str], table: Mapping[str, list[str] | None]) -> list[str]:
    """Of columns that say the same the one in words."""
    kept: dict[Any, str] = {}
    for name in sorted(names, key=lambda n: not have_letters(table[n] or [])):
        kept.setdefault(_order(table[name]) or name, name)
    return [name for name in names if name in kept.values()]


def _are_measures(texts: list[str]) -> bool:
    """Numbers, and not all of them whole."""
    there = [text for text in texts if text]
    return _are_numbers(there) and any(re.search(r"[.,]\d*[1-9]", text) for text in there)


def _are_prose(texts: Sequence[str]) -> bool:
    """At least half of them have three words or more."""
    return 2 * sum(len(text.split()) > 2 for text in texts) >= len(texts)


def have_letters(texts: Iterable[str]) -> bool:
    """Something in them is a word."""
    return any(c.isalpha() for text in texts for c in text)


def _order(texts: list[str] | None) -> tuple[int, ...]:
    """For each value the number of its first row: of two columns the same where each value of one
    stands beside one value of the other. Empty where values do not come often enough to tell."""
    first: dict[str, int] = {}
    order = tuple(first.setdefault(text, row) for row, text in enumerate(texts or ()))
    return order if _OFTEN * len(first) <= len(order) else ()


def _unfit(name: str, texts: list[str] | None) -> str | None:
    """Why a template cannot name a column."""
    if not name.strip():
        return "it has no name"
    if name != name.strip() or set(name) & set("{}"):
        return "its name cannot stand in a template (spaces around it, or braces): rename it"
    return "it is no text in every row" if texts is None else None


def _says_nothing(name: str, texts: list[str]) -> str | None:
    """Why a column does not help to answer."""
    if not any(texts):
        return "it is empty"
    several = len(texts) > 1
    if several and len(set(texts)) == 1:
        return f"it is always {excerpt(texts[0], most=40)!r}"
    if len(texts) < 3:
        return None
    there = [text for text in texts if text]
    if _SELDOM * len(there) < len(texts):
        return f"it is empty in {len(texts) - len(there)} of {len(texts)} rows"
    if 2 * len(set(there)) > len(there) and all(map(_DATE_AND_TIME.fullmatch, there)):
        return _MOMENT
    if _ID_NAME.search(name) and _are_codes(there):
        return _CODES
    if len(set(texts)) < len(texts) or any(re.search(r"\s", t) for t in texts):
        return None
    if all(re.fullmatch(r"[+-]?\d{1,18}", text) for text in texts):
        steps = [b - a for a, b in pairwise(map(int, texts))]
        if set(steps) == {1}:
            return _NUMBER
        rises = min(steps) > 0
        return _CODE if rises or _MAY_BE_ID.search(name) else None
    alike = len({len(text) for text in texts}) == 1
    coded = alike and all(re.search(r"\d", t) for t in texts) and not _are_numbers(texts)
    return _CODE if coded or (all(texts) and _MAY_BE_ID.search(name)) else None


def _are_codes(texts: list[str]) -> bool:
    """Many of one word each, some of which come again."""
    values = set(texts)
    many = len(values) > _MANY or _OFTEN * len(values) > len(texts)
    return many and len(values) < len(texts) and all(re.fullmatch(r"\S+", v) for v in values)


def _are_numbers(texts: list[str]) -> bool:
    return all(re.fullmatch(r"[+-]?\d*[.,]?\d+(?:[eE][+-]?\d+)?", text) for text in texts)
