"""Commands that are killed as they change a file: given again they end as if they had not been."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ptuning import Prompt
from ptuning.cli import main
from ptuning.formats import read_tensors

from .. import tiny
from ..experiments.test_lama import one_token_words
from ..scaffold import in_child, killed_at

STEP = int(os.environ.get("KILL_STEP", "7"))
"""Each so-manieth change is tried; KILL_STEP=1 tries all, which takes a quarter of an hour."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.timeout(600 if STEP > 1 else 0),
]
CAPITALS = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Austria", "Vienna")]

DIFFER = ("seconds", "date", "save_id", "sha256")
"""What two runs that do the same write otherwise into JSON."""


class Place:
    """A folder with data files, in which commands run in children with the output ``here/out``."""

    def __init__(self, folder: Path):
        self.folder, self.here = folder, folder / "here"
        self.out = self.here / "out"
        self.said = folder / "said"

    def run(self, *arguments: Any) -> tuple[int | None, str]:
        """A command: its exit code and all that it says."""
        return in_child(self._command(arguments)), self.said.read_text()

    def ends(self, *arguments: Any) -> None:
        """A command that must end well."""
        code, said = self.run(*arguments)
        assert code == 0, said[-2000:]

    def ends_here(self, *arguments: Any) -> None:
        """The same in this process, so that children find all modules imported."""
        with pytest.raises(SystemExit) as end:
            self._command(arguments)()
        assert end.value.code == 0, self.said.read_text()[-2000:]

    def killed(self, number: int, *arguments: Any) -> bool:
        """A command is killed at its so-manieth change of a file in `here`."""
        return killed_at(number, self.here, self._command(arguments))

    def _command(self, arguments: tuple[Any, ...]) -> Callable[[], None]:
        def work() -> None:
            with open(self.said, "w") as said, redirect_stdout(said), redirect_stderr(said):
                sys.argv = ["ptuning", *map(str, arguments)]
                main()

        return work

    def result(self) -> dict[str, Any]:
        """All below `here`, without what differs between two runs that do the same."""
        return {
            str(path.relative_to(self.here)): _content(path) if path.is_file() else None
            for path in sorted(self.here.rglob("*"))
        }


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return {name: tensor.tolist() for name, tensor in read_tensors(path)[0].items()}
    if path.suffix == ".json":
        return _the_same(json.loads(path.read_text()))
    return yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else path.read_bytes()


def _the_same(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in DIFFER}
        return {name: _the_same(inner) for name, inner in kept.items()}
    return [_the_same(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    _write("rows.jsonl", [{"country": country, "capital": city} for country, city in CAPITALS])
    return Place(tmp_path)


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _every_kill(
    place: Place,
    command: list[Any],
    again: Callable[[], None],
    before: Callable[[], None] = lambda: None,
    look: Callable[[], None] = lambda: None,
) -> int:
    """Kill a command at each change of a file, and hold what `again` makes of it to the result of
    the command that was not killed; gives how many kills there were.

    Args:
        place: where.
        command: writes to `place.out`.
        again: goes on with it.
        before: makes what is in `place.out` before it.
        look: is right at any moment.
    """

    def fresh() -> None:
        shutil.rmtree(place.here, ignore_errors=True)
        place.here.mkdir()
        if (place.folder / "kept").exists():
            shutil.copytree(place.folder / "kept", place.here, dirs_exist_ok=True)

    fresh()
    before()
    shutil.copytree(place.here, place.folder / "kept")
    place.ends_here(*command)
    right, number, kills = place.result(), 1, 0
    while True:
        fresh()
        if not place.killed(number, *command):
            _assert_same(place.result(), right, number)
            return kills
        kills += 1
        look()
        again()
        _assert_same(place.result(), right, number)
        number += STEP


def _assert_same(found: dict[str, Any], right: dict[str, Any], number: int) -> None:
    for name in sorted({*found, *right}):
        assert found.get(name) == right.get(name), f"{name}, killed at change {number}"
    assert list(found) == list(right)


def _train(place: Place, model: Path, *options: Any) -> list[Any]:
    return [
        *("train", "--model", model, "--data", "rows.jsonl", "--dev", "rows.jsonl"),
        *("--template", "[P*2] {country} [MASK]", "--answer", "capital", "--output", place.out),
        *("--epochs", 2, "--batch-size", 2, "--checkpoint-seconds", 0, *options),
    ]


def _resumed(place: Place, command: list[Any]) -> Callable[[], None]:
    """`--resume`, and where there is nothing to resume the command again."""

    def again() -> None:
        code, said = place.run("train", "--output", place.out, "--resume")
        if code == 2 and "nothing to resume" in said:
            place.ends(*command)
        else:
            assert code == 0, said

    return again


@pytest.mark.parametrize("options", [[], ["--tune-model", "--model-learning-rate", 0.01]])
def test_a_training_resumes_after_a_kill_at_any_moment(
    options: list[Any], place: Place, model_folder: Path
) -> None:
    command = _train(place, model_folder, *options)
    assert _every_kill(place, command, _resumed(place, command)) >= 60 // STEP


@pytest.mark.parametrize("options", [[], ["--tune-model", "--model-learning-rate", 0.01]])
def test_a_training_over_another_one_loses_nothing_by_a_kill(
    options: list[Any], place: Place, model_folder: Path
) -> None:
    command = _train(place, model_folder, "--seed", 1, "--overwrite", *options)

    def look() -> None:
        """One of the two prompts is there, with its model."""
        code, said = place.run("evaluate", place.out, "--data", "rows.jsonl", "--json")
        assert code == 0, said

    def again() -> None:
        finished = (place.out / "result.json").exists()
        if finished and "seed: 0" in (place.out / "run.yaml").read_text():
            place.ends(*command)  # the other one is still whole
        else:
            code, said = place.run("train", "--output", place.out, "--resume")
            if code == 2 and "nothing to resume" in said:
                place.ends(*command)
            else:
                assert code == 0, said

    def before() -> None:
        place.ends(*_train(place, model_folder, *options))

    assert _every_kill(place, command, again, before, look) >= 60 // STEP


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_lama_goes_on_after_a_kill_at_any_moment(
    options: list[str], place: Place, model_folder: Path
) -> None:
    Path("lama").mkdir()
    relations = {"P36": "The capital of [X] is [Y] .", "P19": "[X] was born in [Y] ."}
    _write(
        "lama/relations.jsonl",
        [{"relation": name, "template": t, "label": name} for name, t in relations.items()],
    )
    words = one_token_words(tiny.tokenizer())[:4]
    for name in relations:
        facts = [{"sub_label": f"{name} {n}", "obj_label": words[n % 4]} for n in range(12)]
        _write(f"lama/{name}.jsonl", facts)
    command: list[Any] = [
        *("lama", "--model", model_folder, "--data", "lama", "--output", place.out),
        *("--epochs", 2, "--batch-size", 4, "--checkpoint-seconds", 0, "--template", "own"),
    ]

    def before() -> None:
        if options:
            place.ends(*command, "--seed", 1)
            (place.out / "mine.txt").write_text("mine")

    def again() -> None:
        code, said = place.run(*command)
        if code == 2 and "holds a run with seed=1" in said:
            code, said = place.run(*command, *options)
        assert code == 0, said

    assert _every_kill(place, [*command, *options], again, before) >= 60 // STEP


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_merge_after_a_kill_at_any_moment(
    options: list[str], place: Place, model_folder: Path
) -> None:
    for name in ("first", "second"):
        prompt = Prompt("[P*2] {country} [MASK]", answer="capital")
        prompt.vectors = torch.randn(2, 32)
        prompt.save(name)
    command: list[Any] = ["merge", "first", "--model", model_folder, "--output", place.out]

    def before() -> None:
        if options:
            place.ends(*("merge", "second", "--model", model_folder, "--output", place.out))

    def again() -> None:
        code, said = place.run(*command, *options)
        assert code == 0 or (code == 2 and "is a merged model" in said), said  # it was done

    assert _every_kill(place, [*command, *options], again, before)
