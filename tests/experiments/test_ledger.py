from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptuning import InputError, Prompt
from ptuning.experiments.ledger import Ledger, format_of_run
from ptuning.training import checkpoint


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_of_an_older_release_goes_on(tmp_path: Path) -> None:
    Ledger(tmp_path, {"a": 1, "dtype": "float32"}).put("P1", "data", {"figure": 1})
    now = {"a": 1, "dtype": "float32", "frozen": "own"}
    assert format_of_run(tmp_path, now) is not None
    assert Ledger(tmp_path, now).get("P1", "data") == {"figure": 1}
    other = {**now, "frozen": "int8"}
    assert format_of_run(tmp_path, other) is None
    with pytest.raises(InputError, match="holds a run with frozen='own', and now it is 'int8'"):
        Ledger(tmp_path, other)


def test_overwriting_removes_what_the_run_made_and_nothing_else(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {"a": 1})
    prompt = Prompt("[P] {x} [MASK]", vectors=torch.ones(1, 4))
    prompt.save(ledger.prompt("P1"))
    ledger.put("P1", "data", {"figure": 1})
    checkpoint.save(ledger.running("P2"), 1, {"step": 1})
    for place in ("prompts", "running", "done"):
        (tmp_path / place / "mine").mkdir()
        (tmp_path / place / "mine" / "x").touch()
    (tmp_path / "done/mine.json").write_text('{"tasks": []}')
    with pytest.raises(InputError, match="holds a run with a=1, and now it is 2"):
        Ledger(tmp_path, {"a": 2})
    again = Ledger(tmp_path, {"a": 2}, overwrite=True)
    assert again.get("P1", "data") is None
    mine = {f"{place}/mine/x" for place in ("prompts", "running", "done")}
    assert entries(tmp_path) == {"run.json", "done/mine.json", *mine}


def test_a_run_goes_on_writing_where_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(Path("out"), {})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    ledger.put("P1", "data", {"figure": 1})
    assert entries(tmp_path) == {"out/run.json", "out/done/P1.json"}


@pytest.mark.parametrize("part", ["../../precious", "/tmp/x", "..", ""])
def test_a_parts_name_never_leads_out_of_the_folder(part: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "out", {})
    for place in (ledger.running, ledger.prompt, lambda name: ledger.put(name, "", {})):
        with pytest.raises(InputError, match="cannot be the name of a file"):
            place(part)


def test_a_finished_parts_checkpoints_go(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {})
    checkpoint.save(ledger.running("P1"), 1, {"step": 1})
    ledger.put("P1", "data", {"figure": 1})
    assert not (tmp_path / "running").exists()
    checkpoint.save(ledger.running("P1"), 1, {"step": 1})  # as a kill behind the result leaves it
    assert ledger.get("P1", "data") == {"figure": 1}
    assert not (tmp_path / "running").exists()


@pytest.mark.parametrize("name", ["run.yaml", "run.json", "notes.txt"])
def test_a_folder_that_holds_something_else_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="is not empty; choose another folder, or --overwrite"):
        Ledger(tmp_path, {"a": 1})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}
    Ledger(tmp_path, {"a": 1}, overwrite=True)
    assert (tmp_path / "run.json").read_text() != "mine"


def test_the_settings_of_a_run_stay_while_its_first_part_is_not_finished(tmp_path: Path) -> None:
    checkpoint.save(Ledger(tmp_path, {"a": 1}).running("P1"), 1, {"step": 1})
    with pytest.raises(InputError, match="holds a run with a=1, and now it is 2"):
        Ledger(tmp_path, {"a": 2})
    assert '"a": 1' in (tmp_path / "run.json").read_text()
    Ledger(tmp_path, {"a": 1})
