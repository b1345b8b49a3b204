"""``ptuning predict``: rows in, rows and answers out, in memory that does not grow with them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, InputError
from . import console, loading, saved_prompt
from .options import Dtype, Frozen, Overwrite
from .saved_prompt import AnswerTokens, BatchSize, Candidates, Model, PromptFolder

if TYPE_CHECKING:
    from ..data.partial import Output
    from ..inference.answering import Prediction
    from ..prompts.prompt import Prompt

_ADDED = ("prediction", "probability", "probabilities")
_ROWS_AT_ONCE, _BATCHES_AT_ONCE = 256, 8
"""Rows that are read, answered and written together, and batches where their size is given."""


def predict(
    prompt_folder: PromptFolder,
    data: Annotated[str, typer.Option(help="Examples: JSONL, CSV, Parquet, or a hub data set.")],
    form: dict[str, Any],
    output: Annotated[
        Path,
        typer.Option(
            help="File to write: each example with its prediction, as .jsonl, .csv, .tsv or "
            ".parquet; - prints JSON lines."
        ),
    ] = Path("-"),
    model: Model = None,
    candidates: Candidates = None,
    answer_tokens: AnswerTokens = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    frozen: Frozen = "own",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run beside --output.")
    ] = False,
    overwrite: Overwrite = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print a summary as JSON on stdout.")
    ] = False,
) -> None:
    """Answer each example; adds 'prediction' and 'probability' to its columns.

    Prompts with labels also give 'probabilities', label by label.

    Rows are written while they are answered, into a file beside --output that becomes it at the
    end. What interrupts the run leaves them there: the same command with --resume goes on.
    """
    from ..backbone.load import load_model
    from ..data.partial import Output, begun
    from ..data.sources import stream_examples
    from ..data.writing import convert

    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one")
    place = None if str(output) == "-" else Output(output)
    if place is not None and not place.special:
        console.on_stop(lambda: _how_to_go_on(place))
    if json_output and (place is None or place.special):
        raise InputError(
            "--json tells of a file that was written; without --output predictions are JSON lines "
            "already"
        )
    if resume and (place is None or place.special):
        raise InputError("--resume needs an --output file, beside which the interrupted run stands")
    prompt = saved_prompt.load(prompt_folder)
    chosen = saved_prompt.read_candidates(candidates)
    name = saved_prompt.base_name(prompt, model)
    added = _ADDED if chosen or prompt.labels else _ADDED[:2]
    count, columns = _survey(prompt, data, form, added)
    options: Any = {"candidates": chosen, "answer_tokens": answer_tokens, "batch_size": batch_size}
    rows = islice(stream_examples(data, **form), count)
    if place is None or place.special:
        base = loading.base_model(name, dtype, frozen)
        _print(place.path if place else None, _answered(base, prompt, rows, options, 0, count))
        return
    depends_on = {**options, "prompt": _digest(prompt), "model": name}
    del depends_on["batch_size"]
    if frozen != "own":
        depends_on["frozen"] = frozen
    begun_in = _format_of(place, depends_on) if resume else None
    dtype = loading.chosen(name, dtype, begun_in, frozen=frozen)
    depends_on["dtype"] = dtype
    with begun(place, depends_on, resume, overwrite) as partial:
        done = partial.take_up(rows, added[0])
        if done < count:
            base = load_model(name, dtype=dtype, frozen=frozen, gradients=False)
            for block in _answered(base, prompt, rows, options, done, count):
                partial.add(block)

        def made(path: Path) -> None:
            """The data is read again, hours later: its rows must be those that were answered."""
            partial.check(stream_examples(data, **form), added[0])
            convert(path, place.kind, data, form, partial.path, added, (*columns, *added))

        partial.finish(made)
    if json_output:
        console.print_json({"examples": count, "output": str(output)})
    else:
        console.say(f"{count} predictions in {output}")


def _how_to_go_on(place: Output) -> str:
    """What to say of a run that was stopped."""
    if any(partial.stat().st_size for partial in place.partials()):
        return "stopped; what was answered is kept: the same command with --resume goes on"
    return "stopped before the first answer; begin again"


def _format_of(place: Output, depends_on: dict[str, Any]) -> tuple[str, str] | None:
    """The format that an interrupted run was begun in, on whatever machine."""
    for dtype in ("float32", "bfloat16"):
        if place.partial({**depends_on, "dtype": dtype}) in place.partials():
            return dtype, "the interrupted run was begun in it"
    return None


def _survey(
    prompt: Prompt, data: str, form: Mapping[str, Any], added: Sequence[str]
) -> tuple[int, list[str]]:
    """How many rows there are, and their columns; all are fit to be answered."""
    from ..data.sources import stream_examples
    from ..rendering.example import check_rows

    columns: dict[str, None] = {}

    def looked_at() -> Iterator[dict[str, Any]]:
        for row in stream_examples(data, **form):
            columns.update(dict.fromkeys(row))
            yield row

    count = check_rows(prompt, looked_at(), "prediction", answered=False)
    if taken := [name for name in added if name in columns]:
        raise DataError(
            f"{data} has a column {taken[0]!r}, and predict writes one of that name; rename the "
            "data's"
        )
    return count, list(columns)


def _answered(
    base: tuple[Any, Any],
    prompt: Prompt,
    rows: Iterator[dict[str, Any]],
    options: dict[str, Any],
    done: int,
    count: int,
) -> Iterator[list[dict[str, Any]]]:
    """Blocks of rows with their predictions, from row `done` on, of `count`."""
    from ..data.rows import in_blocks
    from ..inference.prediction import rows_at_once, stream_predictions

    size = options["batch_size"]
    on_cpu = _ROWS_AT_ONCE if size is None else _BATCHES_AT_ONCE * size
    at_once = rows_at_once(base[0], [prompt], options["candidates"], size, on_cpu)
    waiting: deque[list[dict[str, Any]]] = deque()  # blocks may be read ahead

    def blocks() -> Iterator[list[dict[str, Any]]]:
        for block in in_blocks(rows, at_once):
            waiting.append(block)
            yield block

    with console.rows_bar(count, done) as tell:
        for predictions in stream_predictions(*base, prompt, blocks(), **options, first=done + 1):
            block = waiting.popleft()
            yield [{**row, **_columns(p)} for row, p in zip(block, predictions, strict=True)]
            done += len(block)
            tell(done)


def _columns(made: Prediction) -> dict[str, Any]:
    values = (made.answer, made.probability, made.probabilities)
    return dict(islice(zip(_ADDED, values, strict=True), 3 if made.probabilities else 2))


def _print(device: Path | None, blocks: Iterator[list[dict[str, Any]]]) -> None:
    """Rows as JSON lines on stdout, or into a device or pipe."""
    from ..data.partial import refused
    from ..data.writing import json_line

    if device is not None:
        with refused(device), open(device, "wb") as file:
            for block in blocks:
                file.writelines(map(json_line, block))
                file.flush()
        return
    try:
        for block in blocks:
            for row in block:
                console.print_json(json.loads(json_line(row)), indent=None)
            sys.stdout.flush()
    except BrokenPipeError:  # such as head, which has seen enough
        console.drop_stdout()


def _digest(prompt: Prompt) -> str:
    digest = hashlib.sha256()
    for member in prompt.members:
        digest.update(repr(member.settings()).encode(errors="backslashreplace"))
        tensors = [member.trained_vectors()]
        if member.label_matrix is not None:
            tensors.append(member.label_matrix.of(member.labels))
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
