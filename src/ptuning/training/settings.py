"""`TrainSettings`: all that a training can be told, with defaults that work."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..data.values import is_number, plain
from ..errors import InputError
from ..prompts.task import at_least_one

AT_WORDS = ("none", "residual", "mixture")
"""Encoders that begin at random words of the vocabulary by themselves."""

_ONE_OF = {
    "schedule": ("linear", "cosine", "constant"),
    "choose_by": ("accuracy", "loss"),
    "init": ("encoder", "words", "labels", "examples"),
    "calibrate": ("none", "context", "batch", "dev"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "graphs": ("auto", "off"),
    "compile": ("auto", "on", "off"),
}
_COUNTS = ("epochs", "batch_size", "gradient_accumulation", "ensemble")
_NONE_OR = {"folds": (2, "for none"), "patience": (1, "to never stop")}
"""Counts from so many on, and what 0 means."""
_ABOVE_0 = ("learning_rate", "max_grad_norm", "model_learning_rate", "max_minutes")
_FROM_0 = ("weight_decay", "checkpoint_seconds", "word_noise")
CHANGE_NO_RESULT = (
    *("tracker", "checkpoint_seconds", "max_minutes", "prefix_cache", "graphs", "compile"),
)
"""Settings that a run may be resumed with others of."""
LATER = {
    **{"ensemble": 1, "calibrate": "none", "folds": 0, "init": None, "label_bias": None},
    **{"word_noise": 0.0, "label_matrix": False},
}
"""Settings that older releases do not have: at its default one is no part of a run's identity."""
_EPOCHS, _STEPS, _MOST_EPOCHS = 10, 200, 50
"""Where the user says nothing. With 32 examples ten epochs are 40 steps, which are too few by far
(`benchmarks/README.md`)."""
_PATIENCE, _PATIENT_STEPS = 4, 100
"""Epochs without a gain that a training takes where the user says nothing, or what is as many
steps of few examples.

Of ten epochs (SmolLM2, float32, seed 0) the demo gains until the 7th, LAMA's P36 until the 3rd:
with 4 both keep their result, and P36 stops after the 7th.
"""
_REFIT = 0.4
"""Epochs of a refit, as a share of the training's."""
_MOST_SEED = 10**12
"""Orders of examples are drawn with a multiple of it, in 64 bits."""
_MOST_NUMBER = 1e30
"""Beyond all use; the vectors' float32 ends at 3e38."""
_SIZE = r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(?:i?B)?\s*"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Each field is an option of ``ptuning train``, and its text here the help there.

    Args:
        epochs: passes over the training examples; by default 10, or of few examples as many as 200
            steps take, 50 at most.
        learning_rate: AdamW's; by default 1e-3 for mlp, 2e-3 for lstm and residual, 1e-2 for
            mixture and for none. The default falls in inverse proportion to a network's inputs
            where they are more than 576, and for none it is in units of the size of the model's
            word vectors (SmolLM2's are 1).
        batch_size: examples per micro-batch.
        gradient_accumulation: micro-batches per optimizer step.
        seed: of initialisation, order and dropout; the first one of a population.
        weight_decay: AdamW's, on the encoder and, where they are trained, the model's weights.
        max_grad_norm: a prompt's gradient is clipped to this norm, together with that of the
            model's weights where they are trained.
        schedule: ``linear`` or ``cosine`` decay to zero, or ``constant``.
        warmup: fraction of all steps in which the rate rises from zero.
        choose_by: which dev result is better: ``accuracy`` (of equals the lower loss) or ``loss``,
            which swings less where dev examples are few.
        patience: stop after so many epochs without a better dev result; 0 never stops. By default
            4, or of few examples as many as 100 steps take; where all dev answers are right 4, and
            a lower loss no longer counts as better. While noise on words grows none are counted.
        max_minutes: stop after so many minutes, reading the examples and dev included; the best
            result until then is the prompt, and the run can be resumed.
        shuffle: a new order of the examples in each epoch.
        mixed_precision: ``no``, ``bf16`` or ``fp16``: accelerate's autocast for the base model.
        tracker: a tracker of accelerate, such as ``tensorboard`` or ``wandb``.
        checkpoint_seconds: time between two checkpoints of a run that has an output folder; there
            is one after each epoch too.
        halving: drop members of a population that fall behind on dev, half of them at each rung.
        ensemble: the so many best members of a population answer together (mean of their
            log-probabilities), at the price of as many forwards.
        calibrate: a bias for each label that takes back what the model prefers whatever the input
            says: ``context`` measures it on inputs without content, ``batch`` on the dev texts (or
            the training's) without their answers, ``dev`` learns it on dev; ``none``.
        folds: so many splits of the training examples take the place of a dev set: settings and
            epoch are chosen by their mean, and the prompt then trains on all examples. For few
            examples; costs as many trainings more.
        refit: when dev has chosen, go on from the best epoch with training and dev examples
            together, for two fifths of the epochs at half the rate; the dev figures are those of
            before. By default where labels are asked for and dev examples were set aside of 500 at
            most (``--dev-share``), but not with ``calibrate`` or ``tune_model``.
        init: where virtual tokens begin that the template gives no words: ``words`` (at random
            words of the vocabulary, by default), ``encoder`` (as an MLP or LSTM makes them, which
            is the paper's and PEFT's way, and learns late with some seeds), ``labels`` (at the
            label words), or ``examples`` (at the ends of some training examples, which are left out
            of their own rows).
        word_noise: normal noise on the words' vectors in training, as a share of their size, so
            that a prompt holds for words nearby, too; it grows from 15 to 40 % of the steps, and
            no prefix is kept meanwhile. By default 0.5 for labels behind templates that begin with
            virtual tokens, as a made one does; else 0, so with a teacher, and where the model is
            trained.
        label_matrix: train, with the virtual tokens, a matrix by which each label word's score
            gets some of the others', for labels that their words alone tell apart badly; half of
            the loss stays that without it. By default from 12 labels on, but not with a teacher,
            and for a prompt that has one.
        prefix_cache: keep the keys and values of text before the first virtual token: ``auto``
            (part of the free memory), ``off`` (every row is computed as a whole), or bytes such as
            ``2G``. Changes no result.
        tune_model: train the base model's weights together with the prompt (the paper's other
            setting); its dropout stays off. For one prompt alone.
        model_learning_rate: of the base model's weights, where they are trained.
        graphs: ``auto`` replays steps of repeated shapes as CUDA graphs on a GPU, ``off`` never
            does. Changes no result.
        compile: run the frozen model's layers compiled: ``auto`` where the steps to come gain more
            than the compilation takes (often on a GPU, on a CPU in trainings of many minutes, if
            ``max_minutes`` allows as many),
            ``on``, or ``off``. Changes results by rounding.

    Raises:
        InputError: a value that cannot be trained with.
    """

    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    seed: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.05
    choose_by: str = "accuracy"
    patience: int | None = None
    max_minutes: float | None = None
    shuffle: bool = True
    mixed_precision: str = "no"
    tracker: str | None = None
    checkpoint_seconds: float = 10.0
    halving: bool = True
    ensemble: int = 1
    calibrate: str = "none"
    folds: int = 0
    refit: bool | None = None
    init: str | None = None
    word_noise: float | None = None
    label_matrix: bool | None = None
    prefix_cache: str = "auto"
    tune_model: bool = False
    model_learning_rate: float = 1e-5
    graphs: str = "auto"
    compile: str = "auto"

    def __post_init__(self) -> None:
        for setting in fields(self):  # numpy's numbers, which no run file takes
            value = plain(getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)
            if value is not None:
                _check(setting.name, value, setting.default)
            elif setting.default is not None:
                raise InputError(f"{setting.name} is None; give a value, or leave it out")
        if self.prefix_cache not in ("auto", "off"):
            parse_size(self.prefix_cache)

    @property
    def prefix_bytes(self) -> int | None:
        """``prefix_cache`` in bytes; None for ``auto``, 0 for ``off``."""
        if self.prefix_cache == "auto":
            return None
        return 0 if self.prefix_cache == "off" else parse_size(self.prefix_cache)

    def for_examples(self, count: int) -> TrainSettings:
        """The settings with the epochs that so many examples are trained for."""
        if self.epochs is not None:
            return self
        enough = math.ceil(_STEPS / self.steps_per_epoch(count))
        return replace(self, epochs=min(max(_EPOCHS, enough), _MOST_EPOCHS))

    @property
    def settled_epochs(self) -> int:
        """The epochs, once the number of examples is known (`for_examples`)."""
        assert self.epochs is not None
        return self.epochs

    @property
    def refit_epochs(self) -> int:
        """Epochs of a refit."""
        return max(1, round(_REFIT * self.settled_epochs))

    def steps_per_epoch(self, count: int) -> int:
        """Optimizer steps that so many examples take."""
        return math.ceil(count / (self.batch_size * self.gradient_accumulation))

    def patience_for(self, steps_per_epoch: int, solved: bool) -> int:
        """Epochs without a gain that are waited for; 0 for any number.

        Args:
            steps_per_epoch: optimizer steps.
            solved: all dev answers are right.
        """
        if self.patience is not None:
            return self.patience
        few = 0 if solved else math.ceil(_PATIENT_STEPS / steps_per_epoch)
        return max(_PATIENCE, few)

    def start_for(self, encoder: str) -> str:
        """A value of ``init`` for an encoder type."""
        return self.init or ("encoder" if encoder in AT_WORDS else "words")


def with_options(settings: TrainSettings, options: dict[str, Any]) -> TrainSettings:
    """The settings with some fields changed.

    Raises:
        InputError: there is no such field, or what came are no settings.
    """
    if not isinstance(settings, TrainSettings):
        raise InputError(
            f"settings is {settings!r}; expected TrainSettings(...), or single settings by name"
        )
    unknown = sorted(set(options) - set(asdict(settings)))
    if unknown:
        raise InputError(
            f"unknown training setting {unknown[0]!r}; there are {', '.join(asdict(settings))}"
        )
    return replace(settings, **options)


def _check(name: str, value: Any, default: Any) -> None:
    """Refuse what a setting cannot be."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(default, bool) or name in ("refit", "label_matrix"):
        fits, wanted = isinstance(value, bool), "expected True or False"
    elif name in _ONE_OF:
        fits, wanted = value in _ONE_OF[name], f"expected one of {', '.join(_ONE_OF[name])}"
    elif name in _ABOVE_0:
        fits, wanted = _is_of_use(value) and value > 0, "give a number above 0"
    elif name in _FROM_0:
        fits, wanted = _is_of_use(value) and value >= 0, "give a number from 0 on"
    elif name == "warmup":
        fits = _is_of_use(value) and 0 <= value < 1
        wanted = "give a fraction of all steps, from 0 to below 1"
    elif name == "seed":
        fits = whole and abs(value) <= _MOST_SEED
        wanted = f"give a whole number, at most {_MOST_SEED:,}"
    elif name in _NONE_OR:
        least, zero = _NONE_OR[name]
        fits = whole and (value == 0 or value >= least)
        wanted = f"give at least {least}, or 0 {zero}"
    else:
        fits, wanted = True, ""
    if not fits:
        raise InputError(f"{name} is {value!r}; {wanted}")
    if name in _COUNTS or (name in _NONE_OR and value):
        at_least_one(name, value)


def _is_of_use(value: object) -> bool:
    return is_number(value) and abs(value) <= _MOST_NUMBER


def parse_size(text: str) -> int:
    """``500M`` or ``2G`` in bytes.

    Raises:
        InputError: no number with K, M, G or T behind it.
    """
    match = re.fullmatch(_SIZE, str(text), re.IGNORECASE)
    if match is None:
        raise InputError(f"prefix_cache is {text!r}; give auto, off, or bytes such as 500M or 2G")
    return int(float(match[1]) * _UNITS[match[2].upper()])
