"""`train`: from a model, a prompt and examples to a trained prompt."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .. import distributed
from ..backbone.base_model import BaseModel
from ..backbone.eight_bits import frozen_format
from ..backbone.modes import check_free
from ..data import Rows, as_rows
from ..data.setting_aside import set_aside
from ..errors import InputError
from ..prompts.prompt import Prompt
from ..prompts.task import majority_answer
from ..rendering.example import answer_column
from ..rendering.lesson import Lessons
from ..reporting import html_picture, html_table, percent, training_curve
from . import checkpoint, guidance
from .calibration import calibrate
from .checks import check_run
from .ensemble import best_members, dev_figures, trained
from .folds import FoldResult, choose, splits
from .grid import Variant, choices
from .learner import Learner
from .loop import Loop
from .members import answers_of, with_examples
from .progress import Progress, in_words, shown
from .refit import place_of, refit, settled_refit
from .settings import TrainSettings, with_options
from .word_noise import settled_noise


@dataclass(frozen=True)
class TrainResult:
    """What came of a training.

    Attributes:
        history: one record per epoch: ``epoch``, ``loss`` and, with dev examples, ``dev_accuracy``
            and ``dev_loss``.
        best: the record of the epoch whose vectors the prompt now has.
        shortened: training examples that were cut to the length limit.
        seconds: wall time of this call.
        members: one for each prompt of the population: ``name`` (its seed and grid values),
            ``best`` (its best record), ``epochs`` that it trained, and ``dropped``, the epoch in
            which it fell out, or None.
        winner: the number of the member that the prompt now is, or the first of an ensemble.
        ensemble: where several members answer together: their numbers (``members``), the best
            first, and with dev examples their ``dev_accuracy`` and ``dev_loss`` together.
        calibrated: where labels got a bias: ``method``, and with dev examples ``dev_accuracy`` and
            ``dev_loss`` with it.
        complete: False where ``max_minutes`` were over before the training was; with an output
            folder it can be resumed.
        refit: where what dev chose went on with all examples: how many ``examples``, for how many
            ``epochs``, and the last ``loss``; `history` and `best` are of before.
        folds: where folds chose: for each setting its ``name``, best ``epoch``, mean
            ``dev_accuracy`` and ``dev_loss``, and ``deviation``; the best first.
    """

    history: list[dict[str, float]]
    best: dict[str, float]
    shortened: int
    seconds: float
    members: list[dict[str, Any]]
    winner: int
    ensemble: dict[str, Any] = field(default_factory=dict)
    calibrated: dict[str, Any] = field(default_factory=dict)
    complete: bool = True
    refit: dict[str, Any] = field(default_factory=dict)
    folds: list[dict[str, Any]] = field(default_factory=list)

    def _repr_html_(self) -> str:
        """For notebooks: the epochs as a table, and the picture."""
        columns = [
            ("dev (%)", "dev_accuracy", percent),
            ("dev loss", "dev_loss", "{:.4f}".format),
        ]
        known = [c for c in columns if any(c[1] in record for record in self.history)]
        rows = [
            [
                f"{record['epoch']}{' (kept)' if record['epoch'] == self.best['epoch'] else ''}",
                f"{record['loss']:.4f}",
                *(write(record[name]) for _, name, write in known),
            ]
            for record in self.history
        ]
        title = f"Trained in {in_words(self.seconds)}"
        if self.ensemble:
            title += f"; {len(self.ensemble['members'])} of {len(self.members)} answer together"
        elif len(self.members) > 1:
            title += f"; the best of {len(self.members)} members"
        if self.refit:
            title += f"; then on with all {self.refit['examples']} examples"
        header = ["epoch", "loss", *(name for name, *_ in known)]
        return html_table(title, header, rows) + html_picture(self._repr_png_())

    def _repr_png_(self) -> bytes:
        return training_curve(self.history)


def train(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    rows: Rows,
    dev: Rows | float = (),
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
    with distributed.together():
        settings = with_options(settings or TrainSettings(), options)
        started = time.monotonic()
        rows = as_rows(rows)
        aside = False
        if isinstance(dev, int | float):
            rows, dev = set_aside(rows, answer_column(prompt, rows[0]), dev, settings.seed)
            aside = bool(dev)
        dev = as_rows(dev)
        check_run(prompt, rows, dev, settings, population, grid, answered=lessons is None)
        settings = settings.for_examples(len(rows))
        base = BaseModel.of(model, tokenizer)
        if prompt.base_model:
            base.check_same(prompt.base_model)
        draft = copy.copy(prompt)  # a training that fails leaves the prompt as it was
        draft.others, draft.label_bias = (), None
        if lessons is None:
            draft.answer = answer_column(prompt, rows[0])
        chosen = choices(draft, settings, population, grid)
        prompts, count = [one for _, one, _ in chosen], len(rows) + len(dev)
        noise = settled_noise(settings, prompts, lessons is not None)
        goes_on = lessons is None and settled_refit(settings, prompts, count, aside)
        chosen = [
            (name, one, replace(how, word_noise=noise, refit=goes_on)) for name, one, how in chosen
        ]
        check_free(model, settings.tune_model)
        quantized = getattr(model, "is_quantized", False) or frozen_format(model)
        if settings.tune_model and quantized:
            raise InputError("tune_model needs the base model's own weights; load it unquantized")
        if not dev and not settings.folds:
            _advise(guidance.without_dev(len(chosen), settings.patience), verbose)
        learnt = (None, None) if lessons is None else (lessons.training, lessons.dev)
        variants = with_examples(base, chosen, rows, dev, learnt)
        answers, dev_answers = answers_of(draft, rows, learnt[0]), answers_of(draft, dev, learnt[1])
        folds: FoldResult | None = None
        with ExitStack() as showing:
            if listener is None and verbose and distributed.state().is_main_process:
                listener = showing.enter_context(shown())
            place = None if output is None else Path(output)
            listener = listener or (lambda progress: None)
            showing.enter_context(distributed.locked(place and place / checkpoint.FOLDER))
            if settings.folds:
                parts = splits(rows, answers, settings.folds, settings.seed)
                render = partial(with_examples, base)
                folds = choose(base, chosen, parts, render, place, resume, listener)
                final = folds.chosen[: settings.ensemble]
                variants = with_examples(base, final, rows, ())
            if place is not None and not resume:
                distributed.from_main(lambda: checkpoint.delete_all(place_of(place)))
            until = folds.epochs if folds else None
            about = None if lessons is None else lessons.about
            loop = Loop(base, variants, place, listener, until, about)
            learners = loop.train(resume)
            kept = best_members(learners, settings.ensemble)
            together = _together(base, variants, learners, kept, settings)
            complete, refitted = not loop.stopped, dict[str, Any]()
            del loop  # and what it keeps on the device
            if goes_on and complete:
                best_ones = [(variants[n], learners[n]) for n in kept]
                left = _minutes_left(settings.max_minutes, started)
                refitted, complete = refit(base, best_ones, place, resume, listener, left)
        winner = kept[0]
        learner, variant = learners[winner], variants[winner]
        learner.put_best_into_model()
        prompt.become(variant.prompt)
        prompt.vectors = learner.best["vectors"]
        prompt.encoder_weights = learner.best["weights"]
        prompt.base_model = base.describe()
        best = learner.figures()
        majority = majority_answer(answers)
        prompt.training = {
            "examples": len(rows),
            "dev_examples": len(dev),
            "majority_answer": majority,
            "learning_rate": variant.settings.rate_for(prompt.encoder),
            "seed": variant.settings.seed,
            "population": len(variants),
            **best,
            **({"refit_examples": refitted["examples"]} if refitted else {}),
            **({} if lessons is None else {"teacher": lessons.about}),
        }
        if folds:
            best, dev_answers = {**best, **folds.best}, answers
            prompt.training |= {"folds": settings.folds, "dev_examples": len(rows), **folds.best}
        prompt.others = tuple(trained(variants[n], learners[n], base) for n in kept[1:])
        if together:
            prompt.training |= {**together, "members": len(kept)}
        calibrated: dict[str, Any] = {}
        if settings.calibrate != "none":
            size = 2 * settings.batch_size
            figures = calibrate(base, prompt, settings.calibrate, rows, dev, size)
            prompt.training |= {"calibrate": settings.calibrate, **figures}
            calibrated = {"method": settings.calibrate, **figures}
        if not variant.has_start:  # what begins as something good may stay as it is
            _advise(guidance.nothing_learnt(learner.history, best, dev_answers, majority), verbose)
        members = [
            {"name": v.name, "best": x.figures(), "epochs": len(x.history), "dropped": x.dropped}
            for v, x in zip(variants, learners, strict=True)
        ]
        seen = [*variant.examples, *(variant.dev if refitted else [])]
        shortened = sum(example.shortened for example in seen)
        seconds = time.monotonic() - started
        return TrainResult(
            history=learner.history,
            best=best,
            shortened=shortened,
            seconds=seconds,
            members=members,
            winner=winner,
            ensemble=together,
            calibrated=calibrated,
            complete=complete,
            refit=refitted,
            folds=folds.table if folds else [],
        )


def _together(
    base: BaseModel,
    variants: list[Variant],
    learners: list[Learner],
    kept: list[int],
    settings: TrainSettings,
) -> dict[str, Any]:
    """What `TrainResult` tells of members that answer together."""
    if len(kept) < 2:
        return {}
    figures: dict[str, Any] = {"members": kept}
    if variants[0].dev:
        prompts = [trained(variants[n], learners[n], base) for n in kept]
        of_members = [variants[n] for n in kept]
        figures |= dev_figures(base, of_members, prompts, 2 * settings.batch_size)
    return figures


def _minutes_left(given: float | None, started: float) -> float | None:
    """What is left of the time; one answer for all processes."""
    if given is None:
        return None
    return distributed.from_main(lambda: given - (time.monotonic() - started) / 60)


def _advise(text: str | None, verbose: bool) -> None:
    """Say what the user should know, once: in the main process."""
    if text and verbose and distributed.state().is_main_process:
        warnings.warn(text, stacklevel=3)
