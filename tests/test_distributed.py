"""Two processes train what one trains, and neither waits for one that has failed.

The scenarios run once in two real processes (gloo) and once in this one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import ptuning
from ptuning import distributed
from ptuning.cli import main
from ptuning.forward.engine import Engine
from ptuning.training.loop import Loop
from ptuning.training.progress import Progress

from . import tiny

pytestmark = pytest.mark.xdist_group("distributed")  # the processes run once for all tests here

TEMPLATE = "[P*2] {country} [P*2] [MASK]"
CAPITALS = ["Paris", "Rome", "Berlin", "Madrid", "Lisbon", "Vienna", "Ottawa"]
COUNTRIES = ["France", "Italy", "Germany", "Spain", "Portugal", "Austria", "Canada"]
ROWS = [{"country": a, "capital": b} for a, b in zip(COUNTRIES, CAPITALS, strict=True)]
LABELLED = [{"country": a, "label": n % 2} for n, a in enumerate(COUNTRIES)]
LONG = "Berlin, Madrid, Lisbon and Vienna are cities of Europe; {country} [P*3] [MASK]"
Outcome = dict[str, Any]


class Stopped(Exception):
    pass


def trained(family: str = "llama", rows: Any = ROWS, **options: Any) -> Outcome:
    """One training: its prompt's vectors, each member's, history, figures, and steps heard."""
    made = options.pop("prompt", {})
    prompt = ptuning.Prompt(**{"template": TEMPLATE, "answer": "capital", **made})
    learners: list[Any] = []
    heard: list[int] = []
    original = Loop.train

    def train(self: Loop, resume: bool) -> list[Any]:
        learners.extend(original(self, resume))
        return learners

    Loop.train = train  # type: ignore[method-assign]
    try:
        result = ptuning.train(
            tiny.model(family),
            tiny.tokenizer(around=family not in tiny.CAUSAL),
            prompt,
            rows,
            **{
                "dev": rows[:3],
                "batch_size": 3,
                "epochs": 8,
                "learning_rate": 1e-2,
                "listener": lambda progress: heard.append(progress.step),
                **options,
            },
        )
    finally:
        Loop.train = original  # type: ignore[method-assign]
    return {
        "vectors": prompt.vectors,
        "members": [learner.made()["vectors"] for learner in learners],
        "history": [learner.history for learner in learners],
        "dropped": [member["dropped"] for member in result.members],
        "winner": result.winner,
        "steps heard": heard,
    }


def interrupted_and_resumed(folder: Path) -> Outcome:
    options: dict[str, Any] = {"output": folder / "run", "population": 2, "checkpoint_seconds": 0.0}

    def stop(progress: Progress) -> None:
        if progress.step == 11:
            raise Stopped("here")

    fault = failure(lambda: trained(**options, listener=stop))
    return {**trained(**options, resume=True), "fault": fault}


def failure(work: Callable[[], Any]) -> tuple[str, str, bool]:
    """How `work` fails: the error's type and text, and whether another process says it."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "heard_elsewhere", False)
    return "", "it did not fail", False


def rank() -> int:
    return int(os.environ.get("RANK", 0))


TRAININGS: dict[str, Callable[[Path], Outcome]] = {
    "odd sizes": lambda _: trained(),
    "fewer examples than processes, with dropout": lambda _: trained(
        prompt={"encoder": "lstm", "encoder_dropout": 0.4}, batch_size=1, epochs=4
    ),
    "parts of a micro-batch share their dropout": lambda _: trained(
        rows=ROWS * 8,
        prompt={"encoder": "lstm", "encoder_dropout": 0.4, "template": "Oslo " * 10 + TEMPLATE},
        batch_size=60,
        epochs=20,
    ),
    "accumulated gradients and labels": lambda _: trained(
        rows=LABELLED,
        prompt={"answer": None, "verbalizer": {"0": "yes", "1": "no, not"}},
        batch_size=2,
        gradient_accumulation=3,
        epochs=10,
    ),
    "a population with a grid, halved": lambda _: trained(
        population=2, grid={"learning_rate": [3e-2, 1e-3]}, batch_size=2, epochs=9
    ),
    "a member that is not finite": lambda _: trained(grid={"learning_rate": [1e30, 3e-2]}),
    "kept prefixes": lambda _: trained(prompt={"template": LONG}),
    "no prefix is kept": lambda _: trained(prompt={"template": LONG}, prefix_cache="off"),
    "masked": lambda _: trained("bert", epochs=4),
    "encoder-decoder": lambda _: trained("t5", epochs=4),
    "the model too, fewer rows than processes": lambda _: trained(
        rows=ROWS[:4], batch_size=3, epochs=4, tune_model=True, model_learning_rate=1e-3
    ),
    "an early stop": lambda _: trained(
        learning_rate=0.05, patience=1, epochs=30, schedule="constant"
    ),
}
FAILURES: dict[str, Callable[[], Any]] = {
    "no member is finite": lambda: trained(learning_rate=1e30),
    "one process fails in a step": lambda: fail_in_one_process(at=1),
    "a listener fails": lambda: fail_in_one_process(at=0),
    "other data": lambda: trained(rows=ROWS[: 6 + rank()]),
    "wrong input in one": lambda: trained(rows=[{"country": "Oslo"}] if rank() else ROWS),
}


def fail_in_one_process(at: int) -> Outcome:
    """Process 1 fails while it trains, or the main process where it reports."""
    if at == 0:
        return trained(listener=lambda progress: 1 // 0)
    original = Engine.batches
    steps = count(1)

    def batches(self: Engine, *rows: Any) -> Any:
        if rank() == 1 and next(steps) == 5:
            raise MemoryError("no room")
        return original(self, *rows)

    Engine.batches = batches  # type: ignore[method-assign]
    try:
        return trained()
    finally:
        Engine.batches = original  # type: ignore[method-assign]


def without_memory_for_a_refit() -> Outcome:
    """Process 1 has no memory left when what dev chose goes on: as if nothing had to go on."""
    original = Loop._optimizer_step

    def step(self: Loop, *where: Any) -> Any:
        if rank() == 1 and self.goes_on and self.step == 2:
            raise torch.OutOfMemoryError("2 GiB wanted")
        return original(self, *where)

    chosen = trained(epochs=4)
    Loop._optimizer_step = step  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            whole = trained(epochs=4, refit=True)
    finally:
        Loop._optimizer_step = original  # type: ignore[method-assign]
    stays = torch.equal(whole["vectors"], chosen["vectors"])
    return {"stays": stays, "told": [str(warning.message) for warning in told]}


def distilled() -> dict[str, Any]:
    """What is told of a prompt beside its teacher, whose bias is measured first."""
    prompt = ptuning.Prompt(TEMPLATE, verbalizer={"0": "yes", "1": "no"})
    found = ptuning.distill(
        tiny.model("llama"),
        tiny.tokenizer(around=False),
        prompt,
        LABELLED,
        dev=LABELLED,
        teacher="Paris, Rome and Berlin",
        calibrate_teacher=True,
        epochs=1,
        verbose=False,
    )
    return found.agreement.to_dict()


def everything(folder: Path) -> dict[str, Any]:
    """What all scenarios give in this process; those that fail stand between two that do not."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: failure(work) for name, work in FAILURES.items()}
    found["no memory for a refit"] = without_memory_for_a_refit()
    found |= {name: work(folder) for name, work in TRAININGS.items()}
    found["resumed"] = interrupted_and_resumed(folder)
    found["distilled"] = distilled()
    return found


def environment_of(process: int, port: int) -> dict[str, str]:
    """What a launcher sets."""
    return {
        "RANK": str(process),
        "LOCAL_RANK": str(process),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",  # one GPU would be too few for two processes
    }


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def worker(process: int, folder: Path, port: int) -> None:
    os.environ |= environment_of(process, port)
    found = everything(folder / str(process))
    found["processes"] = distributed.count()
    torch.save(found, folder / f"{process}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("two")
    running = torch.multiprocessing.spawn(worker, (folder, free_port()), nprocs=2, join=False)
    try:
        end = time.monotonic() + 300
        while not running.join(timeout=1):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in running.processes:
            process.kill()
    assert not (folder / "1").exists()  # the main process alone writes
    return [torch.load(folder / f"{n}.pt", weights_only=False) for n in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("one")
    with tiny.on_cpu():
        found = {name: work(folder) for name, work in TRAININGS.items()}
        return {**found, "resumed": interrupted_and_resumed(folder)}


@pytest.mark.parametrize("name", [*TRAININGS, "resumed"])
def test_two_processes_train_what_one_trains(name: str, one: Any, two: Any) -> None:
    alone = one[name]
    assert two[0]["processes"] == 2
    for together in (process[name] for process in two):
        torch.testing.assert_close(together["vectors"], alone["vectors"], atol=1e-5, rtol=1e-6)
        for number, epoch in enumerate(alone["dropped"]):
            records = [pytest.approx(record, abs=1e-4) for record in alone["history"][number]]
            assert together["history"][number] == records
            if len(records) > 1 and epoch is None:
                vectors = together["members"][number], alone["members"][number]
                torch.testing.assert_close(*vectors, atol=1e-5, rtol=1e-6)
        assert together["dropped"] == alone["dropped"] and together["winner"] == alone["winner"]
    assert torch.equal(two[0][name]["vectors"], two[1][name]["vectors"])
    assert two[0][name]["history"] == two[1][name]["history"]
    assert two[0][name]["steps heard"] == alone["steps heard"] and not two[1][name]["steps heard"]


def test_all_processes_are_told_the_same_of_a_teacher(two: Any) -> None:
    assert two[0]["distilled"] == two[1]["distilled"]


def test_the_scenarios_are_what_they_are_called(one: Any) -> None:
    assert any(one["a population with a grid, halved"]["dropped"])
    assert 1 < len(one["an early stop"]["history"][0]) < 30
    assert len(one["a member that is not finite"]["history"][0]) < 8
    assert one["resumed"]["steps heard"][0] >= 11


def test_a_failure_is_everyones_and_one_says_it(two: Any) -> None:
    first, second = two
    fault = "the loss is|the gradient is not finite"
    for process in two:
        assert process["no member is finite"][0] == "TrainingError"
        assert any(part in process["no member is finite"][1] for part in fault.split("|"))
    assert (first["no member is finite"][2], second["no member is finite"][2]) == (False, True)
    name = "one process fails in a step"
    assert second[name] == ("MemoryError", "no room", False)
    assert first[name] == ("PtuningError", "process 1 has failed: MemoryError: no room", True)
    assert first["a listener fails"][0] == "ZeroDivisionError"
    assert "process 0 has failed: ZeroDivisionError" in second["a listener fails"][1]
    assert "the data differs between" in second["other data"][1] and not second["other data"][2]
    assert first["other data"][0] == "InputError" and first["other data"][2]
    assert second["wrong input in one"][0] == "DataError"
    assert first["wrong input in one"][0] == "InputError"
    assert first["resumed"]["fault"] == ("Stopped", "here", False)


def test_a_refit_that_one_process_cannot_do_is_left_by_all(two: Any) -> None:
    for process, who in zip(two, ["process 1 has failed: ", ""], strict=True):
        found = process["no memory for a refit"]
        assert found["stays"]
        assert any(f"what dev chose stays: {who}2 GiB wanted" in told for told in found["told"])


def command(folder: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "ptuning", "train", "--model", f"{folder}/model",
        "--data", f"{folder}/rows.jsonl", "--dev", f"{folder}/rows.jsonl", "--answer", "capital",
        "--template", TEMPLATE, "--epochs", "3", "--batch-size", "3", "--population", "2", *more,
    ]  # fmt: skip


def run_in_two(arguments: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process."""
    port = free_port()
    started = [
        subprocess.Popen(
            arguments,
            env={**os.environ, **environment_of(process, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        heard = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, heard, strict=True)]


def test_a_process_leaves_the_others_before_the_interpreter_ends() -> None:
    """Where gloo's threads outlive it, the process aborts now and then, however well it went."""
    script = """
import atexit
import torch
joined = torch.distributed.is_initialized
atexit.register(lambda: print("joined:", joined()))  # the last to run
from ptuning import distributed
print(distributed.from_main(lambda: "told"), joined())
"""
    for outcome in run_in_two([sys.executable, "-c", script]):
        assert outcome[:2] == (0, "told True\njoined: False\n"), outcome


@pytest.mark.usefixtures("on_cpu")
def test_the_command_line_writes_and_speaks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    alone = command(tmp_path, "--output", f"{tmp_path}/alone")
    monkeypatch.setattr(sys, "argv", alone[2:])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    together = command(tmp_path, "--output", f"{tmp_path}/together")
    (code, out, err), (other_code, other_out, other_err) = run_in_two([*together, "--json"])
    assert (code, other_code) == (0, 0), (err, other_err)
    assert not other_out and "epoch" not in other_err and err.count("epoch 3 of 3") == 1
    expected = json.loads((tmp_path / "alone" / "result.json").read_text())
    for record, other in zip(json.loads(out)["history"], expected["history"], strict=True):
        assert record == pytest.approx(other, abs=1e-4)
    vectors = [
        ptuning.Prompt.load(tmp_path / name).trained_vectors() for name in ("alone", "together")
    ]
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=1e-6)
    files = {path.name for path in (tmp_path / "together").iterdir()}
    assert files == {path.name for path in (tmp_path / "alone").iterdir()}
    refused = run_in_two(together)
    assert [code for code, _, _ in refused] == [2, 2]
    said = "".join(err for _, _, err in refused)
    assert said.count("error:") == 1 and "holds a saved prompt" in said


def test_commands_of_one_process_are_refused_in_several(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("predict", "evaluate", "report", "merge", "export", "inspect", "serve"):
        code, out, err = run(command, "folder")
        assert (code, out) == (2, "")
        said = f"ptuning {command} runs in one process, and 2 were started"
        assert said in " ".join(err.split()), err
