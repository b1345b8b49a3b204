"""``ptuning evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import console, saved_prompt
from .options import Dtype, Json, Separator
from .saved_prompt import AnswerTokens, BatchSize, Candidates, Model, PromptFolder

if TYPE_CHECKING:
    from ..inference.evaluation import Evaluation


def evaluate(
    prompt_folder: PromptFolder,
    data: Annotated[str, typer.Option(help="Examples with answers: JSONL, CSV, Parquet, hub.")],
    answer: Annotated[
        str | None, typer.Option(help="Column of the right answer. [default: as in the training]")
    ] = None,
    model: Model = None,
    manual: Annotated[
        str | None,
        typer.Option(help="Manual template to compare with. [default: the prompt's words alone]"),
    ] = None,
    candidates: Candidates = None,
    answer_tokens: AnswerTokens = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "float32",
    separator: Separator = None,
    json_output: Json = False,
) -> None:
    """Measure a prompt on examples with answers.

    Shows accuracy beside a manual template and the majority answer; for labels also macro F1, the
    confusion matrix and the mean probability of each label.
    """
    from ..data import read_examples
    from ..inference.evaluation import evaluate as measure
    from ..rendering.render import check_rows

    prompt = saved_prompt.load(prompt_folder)
    prompt.answer = answer or prompt.answer
    chosen = saved_prompt.read_candidates(candidates)
    name = saved_prompt.base_name(prompt, model)
    rows = read_examples(data, separator)
    check_rows(prompt, rows, "evaluation")
    check_rows(prompt.manual(manual), rows, "evaluation", answered=False)
    base, tokenizer = saved_prompt.base_model(name, dtype)
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


def _show(result: Evaluation) -> None:
    rows = [
        ["P-tuned prompt", console.percent(result.accuracy)],
        [f"manual: {result.manual_template}", console.percent(result.manual_accuracy)],
        [f"majority: {result.majority_answer}", console.percent(result.majority_accuracy)],
    ]
    console.table(f"{result.examples} examples", ["", "right (%)"], rows)
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
