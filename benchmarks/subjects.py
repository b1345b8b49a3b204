"""What the studies of wording and placement are made on: LAMA's P36 and FewGLUE's tasks."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import ptuning
from ptuning.experiments.lama.relations import read_facts, read_relations
from ptuning.experiments.ledger import Ledger, digest
from ptuning.experiments.superglue.examples import read_few
from ptuning.experiments.superglue.tasks import TASKS
from ptuning.inference.evaluation import teacher_forced
from ptuning.reporting import versions

FEW_SHOT = ("rte", "cb", "copa", "boolq")
"""The tasks that have validation data to test on."""


@dataclass(frozen=True)
class Subject:
    """Rows, and how a template is trained and asked on them.

    Args:
        name: as the tables show it.
        train, dev, test: rows.
        task: answer column, verbalizer and the like.
        encoder: of prompts.
        settings: of a training.
    """

    name: str
    train: list[Any]
    dev: list[Any]
    test: list[Any]
    task: dict[str, Any]
    encoder: str
    settings: dict[str, Any]


def capital(folder: Path, tokenizer: Any) -> Subject:
    """LAMA's P36, P@1 over the whole vocabulary; as many steps as ``ptuning lama`` takes."""
    (relation,) = read_relations(folder, ["P36"])
    facts = read_facts(folder, relation, tokenizer)
    task = {"answer": "obj_label", "answer_end": False}
    rows = facts.train, facts.dev, facts.test
    return Subject("LAMA P36", *rows, task, encoder="mlp", settings={"epochs": 5})


def few_shot(folder: Path, name: str, most: int | None) -> Subject:
    """One of FewGLUE's tasks, trained as ``ptuning superglue`` does."""
    task = TASKS[name]
    splits = read_few(folder, task, most)
    asked = {
        "answer": task.answer,
        "verbalizer": task.verbalizers[0],
        "max_length": task.max_length,
    }
    rows = splits.train, splits.dev, splits.test
    settings = {"epochs": 10, "choose_by": "loss"}
    return Subject(task.folder, *rows, asked, encoder="none", settings=settings)


def measure(
    base: Any, tokenizer: Any, subject: Subject, template: str, seed: int
) -> dict[str, Any]:
    """A template's accuracy on test; with virtual tokens after a training, and its seconds."""
    if "[P" not in template:
        by_hand = ptuning.Task(template, **subject.task)
        return {"accuracy": teacher_forced(base, tokenizer, by_hand, subject.test)[0]}
    prompt = ptuning.Prompt(template, encoder=subject.encoder, **subject.task)
    started = time.monotonic()
    how = {**subject.settings, "word_noise": 0.0}  # as the published figures were made
    result = ptuning.train(base, tokenizer, prompt, subject.train, subject.dev, seed=seed, **how)
    seconds = time.monotonic() - started
    accuracy, _ = teacher_forced(base, tokenizer, prompt, subject.test)
    return {"accuracy": accuracy, "dev": result.best["dev_accuracy"], "seconds": seconds}


Once = Callable[[Subject, str, int], dict[str, Any]]


def study(
    name: str,
    description: str,
    default: str,
    run: Callable[[list[Subject], Once, argparse.Namespace], tuple[dict[str, Any], Figure]],
    several: bool = False,
) -> None:
    """Read the command line, and run a study whose finished parts are kept.

    Args:
        name: of the files it writes.
        description: of the command.
        default: the tasks it is made on.
        run: gets the subjects, and what measures a template with a seed, once; gives what it found
            and a picture of it.
        several: the study is made with `--seeds`.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lama", type=Path, help="LAMA's folder")
    parser.add_argument("--superglue", type=Path, help="FewGLUE's folder")
    parser.add_argument("--task", default=default, help="of FewGLUE")
    parser.add_argument("--max-examples", type=int, help="to test a task of FewGLUE with")
    if several:
        parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    base, tokenizer = ptuning.load_model(options.model)
    subjects = [capital(options.lama, tokenizer)] if options.lama else []
    if options.superglue:
        names = options.task.split(",")
        subjects += [few_shot(options.superglue, n, options.max_examples) for n in names]
    settings = {"model": options.model, "max_examples": options.max_examples}
    ledger = Ledger(options.output, settings)

    def once(subject: Subject, template: str, seed: int) -> dict[str, Any]:
        part = f"{subject.name}-{digest(template)}-{seed}".replace(" ", "-")
        made_of = digest(asdict(subject))
        result = ledger.get(part, made_of)
        if result is None:
            result = measure(base, tokenizer, subject, template, seed)
            ledger.put(part, made_of, result)
        print(f"{100 * result['accuracy']:5.1f}  {subject.name}  {template!r}", flush=True)
        return result

    found, picture = run(subjects, once, options)
    picture.savefig(options.output / f"{name}.png", dpi=120)
    text = json.dumps({**found, "versions": versions()}, indent=2)
    (options.output / f"{name}.json").write_text(text, encoding="utf-8")
