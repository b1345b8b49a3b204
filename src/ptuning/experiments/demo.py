"""The demonstration: a frozen model learns facts' form from a few hundred examples.

The model knows many people's professions, but a hand-written template brings few of them out. All
choices (the manual template, the prompt's epoch) are made on dev; all figures are from test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from .. import distributed
from ..backbone.eight_bits import OWN, check_frozen
from ..backbone.fetched import SOURCES, fetch
from ..backbone.load import choose_dtype, load_model
from ..backbone.number_format import FULL
from ..data import Row, read_examples
from ..errors import InputError
from ..formats import pack_json
from ..inference.evaluation import manual_score, teacher_forced
from ..inference.nearest_words import Neighbours, nearest_words
from ..inference.prediction import predict
from ..prompts import peft_files
from ..prompts.prompt import Prompt
from ..prompts.task import Task, majority_answer
from ..reporting import training_curve, versions
from ..storage import check_writable, holds_something, write_folder
from ..training.progress import Pace, Progress, in_words
from ..training.train import train
from .splits import cut

TITLE = "Person -> profession"
SUBJECT, ANSWER = "person", "profession"
TEMPLATE = "[P*3] {person} [P*3] [MASK]"
MANUAL_TEMPLATES = (
    "Person: {person}. Profession: [MASK]",
    "Person: {person}\nProfession: [MASK]",
    "Name: {person}. Occupation: [MASK]",
    "Name: {person}\nOccupation: [MASK]",
    "{person} worked as a [MASK]",
    "{person} was a famous [MASK]",
)
_METRICS = "metrics.json"
EPOCHS, BATCH_SIZE, ENCODER = 8, 16, "mlp"


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration shows.

    Attributes:
        metrics: content of ``metrics.json``.
        rows: (name, detail, share right) of the three that are compared.
        examples: (subject, prediction, right answer) of three test examples.
        neighbours: the virtual tokens beside the vocabulary.
        mean_norm: of the vocabulary's vectors.
    """

    metrics: dict[str, Any]
    rows: list[tuple[str, str, float]]
    examples: list[tuple[str, str, str]]
    neighbours: list[Neighbours]
    mean_norm: float


def facts() -> tuple[list[Row], list[Row], list[Row]]:
    """The facts that ship with the package, as train, dev and test; each person stands in one."""
    folder = package_files("ptuning.experiments") / "demo_data"
    return cut(read_examples(Path(str(folder / "professions.csv"))))


def run(
    model_name: str,
    output: Path,
    tell: Callable[[str], None],
    listener: Callable[[Progress], None],
    dtype: str = FULL,
    frozen: str = OWN,
) -> DemoResult:
    """Compare, train, measure, and write prompt, picture and figures to `output`.

    Args:
        model_name: as for `load_model`; a fetchable model is fetched.
        output: replaced only by another demo's files.
        tell: hears what happens, line by line.
        listener: hears the training's steps and epochs.
        dtype: as for `load_model`.
        frozen: as for `load_model`.

    Raises:
        InputError: `output` is a file, or holds what no demo made, or a format is unknown.
    """
    started = time.monotonic()
    check_frozen(frozen)
    distributed.from_main(lambda: _check_free(output))
    if model_name in SOURCES and not Path(model_name).exists():
        fetch(model_name)
    chosen = distributed.from_main(lambda: choose_dtype(model_name, dtype))
    tell(chosen.told(model_name, frozen))
    model, tokenizer = load_model(model_name, dtype=chosen.dtype, frozen=frozen)
    training, dev, test = facts()
    tell(f"{len(training)} facts to train on, {len(dev)} to choose with, {len(test)} to test")
    manual, manual_on_dev, manual_share = _best_manual(model, tokenizer, dev, test)
    tell(f"best manual template on dev: {manual!r}")
    prompt = Prompt(TEMPLATE, answer=ANSWER, encoder=ENCODER)
    tell(f"training {prompt.num_virtual_tokens} virtual tokens: {TEMPLATE}")
    result = train(
        model,
        tokenizer,
        prompt,
        training,
        dev,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        patience=0,  # the published figures are of all epochs
        listener=_with_duration(listener, tell),
    )
    share, _ = teacher_forced(model, tokenizer, prompt, test)
    majority = majority_answer(row[ANSWER] for row in training)
    majority_share = sum(row[ANSWER] == majority for row in test) / len(test)
    shown = test[:3]
    answers = predict(model, tokenizer, prompt, shown)
    neighbours, mean_norm = nearest_words(model, tokenizer, prompt)
    metrics = {
        "manual_p1": manual_share,
        "majority_p1": majority_share,
        "ptuned_p1": share,
        "test_examples": len(test),
        "seconds": round(time.monotonic() - started, 1),
        "manual_template": manual,
        "majority_answer": majority,
        "template": TEMPLATE,
        "dtype": chosen.dtype,
        "frozen": frozen,
        "history": result.history,
        "versions": versions(),
    }

    def save() -> None:
        files = prompt.files(output)
        files["curve.png"] = training_curve(
            result.history, TITLE, {"best manual template": manual_on_dev}
        )
        write_folder(output, {**files, _METRICS: pack_json(metrics)}, remove=peft_files.NAMES)

    distributed.from_main(save)
    return DemoResult(
        metrics,
        [
            ("best manual template", manual.replace("\n", "\\n"), manual_share),
            ("majority answer", majority, majority_share),
            ("P-tuned prompt", TEMPLATE, share),
        ],
        [(row[SUBJECT], answer, row[ANSWER]) for row, answer in zip(shown, answers, strict=True)],
        neighbours,
        mean_norm,
    )


def _check_free(output: Path) -> None:
    if holds_something(output) and not (output / _METRICS).is_file():
        raise InputError(
            f"--output {output} is not empty, and no demo has made what it holds; choose another "
            "folder"
        )
    check_writable(output)


def _with_duration(
    listener: Callable[[Progress], None], tell: Callable[[str], None]
) -> Callable[[Progress], None]:
    """A listener that says after the first steps how long the training takes here."""
    pace, told = Pace(), False

    def hear(heard: Progress) -> None:
        nonlocal told
        left = pace.left(heard)
        if left is not None and not told:
            told = True
            tell(f"the training takes about {in_words(left)} on this machine")
        listener(heard)

    return hear


def _best_manual(
    model: Any, tokenizer: Any, dev: list[Row], test: list[Row]
) -> tuple[str, float, float]:
    """The manual template that is best on dev, and its shares on dev and on test."""
    tasks = [Task(template, answer=ANSWER) for template in MANUAL_TEMPLATES]
    on_dev = [manual_score(model, tokenizer, task, dev) for task in tasks]
    best = tasks[on_dev.index(max(on_dev))]
    return best.parsed.text, max(on_dev), manual_score(model, tokenizer, best, test)
