"""``ptuning demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console
from .options import Dtype, Frozen, Json


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the prompt, picture and figures.")] = (
        Path("demo_output")
    ),
    model: Annotated[str, typer.Option(help="Base model; fetched if it is not here.")] = "smollm2",
    dtype: Dtype = "auto",
    frozen: Frozen = "own",
    json_output: Json = False,
) -> None:
    """See a frozen model learn a task: one to three minutes on two free CPU cores.

    Compares the best of several hand-written templates, the majority answer, and a P-tuned prompt
    on facts that ship with the package. All choices are made on dev, all figures are from test.
    """
    from .. import distributed
    from ..experiments import demo as facts

    with distributed.together(), distributed.locked(output):
        main = distributed.state().is_main_process
        console.speak_if(main)
        with console.training_bar() as listener:
            result = facts.run(model, output, console.say, listener, dtype, frozen)
    if not main:
        return
    if json_output:
        console.print_json(result.metrics)
        return
    rows = [[name, detail, console.percent(share)] for name, detail, share in result.rows]
    title = f"{facts.TITLE}: exact match on {result.metrics['test_examples']} test examples"
    console.table(title, ["", "", "right (%)"], rows)
    console.table(
        "Three predictions",
        [facts.SUBJECT, "P-tuned", "right answer"],
        [list(example) for example in result.examples],
    )
    console.table(
        "The virtual tokens and their nearest words",
        ["token", "norm", "nearest words"],
        [
            [f"[P] {i}", f"{n.norm:.2f}", ", ".join(word for word, _ in n.words)]
            for i, n in enumerate(result.neighbours)
        ],
    )
    console.tell(
        "A virtual token is a vector that no word has: the words whose vectors point most nearly "
        "its way (and still far away) seldom tell what it does. Its norm beside the vocabulary's "
        f"mean, {result.mean_norm:.2f}, shows how loudly it speaks."
    )
    console.tell(
        f"prompt, curve.png and metrics.json are in {output} ({result.metrics['seconds']:.0f} s); "
        f"try: {console.program()} inspect {output}, or in a browser: {console.program()} serve "
        f"{output}"
    )
