"""``ptuning predict``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from . import console, saved_prompt
from .options import Dtype
from .saved_prompt import AnswerTokens, BatchSize, Candidates, Model, PromptFolder


def predict(
    prompt_folder: PromptFolder,
    data: Annotated[str, typer.Option(help="Examples: JSONL, CSV, Parquet, hub.")],
    output: Annotated[
        Path, typer.Option(help="JSONL file to write: each example with its prediction; - prints.")
    ] = Path("-"),
    model: Model = None,
    candidates: Candidates = None,
    answer_tokens: AnswerTokens = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print a summary as JSON on stdout.")
    ] = False,
) -> None:
    """Answer each example; adds 'prediction' and 'probability' to its columns.

    Prompts with labels also give 'probabilities', label by label.
    """
    from ..data import read_examples
    from ..inference.prediction import predict_details

    prints = str(output) == "-"
    if not prints and output.exists() and not overwrite:
        raise InputError(f"--output {output} exists; choose another file, or --overwrite")
    prompt = saved_prompt.load(prompt_folder)
    rows = read_examples(data)
    chosen = saved_prompt.read_candidates(candidates)
    base, tokenizer = saved_prompt.base_model(prompt, model, dtype)
    predictions = predict_details(
        base,
        tokenizer,
        prompt,
        rows,
        candidates=chosen,
        answer_tokens=answer_tokens,
        batch_size=batch_size,
    )
    lines = []
    for row, made in zip(rows, predictions, strict=True):
        added: dict[str, Any] = {"prediction": made.answer, "probability": made.probability}
        if made.probabilities:
            added["probabilities"] = made.probabilities
        lines.append(console.json_text({**row, **added}))
    text = "\n".join(lines) + "\n"
    if prints:
        sys.stdout.write(text)
        return
    from ..storage import write_file

    write_file(output, text.encode())
    if json_output:
        console.print_json({"examples": len(rows), "output": str(output)})
    else:
        console.say(f"{len(rows)} predictions in {output}")
