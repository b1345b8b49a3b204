"""``ptuning report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from . import console, loading, saved_prompt
from .options import Dtype, Overwrite, Separator
from .saved_prompt import AnswerTokens, BatchSize, Candidates, Model, PromptFolder


def report(
    prompt_folder: PromptFolder,
    data: Annotated[str, typer.Option(help="Examples with answers: JSONL, CSV, Parquet, hub.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
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
    overwrite: Overwrite = False,
) -> None:
    """Write one HTML file about a prompt, to send around.

    Metrics with confidence intervals beside a manual template and the majority answer, confusion,
    the surest mistakes, calibration, the training's curve, nearest words, settings.
    """
    from .. import places, storage
    from ..data import read_examples
    from ..inference.evaluation import evaluate
    from ..inference.nearest_words import nearest_words
    from ..inference.report import report_on, training_history
    from ..inference.report_page import page
    from ..rendering.render import check_rows
    from ..reporting import versions

    storage.check_file(output)
    if output.exists() and not overwrite:
        raise InputError(f"--output {output} exists; choose another file, or --overwrite")
    prompt = saved_prompt.load(prompt_folder)
    prompt.answer = answer or prompt.answer
    chosen = saved_prompt.read_candidates(candidates)
    name = saved_prompt.base_name(prompt, model)
    rows = read_examples(data, separator)
    check_rows(prompt, rows, "evaluation")
    check_rows(prompt.manual(manual), rows, "evaluation", answered=False)
    base, tokenizer = loading.base_model(name, dtype)
    options: dict[str, Any] = {"candidates": chosen, "answer_tokens": answer_tokens}
    result = evaluate(
        base, tokenizer, prompt, rows, manual=manual, batch_size=batch_size, **options
    )
    made = report_on(
        places.real(prompt_folder).name,
        Path(data).name,
        prompt,
        list(rows),
        result,
        nearest_words(base, tokenizer, prompt),
        history=training_history(Path(prompt_folder)),
        versions=versions(),
    )
    storage.write_file(output, page(made).encode())
    console.say(
        f"{result.examples} rows, {console.percent(result.accuracy)} % right; report in {output}"
    )
