"""Metrics of a prompt on labelled rows, beside a manual template and the majority answer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..backbone.base_model import BaseModel
from ..data import Rows, as_rows
from ..devices import on_cpu_by_default
from ..errors import DataError, InputError, counted, excerpt, warn
from ..forward.engine import Engine
from ..forward.scoring import label_log_probabilities, score, score_together
from ..forward.together import biased
from ..prompts.consistency import check_kind
from ..prompts.prompt import Prompt
from ..prompts.task import Task, at_least_one, majority_answer
from ..rendering.example import Example, answer_column, check_rows
from ..rendering.render import Renderer, render_all
from ..reporting import html_picture, html_table, percent, shares
from ..training.calibration import bias_against, without_content
from ..training.guidance import dev_far_above
from ..training.members import answers_of
from .answering import Prediction, read_back
from .attachment import all_placed
from .baselines import automatic_templates
from .prediction import as_candidates, members_of, predict_details

_CHOOSING = 200
"""Rows on which the manual template is chosen."""
WIDEST = 40
"""Labels of a confusion matrix that a page shows whole."""
_SHOWN = 20
"""Labels that are told of where there are more."""


@dataclass(frozen=True)
class Evaluation:
    """How a prompt did; all shares are fractions.

    Attributes:
        examples: number of rows.
        accuracy: share answered right: the label, or the whole text of a free answer.
        loss: mean negative log-likelihood per answer token (per example for labels).
        macro_f1: mean F1 over the labels; None for free answers.
        manual_template: the template without virtual tokens that `manual_accuracy` is for. Free
            answers count as right there where greedy decoding begins with the whole answer, since a
            hand-written template never learned where to stop.
        manual_calibrated: the same template with a label bias like the prompt's (``batch`` on these
            rows where the prompt's was learned on dev); None where the prompt has none.
        majority_answer: the most frequent answer of the training (of these rows, if unknown).
        labels: order of rows and columns in `confusion`.
        confusion: right label (row) against predicted label (column); empty for free answers.
        predictions: one per row.
        right_answers: one per row, as they are compared: free answers as the tokenizer reads them
            back, which may put a space into a number or drop capitals.
    """

    examples: int
    accuracy: float
    loss: float
    macro_f1: float | None
    manual_template: str
    manual_accuracy: float
    majority_answer: str
    majority_accuracy: float
    labels: list[str]
    confusion: list[list[int]]
    predictions: list[Prediction]
    right_answers: list[str]
    manual_calibrated: float | None = None

    def confident_mistakes(self, count: int = 5) -> list[int]:
        """The numbers of rows (from 0) that are answered wrong, the most confident first."""
        wrong = [
            number
            for number, right in enumerate(self.right_answers)
            if self.predictions[number].answer != right
        ]
        return sorted(wrong, key=lambda n: -self.predictions[n].probability)[:count]

    def most_mistaken(self, count: int = _SHOWN) -> list[int]:
        """The numbers of the labels with the most rows that are answered wrong, in that order."""
        wrong = [sum(counts) - counts[own] for own, counts in enumerate(self.confusion)]
        return sorted(range(len(wrong)), key=lambda own: -wrong[own])[:count]

    def confused(self, own: int) -> list[str]:
        """Of a label, by its number: its name, how many rows have it, how many of them are
        answered right, and what the others are most often taken for."""
        counts = self.confusion[own]
        others = [0 if number == own else count for number, count in enumerate(counts)]
        most = max(others)
        taken_for = f"{self.labels[others.index(most)]} ({most})" if most else ""
        return [self.labels[own], str(sum(counts)), str(counts[own]), taken_for]

    def compared(self) -> list[tuple[str, float]]:
        """Name and share right: of the prompt and of what it is compared with."""
        found = [
            ("P-tuned prompt", self.accuracy),
            (f"manual: {self.manual_template}", self.manual_accuracy),
        ]
        if self.manual_calibrated is not None:
            found.append(("the same, calibrated", self.manual_calibrated))
        majority = excerpt(" ".join(self.majority_answer.split()), most=60)
        return [*found, (f"majority: {majority}", self.majority_accuracy)]

    def rows(self) -> list[list[str]]:
        """The same in percent, as the rows of a table."""
        return [[name, percent(share)] for name, share in self.compared()]

    def _repr_html_(self) -> str:
        """For notebooks: the prompt beside the baselines, the confusion matrix, and a picture."""
        page = html_table(counted(self.examples, "example"), ["", "right (%)"], self.rows())
        if len(self.confusion) > WIDEST:
            shown = [self.confused(own) for own in self.most_mistaken()]
            page += html_table(most_mistaken_of(len(self.labels)), CONFUSED, shown)
        elif self.confusion:
            header = ["right label / predicted", *self.labels]
            counts = [
                [label, *map(str, row)]
                for label, row in zip(self.labels, self.confusion, strict=True)
            ]
            page += html_table("Confusion", header, counts)
        return page + html_picture(self._repr_png_())

    def _repr_png_(self) -> bytes:
        bars: dict[str, list[float | None]] = {
            "P-tuned": [self.accuracy],
            "manual": [self.manual_accuracy],
            "majority": [self.majority_accuracy],
        }
        return shares([counted(self.examples, "example")], bars, "right (%)")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


CONFUSED = ["", "rows", "right", "most often taken for"]
"""The header of `Evaluation.confused`."""


def most_mistaken_of(labels: int) -> str:
    """The title of a table of `Evaluation.most_mistaken`, of so many labels."""
    return f"Confusion: {min(_SHOWN, labels)} of {labels} labels, the most mistakes first"


def check_candidates(prompt: Prompt, candidates: Sequence[str] | None) -> None:
    """Refuse to measure labels among other answers.

    Raises:
        InputError: there are candidates, and the prompt has labels.
    """
    if candidates and prompt.labels:
        raise InputError(
            "candidates are for free answers, and this prompt compares its labels; leave them out"
        )


@on_cpu_by_default
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    rows: Rows,
    *,
    manual: str | None = None,
    candidates: Sequence[str] | None = None,
    answer_tokens: int | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Measure a trained prompt on rows with answers.

    Args:
        model: the frozen base model.
        tokenizer: the model's.
        prompt: trained.
        rows: examples with the answer column, as `train` takes them.
        manual: hand-written template to compare with; by default the best on these rows (on the
            first 200 of them) of the prompt's own words and a few plain forms
            (`baselines.automatic_templates`): more than a template of one's own would get.
        candidates: choose free answers among these.
        answer_tokens: longest free answer in tokens.
        batch_size: rows per forward; by default 32, and on a GPU more of short ones.

    Raises:
        InputError, DataError: prompt, model or rows do not fit together.
    Warns:
        UserWarning: the accuracy is far below what dev had promised.
    """
    at_least_one("batch_size", batch_size)
    check_kind(prompt, Prompt)
    prompt, candidates = prompt.checked(), as_candidates(candidates)
    check_candidates(prompt, candidates)
    rows = as_rows(rows)
    if not rows:
        raise DataError("there is no example to evaluate on; give at least one")
    check_rows(prompt, rows, "evaluation")
    predictions = predict_details(
        model,
        tokenizer,
        prompt,
        rows,
        candidates=candidates,
        answer_tokens=answer_tokens,
        batch_size=batch_size,
    )
    asked = partial(_by_hand, model, tokenizer, candidates=candidates, batch_size=batch_size)
    if manual:
        by_hand = prompt.manual(manual)
        manual_accuracy = asked(by_hand, rows)
    else:
        masked = BaseModel.of(model, tokenizer).kind == "masked"
        by_hand, manual_accuracy = _best_manual(asked, prompt, masked, rows)
    named = answers_of(prompt, rows)
    compares = bool(prompt.labels or candidates)
    gold = named if compares else [read_back(tokenizer, text) for text in named]
    said = [prediction.answer for prediction in predictions]
    labels = list(prompt.labels)
    confusion: list[list[int]] = []
    macro_f1 = None
    if labels and prompt.label_mode == "labels":
        found = (p.probabilities[right] for p, right in zip(predictions, gold, strict=True))
        loss = fmean(-math.log(max(share, sys.float_info.min)) for share in found)
    else:
        _, loss = teacher_forced(model, tokenizer, prompt, rows, batch_size)
    if labels:
        from sklearn.metrics import confusion_matrix, f1_score

        confusion = confusion_matrix(gold, said, labels=labels).tolist()
        macro_f1 = float(f1_score(gold, said, labels=labels, average="macro", zero_division=0))
    majority = prompt.training.get("majority_answer") or majority_answer(named)
    accuracy = _share(a == b for a, b in zip(gold, said, strict=True))
    if warning := dev_far_above(prompt.training, accuracy, len(rows)):
        warn(warning)
    return Evaluation(
        examples=len(rows),
        accuracy=accuracy,
        loss=loss,
        macro_f1=macro_f1,
        manual_template=by_hand.parsed.text,
        manual_accuracy=manual_accuracy,
        majority_answer=majority,
        majority_accuracy=_share(answer == majority for answer in named),
        labels=labels,
        confusion=confusion,
        predictions=predictions,
        right_answers=gold,
        manual_calibrated=calibrated_manual(
            model, tokenizer, prompt, by_hand, rows, gold, batch_size
        )
        if prompt.label_bias
        else None,
    )


def calibrated_manual(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    by_hand: Task,
    rows: Sequence[Example],
    gold: Sequence[str],
    batch_size: int | None,
) -> float:
    """Accuracy of a manual template with a label bias that is measured as the prompt's was."""
    on_rows = log_shares(model, tokenizer, by_hand, rows, batch_size)
    if prompt.training.get("calibrate") == "context":
        content_free = without_content(by_hand.columns)
        bias = bias_against(log_shares(model, tokenizer, by_hand, content_free, batch_size))
    else:
        bias = bias_against(on_rows)
    labels = list(by_hand.labels)
    said = [labels[number] for number in biased(on_rows, bias.tolist()).argmax(1).tolist()]
    return _share(a == b for a, b in zip(said, gold, strict=True))


def log_shares(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Example],
    batch_size: int | None = None,
) -> torch.Tensor:
    """Log-probabilities ``(N, labels)`` of a task's labels among themselves."""
    with _asked(model, tokenizer, task) as (engine, renderers, first):
        examples = [r.asking().each(rows, "evaluation", answered=False) for r in renderers]
        return label_log_probabilities(engine, renderers, examples, first, batch_size)


def _best_manual(
    accuracy: Callable[[Task, Sequence[Example]], float],
    prompt: Prompt,
    masked: bool,
    rows: Sequence[Example],
) -> tuple[Task, float]:
    """The automatic template that is best on the first rows, and its accuracy on all."""
    few = rows[:_CHOOSING]
    column = answer_column(prompt, rows[0])
    own, *others = automatic_templates(prompt, column, masked)
    scores = {own: accuracy(prompt.manual(own), few)}
    for template in others:
        with suppress(DataError):  # words of ours that the prompt's length limit has no room for
            scores[template] = accuracy(prompt.manual(template), few)
    best = max(scores, key=scores.__getitem__)
    by_hand = prompt.manual(best)
    return by_hand, scores[best] if len(few) == len(rows) else accuracy(by_hand, rows)


def _by_hand(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Example],
    candidates: Sequence[str] | None,
    batch_size: int | None,
) -> float:
    """Accuracy of a manual template, which is asked what the prompt is asked."""
    if not candidates:
        return manual_score(model, tokenizer, task, rows, batch_size)
    options: Any = {"candidates": candidates, "batch_size": batch_size}
    found = predict_details(model, tokenizer, task, rows, **options)
    return _share(p.answer == own for p, own in zip(found, answers_of(task, rows), strict=True))


def teacher_forced(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Example],
    batch_size: int | None = None,
) -> tuple[float, float]:
    """Accuracy and loss of a prompt or manual template by one forward per batch (`score`)."""
    with _asked(model, tokenizer, task) as (engine, renderers, first):
        examples = [render_all(renderer, rows, "evaluation") for renderer in renderers]
        if len(renderers) == 1:
            return score(engine, renderers[0], examples[0], first[0], batch_size)
        return score_together(engine, renderers, examples, first, batch_size)


def manual_score(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Example],
    batch_size: int | None = None,
) -> float:
    """Accuracy of a hand-written template: of its labels among each other, as predictions compare
    them, or of free answers, which need not end."""
    lenient = Task(**{**task.settings(), "answer_end": False, "label_mode": "labels"})
    return teacher_forced(model, tokenizer, lenient, rows, batch_size)[0]


@contextmanager
def _asked(
    model: nn.Module, tokenizer: Any, task: Task
) -> Iterator[tuple[Engine, list[Renderer], list[int]]]:
    """The model in eval mode with a task's members on it: what asks them, what renders rows for
    each, and the id of each one's first virtual token."""
    members = members_of(task)
    engine = Engine(BaseModel.of(model, tokenizer), 0 if len(members) == 1 else None)
    with all_placed(model, tokenizer, members) as first:
        yield engine, [engine.renderer(member) for member in members], first


def _share(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values)
