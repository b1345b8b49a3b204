"""LAMA's facts and relations (Petroni et al., arXiv 1909.01066), and the protocol that splits them.

DATA/relations.jsonl    relation, template ("[X] was born in [Y] ."), label
DATA/P19.jsonl          sub_label, obj_label
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data import Row, read_examples
from ...errors import DataError, InputError
from ...places import entry
from ..splits import cut

SUBJECT, OBJECT = "sub_label", "obj_label"


@dataclass(frozen=True)
class Relation:
    """One relation of LAMA.

    Attributes:
        name: such as ``P19``.
        template: LAMA's own, with ``[X]`` for the subject and ``[Y]`` for the object.
        label: its name in words, such as ``place of birth``.
    """

    name: str
    template: str
    label: str


@dataclass(frozen=True)
class Facts:
    """The usable facts of one relation: to train on, to choose with, and to test."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


class UnusableRelationError(DataError):
    """A relation that a model cannot be asked about; others may do."""


def read_relations(folder: Path, chosen: Sequence[str] = ()) -> list[Relation]:
    """The relations that have facts in `folder`, or those that are chosen, in that order.

    Raises:
        InputError: a relation is unknown or has no facts.
        DataError: ``relations.jsonl`` is not there or is not LAMA's.
    """
    path = folder / "relations.jsonl"
    if not path.is_file():
        raise DataError(
            f"{path} is not there; give LAMA's folder with relations.jsonl and P*.jsonl (--data)"
        )
    known: dict[str, Relation] = {}
    for number, row in enumerate(read_examples(path), 1):
        missing = [key for key in ("relation", "template") if not row.get(key)]
        if missing:
            raise DataError(f"{path}, relation {number} has no {missing[0]!r}")
        name, template = str(row["relation"]), str(row["template"])
        if template.count("[X]") != 1 or template.count("[Y]") != 1:
            raise DataError(f"{path}, {name}: [X] and [Y] must stand in it once: {template}")
        if name in known:
            raise DataError(f"{path} has the relation {name} twice")
        known[name] = Relation(name, template, str(row.get("label") or ""))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(f"unknown relation {unknown[0]!r}; {path} has {', '.join(known)}")
    without = [name for name in chosen if not _path(folder, name).is_file()]
    if without:
        raise InputError(f"the relation {without[0]} has no facts: {_path(folder, without[0])}")
    relations = [known[name] for name in (dict.fromkeys(chosen) or known)]
    relations = [r for r in relations if _path(folder, r.name).is_file()]
    if not relations:
        raise DataError(f"{folder} has no facts (P*.jsonl) of the relations in relations.jsonl")
    return relations


def read_facts(folder: Path, relation: Relation, tokenizer: Any) -> Facts:
    """The facts whose object is one token, shuffled and cut: 60 % train, 15 % dev, 25 % test.

    Raises:
        DataError: a fact has no subject or object.
        UnusableRelationError: too few have an object of one token.
    """
    path = _path(folder, relation.name)
    rows = read_examples(path) if path.stat().st_size else []
    for number, row in enumerate(rows, 1):
        for key in (SUBJECT, OBJECT):
            value = row.get(key)
            if not isinstance(value, str | int | float) or not str(value).strip():
                raise DataError(f"{path}, fact {number}: {key} is {value!r}; give text")
    usable = [row for row in rows if is_one_token(tokenizer, str(row[OBJECT]))]
    facts = Facts(*cut(usable))
    if not (facts.train and facts.dev and facts.test):
        raise UnusableRelationError(
            f"{path} has {len(usable)} facts whose object is one token of this tokenizer; 3 are "
            "the least that can be split"
        )
    return facts


def is_one_token(tokenizer: Any, word: str) -> bool:
    """The word, with a space before it, is one known token of the vocabulary."""
    ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def one_token(tokenizer: Any, word: str) -> int:
    """The id of a word that `is_one_token`."""
    (found,) = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
    return int(found)


def _path(folder: Path, relation: str) -> Path:
    return entry(folder, f"{relation}.jsonl")
