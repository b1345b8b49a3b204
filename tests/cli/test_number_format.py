"""The number format that commands choose is said, written down, and kept where a run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ptuning import Prompt
from ptuning.backbone import number_format
from ptuning.data.partial import Partial

from ..scaffold import Run

Machine = Callable[[float], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Sets how many times as fast as in float32 a machine multiplies in bfloat16."""
    monkeypatch.setattr(number_format, "_SMALL", 0)
    monkeypatch.chdir(tmp_path)
    rows = [{"country": f"town {n}", "capital": "Paris"} for n in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def another(ratio: float) -> None:
        monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / f"cache-{ratio}"))
        found = {"float32": ratio, "bfloat16": 1.0}
        monkeypatch.setattr(number_format, "measured", lambda shape: found)

    return another


def settings(output: str) -> Any:
    return yaml.safe_load((Path(output) / "run.yaml").read_text())


@pytest.fixture
def train(run: Run, model_folder: Path) -> Run:
    def call(output: str, *flags: str) -> tuple[int, str, str]:
        template = ("--template", "[P*2] {country} [MASK]", "--answer", "capital")
        where = ("--model", model_folder, "--data", "rows.jsonl", "--output", output)
        return run("train", *where, *template, "--epochs", "3", *flags)

    return call


@pytest.mark.usefixtures("on_cpu")
def test_the_format_is_said_written_down_and_kept_on_another_machine(
    machine: Machine, train: Run, run: Run, ctrl_c_after: Callable[[int | None], None]
) -> None:
    machine(4.0)
    code, _, err = train("whole")
    assert code == 0 and "in bfloat16: this processor multiplies 4.0 times as fast" in err
    ctrl_c_after(1)
    assert train("out")[0] == 130
    ctrl_c_after(None)
    machine(1.0)
    code, _, err = run("train", "--output", "out", "--resume")
    assert code == 0, err
    assert settings("out")["dtype"] == settings("whole")["dtype"] == "bfloat16"
    code, _, _ = train("named", "--dtype", "bfloat16")
    assert code == 0 and settings("named")["dtype"] == "bfloat16"
    whole, out = (Prompt.load(folder).trained_vectors() for folder in ("whole", "out"))
    assert torch.equal(whole, out)
    code, _, err = train("slow")
    assert code == 0 and settings("slow")["dtype"] == "float32"
    assert "in float32: this processor multiplies 1.0 times as fast in bfloat16" in err


@pytest.mark.parametrize("flags", [["--tune-model"], ["--mixed-precision", "bf16"]])
def test_weights_that_are_trained_or_rounded_on_the_way_stay_float32(
    flags: list[str], machine: Machine, train: Run
) -> None:
    machine(4.0)
    code, _, err = train("out", *flags)
    assert code == 0 and "in float32: " in err
    assert settings("out")["dtype"] == "float32"


@pytest.mark.usefixtures("on_cpu")
def test_a_prediction_goes_on_in_the_format_that_it_was_begun_in(
    machine: Machine, train: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(4.0)
    train("prompt")
    given = ("predict", "prompt", "--data", "rows.jsonl", "--batch-size", "1")
    assert run(*given, "--output", "whole.jsonl")[0] == 0
    add = Partial.add

    def stop(self: Partial, rows: Any) -> None:
        add(self, rows[:3])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "add", stop)
        assert run(*given, "--output", "out.jsonl")[0] == 130
    machine(1.0)
    code, _, err = run(*given, "--output", "out.jsonl", "--resume")
    assert code == 0 and "in bfloat16: the interrupted run was begun in it" in err
    assert Path("out.jsonl").read_text() == Path("whole.jsonl").read_text()
    code, _, err = run("evaluate", "prompt", "--data", "rows.jsonl")
    assert code == 0 and "bfloat16" not in err  # on a machine that gains nothing


@pytest.mark.usefixtures("on_cpu")
def test_an_experiment_goes_on_in_the_format_that_it_was_begun_in(
    machine: Machine, run: Run, model_folder: Path
) -> None:
    Path("lama").mkdir()
    relations = [
        {"relation": name, "template": f"[X] {name} [Y] .", "label": "place"}
        for name in ("P1", "P2")
    ]
    Path("lama/relations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in relations))
    facts = [{"sub_label": f"town {n}", "obj_label": "Paris"} for n in range(12)]
    for name in ("P1", "P2"):
        Path(f"lama/{name}.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))

    def lama(*more: str) -> str:
        options = ("--data", "lama", "--epochs", "1", "--encoder", "none", "--output", "out")
        code, _, err = run("lama", "--model", model_folder, *options, *more)
        assert code == 0, err
        return str(json.loads(Path("out/lama.json").read_text())["settings"]["dtype"])

    machine(4.0)
    assert lama("--relations", "P1") == "bfloat16"
    machine(1.0)
    assert lama("--relations", "P1,P2") == "bfloat16"
    assert lama("--relations", "P1,P2", "--overwrite") == "float32"


@pytest.mark.usefixtures("on_cpu")
def test_layers_in_eight_bits_are_said_written_down_and_gone_on_with(
    machine: Machine, train: Run, run: Run, ctrl_c_after: Callable[[int | None], None]
) -> None:
    machine(1.0)
    code, _, err = train("whole", "--frozen", "int8")
    assert code == 0 and "in float32, its layers in int8" in err
    assert settings("whole")["frozen"] == "int8"
    ctrl_c_after(1)
    assert train("half", "--frozen", "int8", "--checkpoint-seconds", "0")[0] != 0
    ctrl_c_after(None)
    code, _, err = run("train", "--output", "half", "--resume")
    assert code == 0 and "its layers in int8" in err
    vectors = [Prompt.load(name).trained_vectors() for name in ("whole", "half")]
    assert torch.equal(*vectors)
    assert train("plain")[0] == 0
    assert not torch.equal(vectors[0], Prompt.load("plain").trained_vectors())
    code, _, err = run("predict", "whole", "--data", "rows.jsonl", "--output", "a.jsonl")
    assert code == 0 and "layers" not in err
    code, _, err = run(*("evaluate", "whole", "--data", "rows.jsonl", "--frozen", "fp8", "--json"))
    assert code == 0 and "its layers in fp8" in err
    for line in (
        ("predict", "whole", "--data", "rows.jsonl", "--output", "b.jsonl"),
        ("report", "whole", "--data", "rows.jsonl"),
    ):
        code, _, err = run(*line, "--frozen", "int8")
        assert code == 0 and err.count("loading") == 1 and "its layers in int8" in err
    where = ("--backend", "vllm", "--url", "http://127.0.0.1:9")
    code, _, err = run("serve", "whole", *where, "--frozen", "int8")
    assert code == 2 and "--frozen is for --backend local" in err
    code, _, err = run("demo", "--frozen", "int4")
    assert code == 2 and "frozen is 'int4'" in err and "loading" not in err
    code, _, err = train("no", "--frozen", "int4")
    assert code == 2 and "frozen is 'int4'; expected one of own, int8, fp8" in err
    assert not Path("no").exists()


@pytest.mark.usefixtures("on_cpu")
def test_a_prediction_goes_on_only_in_the_eight_bits_that_it_was_begun_in(
    machine: Machine, train: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1.0)
    assert train("whole")[0] == 0
    ask = ("predict", "whole", "--data", "rows.jsonl", "--output", "a.jsonl", "--frozen", "int8")
    with monkeypatch.context() as patch:
        patch.setattr(Partial, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*ask)[0] != 0
    code, _, err = run(*ask[:-2], "--resume")
    assert "layers" not in err
    assert code == 2 and "was made with another prompt, model or option" in err
    assert run(*ask, "--resume")[0] == 0
