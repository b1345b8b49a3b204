"""What a training leaves behind and says: files beside the prompt, a line, a table of members."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import console, run_folder

MODEL = "model"
"""The folder of a model that was trained with the prompt."""
_WHERE_DONE = ("ensemble", "folds", "refit", "calibrated")

if TYPE_CHECKING:
    from ..prompts.prompt import Prompt
    from ..training.result import TrainResult


def save(
    output: Path,
    prompt: Prompt,
    result: TrainResult,
    keep_encoder: bool,
    tuned: tuple[Any, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the prompt, ``result.json`` and ``curve.png``, as one save; gives what ``--json`` says.

    Args:
        output: the folder.
        prompt: trained.
        result: of the training.
        keep_encoder: with the encoder's weights.
        tuned: model and tokenizer, where they were trained too: they are in the same save.
        more: of the report.
    """
    from ..formats import pack_json
    from ..places import real
    from ..prompts.peft_files import NAMES
    from ..reporting import training_curve, versions
    from ..storage import one_save, write_all

    report = {
        "best": result.best,
        "history": result.history,
        "members": result.members,
        "winner": result.winner,
        **{name: found for name in _WHERE_DONE if (found := getattr(result, name))},
        **({} if result.complete else {"complete": False}),
        "shortened": result.shortened,
        "seconds": round(result.seconds, 2),
        **(more or {}),
        "versions": versions(),
    }
    before = [MODEL] if made_model(output) else []
    with one_save(output, remove=[*NAMES, *before]) as staged:
        if tuned is not None:
            for part in tuned:
                part.save_pretrained(staged / MODEL)
            name, path = prompt.base_model["name"], str(real(output / MODEL))
            prompt.base_model = {**prompt.base_model, "name": path, "tuned_from": name}
        files = prompt.files(output, keep_encoder=keep_encoder)
        files["curve.png"] = training_curve(result.history)
        write_all(staged, {**files, run_folder.RESULT: pack_json(report)})
    return report


def made_model(output: Path) -> bool:
    """A run has made the model in `output`, so that the next run may replace it."""
    from ..errors import PromptFileError
    from ..formats import read_json

    try:
        about = read_json(output / "prompt.json").get("base_model")
    except PromptFileError:
        return False
    if not isinstance(about, dict):
        return False
    # Older releases name the whole path.
    return about.get("folder") == MODEL or about.get("name") == str((output / MODEL).resolve())


def tell_finished(output: Path, as_json: bool) -> None:
    """Say that there is nothing to resume; what ``--json`` says is what the run has said."""
    from ..formats import read_json

    console.say(
        f"{output} holds a finished run; there is nothing to resume (train more: "
        f"--init-from {output} and another --output)"
    )
    if as_json:
        console.print_json(read_json(output / run_folder.RESULT))


def tell(
    output: Path, prompt: Prompt, result: TrainResult, data: str, command: str = "train"
) -> None:
    """Say what came of a command, and what to do next with the user's own `data`."""
    best = result.best
    if result.folds:
        _tell_folds(result)
    elif len(result.members) > 1:
        _tell_members(result)
    line = f"{prompt.num_virtual_tokens} virtual tokens saved in {output} (epoch {best['epoch']}"
    if "dev_accuracy" in best:
        dev = "mean of the folds" if result.folds else "dev"
        line += f", {dev} {console.percent(best['dev_accuracy'])} %"
    if prompt.others:
        line += f"; with {len(prompt.others)} more as an ensemble"
        if "dev_accuracy" in result.ensemble:
            line += f", dev {console.percent(result.ensemble['dev_accuracy'])} %"
    if result.refit:
        line += f"; then on with all {result.refit['examples']} examples"
    if prompt.label_matrix is not None:
        line += "; with a label matrix"
    if prompt.label_bias:
        line += f"; labels calibrated by {result.calibrated['method']}"
        if "dev_accuracy" in result.calibrated:
            line += f", dev {console.percent(result.calibrated['dev_accuracy'])} %"
    console.tell(f"{line}, {result.seconds:.0f} s)")
    if not result.complete:
        again = console.command(command, "--output", output, "--resume")
        console.tell(f"the time was over; go on: {again}")
    console.tell(f"next: {console.command('evaluate', output, '--data', data)}")
    console.tell(f"      {console.command('predict', output, '--data', data)}")
    if "dev_accuracy" in best:
        chose = "the folds chose its settings" if result.folds else "dev chose this prompt"
        console.tell(f"({chose}: examples that neither trained nor chose tell more)")


def _tell_folds(result: TrainResult) -> None:
    """The settings, the best first, by their mean over folds and seeds."""
    rows = [
        [
            _named(setting) or "as given",
            console.percent(setting["dev_accuracy"]),
            console.percent(setting["deviation"]),
            f"{setting['dev_loss']:.4f}",
            str(setting["epoch"]),
        ]
        for setting in result.folds
    ]
    header = ["setting", "right (%)", "deviation", "loss", "best epoch"]
    console.table("Folds: what is held out", header, rows)


def _named(member: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in member["name"].items())


def _tell_members(result: TrainResult) -> None:
    """All members, the winner first, with mean and deviation of what decided."""
    from statistics import mean, stdev

    def figure(member: dict[str, Any]) -> float:
        best = member["best"]
        return best["dev_accuracy"] if by_dev else -best["loss"]

    by_dev = "dev_accuracy" in result.best
    winner = result.members[result.winner]
    known = [member for member in result.members if member["best"]]
    rows = []
    for member in sorted(known, key=lambda m: (m is winner, figure(m)), reverse=True):
        score = console.percent(figure(member)) if by_dev else f"{member['best']['loss']:.4f}"
        dropped = member["dropped"]
        left = "" if dropped is None else f"dropped after epoch {dropped}"
        rows.append([_named(member), score, str(member["best"]["epoch"]), left])
    rows += [
        [_named(m), "-", "-", "no result: not finite"] for m in result.members if not m["best"]
    ]
    console.table("Members", ["member", "dev (%)" if by_dev else "loss", "best epoch", ""], rows)
    if by_dev and len(known) > 1:
        figures = [100 * figure(member) for member in known]
        console.tell(
            f"dev: mean {mean(figures):.1f}, deviation {stdev(figures):.1f}, best "
            f"{max(figures):.1f} (members that were dropped count with their best until then)"
        )
