"""What the folder of a training holds: whether a run may begin there, or go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ..errors import InputError, PromptFileError
from . import console, run_files

SETTINGS, RESULT = "run.yaml", "result.json"
_BEGINNING = {SETTINGS, "checkpoints"}
"""What a run leaves that is stopped before its first checkpoint."""
BEGIN_AGAIN = "stopped before the first step; begin again"


def find_settings(context: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """Callback of ``--output`` and ``--resume``: where both are given, the settings of the run in
    that folder are this command's defaults; options given here come first.

    Raises:
        InputError: there is nothing to resume.
    """
    given = {**context.params, param.name: value}
    output = given.get("output")
    if output is None or not given.get("resume"):
        return value
    check_resumable(output)
    if (output / SETTINGS).is_file():
        _check_command(output, context.info_name)
        before = context.default_map or {}
        run_files.use_config(context, output / SETTINGS)
        context.default_map = {**_older(output), **(context.default_map or {}), **before}
    return value


def _older(output: Path) -> dict[str, Any]:
    """What a run of an older release did where it had no such option."""
    from ..training.settings import LATER

    known = run_files.read(output / SETTINGS)
    before = {**{name: LATER[name] for name in ("word_noise", "label_matrix")}, "refit": False}
    return {name: value for name, value in before.items() if name not in known}


def _check_command(output: Path, command: str | None) -> None:
    """Only `distill` has a teacher, and goes on with a run that has one.

    Raises:
        InputError: the run there is another command's.
    """
    taught = "teacher" in run_files.read(output / SETTINGS)
    own, what = ("distill", "a distillation") if taught else ("train", "a training")
    if command != own:
        raise InputError(
            f"the run in --output {output} is {what}: ptuning {own} --output {output} --resume"
        )


def is_finished(output: Path) -> bool:
    """A training came to its end there, and not to that of its time (``--max-minutes``)."""
    from ..formats import read_json

    if not all((output / name).is_file() for name in (RESULT, "prompt.safetensors")):
        return False
    try:
        return read_json(output / RESULT).get("complete") is not False
    except PromptFileError:
        return True


def is_interrupted(output: Path) -> bool:
    """There is a checkpoint to go on from."""
    return not is_finished(output) and any(output.glob("checkpoints/**/step-*/DONE"))


def is_begun(output: Path) -> bool:
    """A run was stopped there before its first checkpoint: nothing else but its settings."""
    return (output / SETTINGS).is_file() and not _seen(output) - _BEGINNING


def _seen(output: Path) -> set[str]:
    return {path.name for path in output.iterdir() if not path.name.startswith(".")}


def check_resumable(output: Path) -> None:
    """Refuse ``--resume`` where there is nothing to resume.

    Raises:
        InputError: the folder is not there, or holds no run.
    """
    if is_finished(output) or is_interrupted(output) or is_begun(output):
        return
    nothing = f"there is nothing to resume in --output {output}"
    if not output.exists():
        raise InputError(f"{nothing}: it does not exist; correct its name, or leave --resume out")
    if (output / "prompt.json").is_file():
        raise InputError(
            f"{nothing}: it holds a saved prompt and no checkpoint; train on from that prompt with "
            f"--init-from {output} and another --output"
        )
    raise InputError(f"{nothing}: it holds no run; leave --resume out")


def check_free(output: Path) -> None:
    """Refuse a folder that a new run would spoil.

    Raises:
        InputError: it is a file, or holds a run, a prompt or other files.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder")
    if not output.is_dir():
        return
    if is_interrupted(output):
        raise InputError(
            f"--output {output} holds an interrupted run; go on with it (--resume), replace it "
            "(--overwrite), or choose another folder"
        )
    if (output / "prompt.json").exists():
        raise InputError(
            f"--output {output} holds a saved prompt; choose another folder, train on from it into "
            f"another one (--init-from {output}), or replace it (--overwrite)"
        )
    if _seen(output) - _BEGINNING:
        raise InputError(
            f"--output {output} is not empty; choose another folder, or --overwrite to write there "
            "all the same"
        )


def begin(output: Path, run_file: bytes, anew: bool) -> None:
    """A run has been accepted: its settings are in the folder, and nothing of a run before.

    Args:
        output: the folder.
        run_file: the settings.
        anew: checkpoints and result that are there are another run's.
    """
    from ..formats import pack_json
    from ..storage import write_folder
    from ..training import checkpoint

    files = {SETTINGS: run_file}
    if anew:
        checkpoint.delete_all(output)
        if (output / RESULT).exists():  # not deleted: the next one keeps its mode
            files[RESULT] = pack_json({"complete": False})
    write_folder(output, files)


def how_to_go_on(output: Path, command: str) -> str:
    """What to say of a training that was stopped."""
    if is_interrupted(output) or is_begun(output):
        told = console.command(command, "--output", output, "--resume")
        return f"stopped; go on with: {told}"
    return BEGIN_AGAIN


def how_an_experiment_goes_on(overwrite: bool) -> str:
    """The same of an experiment; `overwrite` would forget its finished parts."""
    same = "the same command without --overwrite" if overwrite else "the same command"
    return f"stopped; {same} goes on where it stopped"
