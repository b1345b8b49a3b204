"""What an experiment of many parts has finished: a file for each part, so that it can go on later.

OUT/run.json            the settings that every result depends on
OUT/done/PART.json      the result of one part, and a digest of the data that it was made of
OUT/prompts/            the prompts of finished parts
OUT/running/PART/       checkpoints of a part that is not finished

Of several processes the main one reads and writes, and all get what it has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import distributed
from ..errors import InputError, PromptFileError
from ..formats import pack_json, read_json
from ..places import entry
from ..prompts import peft_files, prompt_files
from ..storage import check_writable, remove_own, write_file
from ..training import checkpoint

_SETTINGS = "run.json"


def digest(*data: Any) -> str:
    """What tells plain values from others."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def format_of_run(output: Path, settings: dict[str, Any]) -> tuple[str, str] | None:
    """The number format that a run of the same settings was begun in, and why it stays; None
    where there is no such run.

    Args:
        output: the experiment's folder.
        settings: plain values that every result depends on; ``dtype`` may be another.
    """

    def read() -> tuple[str, str] | None:
        before, now = _read(output / _SETTINGS), json.loads(json.dumps(settings))
        if before is None or _named({**before, "dtype": ""}) != _named({**now, "dtype": ""}):
            return None
        return str(before.get("dtype")), f"the run in {output} was begun in it"

    return distributed.from_main(read)


class Ledger:
    """The finished parts of one experiment.

    Args:
        output: its folder; the same settings go on where they stopped.
        settings: plain values that every result depends on.
        overwrite: forget the parts of another run that the folder holds.

    Raises:
        InputError: the folder holds parts of a run with other settings, or other files.
        PtuningError: it cannot be written.
    """

    def __init__(self, output: Path, settings: dict[str, Any], overwrite: bool = False):
        self.output, place = output, output.absolute()  # whatever chdir does
        self._done, self._prompts = place / "done", place / "prompts"
        self._running = place / "running"
        settings = json.loads(json.dumps(settings))
        distributed.from_main(lambda: self._open(settings, overwrite))

    def _open(self, settings: dict[str, Any], overwrite: bool) -> None:
        output = self.output
        check_writable(output)
        if overwrite:
            self._forget()
        elif any(self._done.glob("*.json")) or any(self._begun()):
            self._check(_read(output / _SETTINGS), settings)
        else:
            self._check_free()
        write_file(output / _SETTINGS, pack_json(settings))

    def _begun(self) -> Iterator[Path]:
        """Checkpoints of parts that are not finished."""
        return self._running.glob(f"*/{checkpoint.FOLDER}")

    def _check_free(self) -> None:
        """Refuse a folder that holds what no experiment has made, and a new one would replace."""
        own = {self._done.name, self._prompts.name, self._running.name}
        seen = {path.name for path in self.output.iterdir() if not path.name.startswith(".")}
        # With settings it is an experiment's, whatever else is there: a kill behind --overwrite.
        is_ours = _SETTINGS in seen and _read(self.output / _SETTINGS) is not None
        if seen - own and not is_ours:
            raise InputError(
                f"--output {self.output} is not empty; choose another folder, or --overwrite to "
                "write there all the same"
            )

    def _forget(self) -> None:
        """Remove the parts of an earlier run, and nothing that no run has made."""
        parts = {path.stem for path in self._done.glob("*.json") if "result" in (_read(path) or ())}
        parts |= {path.parent.name for path in self._begun()}
        for part in parts:
            remove_own(self.prompt(part), (*prompt_files.NAMES, *peft_files.NAMES))
            self._end(part)
        remove_own(self._prompts)
        remove_own(self._done, [f"{part}.json" for part in parts])

    def _end(self, part: str) -> None:
        """Remove a part's checkpoints."""
        checkpoint.delete_all(self.running(part))
        remove_own(self.running(part))
        remove_own(self._running)

    def _check(self, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
        if before is None:
            raise self._other("whose run.json is missing or damaged")
        before, now = _named(before), _named(now)
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            name = names[0]
            was, wanted = before.get(name), now.get(name)
            raise self._other(f"with {name}={was!r}, and now it is {wanted!r}")

    def _other(self, run: str) -> InputError:
        return InputError(
            f"--output {self.output} holds a run {run}; choose another folder, or replace that run "
            "(--overwrite)"
        )

    def get(self, part: str, data: str) -> dict[str, Any] | None:
        """The result of a part, or None where it is not finished.

        Args:
            part: its name.
            data: the `digest` of what it is made of.

        Raises:
            InputError: it was made of other data.
        """

        def read() -> dict[str, Any] | None:
            found = _read(entry(self._done, f"{part}.json"))
            if found is None or not isinstance(found.get("result"), dict):
                return None
            if found.get("data") != data:
                raise self._other(f"whose part {part} was made of other data")
            self._end(part)  # a kill behind the result may have left them
            remove_own(self._done)  # and what wrote it
            return found["result"]

        return distributed.from_main(read)

    def put(self, part: str, data: str, result: dict[str, Any]) -> None:
        """Keep the result of a finished part; its checkpoints are deleted."""
        content = pack_json({"data": data, "result": result})

        def write() -> None:
            write_file(entry(self._done, f"{part}.json"), content)
            self._end(part)

        distributed.from_main(write)

    def running(self, part: str) -> Path:
        """Folder for a part's checkpoints."""
        return entry(self._running, part)

    def prompt(self, part: str) -> Path:
        """Folder for a finished part's prompt."""
        return entry(self._prompts, part)


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    """With those that older releases do not name, and had no other values of."""
    return {"frozen": "own", **settings}


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none."""
    try:
        return read_json(path)
    except PromptFileError:
        return None
