"""SuperGLUE's tasks as flat rows, columns as the templates name them.

    DATA/BoolQ/{train,dev32,val}.jsonl      as FewGLUE has them; test.jsonl comes before val.jsonl

`text` columns are as they stand, but for what a template needs: COPA's choices begin in lower case
and lose their full stop, WSC's text marks its pronoun, MultiRC's questions and answers become a row
each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import Row, read_examples
from ..errors import DataError

TEST_FILES = ("test.jsonl", "val.jsonl")


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to choose with, and to test (none where there is no file of them)."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


def read_few(folder: Path, name: str, most: int | None = None) -> Splits:
    """A task of FewGLUE: 32 examples to train on, 32 to choose with, the validation set to test.

    Args:
        folder: of all tasks.
        name: of the task's folder.
        most: so many test rows, the first after a shuffle with seed 0.

    Raises:
        DataError: a file or column is missing.
    """
    places = [path for path in sorted(folder.glob("*")) if path.name.lower() == name.lower()]
    if not places:
        raise DataError(f"{folder} has no folder {name}; give FewGLUE's folder (--data)")
    place = places[0]
    tests = [place / file for file in TEST_FILES if (place / file).is_file()]
    test = read_rows(tests[0], name) if tests else []
    if most is not None and len(test) > most:
        test = _shuffled(test)[:most]
    return Splits(
        read_rows(place / "train.jsonl", name), read_rows(place / "dev32.jsonl", name), test
    )


def read_full(
    name: str, train: Path, dev: Path | None, test: Path | None, most: int | None = None
) -> Splits:
    """A task of which there are more examples; without `dev` and `test` `train` is cut 60/15/25."""
    splits = _cut(name, train, dev, test)
    if most is None or len(splits.test) <= most:
        return splits
    return Splits(splits.train, splits.dev, _shuffled(splits.test)[:most])


def _cut(name: str, train: Path, dev: Path | None, test: Path | None) -> Splits:
    rows = read_rows(train, name)
    if dev is not None and test is not None:
        return Splits(rows, read_rows(dev, name), read_rows(test, name))
    rows = _shuffled(rows)
    first, second = int(0.6 * len(rows)), int(0.75 * len(rows))
    if dev is None and test is None:
        return Splits(rows[:first], rows[first:second], rows[second:])
    if dev is None:
        return Splits(rows[:second], rows[second:], read_rows(test, name) if test else [])
    return Splits(rows[:second], read_rows(dev, name), rows[second:])


def read_rows(path: Path, name: str) -> list[Row]:
    """A file's rows as the task's templates want them.

    Raises:
        DataError: the file is missing, or is not the task's.
    """
    if not path.is_file():
        raise DataError(f"{path} is not there; give FewGLUE's folder (--data) or the file's place")
    flat = _FLAT.get(name.lower(), lambda row: iter([row]))
    rows: list[Row] = []
    for number, row in enumerate(read_examples(path), 1):
        try:
            rows += flat(row)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise DataError(f"{path}, line {number} is no example of {name}: {error!r}") from None
    return rows


def _shuffled(rows: list[Row]) -> list[Row]:
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return rows


def _copa(row: Row) -> Iterator[Row]:
    joined = {"cause": "because", "effect": "so"}[row["question"]]
    choices = {key: _clause(row[key]) for key in ("choice1", "choice2")}
    premise = row["premise"].strip().removesuffix(".")
    yield {**row, **choices, "premise": premise, "joined": joined}


def _clause(sentence: str) -> str:
    text = sentence.strip().removesuffix(".")
    return text[:1].lower() + text[1:] if not text.startswith("I ") else text


def _multirc(row: Row) -> Iterator[Row]:
    passage = row["passage"]
    for question in passage["questions"]:
        for answer in question["answers"]:
            yield {
                "passage": passage["text"],
                "question": question["question"],
                "answer_text": answer["text"],
                "label": answer.get("label"),
                "of_question": f"{row['idx']}-{question['idx']}",
            }


def _wsc(row: Row) -> Iterator[Row]:
    target = row["target"]
    words = row["text"].split(" ")
    start, pronoun = int(target["span2_index"]), target["span2_text"]
    size = len(pronoun.split(" "))
    marked = [*words[:start], f"*{pronoun}*", *words[start + size :]]
    yield {
        "text": " ".join(marked),
        "pronoun": pronoun,
        "noun": target["span1_text"],
        "label": row.get("label"),
    }


_FLAT: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "copa": _copa,
    "multirc": _multirc,
    "wsc": _wsc,
}
