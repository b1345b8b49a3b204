"""What an experiment of many parts has finished: a file for each part, so that it can go on later.

OUT/run.json            the settings that every result depends on
OUT/done/PART.json      the result of one part

Of several processes the main one reads and writes, and all get what it has.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .. import processes
from ..errors import InputError
from ..files import check_writable, pack_json, write_file


class Ledger:
    """The finished parts of one experiment.

    Args:
        output: its folder; the same settings go on where they stopped.
        settings: plain values that every result depends on.
        overwrite: forget the parts of another run that the folder holds.

    Raises:
        InputError: the folder holds a run with other settings.
        PtuningError: it cannot be written.
    """

    def __init__(self, output: Path, settings: dict[str, Any], overwrite: bool = False):
        self.output, self._done = output, output / "done"
        settings = json.loads(json.dumps(settings))
        processes.from_main(lambda: self._open(settings, overwrite))

    def _open(self, settings: dict[str, Any], overwrite: bool) -> None:
        output = self.output
        if output.is_file():
            raise InputError(f"--output {output} is a file; give a folder")
        check_writable(output)
        if overwrite:
            shutil.rmtree(self._done, ignore_errors=True)
        elif (output / "run.json").is_file():
            self._check(json.loads((output / "run.json").read_text(encoding="utf-8")), settings)
        write_file(output / "run.json", pack_json(settings))

    def _check(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            name = names[0]
            raise InputError(
                f"--output {self.output} holds a run with {name}={before.get(name)!r}, and now it "
                f"is {now.get(name)!r}; choose another folder, or replace that run (--overwrite)"
            )

    def get(self, part: str) -> dict[str, Any] | None:
        """The result of a part, or None where it is not finished."""
        path = self._done / f"{part}.json"

        def read() -> dict[str, Any] | None:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

        return processes.from_main(read)

    def put(self, part: str, result: dict[str, Any]) -> None:
        """Keep the result of a finished part."""
        content = pack_json(result)
        processes.from_main(lambda: write_file(self._done / f"{part}.json", content))
