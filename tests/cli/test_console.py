"""What is printed is harmless, whatever a file or a name holds."""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ptuning
from ptuning import distributed
from ptuning.backbone.identity import describe
from ptuning.cli import console, main
from ptuning.devices import best_device

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


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_stdout_that_has_not_all_characters_gets_escapes(encoding: str) -> None:
    program = """if True:
        from ptuning.cli import console
        console.write_to_any_stdout()
        console.print_json({"Größe": "\\u6771\\U0001f600"}, indent=None)
        console.tell("\\u6771 saved")
        console.table("\\u6771", ["\\u6771"], [["\\U0001f600"]])
    """
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    lines = done.stdout.decode(encoding).splitlines()
    assert json.loads(lines[0]) == {"Größe": "東😀"}
    assert lines[1] == r"\u6771 saved" and any(r"\U0001f600" in line for line in lines[2:])


def test_only_the_console_prints() -> None:
    for path in (Path(ptuning.__file__).parent / "cli").glob("*.py"):
        if path.name == "console.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "typer.echo", "typer.secho"), path.name
                assert not called.startswith(("console.out.", "console.err.")), path.name


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["ptuning", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_quiet_leaves_results_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    console.be_quiet(True)
    try:
        console.say("a note")
        console.warn("look out")
        console.complain("it failed")
        console.tell("42")
    finally:
        console.be_quiet(False)
    assert capsys.readouterr() == ("42\n", "warning: look out\nerror: it failed\n")


def test_libraries_say_nothing_of_their_own(tmp_path: Path, model_folder: Path) -> None:
    """Their bar while a model is read, and a notice where a text is as long as the model reads."""
    model, tokenizer = ptuning.load_model(str(model_folder))
    prompt = ptuning.Prompt("[P] {text} [MASK]", answer="answer", answer_tokens=2)
    prompt.vectors, prompt.base_model = torch.zeros(1, 32), describe(model, tokenizer)
    prompt.save(tmp_path / "prompt")
    (tmp_path / "texts.csv").write_text("text\n" + "x" * 400 + "\n")
    own = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
    command = [sys.executable, "-m", "ptuning", "predict", "prompt", "--data", "texts.csv"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in own},
    )
    told = "warning: 1 of 1 prediction examples were shortened to 128 tokens\n"
    assert (done.returncode, done.stderr) == (0, told)


def test_a_device_that_is_not_here_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PTUNING_DEVICE", "")  # what the option sets is undone
    assert _run(monkeypatch, "inspect", "nowhere", "--device", "gpu") == 2
    assert "--device is 'gpu'; give cpu, cuda" in capsys.readouterr().err
    monkeypatch.setenv("PTUNING_DEVICE", "xpu:7")
    with pytest.raises(ptuning.InputError, match="the device xpu:7 is not here; there is cpu"):
        best_device()
    monkeypatch.setenv("PTUNING_DEVICE", "cpu")
    assert best_device().type == "cpu" and distributed.state().device.type == "cpu"


@pytest.mark.parametrize("moment", ["import ptuning.cli.app", "app("])
def test_ctrl_c_while_it_starts_shows_no_traceback(moment: str) -> None:
    breaks = {
        "import ptuning.cli.app": "import sys; sys.modules['typer'] = Stop()",
        "app(": "import ptuning.cli.app as a; a.console.quiet_libraries = stop",
    }[moment]
    script = f"""
def stop(*_):
    raise KeyboardInterrupt
class Stop:
    def __getattr__(self, name):
        stop()
import sys
sys.argv = ["ptuning", "inspect", "nowhere"]
from ptuning.cli import main
{breaks}
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_ctrl_c_that_an_imported_library_takes_for_something_else_ends_the_program() -> None:
    script = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
class Imported:
    def __getattr__(self, name):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(9):
                pass
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None
sys.argv = ["ptuning", "inspect", "nowhere"]
from ptuning.cli import main
sys.modules["typer"] = Imported()
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_ctrl_c_of_which_a_library_makes_an_error_stops_the_command() -> None:
    script = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
from ptuning.cli import main, saved_prompt
def load(*_):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("Invalid bounding box") from None
saved_prompt.load = load
sys.argv = ["ptuning", "inspect", "nowhere"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_ctrl_c_while_it_ends_shows_no_traceback() -> None:
    script = """
import atexit, os, signal, sys
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv = ["ptuning", "--version"]
from ptuning.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"ptuning {ptuning.__version__}\n", "")
    assert done.returncode == -signal.SIGINT


def test_a_shell_can_complete_commands() -> None:
    environment = {**os.environ, "_PTUNING_COMPLETE": "complete_bash", "COMP_WORDS": "ptuning tra"}
    script = "import sys; sys.argv = ['ptuning']; from ptuning.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["train"] and done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_a_full_stdout_has_no_room_for_is_not_lost_unheard(
    tmp_path: Path, unbuffered: str
) -> None:
    program = """if True:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        from ptuning.cli import app, console
        app.app = lambda *_, **__: console.print_json(["x" * 9000])
        app.main()
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, stdout=out, stderr=subprocess.PIPE
        )
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: what stdout goes to is full (File too large)")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
def test_closed_streams_are_as_if_they_led_nowhere() -> None:
    program = """if True:
        from ptuning.cli import app, console, main
        app.app = lambda *_, **__: console.print_json({"answer": "Paris"}) or 0
        main()
    """
    command = ["sh", "-c", '"$0" -c "$1" <&- >&-', sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_full_stdout_is_said_in_words(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(console, "tell", full)
    code, _, err = run("--version")
    assert code == 1 and "what stdout goes to is full" in err and "OSError" not in err
