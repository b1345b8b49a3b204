"""Commands, run files, and how errors leave the program.

Exit codes: 0 done, 1 failure, 2 wrong input. No traceback unless ``--debug``.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType
from typing import Annotated, Any

import typer

from ..errors import InputError, PtuningError
from ..places import at_home
from . import (
    at_ctrl_c,
    console,
    distill,
    evaluate,
    export,
    lama,
    merge,
    predict,
    report,
    run_demo,
    serve,
    superglue,
    train,
    use,
)
from .fields import filled
from .options import OF_FILES

# Newer releases of typer bring a click of their own: take the class from what typer exports.
UsageError: type[Any] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Train a few virtual tokens for a frozen language model (P-tuning, arXiv 2103.10385).

A table with a column of labels is enough:

    ptuning train --model smollm2 --data tickets.csv --output tickets/

A template of your own says where columns, virtual tokens [P] and the answer [MASK] stand:

    ptuning train --model smollm2 --data train.csv --dev dev.csv --answer capital \\
        --template "[P*3] {country} [P*3] [MASK]" --output capital/

    ptuning evaluate capital/ --data test.csv

    ptuning predict capital/ --data new.csv --output answers.jsonl

Try it: `ptuning demo`""",
)

_ALONE = ("evaluate", "predict", "inspect", "merge", "export", "report", "serve", "fetch")
"""Commands of one process; each of several would do all of it."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_INTERRUPTED = 130
"""What typer makes of Ctrl-C."""


def _version(shown: bool) -> None:
    if shown:
        from .. import __version__

        console.tell(f"ptuning {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,  # `main` takes it out, wherever it stands
) -> None:
    started = os.environ.get("WORLD_SIZE", "1")
    if context.invoked_subcommand in _ALONE and started != "1":
        raise InputError(
            f"ptuning {context.invoked_subcommand} runs in one process, and {started} were "
            "started; start it without torchrun or accelerate launch"
        )


# What stands behind the options of `train` are parts of its grid.
app.command("train", context_settings={"allow_extra_args": True})(train.train)
app.command("distill", context_settings={"allow_extra_args": True})(distill.distill)
app.command("evaluate")(filled(form=OF_FILES)(evaluate.evaluate))
app.command("predict")(filled(form=OF_FILES)(predict.predict))
app.command("inspect")(filled()(use.inspect))
app.command("merge")(filled(loads_model=False)(merge.merge))
app.command("export")(filled(loads_model=False)(export.export))
app.command("report")(filled(form=OF_FILES)(report.report))
app.command("serve")(filled()(serve.serve))
app.command("lama")(lama.lama)
app.command("superglue")(superglue.superglue)
app.command("demo")(filled()(run_demo.demo))
app.command("fetch")(filled(loads_model=False)(use.fetch))


def main() -> None:
    """Run the command line; every error becomes one line and an exit code."""
    arguments = [_at_home(argument) for argument in sys.argv[1:]]
    debug = "--debug" in arguments
    console.write_to_any_stdout()
    console.speak_if(os.environ.get("RANK", "0") == "0")
    console.on_stop(lambda: "stopped")
    try:
        _check_filled(arguments)
        with _ctrl_c_whatever_comes_of_it():
            code = app(
                [a for a in arguments if a != "--debug"], standalone_mode=False, prog_name="ptuning"
            )
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except PtuningError as error:
        if debug:
            raise
        _complain(error, str(error) + _how_to_go_on(error))
        code = error.exit_code
    except UsageError as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "ptuning")
        message = error.format_message()
        if message:  # empty where no command was given: then the help was shown
            console.complain(f"{message} (see {command} --help)")
        code = 2
    except Exception as error:
        if debug:
            raise
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0] if text else 'no message'}"
        reason += " (run again with --debug for the traceback)"
        if isinstance(error, OSError) and error.errno in _FULL and not error.filename:
            reason = f"what stdout goes to is full ({error.strerror}); free space there"
            console.drop_stdout()
        _complain(error, reason)
        code = 1
    if code == _INTERRUPTED:
        console.say(console.stopped())
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _ctrl_c_whatever_comes_of_it() -> Iterator[None]:
    """Libraries' C code may take the exception of Ctrl-C for a fault of its own, and raise another
    (matplotlib: "Invalid bounding box")."""
    heard = False

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard = True
        signal.default_int_handler(number, frame)

    try:
        with at_ctrl_c(hear):
            yield
    except Exception as error:
        if heard:
            raise KeyboardInterrupt from error
        raise


def _how_to_go_on(error: PtuningError) -> str:
    """Where there was no room: what a run that is stopped says of what it has kept."""
    cause, how = error.__cause__, console.stopped()
    if how == "stopped" or not (isinstance(cause, OSError) and cause.errno in _FULL):
        return ""
    return f"; {how.removeprefix('stopped; ')}"


def _at_home(argument: str) -> str:
    """With the home folder for ``~``, where the shell has left it: ``--output=~/out``."""
    name, assigned, value = argument.partition("=")
    if name.startswith("--") and assigned:
        return f"{name}={at_home(value)}"
    return at_home(argument)


def _check_filled(arguments: list[str]) -> None:
    """Refuse an empty argument: as a path it would be the current folder."""
    for before, argument in pairwise(["ptuning", *arguments]):
        name, assigned, value = argument.partition("=")
        if not argument or (name.startswith("--") and assigned and not value):
            place = name or f"what stands behind {before}"
            raise InputError(f"{place} is empty; give it a value (is a shell variable not set?)")


def _complain(error: Exception, text: str) -> None:
    """Say an error, of several processes in the first that has it."""
    console.speak_if(not getattr(error, "heard_elsewhere", False))
    console.complain(text)
