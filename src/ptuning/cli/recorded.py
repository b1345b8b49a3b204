"""A training on the command line: shown as it goes, with its settings in its folder once it is
accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from . import console, run_folder

if TYPE_CHECKING:
    from ..training.progress import Progress


@contextmanager
def recorded(
    output: Path, run_file: bytes, anew: bool, resumed: bool, command: str = "train"
) -> Iterator[Callable[[Progress], None]]:
    """Gives the listener that a training wants.

    Args:
        output: its folder.
        run_file: its settings.
        anew: what the folder holds is another run's.
        resumed: it is this run's.
        command: that goes on with it.
    """
    from .. import distributed

    begun = False

    def begin() -> None:
        """The first step is done: all that could be refused was accepted."""
        nonlocal begun
        if not begun:
            run_folder.begin(output, run_file, anew=anew)
            begun = True

    def how_to_go_on() -> str:
        if begun or resumed:
            return run_folder.how_to_go_on(output, command)
        return run_folder.BEGIN_AGAIN  # what the folder holds is another run's

    console.on_stop(how_to_go_on)
    with console.training_bar() as show:

        def listener(heard: Progress) -> None:
            if not heard.before:
                begin()
            show(heard)

        yield listener
    distributed.from_main(begin)  # where no step was left to be done
