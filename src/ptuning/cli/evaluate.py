"""``ptuning evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import console, loading, saved_prompt
from .options import Dtype, Frozen, Json, Separator
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
    answer: AnswerColumn = None,
    model: Model = None,
    manual: Manual = None,
    candidates: Candidates = None,
    answer_tokens: AnswerTokens = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    frozen: Frozen = "own",
    separator: Separator = None,
    json_output: Json = False,
) -> None:
    """Measure a prompt on examples with answers.

    Shows accuracy beside a manual template and the majority answer, and the most confident
    mistakes; for labels also macro F1, the confusion matrix and the mean probability of each label.
    """
    from ..inference.evaluation import evaluate as measure

    prompt = saved_prompt.load(prompt_folder)
    prompt.answer = answer or prompt.answer
    chosen = saved_prompt.read_candidates(candidates)
    name = saved_prompt.base_name(prompt, model)
    rows = saved_prompt.answered_rows(prompt, data, separator, manual)
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
    mistakes = result.confident_mistakes()
    if not mistakes:
        return
    shown = [
        [
            str(number + 1),
            _short(", ".join(str(rows[number][name]) for name in prompt.parsed.fields)),
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
    console.table(f"{result.examples} examples", ["", "right (%)"], result.rows())
    line = f"loss {result.loss:.4f}"
    if result.macro_f1 is not None:
        line += f", macro F1 {console.percent(result.macro_f1)}"
    console.tell(line)
    if result.confusion:
        mean = {
            label: sum(p.probabilities[label] for p in result.predictions) / result.examples
            for label in result.labels
        }
        console.table(
            "Confusion (rows: right label, columns: predicted)",
            ["", *result.labels, "mean probability"],
            [
                [label, *map(str, counts), f"{mean[label]:.3f}"]
                for label, counts in zip(result.labels, result.confusion, strict=True)
            ],
        )
