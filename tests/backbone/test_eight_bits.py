"""Frozen layers in eight bits: what they are, what prompts are trained and asked on them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import ptuning
from ptuning import InputError, Prompt
from ptuning.backbone.eight_bits import (
    FORMATS,
    EightBitLinear,
    check_frozen,
    frozen_format,
    quantize,
)
from ptuning.backbone.traits import layer_weights

from .. import tiny

KINDS = pytest.mark.parametrize("frozen", FORMATS)
ROWS = [{"a": f"town {n}", "b": "yes" if n % 2 else "no"} for n in range(8)]


def _layer(frozen: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    plain = nn.Linear(32, 48, bias=bias, dtype=dtype)
    return plain, EightBitLinear(plain.weight, plain.bias, FORMATS[frozen], True)


def _weight(layer: EightBitLinear) -> Tensor:
    return layer.values.float() * layer.scales[:, None]


@KINDS
def test_what_eight_bits_hold_exactly_is_multiplied_exactly_in_both_directions(frozen: str) -> None:
    _, layer = _layer(frozen)
    small = torch.randint(-7, 8, (5, 32)).float()
    small[:, 0] = FORMATS[frozen].largest / 2**3  # so that a row's scale is a power of two
    hidden = small.requires_grad_()
    found = layer(hidden)
    expected = functional.linear(hidden, _weight(layer), layer.bias)
    torch.testing.assert_close(found, expected)

    gradient = torch.randint(-7, 8, (5, 48)).float()
    gradient[:, 0] = FORMATS[frozen].largest / 2**3
    (back,) = torch.autograd.grad(found, hidden, gradient / layer.scales)
    expected = (gradient / layer.scales) @ _weight(layer)
    torch.testing.assert_close(back, expected, atol=1e-3, rtol=1e-5)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_layer_but_for_the_rounding(frozen: str, dtype: torch.dtype) -> None:
    plain, layer = _layer(frozen, dtype)
    hidden = torch.randn(2, 7, 32).to(dtype).requires_grad_()
    outputs = [one(hidden) for one in (plain, layer)]
    gradients = [torch.autograd.grad(out.square().sum(), hidden)[0] for out in outputs]
    for expected, found in (outputs, gradients):
        assert found.dtype == dtype and found.shape == expected.shape
        error = (found - expected).float().norm() / expected.float().norm()
        assert error < {"int8": 0.02, "fp8": 0.05}[frozen]


@KINDS
def test_a_row_does_not_depend_on_its_batch(frozen: str) -> None:
    _, layer = _layer(frozen)
    hidden = torch.randn(20, 32)
    torch.testing.assert_close(layer(hidden)[3:5], layer(hidden[3:5]))
    assert layer(hidden[:0]).shape == (0, 48)
    torch.testing.assert_close(layer(torch.zeros(1, 32))[0], layer.bias)


@KINDS
def test_without_a_matrix_for_the_backward_product_one_is_made(frozen: str) -> None:
    plain, layer = _layer(frozen, bias=False)
    lean = EightBitLinear(plain.weight, None, FORMATS[frozen], False)
    assert lean.turned is None
    hidden = torch.randn(3, 32, requires_grad=True)
    gradients = [torch.autograd.grad(m(hidden).sum(), hidden)[0] for m in (layer, lean)]
    torch.testing.assert_close(*gradients)


@KINDS
def test_autocast_decides_the_format_as_it_does_for_the_plain_layer(frozen: str) -> None:
    plain, layer = _layer(frozen)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 32)).dtype == plain(torch.randn(2, 32)).dtype


@KINDS
def test_a_turned_matrix_is_read_as_it_stands(frozen: str) -> None:
    """GPT-2 keeps its matrices with the inputs first."""
    holder: Any = nn.Module()
    holder.layers = nn.ModuleList([nn.Sequential(Conv1D(48, 32)) for _ in range(2)])
    hidden = torch.randn(3, 32)
    expected = [layer(hidden) for layer in holder.layers]
    assert quantize(holder, frozen) == 2
    for layer, right in zip(holder.layers, expected, strict=True):
        assert (layer(hidden) - right).norm() / right.norm() < 0.06


@KINDS
def test_small_gradients_are_not_crushed(frozen: str) -> None:
    _, layer = _layer(frozen)
    hidden = torch.randn(3, 32, requires_grad=True)
    gradient = torch.randn(3, 48)
    (whole,) = torch.autograd.grad(layer(hidden), hidden, gradient)
    (small,) = torch.autograd.grad(layer(hidden), hidden, gradient * 1e-20)
    torch.testing.assert_close(small * 1e20, whole)


PLAIN = {  # linear layers of a tiny model that are in eight bits, and those of its head and others
    "llama": (14, 1),
    "gpt2": (8, 1),
    "gemma2": (14, 1),
    "opt": (12, 3),
    "bert": (12, 2),
    "roberta": (12, 2),
    "modernbert": (8, 2),
    "t5": (32, 1),
    "bart": (32, 1),
}


@KINDS
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_kind_of_model_trains_and_answers(family: str, frozen: str) -> None:
    tokenizer = tiny.tokenizer(around=family in tiny.MASKED)
    model = tiny.model(family, initializer_range=0.2) if family == "llama" else tiny.model(family)
    weights = layer_weights(model)
    count = quantize(model, frozen)
    left = [m for m in model.modules() if type(m) is nn.Linear or type(m) is Conv1D]
    assert (count, len(left)) == PLAIN[family]
    assert layer_weights(model) == weights
    before = tiny.weights(model)
    prompt = Prompt(
        "[P*2] {a} [P*2] [MASK]", answer="b", verbalizer={"yes": "yes", "no": "no"}, encoder="none"
    )
    result = ptuning.train(
        *(model, tokenizer, prompt, ROWS, ROWS), epochs=4, learning_rate=0.05, verbose=False
    )
    losses = [epoch["loss"] for epoch in result.history]
    assert min(losses[1:]) < losses[0]
    answers = ptuning.predict(model, tokenizer, prompt, ROWS)
    assert set(answers) <= {"yes", "no"}
    for name, value in model.state_dict().items():
        assert torch.equal(value.float().cpu(), before[name].float()), name


@KINDS
@pytest.mark.usefixtures("on_cpu")
def test_kept_text_gives_the_numbers_of_whole_rows(frozen: str) -> None:
    """But for what rounding moves over a boundary: the numbers of another text are elsewhere."""

    def losses(kept: str, seed: int = 0) -> list[float]:
        model = tiny.model("llama", initializer_range=0.2, seed=seed)
        quantize(model, frozen)
        prompt = Prompt("{a} is [P*3] [MASK]", answer="b", verbalizer={"yes": "yes", "no": "no"})
        result = ptuning.train(
            *(model, tiny.tokenizer(), prompt, ROWS), epochs=2, prefix_cache=kept, verbose=False
        )
        return [epoch["loss"] for epoch in result.history]

    whole = losses("off")
    assert losses("1M") == pytest.approx(whole, rel=5e-3)
    assert losses("1M", seed=1) != pytest.approx(whole, rel=2e-2)


@KINDS
def test_a_compiled_layer_is_the_plain_one(frozen: str) -> None:
    _, layer = _layer(frozen)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=True)
    for rows in (3, 20):
        hidden = torch.randn(rows, 32, requires_grad=True)
        (one, its), (other, same) = (
            (m(hidden), torch.autograd.grad(m(hidden).square().sum(), hidden)[0])
            for m in (layer, compiled)
        )
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(its, same)


def test_loaded_so_it_has_the_weights_of_the_file(model_folder: Path) -> None:
    plain, _ = ptuning.load_model(str(model_folder), device="cpu", dtype="bfloat16")
    options: Any = {"device": "cpu", "dtype": "bfloat16", "frozen": "int8"}
    model, _ = ptuning.load_model(str(model_folder), **options)
    lean, _ = ptuning.load_model(str(model_folder), **options, gradients=False)
    one, other = plain.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj
    assert (_weight(other) - one).norm() / one.float().norm() < 0.01
    assert type(model.lm_head) is nn.Linear
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(model(ids).logits, lean(ids).logits)
    of_plain, of_model, of_lean = (_bytes(m.model.layers) for m in (plain, model, lean))
    assert of_lean < 0.65 * of_plain and of_model < 1.15 * of_plain  # scales, in layers this small


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@KINDS
def test_a_copy_is_the_same_and_a_conversion_is_refused(frozen: str) -> None:
    model = tiny.model("llama")
    quantize(model, frozen)
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, model(ids).logits)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight.dtype, weight.shape) == (torch.float32, (48, 32))
    with pytest.raises(TypeError):  # who computes with it finds no numbers, wrong ones least of all
        weight @ torch.ones(32, 1)
    converted = model.half()
    with pytest.raises(InputError, match="converted to another number format"):
        converted(ids)


def test_what_reads_its_matrices_itself_stays_and_so_do_adapters_and_images() -> None:
    config = transformers.MambaConfig(
        vocab_size=100, hidden_size=32, state_size=16, num_hidden_layers=2, time_step_rank=16
    )
    model = transformers.MambaForCausalLM(config).eval()
    with pytest.raises(InputError, match="has no layers here that int8 is made for"):
        quantize(model, "int8")
    model = tiny.model("llama")
    one = model.model.layers[0].mlp
    one.up_proj.lora_A = nn.Linear(32, 16)
    model.model.vision_tower = nn.ModuleList([nn.Linear(32, 32)])
    one.down_proj.register_forward_hook(lambda *_: None)
    assert quantize(model, "int8") == 13
    assert type(one.down_proj) is nn.Linear
    assert type(model.model.vision_tower[0]) is nn.Linear


def test_it_is_said_where_most_weights_stay() -> None:
    model = tiny.model("llama", hidden_size=32, intermediate_size=200)
    with pytest.warns(
        UserWarning, match=r"\d+% of the layers' weights are put into int8; the others"
    ):
        quantize(model, "int8")


def test_a_processor_that_multiplies_whole_numbers_wrongly_multiplies_floats() -> None:
    """oneDNN, held to AVX2, adds pairs of products up in 16 bits."""
    code = (
        "import torch; from ptuning.backbone.upstream import whole_product as p\n"
        "a, b = (torch.randint(-127, 128, (n, 64), dtype=torch.int8) for n in (40, 48))\n"
        "assert torch.equal(p(a, b).long(), a.long() @ b.long().T)"
    )
    for most in ("AVX2", "ALL"):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_run_goes_on_only_in_the_eight_bits_that_it_was_begun_in(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 2:
            raise Stop

    def train(frozen: str, **options: Any) -> Any:
        model = tiny.model("llama")
        quantize(model, frozen)
        prompt = Prompt("[P*2] {a} [MASK]", answer="b")
        more = {"output": tmp_path, "checkpoint_seconds": 0, "verbose": False, **options}
        return ptuning.train(model, tiny.tokenizer(), prompt, ROWS, epochs=3, **more)

    with pytest.raises(Stop):
        train("int8", listener=stop)
    for other in ("own", "fp8"):
        with pytest.raises(InputError, match="frozen"):
            train(other, resume=True)
    train("int8", resume=True)


def test_what_is_not_possible_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model("llama")
    with pytest.raises(InputError, match="frozen is 'int4'; expected one of own, int8, fp8"):
        quantize(model, "int4")
    assert quantize(model, "own") == 0 and frozen_format(model) is None
    with pytest.raises(InputError, match="has no layers here that int8 is made for"):
        quantize(tiny.model("llama", hidden_size=24, intermediate_size=40), "int8")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
        with pytest.raises(InputError, match=r"fp8 needs a CUDA device of capability 8\.9.*A100"):
            check_frozen("fp8", torch.device("cuda"))
        check_frozen("int8", torch.device("cuda"))
    with pytest.raises(InputError, match="int8 is for CPUs and CUDA devices; this is mps"):
        check_frozen("int8", torch.device("mps"))
    quantize(model, "int8")
    assert frozen_format(model) == "int8"
    with pytest.raises(InputError, match="is in int8 already"):
        quantize(model, "fp8")
    prompt = Prompt("[P*2] {a} [MASK]", answer="b")
    with pytest.raises(InputError, match="tune_model needs the base model's own weights"):
        ptuning.train(model, tokenizer, prompt, ROWS, tune_model=True, verbose=False)
    ptuning.train(model, tokenizer, prompt, ROWS, epochs=1, verbose=False)
    with pytest.raises(InputError, match="quantized weights cannot be written"):
        ptuning.merge(model, tokenizer, {"a": prompt}).save(tmp_path / "merged")
    with pytest.raises(InputError, match="which transformers cannot write"):
        model.save_pretrained(tmp_path / "saved")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@KINDS
@pytest.mark.parametrize("rows", [3, 40])
def test_on_a_gpu_it_is_that_of_the_cpu(frozen: str, rows: int) -> None:
    _, layer = _layer(frozen, torch.bfloat16)
    hidden = torch.randn(rows, 32).bfloat16().requires_grad_()
    expected = layer(hidden)
    (gradient,) = torch.autograd.grad(expected.sum(), hidden)
    found = layer.cuda()(there := hidden.detach().cuda().requires_grad_())
    (its,) = torch.autograd.grad(found.sum(), there)
    torch.testing.assert_close(found.cpu(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(its.cpu(), gradient, atol=0.02, rtol=0.02)


@KINDS
def test_a_real_model_says_nearly_the_same(
    frozen: str, smollm2: tuple[Any, Any], smollm2_folder: Path
) -> None:
    plain, tokenizer = smollm2
    model, _ = ptuning.load_model(
        str(smollm2_folder), dtype="float32", device=str(plain.device), frozen=frozen
    )
    text = "Water boils at one hundred degrees. The capital of France is Paris, and of Italy Rome."
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(plain.device)
    found = []
    for one in (plain, model):
        embedded = one.get_input_embeddings()(ids).detach().requires_grad_()
        outputs = one(inputs_embeds=embedded, labels=ids)
        (gradient,) = torch.autograd.grad(outputs.loss, embedded)
        found.append((float(outputs.loss), outputs.logits.argmax(-1), gradient.flatten()))
    (expected, words, right), (loss, said, ours) = found
    assert loss == pytest.approx(expected, rel=0.05)
    assert float((said == words).float().mean()) > 0.5
    assert float(functional.cosine_similarity(ours, right, 0)) > 0.7
