"""``ptuning report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, counted
from . import console, loading, saved_prompt
from .options import Dtype, Frozen, Overwrite
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


def report(
    prompt_folder: PromptFolder,
    data: Answered,
    form: dict[str, Any],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    answer: AnswerColumn = None,
    model: Model = None,
    manual: Manual = None,
    candidates: Candidates = None,
    answer_tokens: AnswerTokens = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    frozen: Frozen = "own",
    overwrite: Overwrite = False,
) -> None:
    """Write one HTML file about a prompt, to send around.

    Metrics with confidence intervals beside a manual template and the majority answer, confusion,
    the surest mistakes, calibration, the training's curve, nearest words, settings.
    """
    from .. import places, storage
    from ..inference.evaluation import check_candidates, evaluate
    from ..inference.nearest_words import nearest_words
    from ..inference.report import report_on, training_history
    from ..inference.report_page import page
    from ..reporting import versions

    storage.check_file(output)
    if output.exists() and not overwrite:
        raise InputError(f"--output {output} exists; choose another file, or --overwrite")
    prompt = saved_prompt.load(prompt_folder)
    prompt.answer = answer or prompt.answer
    chosen = saved_prompt.read_candidates(candidates)
    check_candidates(prompt, chosen)
    name = saved_prompt.base_name(prompt, model)
    rows = saved_prompt.answered_rows(prompt, data, form, manual)
    base, tokenizer = loading.base_model(name, dtype, frozen)
    options: dict[str, Any] = {"candidates": chosen, "answer_tokens": answer_tokens}
    result = evaluate(
        base, tokenizer, prompt, rows, manual=manual, batch_size=batch_size, **options
    )
    made = report_on(
        places.real(prompt_folder).name,
        Path(data).name,
        prompt,
        rows,
        result,
        nearest_words(base, tokenizer, prompt),
        history=training_history(Path(prompt_folder)),
        versions=versions(),
    )
    storage.write_file(output, page(made).encode())
    answered, right = counted(result.examples, "row"), console.percent(result.accuracy)
    console.say(f"{answered}, {right} % right; report in {output}")
