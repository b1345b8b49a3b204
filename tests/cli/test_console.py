"""What is printed is harmless, whatever a file or a name holds."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import ptuning
from ptuning.cli import console

EVIL = "\x1b]0;TITLE\x07\x9b31m\x7f\n\u202egpj.exe\u2028\ud800[red]"
SHOWN = r"\x1b]0;TITLE\x07\x9b31m\x7f\n\u202egpj.exe\u2028\ud800[red]"


def test_control_characters_are_shown_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(EVIL)
    console.tell(EVIL)
    console.table(EVIL, [EVIL], [[EVIL]])
    out, err = capsys.readouterr()
    assert err == SHOWN + "\n"
    assert out.splitlines()[0] == SHOWN
    assert not any(c in out for c in "\x1b\x07\x9b\x7f\u202e\u2028\ud800")


def test_ordinary_text_stays_as_it_is() -> None:
    text = "Zürich, 東京, [bold] שלום, n\u200dja 🙂 C:\\new"
    assert console.safe(text) == text


def test_json_is_safe_and_means_the_same() -> None:
    value = {EVIL: [EVIL, "Zürich", 1.5]}
    text = console.json_text(value)
    assert json.loads(text) == value and "Zürich" in text
    assert not any(c in text for c in "\x1b\x07\x9b\x7f\n\u202e\u2028\ud800")
    assert json.loads(console.json_text(value, indent=2)) == value


def test_only_the_console_prints() -> None:
    for path in (Path(ptuning.__file__).parent / "cli").glob("*.py"):
        if path.name == "console.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "typer.echo", "typer.secho"), path.name
                assert not called.startswith(("console.out.", "console.err.")), path.name
