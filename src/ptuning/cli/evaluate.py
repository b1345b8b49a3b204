"""``ptuning evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import counted
from . import console, loading, saved_prompt
from .options import Dtype, Frozen, Json
from .saved_prompt import (
    AnswerColumn,
    Answered,
    AnswerTokens,
    BatchSize,
    Candidates,
    Manual,
    Model,
    PromptFolder,
)

if TYPE_CHECKING:
    from ..data.rows import Row
    from ..inference.evaluation import Evaluation
    from ..prompts.prompt import Prompt


def evaluate(
    prompt_folder: PromptFolder,
    data: Answered,
    form: dict[str, Any],
    answer: AnswerColumn = None,
    model: Model = None,
    manual: Manual = None,
    candidates: Candidates = None,
    answer_tokens: AnswerTokens = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    frozen: Frozen = "own",
    json_output: Json = False,
) -> None:
    """Measure a prompt on examples with answers.

    Shows accuracy beside a manual template and the majority answer, and the most confident
    mistakes; for labels also macro F1, the mean probability of each, and the confusion matrix or,
    where that is too wide, the labels that are mistaken most.
    """
    from ..inference.evaluation import check_candidates
    from ..inference.evaluation import evaluate as measure

    prompt = saved_prompt.load(prompt_folder)
    prompt.answer = answer or prompt.answer
    chosen = saved_prompt.read_candidates(candidates)
    check_candidates(prompt, chosen)
    name = saved_prompt.base_name(prompt, model)
    rows = saved_prompt.answered_rows(prompt, data, form, manual)
    base, tokenizer = loading.base_model(name, dtype, frozen)
    result = measure(
        base,
        tokenizer,
        prompt,
        rows,
        manual=manual,
        candidates=chosen,
        answer_tokens=answer_tokens,
        batch_size=batch_size,
    )
    if json_output:
        console.print_json(result.to_dict())
    else:
        _show(result)
        _show_mistakes(result, rows, prompt)
        console.tell(f"next: {console.command('predict', prompt_folder, '--data', data)}")


def _show_mistakes(result: Evaluation, rows: list[Row], prompt: Prompt) -> None:
    """The wrong answers that the prompt is surest of: often a label is wrong, or the data odd."""
    from ..rendering.example import all_columns

    mistakes = result.confident_mistakes()
    if not mistakes:
        return
    read = all_columns(prompt)
    shown = [
        [
            str(number + 1),
            _short(", ".join(str(rows[number][name]) for name in read)),
            _short(result.right_answers[number]),
            _short(result.predictions[number].answer),
            f"{result.predictions[number].probability:.3f}",
        ]
        for number in mistakes
    ]
    header = ["example", "input", "right", "predicted", "probability"]
    console.table("Most confident mistakes", header, shown)


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _show(result: Evaluation) -> None:
    console.table(counted(result.examples, "example"), ["", "right (%)"], result.rows())
    line = f"loss {result.loss:.4f}"
    if result.macro_f1 is not None:
        line += f", macro F1 {console.percent(result.macro_f1)}"
    console.tell(line)
    if result.confusion:
        _show_confusion(result)


_COLUMN = 8
"""Letters that a column of the confusion matrix takes, rules and blanks included."""


def _show_confusion(result: Evaluation) -> None:
    """The matrix where the terminal has room for it, else the labels that are mistaken most."""
    from ..inference.evaluation import CONFUSED, most_mistaken_of

    labels = result.labels
    mean = [
        f"{sum(p.probabilities[label] for p in result.predictions) / result.examples:.3f}"
        for label in labels
    ]
    if _COLUMN * (len(labels) + 3) <= console.out.width:
        console.table(
            "Confusion (rows: right label, columns: predicted)",
            ["", *labels, "mean probability"],
            [
                [label, *map(str, counts), share]
                for label, counts, share in zip(labels, result.confusion, mean, strict=True)
            ],
        )
        return
    console.table(
        f"{most_mistaken_of(len(labels))} (--json: all)",
        [*CONFUSED, "mean probability"],
        [[*result.confused(own), mean[own]] for own in result.most_mistaken()],
    )
