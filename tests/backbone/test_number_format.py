"""Which number format a model is loaded in, and that prompts go from one format to another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import ptuning
from ptuning.backbone import number_format
from ptuning.backbone.load import choose_dtype, load_as_saved, load_model
from ptuning.backbone.number_format import Choice, fastest, measured
from ptuning.errors import InputError

from .. import tiny
from ..scaffold import saved

CPU = torch.device("cpu")


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The machine's measurement: how many times as fast bfloat16 is, and how often it was made."""
    told = {"ratio": 4.0, "asked": 0}

    def fake(shape: tuple[int, int]) -> dict[str, float]:
        told["asked"] += 1
        return {"float32": told["ratio"], "bfloat16": 1.0}

    monkeypatch.setattr(number_format, "measured", fake)
    monkeypatch.setattr(number_format, "_SMALL", 0)
    return told


@pytest.mark.parametrize(("ratio", "dtype"), [(4.0, "bfloat16"), (1.2, "float32")])
def test_a_cpu_takes_what_it_multiplies_fast_in(
    ratio: float, dtype: str, gains: dict[str, float], tmp_path: Path
) -> None:
    gains["ratio"] = ratio
    choice = fastest(tiny.model(), CPU, tmp_path)
    assert choice.dtype == dtype and f"{ratio} times as fast" in choice.why


def test_it_is_measured_once_for_a_processor_shape_and_number_of_threads(
    gains: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        fastest(tiny.model(), CPU, tmp_path)
    assert gains["asked"] == 1
    fastest(tiny.model("llama", intermediate_size=80), CPU, tmp_path)
    assert gains["asked"] == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 61)
    fastest(tiny.model(), CPU, tmp_path)
    assert gains["asked"] == 3
    (tmp_path / "number_formats.json").write_text('{"cut off')
    assert fastest(tiny.model(), CPU, tmp_path).dtype == "bfloat16" and gains["asked"] == 4


def test_without_a_place_to_keep_it_it_is_measured_each_time(
    gains: dict[str, float], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert fastest(tiny.model(), CPU, tmp_path / "file").dtype == "bfloat16"
    assert gains["asked"] == 2


def test_both_formats_are_measured() -> None:
    found = measured((48, 32))
    assert set(found) == {"float32", "bfloat16"} and min(found.values()) > 0


def test_small_models_stay_in_float32_on_every_device(tmp_path: Path) -> None:
    for device in ("cpu", "cuda", "mps"):
        assert fastest(tiny.model(), torch.device(device), tmp_path).dtype == "float32"


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cuda:0", "float32"), ("cuda:1", "bfloat16"), ("mps", "float32")],
)
def test_a_gpu_takes_bfloat16_where_it_has_it(
    device: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by itself: there are machines with an old and a new one."""
    monkeypatch.setattr(number_format, "_SMALL", 0)
    current = [0]

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: current[-1] == 1
    )
    assert fastest(tiny.model(), torch.device(device), tmp_path).dtype == dtype


def test_the_loader_takes_the_chosen_a_named_or_the_model_s_own_format(
    gains: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "cache"))
    folder = str(saved(tiny.model().to(torch.float16), tiny.tokenizer(), tmp_path / "model"))
    found = {d: load_model(folder, dtype=d, device="cpu")[0].dtype for d in ("auto", "own")}
    assert found == {"auto": torch.bfloat16, "own": torch.float16}
    assert load_as_saved(folder)[0].dtype == torch.float16
    assert load_as_saved(folder, "float32")[0].dtype == torch.float32
    assert choose_dtype(folder, "float16") == Choice("float16")
    assert gains["asked"] == 1
    with pytest.raises(InputError, match=r"absent\.gguf does not exist"):
        choose_dtype("absent.gguf")
    with pytest.raises(InputError, match="dtype is 'int4'"):
        choose_dtype("nobody/nothing", "int4")


def pair(**options: Any) -> tuple[Any, Any]:
    """The same tiny model in float32 and bfloat16."""
    torch.manual_seed(0)
    model = tiny.model(**options)
    other = tiny.model(**options).to(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    return model, other


@pytest.mark.parametrize("first", [0, 1])
def test_a_prompt_of_one_format_serves_the_other(first: int) -> None:
    models, tokenizer = pair(), tiny.tokenizer()
    there, here = models[first], models[1 - first]
    prompt = ptuning.Prompt("[P*3] {text} [MASK]", verbalizer={"a": "Paris", "b": "Rome"})
    rows = [{"text": f"town {n}", "label": "ab"[n % 2]} for n in range(6)]
    ptuning.train(there, tokenizer, prompt, rows, epochs=1, verbose=False)
    assert prompt.trained_vectors().dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is the same model, whatever its format
        found = [ptuning.predict_details(model, tokenizer, prompt, rows) for model in (there, here)]
    for mine, other in zip(*found, strict=True):
        assert mine.probability == pytest.approx(other.probability, abs=0.02)
    torch.nn.init.normal_(here.get_input_embeddings().weight)
    with pytest.warns(UserWarning, match="has other weights"):
        ptuning.predict(here, tokenizer, prompt, rows)


def test_a_run_is_resumed_in_its_own_format(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    rows = [{"text": f"town {n}", "answer": "Paris"} for n in range(8)]

    def train(model: Any, epochs: int = 2, resume: bool = True) -> ptuning.TrainResult:
        prompt = ptuning.Prompt("[P*3] {text} [MASK]")
        return ptuning.train(
            model, tokenizer, prompt, rows, output=tmp_path, resume=resume, verbose=False,
            epochs=epochs, schedule="constant",
        )  # fmt: skip

    full, half = pair()
    train(half, resume=False)
    with pytest.raises(InputError, match=r'dtype differs .*then "bfloat16", now "float32"'):
        train(full)
    assert len(train(half).history) == 2
