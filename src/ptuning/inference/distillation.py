"""`distill`: what a long text, or an ensemble of prompts, makes a model say, put into a few virtual
tokens, without labels.

teacher    the frozen model behind the long text          once: its distributions (`teaching`)
student    the frozen model behind virtual tokens         `train` on them: KL(teacher || student)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .. import distributed
from ..backbone.base_model import BaseModel
from ..data import Row, Rows, as_rows, optional_rows
from ..data.rows import listed
from ..data.setting_aside import set_aside, usual_share
from ..data.values import is_number, plain
from ..devices import on_cpu_by_default
from ..errors import DataError, InputError, warn
from ..forward.engine import Engine
from ..places import named
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..prompts.teacher import Teacher
from ..rendering.example import check_rows
from ..rendering.lesson import Lessons
from ..rendering.short_words import settle_words
from ..training.checks import check_helpers, check_run, check_whole
from ..training.clock import minutes_left
from ..training.grid import choices, columns_read
from ..training.progress import Progress, shown
from ..training.result import TrainResult
from ..training.settings import TrainSettings, with_options
from ..training.train import train
from .agreement import Agreement, compare
from .attachment import all_placed
from .kept_answers import KeptAnswers
from .prediction import members_of
from .teaching import ask, calibrate, lessons, own_label, teacher_renderers


@dataclass(frozen=True)
class Distillation:
    """What came of `distill`.

    Attributes:
        training: of the prompt; its dev accuracy is the agreement with the teacher there.
        agreement: on the test texts, else on the dev texts (which chose the epoch, and so flatter).
    """

    training: TrainResult
    agreement: Agreement


@on_cpu_by_default
def distill(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    rows: Rows,
    dev: Rows | None = (),
    *,
    teacher: str | Prompt,
    test: Rows | None = (),
    label_weight: float = 0.0,
    calibrate_teacher: bool = False,
    output: str | Path | None = None,
    resume: bool = False,
    settings: TrainSettings | None = None,
    population: int = 1,
    grid: Mapping[str, Sequence[Any]] | None = None,
    listener: Callable[[Progress], None] | None = None,
    verbose: bool = True,
    **options: Any,
) -> Distillation:
    """Train a prompt to say what the same model says behind a long text, or behind trained virtual
    tokens: an ensemble of prompts becomes one.

    Args:
        model: a causal, masked or encoder-decoder language model; stays as it is.
        tokenizer: the model's.
        prompt: gets its vectors. For free answers its ``answer_tokens`` says how long they may be.
        rows: texts, as `train` takes rows; they need no answers.
        dev: texts that choose the best epoch; by default a fifth of `rows`.
        teacher: the text: with columns or ``[MASK]`` in it a template, else it stands in front of
            the prompt's own words (`prompts.teacher`). Or a trained prompt, alone or an ensemble,
            with the same labels in the same order.
        test: texts that neither train nor choose, to be compared on.
        label_weight: from 0 to 1 how much the rows' own labels count where they have some.
        calibrate_teacher: take back what the teacher prefers whatever the texts say. It is measured
            on `rows`, and takes the labels for equally frequent there (`calibration`: batch).
        output: as for `train`, like all that follow.
        resume: continue from the newest checkpoint in `output`. What the teacher has said is kept
            there too, and found with or without this.
        settings: how to train; `options` change single fields of it.
        population: seeds side by side.
        grid: values to train side by side.
        listener: called after each 64 texts that the teacher reads, then after each step and epoch.
        verbose: False shows nothing.

    Raises:
        InputError, DataError: as `train`; and a teacher that is empty, too long for the model, or
            names columns that the rows have not.

    Example:
        >>> distill(model, tokenizer, prompt, rows, teacher=Path("teacher.txt").read_text())
    """
    with distributed.together():
        started = time.monotonic()
        settings = with_options(settings or TrainSettings(), options)
        check_helpers(None, listener, output, resume)
        label_weight = plain(label_weight)  # numpy's, which no saved prompt takes
        base = BaseModel.of(model, tokenizer)
        settle_words(prompt, tokenizer, base.kind)
        long = teacher_of(teacher, prompt)
        rows = as_rows(rows)
        check_whole(prompt, rows, answered=False)
        read = columns_asked(prompt, long, settings, population, grid)
        training, choosing = with_dev(rows, optional_rows(dev), read, settings.seed)
        held_out = optional_rows(test) or choosing
        check_distillation(
            *(prompt, long, training, choosing, held_out, settings, population, grid, label_weight),
            calibrate_teacher=calibrate_teacher,
        )

        place = None if output is None else named(output).absolute()
        with ExitStack() as showing:
            if listener is None and verbose and distributed.state().is_main_process:
                listener = showing.enter_context(shown())
            hear = listener or (lambda progress: None)

            def asked() -> Lessons:
                engine = Engine(base)
                renderers = teacher_renderers(engine, long)
                kept = KeptAnswers(place, base, long, engine.ends(long)) if place else None
                texts = [*training, *choosing]
                heard = partial(_heard, hear, len(texts))
                with all_placed(model, tokenizer, [r.task for r in renderers]) as first_ids:
                    said = ask(engine, renderers, first_ids, texts, kept=kept, listener=heard)
                if calibrate_teacher:
                    said = calibrate(long, said, len(training))
                taught = lessons(base, prompt, texts, said, label_weight)
                one, other = taught[: len(training)], taught[len(training) :]
                return Lessons(about(long, label_weight), one, other)

            learnt = distributed.from_main(asked)
            training, choosing, learnt = _said(training, choosing, learnt)
            left = minutes_left(settings.max_minutes, started)  # the teacher has taken some
            result = train(
                model,
                tokenizer,
                prompt,
                training,
                choosing,
                lessons=learnt,
                output=output,
                resume=resume,
                settings=replace(settings, max_minutes=left),
                population=population,
                grid=grid,
                listener=listener,
                verbose=verbose,
            )
        # The main process alone has the teacher's bias, and times what it shares with nobody.
        found = distributed.from_main(lambda: compare(model, tokenizer, prompt, long, held_out))
        return Distillation(result, found)


def teacher_of(teacher: str | Prompt, student: Prompt) -> Task:
    """The task that teaches: a text in front of the student's question, or a trained prompt.

    Raises:
        InputError, TemplateError: a text that is none (`Teacher.of`), a prompt that is not trained,
            is the student itself, or answers otherwise.
    """
    if not isinstance(teacher, Prompt):
        return Teacher.of(teacher, student)
    teacher.trained_vectors()
    if teacher is student:
        raise InputError(
            "the prompt cannot teach itself; give another one to train (Prompt(…), or a copy that "
            "is loaded again)"
        )
    ours, theirs = list(student.labels), list(teacher.labels)
    if ours != theirs:
        raise InputError(
            f"the prompt's labels are {listed(map(repr, ours)) or 'none'}, and the teacher's "
            f"{listed(map(repr, theirs)) or 'none'}; give the prompt the teacher's verbalizer"
        )
    if teacher.ends_answer != student.ends_answer:
        raise InputError(
            f"answer_end is {student.answer_end} for the prompt and {teacher.answer_end} for its "
            "teacher; give the prompt the teacher's, since it learns what the teacher says"
        )
    return teacher


def about(teacher: Task, label_weight: float) -> dict[str, Any]:
    """What is kept of a teacher with the prompt that learnt from it."""
    members = [_about_member(member) for member in members_of(teacher)]
    told = members[0] if len(members) == 1 else {**members[0], "others": members[1:]}
    calibrated = teacher.label_bias is not None
    return {**told, "label_weight": label_weight, "calibrated": calibrated}


def _about_member(member: Task) -> dict[str, Any]:
    told: dict[str, Any] = {"template": member.parsed.text}
    if isinstance(member, Teacher) and member.system is not None:
        told["system"] = member.system
    if isinstance(member, Prompt):
        told["vectors"] = member.trained_vectors().double().sum().item()
        if member.label_matrix is not None:
            told["label_matrix"] = member.label_matrix.numbers.double().abs().sum().item()
    return told


def _heard(hear: Callable[[Progress], None], count: int, read: int) -> None:
    """Tell how many of so many texts the teacher has read."""
    hear(Progress(read, count, 0, math.nan, before="the teacher reads"))


def _said(
    training: list[Row], choosing: list[Row], learnt: Lessons
) -> tuple[list[Row], list[Row], Lessons]:
    """Texts and lessons without those in which the teacher says nothing: there is nothing to learn.

    Raises:
        DataError: it says nothing to any text that trains, or to any that chooses.
    """
    kept = []
    for rows, taught, what in (
        (training, learnt.training, "train"),
        (choosing, learnt.dev, "choose"),
    ):
        pairs = [(r, one) for r, one in zip(rows, taught, strict=True) if len(one.shares)]
        if not pairs:
            raise DataError(
                f"the teacher says nothing to any of the {len(rows)} texts that {what}: it ends "
                "at once. Give another teacher, or learn the end too (answer_end)"
            )
        kept.append(pairs)
    silent = len(training) + len(choosing) - sum(map(len, kept))
    if silent:
        warn(f"the teacher says nothing to {silent} texts, left out here")
    (training, first), (choosing, second) = (
        [*map(list, zip(*pairs, strict=True))] for pairs in kept
    )
    return training, choosing, replace(learnt, training=first, dev=second)


def with_dev(
    rows: Sequence[Row], dev: Sequence[Row], read: Iterable[str], seed: int
) -> tuple[list[Row], list[Row]]:
    """Texts that train and texts that choose; where there are none of these, some of the others.

    Args:
        rows: texts.
        dev: texts that choose, if there are any.
        read: the columns of what is asked; texts that say the same stay together (`set_aside`).
        seed: which of the others they are.

    Raises:
        DataError: there are too few.
    """
    if dev:
        return list(rows), list(dev)
    share = usual_share(len(rows))
    if not share:
        raise DataError(
            f"{len(rows)} texts, and none to choose the epoch by: give at least ten, or some more "
            "as dev texts (dev=, --dev)"
        )
    return set_aside(rows, read, None, share, seed)


def columns_asked(
    prompt: Prompt,
    teacher: Task,
    settings: TrainSettings,
    population: int = 1,
    grid: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[str, ...]:
    """The columns that the teacher or any member of the population reads.

    Raises:
        InputError: no template, or a population or grid that cannot be.
    """
    members = choices(prompt, settings, population, grid)
    return (*columns_read(members), *teacher.columns)


def check_distillation(
    prompt: Prompt,
    teacher: Task,
    rows: Sequence[Row],
    dev: Sequence[Row],
    held_out: Sequence[Row],
    settings: TrainSettings,
    population: int = 1,
    grid: Mapping[str, Sequence[Any]] | None = None,
    label_weight: float = 0.0,
    calibrate_teacher: bool = False,
) -> None:
    """Refuse what `distill` would refuse of its arguments but for the model.

    Args:
        prompt: to train.
        teacher: of it (`teacher_of`).
        rows: texts that train.
        dev: texts that choose.
        held_out: texts that both are compared on.
        settings: how to train.
        population: seeds.
        grid: values to train side by side.
        label_weight: of the rows' own labels.
        calibrate_teacher: it has labels then.

    Raises:
        InputError, DataError: data, teacher, prompt or settings that do not fit together.
    """
    if settings.tune_model:
        raise InputError("the teacher is the model as it is, so tune_model is not for distilling")
    if prompt.labels and prompt.label_mode != "labels":
        raise InputError(
            'distilling compares label words; leave label_mode="vocabulary" out, or the labels'
        )
    if not is_number(label_weight) or not 0 <= label_weight <= 1:
        raise InputError(f"label_weight is {label_weight!r}; give a share, 0 to 1")
    if calibrate_teacher and isinstance(teacher, Prompt):
        raise InputError(
            "calibrate_teacher is for a text; a trained prompt has a label bias of its own, or is "
            "trained with one (calibrate)"
        )
    if calibrate_teacher and not prompt.labels:
        raise InputError("calibrate_teacher is for labels, and this prompt has none (verbalizer)")
    if label_weight and not prompt.labels:
        raise InputError("label_weight mixes labels in, and this prompt has none (verbalizer)")
    if not prompt.labels and prompt.answer_tokens is None:
        raise InputError(
            "how long may the teacher's answers be? Give answer_tokens (--answer-tokens N), or "
            "labels"
        )
    check_run(prompt, rows, dev, settings, population, grid, answered=False)
    for unknown in [name for name in teacher.columns if name not in rows[0]]:
        raise DataError(
            f"the teacher names the column {unknown!r}, and the texts have "
            f"{listed(map(repr, rows[0])) or 'none'}; name one of these, or write {{{{ and }}}} "
            "where braces are text"
        )
    for some, what in ((rows, "training"), (dev, "dev"), (held_out, "test")):
        check_rows(teacher, some, what, answered=False)
    check_rows(prompt, held_out, "test", answered=False)
    if held_out is not dev:  # somebody's own choice of texts to measure on
        for number, row in enumerate(held_out, 1):
            own_label(prompt, row, number)
    if label_weight:
        both = [
            [own_label(prompt, row, n) for n, row in enumerate(some, 1)] for some in (rows, dev)
        ]
        if not any(both[0]):
            raise DataError("label_weight mixes labels in, and no text has one")
