"""SuperGLUE's tasks as flat rows, columns as the templates name them.

    DATA/BoolQ/{train,dev32,val}.jsonl      as in FewGLUE; a test.jsonl with labels comes first

`text` columns are as they stand, but for what a template needs: COPA's choices begin in lower case
and lose their full stop, WSC's text marks its pronoun, MultiRC's questions and answers become a row
each. What is shuffled and cut are the files' examples: MultiRC's passages stay whole. Labels are
text, and the task's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data import Row, read_examples
from ...data.values import text_of
from ...errors import DataError
from ...prompts.task import as_label
from ..splits import cut, shuffled
from .tasks import SuperGlueTask

TEST_FILES = ("test.jsonl", "val.jsonl")
Examples = list[list[Row]]
"""The rows of each example."""


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to choose with, and to test (none where there is no file of them)."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


def read_few(folder: Path, task: SuperGlueTask, most: int | None = None) -> Splits:
    """A task of FewGLUE: 32 examples to train on, 32 to choose with, the validation set to test.

    Args:
        folder: of all tasks.
        task: names its folder there.
        most: so many test examples, the first after a shuffle with seed 0.

    Raises:
        DataError: a file, column or label is missing, or the label is not the task's.
    """
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "is not there"
        raise DataError(f"{folder} {problem}; give FewGLUE's folder (--data)")
    name = task.folder.lower()
    folders = [path for path in sorted(folder.glob("*")) if path.name.lower() == name]
    if not folders:
        raise DataError(f"{folder} has no folder {task.folder}; give FewGLUE's folder (--data)")
    task_folder = folders[0]
    test: Examples = []
    for path in [task_folder / file for file in TEST_FILES if (task_folder / file).is_file()]:
        found = _rows_of(path, task)
        known = any(row.get("label") not in (None, -1) for row in _flat(found))
        if known or path.name != "test.jsonl":  # SuperGLUE's own has none, or -1 in their place
            test = _labelled(path, task, found)
            break
    return Splits(
        read_rows(task_folder / "train.jsonl", task),
        read_rows(task_folder / "dev32.jsonl", task),
        _flat(_first(test, most)),
    )


def read_full(
    task: SuperGlueTask,
    train: Path,
    dev: Path | None,
    test: Path | None,
    most: int | None = None,
) -> Splits:
    """A task of which there are more examples; without `dev` and `test` `train` is cut 60/15/25.

    Raises:
        DataError: as in `read_few`; or there are too few examples to cut.
    """
    examples = _examples(train, task)
    parts = {"dev": dev, "test": test}
    given = {name: _examples(path, task) for name, path in parts.items() if path is not None}
    if len(given) < 2:
        train_part, dev_part, test_part = cut(examples)
        if not given:
            examples, given = train_part, {"dev": dev_part, "test": test_part}
        else:
            (missing,) = set(parts) - set(given)
            examples, given[missing] = train_part + dev_part, test_part
    if not (examples and given["dev"] and given["test"]):
        raise DataError(f"{train} has too few examples to be cut; 3 are the least")
    return Splits(_flat(examples), _flat(given["dev"]), _flat(_first(given["test"], most)))


def read_rows(path: Path, task: SuperGlueTask) -> list[Row]:
    """A file's rows as the task's templates want them.

    Raises:
        DataError: the file is missing, or is not the task's.
    """
    return _flat(_examples(path, task))


def _examples(path: Path, task: SuperGlueTask) -> Examples:
    return _labelled(path, task, _rows_of(path, task))


def _rows_of(path: Path, task: SuperGlueTask) -> Examples:
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is not there"
        raise DataError(f"{path} {problem}; give FewGLUE's folder (--data) or the file's path")
    flatten = _FLAT.get(task.name, lambda row: iter([row]))
    found: Examples = []
    for number, example in enumerate(read_examples(path), 1):
        try:
            found.append(list(flatten(example)))
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise DataError(
                f"{path}, example {number} is no example of {task.folder}: {error!r}"
            ) from None
    if not any(found):
        raise DataError(f"{path} has no answers that could be labelled")
    return found


def _labelled(path: Path, task: SuperGlueTask, examples: Examples) -> Examples:
    """The same with labels as text, each one of the task's."""
    for number, rows in enumerate(examples, 1):
        for row in rows:
            value = row.get("label")
            label = text_of("label", as_label(value, task.labels)).strip().lower()
            if label not in task.labels:
                said = "no label" if value is None else f"the label {value!r}"
                raise DataError(
                    f"{path}, example {number} has {said}; {task.folder} has "
                    f"{', '.join(task.labels)}"
                )
            row["label"] = label
    return examples


def _flat(examples: Examples) -> list[Row]:
    return [row for rows in examples for row in rows]


def _first(examples: Examples, most: int | None) -> Examples:
    if most is None or len(examples) <= most:
        return examples
    return shuffled(examples)[:most]


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
    pronoun, noun = (" ".join(target[name].split()) for name in ("span2_text", "span1_text"))
    if not (pronoun and noun):
        raise ValueError("a span has no text")
    yield {
        "text": _marked(row["text"], pronoun, int(target["span2_index"])),
        "pronoun": pronoun,
        "noun": noun,
        "label": row.get("label"),
    }


def _marked(text: str, pronoun: str, word: int) -> str:
    """The text with stars around the pronoun: where it stands nearest to that word.

    The files count words in several ways, and spell the pronoun in another case than the text.
    """
    spelled = r"\s+".join(map(re.escape, pronoun.split()))
    found = list(re.finditer(rf"(?<!\w){spelled}(?!\w)", text, re.IGNORECASE))
    if not found:
        raise ValueError(f"the text has no {pronoun!r}")
    nearest = min(found, key=lambda m: abs(len(text[: m.start() + 1].split()) - 1 - word))
    return f"{text[: nearest.start()]}*{nearest[0]}*{text[nearest.end() :]}"


_FLAT: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "copa": _copa,
    "multirc": _multirc,
    "wsc": _wsc,
}
