"""The code blocks of README and docs run as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from .scaffold import Run

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
FACTS = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Poland", "Warsaw")]


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_folder: Path) -> Path:
    """The files that the documentation speaks of, in the current folder."""
    monkeypatch.chdir(tmp_path)
    text = "country,capital\n" + "".join(f"{a},{b}\n" for a, b in FACTS)
    for name in ("train", "dev", "test", "new"):
        (tmp_path / f"{name}.csv").write_text(text)
    tickets = "text,team\n" + "My card was charged,billing\nMy password is lost,access\n" * 5
    for name in ("tickets", "test_tickets"):
        (tmp_path / f"{name}.csv").write_text(tickets)
    (tmp_path / "lama").mkdir()
    relation = {"relation": "P36", "template": "The capital of [X] is [Y] .", "label": "capital"}
    (tmp_path / "lama/relations.jsonl").write_text(json.dumps(relation))
    facts = [json.dumps({"sub_label": a, "obj_label": b}) for a, b in FACTS]
    (tmp_path / "lama/P36.jsonl").write_text("\n".join(facts))
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page: str, workplace: Path) -> None:
    namespace: dict[str, Any] = {}
    for block in _blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)


def test_command_lines_of_the_readme_run_in_order(workplace: Path, run: Run) -> None:
    lines = "\n".join(_blocks("README.md", "bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("ptuning ")]
    assert [command[1] for command in commands] == [
        *("fetch", "train", "evaluate"),
        "fetch",
        "train",
        "evaluate",
        "predict",
        "inspect",
        "lama",
    ]
    for command in commands:
        if command[1] in ("train", "lama"):
            command += ["--epochs", "1"]
        code, _, err = run(*command[1:])
        assert code == 0, err
    assert len((workplace / "answers.jsonl").read_text().splitlines()) == len(FACTS)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
