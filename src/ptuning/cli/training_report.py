"""What a training leaves behind and says: files beside the prompt, a line, a table of members."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import console

if TYPE_CHECKING:
    from ..prompts.prompt import Prompt
    from ..training.train import TrainResult


def save(output: Path, prompt: Prompt, result: TrainResult, keep_encoder: bool) -> dict[str, Any]:
    """Write the prompt, ``result.json`` and ``curve.png``; gives what ``--json`` prints."""
    from ..formats import pack_json
    from ..reporting import training_curve, versions
    from ..storage import write_folder

    prompt.save(output, keep_encoder=keep_encoder)
    report = {
        "best": result.best,
        "history": result.history,
        "members": result.members,
        "winner": result.winner,
        "shortened": result.shortened,
        "seconds": round(result.seconds, 2),
        "versions": versions(),
    }
    write_folder(
        output, {"curve.png": training_curve(result.history), "result.json": pack_json(report)}
    )
    return report


def save_model(output: Path, prompt: Prompt, model: Any, tokenizer: Any) -> None:
    """Write a model that was trained with the prompt, and say in the prompt where it is."""
    folder, staged = output / "model", output / ".model"
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)
    prompt.base_model["name"] = str(folder.resolve())


def tell(output: Path, prompt: Prompt, result: TrainResult) -> None:
    """Say what came of it."""
    best = result.best
    if len(result.members) > 1:
        _tell_members(result)
    line = f"{prompt.num_virtual_tokens} virtual tokens saved in {output} (epoch {best['epoch']}"
    if "dev_accuracy" in best:
        line += f", dev {console.percent(best['dev_accuracy'])} %"
    console.tell(f"{line}, {result.seconds:.0f} s)")
    next_step = f"next: {console.program()} evaluate {output} --data test.jsonl"
    console.tell(next_step)


def _tell_members(result: TrainResult) -> None:
    """All members, the winner first, with mean and deviation of what decided."""
    from statistics import mean, stdev

    def figure(member: dict[str, Any]) -> float:
        best = member["best"]
        return best["dev_accuracy"] if "dev_accuracy" in best else -best["loss"]

    by_dev = "dev_accuracy" in result.best
    winner = result.members[result.winner]
    rows = []
    for member in sorted(result.members, key=lambda m: (m is winner, figure(m)), reverse=True):
        name = ", ".join(f"{k} {v}" for k, v in member["name"].items())
        score = console.percent(figure(member)) if by_dev else f"{member['best']['loss']:.4f}"
        dropped = member["dropped"]
        left = "" if dropped is None else f"dropped after epoch {dropped}"
        rows.append([name, score, str(member["best"]["epoch"]), left])
    console.table("Members", ["member", "dev (%)" if by_dev else "loss", "best epoch", ""], rows)
    if by_dev:
        figures = [100 * figure(member) for member in result.members]
        console.tell(
            f"dev: mean {mean(figures):.1f}, deviation {stdev(figures):.1f}, best "
            f"{max(figures):.1f} (members that were dropped count with their best until then)"
        )
