"""A bias for each label that takes back what a model prefers whatever the input says.

    context   b = -log mean of p over inputs without content ("N/A", "[MASK]", ""): Zhao et al.
              2021 (arXiv 2102.09690), section 4, W = diag(p_cf)^-1
    batch     b = -log mean of p over unlabelled inputs: Zhou et al. 2023 (arXiv 2309.17249),
              section 3, the contextual prior; takes the labels for equally frequent
    dev       b = argmin of the labels' summed loss on dev + |b|^2 / 2: learned, with a standard
              normal prior, since dev is small

The labels' log-probabilities get ``b`` added before they are compared (`Task.label_bias`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone.base_model import BaseModel
from ..backbone.injection import Injector
from ..backbone.modes import eval_mode
from ..backbone.tokens import first_free_id
from ..errors import InputError
from ..forward.engine import Engine
from ..forward.label_scores import Words, losses_of_labels
from ..forward.scoring import label_log_probabilities
from ..forward.together import biased
from ..prompts.prompt import Prompt
from ..prompts.task import Task, named_fields
from ..rendering.example import Example
from ..threads import CHANGING

CONTENT_FREE = ("N/A", "[MASK]", "")


def check_calibration(task: Task, method: str, has_dev: bool, folds: int) -> None:
    """Refuse a calibration that has nothing to measure.

    Raises:
        InputError: no labels, words that change from row to row, or no dev examples.
    """
    if method == "none":
        return
    if not task.labels:
        raise InputError(
            f"calibrate is {method}, and there are no labels to compare; give a verbalizer "
            "(--labels), or leave calibrate out"
        )
    words = [word for words in task.labels.values() for word in words]
    if method == "context" and any(map(named_fields, words)):
        raise InputError(
            "calibrate is context, and the label words name columns, which an input without "
            "content does not have; take batch or dev"
        )
    if method == "dev" and folds:
        raise InputError(
            "calibrate is dev, and folds leave no dev examples for it; take batch or context, or "
            "leave folds out"
        )
    if method == "dev" and not has_dev:
        raise InputError(
            "calibrate is dev, and there are no dev examples; give some (dev=, --dev, --dev-share)"
        )


def without_content(columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows that say nothing."""
    return [dict.fromkeys(columns, text) for text in CONTENT_FREE]


def bias_against(log_probabilities: Tensor) -> Tensor:
    """The bias ``(labels,)`` that takes back the mean of probabilities ``(N, labels)``."""
    return math.log(len(log_probabilities)) - log_probabilities.double().logsumexp(0)


def fitted_bias(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """The bias ``(labels,)`` with the least loss, and a small one where examples are few.

    Args:
        log_probabilities: ``(N, labels)``.
        labels: ``(N,)`` the right ones.
    """
    known = log_probabilities.double()
    bias = torch.zeros(known.shape[1], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(known + bias, labels, reduction="sum") + bias.square().sum() / 2
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return bias.detach()


def calibrate(
    base: BaseModel,
    prompt: Prompt,
    method: str,
    rows: Sequence[Example],
    dev: Sequence[Example],
    batch_size: int,
) -> dict[str, float]:
    """Give a trained prompt its label bias.

    Args:
        base: the frozen model.
        prompt: of an ensemble the bias is that of all members together.
        method: ``context``, ``batch`` or ``dev``.
        rows: training examples: ``batch`` reads their texts where there is no dev.
        dev: with answers.
        batch_size: rows of a forward.

    Returns:
        ``dev_accuracy`` and ``dev_loss`` with the bias, where there are dev examples.
    """
    prompt.label_bias = None
    engine = Engine(base)
    renderers = [engine.renderer(member).asking() for member in prompt.members]
    with attached(base, prompt.members) as first_ids:

        def asked(rows: Sequence[Example], answered: bool) -> tuple[Tensor, list[int | None]]:
            examples = [r.each(rows, "calibration", answered=answered) for r in renderers]
            found = label_log_probabilities(engine, renderers, examples, first_ids, batch_size)
            return found, [example.label for example in examples[0]]

        on_dev: Any = asked(dev, True) if dev else None
        if method == "context":
            bias = bias_against(asked(without_content(prompt.columns), False)[0])
        elif method == "batch":
            bias = bias_against(on_dev[0] if dev else asked(rows, False)[0])
        else:
            bias = fitted_bias(on_dev[0], torch.tensor(on_dev[1]))
    prompt.label_bias = dict(zip(prompt.labels, bias.tolist(), strict=True))
    if not dev:
        return {}
    found, labels = biased(on_dev[0], bias.tolist()), torch.tensor(on_dev[1])
    losses, right = losses_of_labels(found, labels, Words.of(range(found.shape[1])))
    return {"dev_accuracy": float(right.double().mean()), "dev_loss": float(losses.mean())}


@contextmanager
def attached(base: BaseModel, members: Sequence[Prompt]) -> Iterator[list[int]]:
    """The model in eval mode with trained prompts on it; gives their first ids."""
    with ExitStack() as stack:
        stack.enter_context(eval_mode(base.model))
        first_ids = []
        for member in members:
            with CHANGING:
                injector = Injector.on(base.model)
                span = injector.add(member.trained_vectors(), first_free_id(base.tokenizer))
            stack.callback(injector.remove, span)
            first_ids.append(span.first)
        yield first_ids
