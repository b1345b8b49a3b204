"""`train`: from a model, a prompt and examples to a trained prompt."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .base_model import check_same, context_length, describe, task_kind
from .errors import DataError, InputError
from .loop import Loop, Progress
from .prompt import Prompt
from .render import Example, Rendered, Renderer, answer_column, render_all
from .settings import TrainSettings


@dataclass(frozen=True)
class TrainResult:
    """What came of a training.

    Attributes:
        history: one record per epoch: ``epoch``, ``loss`` and, with dev examples, ``dev_accuracy``
            and ``dev_loss``.
        best: the record of the epoch whose vectors the prompt now has.
        shortened: training examples that were cut to the length limit.
        seconds: wall time of this call.
    """

    history: list[dict[str, float]]
    best: dict[str, float]
    shortened: int
    seconds: float


def train(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    rows: Iterable[Example],
    dev: Iterable[Example] = (),
    *,
    output: str | Path | None = None,
    resume: bool = False,
    settings: TrainSettings | None = None,
    listener: Callable[[Progress], None] | None = None,
    **options: Any,
) -> TrainResult:
    """Train a prompt on a frozen model; afterwards the prompt has its vectors.

    Args:
        model: a causal, masked or encoder-decoder language model; stays as it is.
        tokenizer: the model's.
        prompt: a trained one continues from its weights.
        rows: training examples, column -> value.
        dev: examples that choose the best epoch; without them it is the last.
        output: folder for checkpoints of the running training.
        resume: continue from the newest checkpoint in `output`, if there is one.
        settings: how to train; `options` change single fields of it.
        listener: called after each step and epoch.

    Raises:
        InputError: data, template, model or settings that do not fit together.
        TrainingError: the loss is no longer finite.

    Example:
        >>> result = train(model, tokenizer, prompt, rows, dev=dev_rows, epochs=5)
    """
    settings = _with_options(settings or TrainSettings(), options)
    started = time.monotonic()
    rows, dev = list(rows), list(dev)
    if not rows:
        raise DataError("there is no training example; give at least one")
    if prompt.base_model:
        check_same(prompt.base_model, model, tokenizer)
    prompt.answer = answer_column(prompt, rows[0])
    renderer = Renderer(tokenizer, prompt, task_kind(model), context_length(model, tokenizer))
    examples = render_all(renderer, rows, "training")
    learn_answer_length(prompt, renderer, examples)
    loop = Loop(
        model=model,
        tokenizer=tokenizer,
        prompt=prompt,
        renderer=renderer,
        examples=examples,
        dev=render_all(renderer, dev, "dev"),
        settings=settings,
        output=Path(output) if output is not None else None,
        listener=listener or (lambda progress: None),
    )
    learner = loop.train(resume)
    prompt.vectors = learner.best["vectors"]
    prompt.encoder_weights = learner.best["weights"]
    prompt.base_model = describe(model, tokenizer)
    best = {k: v for k, v in learner.best.items() if k not in ("weights", "vectors")}
    majority = Counter(str(row[prompt.answer]) for row in rows).most_common(1)[0][0]
    prompt.training = {
        "examples": len(rows),
        "dev_examples": len(dev),
        "majority_answer": majority,
        "learning_rate": settings.rate_for(prompt.encoder),
        "seed": settings.seed,
        **best,
    }
    shortened = sum(example.shortened for example in examples)
    return TrainResult(learner.history, best, shortened, time.monotonic() - started)


def _with_options(settings: TrainSettings, options: dict[str, Any]) -> TrainSettings:
    try:
        return replace(settings, **options)
    except TypeError:
        unknown = sorted(set(options) - set(asdict(settings)))
        raise InputError(
            f"unknown training setting {unknown[0]!r}; there are {', '.join(asdict(settings))}"
        ) from None


def learn_answer_length(prompt: Prompt, renderer: Renderer, examples: list[Rendered]) -> None:
    """How long free answers may be at inference: the longest seen; for masks, the commonest.

    Raises:
        DataError: an answer is longer than the ``answer_tokens`` that the user gave.
    """
    if prompt.labels:
        return
    lengths = [len(example.sequences[0].answer) for example in examples]
    given = prompt.answer_tokens
    if given is not None and prompt.vectors is None and max(lengths) > given:
        number = next(n for n, length in enumerate(lengths, 1) if length > given)
        ending = ", its end included" if renderer.kind == "causal" and prompt.ends_answer else ""
        raise DataError(
            f"training example {number}: the answer has {lengths[number - 1]} tokens{ending}, and "
            f"answer_tokens is {given}; raise answer_tokens, or leave it out"
        )
    if renderer.kind == "masked":
        prompt.answer_tokens = given or Counter(lengths).most_common(1)[0][0]
    else:
        prompt.answer_tokens = max([*lengths, given or 0])
