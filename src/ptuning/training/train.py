"""`train`: from a model, a prompt and examples to a trained prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import distributed
from ..data import Rows, as_rows
from ..devices import on_cpu_by_default
from ..errors import warn
from ..places import named
from ..prompts.consistency import check_kind
from ..prompts.prompt import Prompt
from ..prompts.task import majority_answer
from ..rendering.lesson import Lessons
from . import checkpoint, guidance
from .calibration import calibrate
from .checks import check_helpers
from .clock import minutes_left
from .ensemble import best_members
from .folds import FoldResult, choose, splits
from .grid import columns_read
from .loop import Loop
from .members import with_examples
from .outcome import Outcome, become, figures_together
from .plan import Plan, planned
from .progress import Progress, shown
from .refit import place_of, refit
from .result import TrainResult
from .settings import TrainSettings, with_options


@on_cpu_by_default
def train(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    rows: Rows,
    dev: Rows | float | None = (),
    *,
    output: str | Path | None = None,
    resume: bool = False,
    settings: TrainSettings | None = None,
    population: int = 1,
    grid: Mapping[str, Sequence[Any]] | None = None,
    listener: Callable[[Progress], None] | None = None,
    verbose: bool = True,
    lessons: Lessons | None = None,
    **options: Any,
) -> TrainResult:
    """Train a prompt on a frozen model; afterwards the prompt has its vectors.

    With ``tune_model=True`` the model is trained too, and afterwards has the weights that belong to
    the prompt; save both.

    Processes that a launcher started (`distributed`) all call this with the same arguments, and all
    get the result of a training in one process.

    Args:
        model: a causal, masked or encoder-decoder language model; stays as it is, but for
            ``tune_model``.
        tokenizer: the model's.
        prompt: a trained one continues from its weights.
        rows: training examples: rows (column -> value), a dict of columns, a data frame, a data
            set (`as_rows`).
        dev: examples that choose the best epoch; without them it is the last. A number sets such a
            share of `rows` aside for it (`setting_aside.set_aside`, by the settings' seed).
        output: folder for checkpoints of the running training; only the main process uses it.
        resume: continue from the newest checkpoint in `output`, if there is one.
        settings: how to train; `options` change single fields of it.
        population: train so many seeds side by side in shared batches, and keep the best by dev
            (or the best few: the setting ``ensemble``).
        grid: values to train side by side too, such as ``{"encoder": ["mlp", "lstm"]}``; each
            combination with each seed is a member (`grid.KEYS` lists what may vary).
        listener: called after each step and epoch, in the main process; by default one that shows
            the training on stderr or in a notebook.
        verbose: False shows nothing, and gives no advice (such as that nothing was learnt).
        lessons: what a teacher says to the rows, which is learnt in place of their own answers
            (`inference.distillation`); they need none then.

    Raises:
        InputError: data, template, model or settings that do not fit together.
        TrainingError: the loss is no longer finite before there is a result; a result that there is
            stays, with a warning.

    Example:
        >>> result = train(model, tokenizer, prompt, rows, dev=dev_rows, epochs=5)
    """
    with distributed.together(), torch.inference_mode(False), torch.enable_grad():
        started = time.monotonic()
        settings = with_options(TrainSettings() if settings is None else settings, options)
        check_kind(prompt, Prompt)
        check_helpers(lessons, listener, output, resume)
        plan = planned(
            model,
            tokenizer,
            prompt,
            as_rows(rows),
            dev,
            settings,
            population=population,
            grid=grid,
            lessons=lessons,
        )
        for advice in plan.advice:
            _advise(advice, verbose)
        with ExitStack() as showing:
            if listener is None and verbose and distributed.state().is_main_process:
                listener = showing.enter_context(shown())
            listener = listener or (lambda progress: None)
            place = None if output is None else named(output).absolute()  # whatever chdir does
            showing.enter_context(distributed.locked(place and place / checkpoint.FOLDER))
            outcome = _outcome(plan, place, resume, listener, started)
        _advise(guidance.too_few(len(outcome.kept), plan.settings.ensemble), verbose)
        become(prompt, outcome, plan.base)
        calibrated = _described(prompt, plan)
        variant, learner = outcome.best_ones[0]
        folds = outcome.folds
        best = {**learner.figures(), **(folds.best if folds else {})}
        advice = None
        if not variant.has_start:  # what begins as something good may stay as it is
            advice = _nothing_learnt(plan, learner.history, best, outcome.complete)
        if advice is None and plan.dev and plan.about is None and folds is None:
            epochs = plan.settings.settled_epochs
            advice = guidance.still_learning(learner.history, best["epoch"], epochs)
        _advise(advice, verbose)
        return TrainResult(
            history=learner.history,
            best=best,
            shortened=outcome.shortened,
            seconds=time.monotonic() - started,
            members=outcome.members,
            winner=outcome.kept[0],
            ensemble=outcome.together,
            calibrated=calibrated,
            complete=outcome.complete,
            refit=outcome.refit,
            folds=folds.table if folds else [],
        )


def _outcome(
    plan: Plan,
    place: Path | None,
    resume: bool,
    listener: Callable[[Progress], None],
    started: float,
) -> Outcome:
    """Train what is planned: folds where they choose, then the members, then on with all rows."""
    base, settings, variants = plan.base, plan.settings, plan.variants
    if place is not None and not resume:  # what else a run before has left
        old = place if settings.folds else place_of(place)
        distributed.from_main(lambda: checkpoint.delete_all(old))
    elif place is not None:
        distributed.from_main(lambda: checkpoint.check_same_folds(place, settings.folds))
    folds: FoldResult | None = None
    if settings.folds:
        read = columns_read(plan.chosen)
        parts = splits(plan.rows, read, plan.answers, settings.folds, settings.seed)
        folds = choose(base, plan.chosen, parts, place, resume, listener)
        variants = with_examples(base, folds.chosen[: settings.ensemble], plan.rows, ())
    left = minutes_left(settings.max_minutes, started)
    variants = [replace(v, settings=replace(v.settings, max_minutes=left)) for v in variants]
    until = folds.epochs if folds else None
    outcome = _learn(Loop(base, variants, place, listener, until, plan.about), resume, folds)
    outcome.together = figures_together(base, outcome, 2 * settings.batch_size)
    if plan.goes_on and outcome.complete:
        left = minutes_left(settings.max_minutes, started)
        going = outcome.best_ones
        outcome.refit, outcome.complete = refit(base, going, place, resume, listener, left)
    return outcome


def _learn(loop: Loop, resume: bool, folds: FoldResult | None) -> Outcome:
    """Train; the loop, and what it keeps on the device, ends with it."""
    learners = loop.train(resume)
    kept = best_members(learners, loop.settings.ensemble)
    return Outcome(loop.variants, learners, kept, folds, complete=not loop.stopped)


def _described(prompt: Prompt, plan: Plan) -> dict[str, Any]:
    """The prompt says what it was trained on, and gets its label bias; what `TrainResult` tells of
    that."""
    settings, dev = plan.settings, plan.rows if plan.settings.folds else plan.dev
    prompt.training = {
        "examples": len(plan.rows),
        "dev_examples": len(dev),
        "majority_answer": majority_answer(plan.answers),
        **prompt.training,
        **({} if plan.about is None else {"teacher": plan.about}),
    }
    if settings.calibrate == "none":
        return {}
    size = 2 * settings.batch_size
    figures = calibrate(plan.base, prompt, settings.calibrate, plan.rows, plan.dev, size)
    prompt.training |= {"calibrate": settings.calibrate, **figures}
    return {"method": settings.calibrate, **figures}


def _nothing_learnt(
    plan: Plan, history: list[dict[str, float]], best: dict[str, Any], complete: bool
) -> str | None:
    """What to try where a training has learnt nothing."""
    asked = plan.answers if plan.settings.folds else plan.dev_answers
    right = "right" if plan.about is None else "as the teacher says"
    majority = majority_answer(plan.answers)
    return guidance.nothing_learnt(history, best, asked, majority, right, complete)


def _advise(text: str | None, verbose: bool) -> None:
    """Say what the user should know, once: in the main process."""
    if text and verbose and distributed.state().is_main_process:
        warn(text)
