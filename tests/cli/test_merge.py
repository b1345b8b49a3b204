"""``ptuning merge``: model folders written, added to and taken from; mistakes in one line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ptuning import Prompt, load_model, storage
from ptuning.backbone.identity import describe
from ptuning.cli import main
from ptuning.inference.merging import fingerprint

from .. import tiny

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`ptuning merge` in a folder with a tiny model and three prompts for it."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.tokenizer()
    tiny.model("llama", vocab_size=len(tokenizer)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    model, tokenizer = load_model("base")
    for name in ("one", "two", "other/one"):
        prompt = Prompt("[P*2] {country} [P] [MASK]", answer="capital")
        prompt.vectors = torch.randn(3, 32)
        prompt.base_model = describe(model, tokenizer)
        prompt.save(name)
    capsys.readouterr()

    def call(*arguments: Any) -> tuple[int, str, str]:
        others = ("export", "predict", "evaluate")
        command = [] if arguments[0] in others else ["merge"]
        monkeypatch.setattr(sys, "argv", ["ptuning", *command, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out, captured.err

    return call


def _table(folder: str = "merged") -> dict[str, Any]:
    return json.loads(Path(folder, "prompts.json").read_text())


def test_prompts_become_a_model_folder_that_says_what_to_ask(run: Run) -> None:
    code, out, err = run("one", "two", "--output", "merged", "--model", "base")
    assert code == 0, err
    assert out == "2 prompts in merged: one, two\n"
    assert _table()["one"] == {
        "text": "<|one:0|><|one:1|> {country}<|one:2|>",
        "virtual_ids": [400, 401, 402],
        "labels": None,
        "vectors": fingerprint(Prompt.load("one")),
    }
    model, tokenizer = load_model("merged")
    assert tokenizer("<|two:1|>")["input_ids"] == [404] and model.config.vocab_size == 406


def test_prompts_are_added_replaced_and_removed(run: Run) -> None:
    assert run("one", "--output", "merged")[0] == 0  # the model is the prompt's own
    assert run("two", "--output", "merged")[0] == 0
    assert list(_table()) == ["one", "two"]
    code, _, err = run("other/one", "--output", "merged")
    assert code == 2 and "'one' is merged already" in err
    assert run("other/one", "--output", "merged", "--overwrite")[0] == 0
    code, out, _ = run("--output", "merged", "--remove", "two", "--json")
    assert code == 0 and list(json.loads(out)["prompts"]) == ["one"]
    code, _, err = run("--output", "merged", "--remove", "two")
    assert code == 2 and "no merged prompt is called 'two'; there are one" in err
    assert run("two", "--model", "merged", "--output", "more")[0] == 0
    assert list(_table("more")) == ["one", "two"] and list(_table()) == ["one"]
    assert run("--output", "merged", "--remove", "one")[:2] == (0, "0 prompts in merged\n")


def test_of_many_prompts_the_first_are_named(run: Run) -> None:
    many = [str(shutil.copytree("one", f"many/p{n:02}")) for n in range(25)]
    code, out, err = run(*many, "--output", "merged", "--model", "base")
    assert code == 0, err
    named = ", ".join(f"p{n:02}" for n in range(20))
    assert out == f"25 prompts in merged: {named}, and 5 more\n" and len(_table()) == 25


def test_mistakes_are_one_line_and_change_nothing(run: Run) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("x")
    shutil.copytree("one", "my one")
    assert run("one", "--output", "merged")[0] == 0
    before = _table()
    for arguments, told in [
        (["--output", "x"], "nothing to merge"),
        (["one", "other/one", "--output", "x"], "would both be called 'one'"),
        (["one", "--name", "a", "--name", "b", "--output", "x"], "2 times for 1 prompts"),
        (["one", "--name", "../a", "--output", "x"], "cannot name a merged prompt"),
        (["my one", "--output", "x"], "ptuning merge --name gives another"),
        (["one", "--output", "full"], "holds no merged model"),
        (["one", "--output", "full/mine.txt"], "is a file"),
        (["two", "--output", "merged", "--model", "base"], "is a merged model; leave --model"),
        (["nowhere", "--output", "x"], "nowhere is not a folder"),
        (["--remove", "a", "--output", "x"], "none is given"),
        (["one", "--output", "x", "--dtype", "int3"], "dtype is 'int3'"),
    ]:
        code, _, err = run(*arguments)
        assert code == 2 and told in err, (arguments, err)
        assert err.count("error:") == 1 and "Traceback" not in err
    assert not Path("x").exists() and _table() == before


def test_a_prompt_of_another_model_is_refused(run: Run) -> None:
    tokenizer = tiny.tokenizer()
    tiny.model("llama", vocab_size=len(tokenizer), seed=5).save_pretrained("another")
    tokenizer.save_pretrained("another")
    code, _, err = run("one", "--output", "x", "--model", "another")
    assert code == 2 and "has other weights" in err and not Path("x").exists()


def test_a_merged_model_or_a_prompt_becomes_a_gguf_file(run: Run) -> None:
    assert run("one", "two", "--output", "merged", "--model", "base")[0] == 0
    code, out, err = run("export", "merged", "--to", "gguf", "--output", "out")
    assert code == 0 and out == "model.gguf and prompts.json in out\n", err
    assert list(_table("out")) == ["one", "two"] and Path("out/model.gguf").is_file()
    code, _, err = run("export", "other/one", "--to", "gguf", "--output", "alone")
    assert code == 0 and list(_table("alone")) == ["one"], err
    code, _, err = run("export", "merged", "--to", "gguf", "--output", "merged")
    assert code == 2 and "choose another folder" in err
    code, _, err = run("export", "merged", "--to", "gguf", "--output", "x", "--model", "base")
    assert code == 2 and "--model goes with a saved prompt" in err


def test_a_prompt_is_exported(run: Run) -> None:
    code, out, err = run("export", "one", "--to", "vllm-embeds", "--output", "out")
    assert code == 0 and out == "vllm_embeds.json in out\n", err
    (Path("full")).mkdir()
    Path("full/adapter_model.safetensors").write_text("another method's")
    code, _, err = run("export", "one", "--to", "tensorrt-llm", "--output", "full")
    assert code == 2 and "full is not empty" in err and "--overwrite" in err
    code, _, err = run("export", "one", "--to", "tensorrt-llm", "--output", "full", "--overwrite")
    assert code == 0 and Path("full/adapter_model.safetensors").read_text() == "another method's"
    code, _, err = run("export", "one", "--to", "onnx", "--output", "x")
    assert code == 2 and "expected one of peft, vllm-embeds, tensorrt-llm" in err
    code, _, err = run("export", "one", "--to", "peft", "--output", "x")
    assert code == 2 and "PEFT puts virtual tokens in front" in err and not Path("x").exists()


@pytest.mark.skipif(os.name == "nt", reason="modes of files")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_merged_models_files_have_the_modes_that_the_umask_asks_for(run: Run, mask: int) -> None:
    before = os.umask(mask)
    try:
        assert run("one", "--output", "merged")[0] == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path("merged").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_two_merges_into_one_folder_do_not_lose_one_of_them(run: Run) -> None:
    with storage.locked("merged"):
        code, _, err = run("one", "--output", "merged", "--model", "base")
    assert code == 2 and "another run is using" in err and not Path("merged").exists()


def test_vectors_that_a_precision_cannot_hold_are_refused(run: Run) -> None:
    prompt = Prompt("[P*2] {country} [MASK]", answer="capital", answer_tokens=1)
    prompt.vectors = torch.full((2, 32), 1e5)
    prompt.save("large")
    Path("rows.csv").write_text("country,capital\nFrance,Paris\n")
    half = ("--model", "base", "--dtype", "float16")
    for command in (
        ["large", "--output", "out"],
        ["export", "large", "--to", "vllm-embeds", "--output", "out"],
        ["predict", "large", "--data", "rows.csv"],
        ["evaluate", "large", "--data", "rows.csv"],
    ):
        code, out, err = run(*command, *half)
        assert code == 2 and "reach 1.0e+05, which the model's float16 cannot hold" in err, err
        assert not out and not Path("out").exists()
    assert run("large", "--output", "out", "--model", "base")[0] == 0
