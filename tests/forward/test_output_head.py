"""In half precision logits are made in float32 of what the head is given, for all who ask."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ptuning.backbone.injection import Injector
from ptuning.backbone.traits import output_head
from ptuning.forward import chunked, label_words, vocabulary
from ptuning.forward import output_head as module
from ptuning.forward.label_words import label_word_scores
from ptuning.forward.plain import answer_logits, example_losses
from ptuning.forward.vocabulary import vocabulary_logits
from ptuning.rendering.collate import Batch

from .. import tiny
from .test_plain import KIND, batch_of, examples_for

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_model_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_alike", set())
    monkeypatch.setattr(label_words, "_alike", set())
    monkeypatch.setattr(module, "_other", set())
    monkeypatch.setattr(module, "_LIKELY", 400)  # all, as on a GPU


def model_of(family: str, dtype: torch.dtype, scale: float = 30.0) -> tuple[Any, Tensor]:
    """With large logits, which are coarse in half precision."""
    torch.manual_seed(0)
    model: Any = tiny.model(family).requires_grad_(False)
    head: Any = output_head(model)
    head.weight = torch.nn.Parameter(head.weight * scale, requires_grad=False)
    model.to(dtype)
    rows = torch.randn(3, model.get_input_embeddings().weight.shape[1]).requires_grad_()
    Injector(model).add(rows)
    return model, rows


def exact(model: Any, batch: Batch) -> Tensor:
    """The model's own logits with a head in float32 behind the same hidden states."""
    head: Any = output_head(model)
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()

    def unrounded(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.nn.functional.linear(args[0].float(), weight, bias)

    handle = head.register_forward_hook(unrounded)
    try:
        return answer_logits(model, batch).float()
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_logits_are_those_of_a_head_in_float32(family: str, dtype: torch.dtype) -> None:
    model, rows = model_of(family, dtype)
    batch = batch_of(family, examples_for(KIND[family]))
    expected, own = exact(model, batch), answer_logits(model, batch)
    assert (own.float() - expected).abs().max() > 1e-4  # what rounding takes
    for _ in range(2):  # a model that is not known yet, and one that is
        got = vocabulary_logits(model, batch)
        assert got.dtype == torch.float32 and got.shape == own.shape
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert model in vocabulary._alike
    weights = torch.linspace(-1, 1, got.numel()).view_as(got)
    (found,) = torch.autograd.grad((got * weights).sum(), rows)
    (plain,) = torch.autograd.grad((own.float() * weights).sum(), rows)
    assert plain.abs().max() > 0
    torch.testing.assert_close(found, plain, atol=0.03 * float(plain.abs().max()), rtol=0.03)


def test_on_a_cpu_the_likeliest_words_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIKELY", 8)
    model, _ = model_of("llama", torch.bfloat16)
    batch = batch_of("llama", examples_for("causal"))
    expected, own = exact(model, batch), answer_logits(model, batch).float()
    got = vocabulary_logits(model, batch)
    likely = own.topk(8).indices
    kept = torch.zeros_like(got, dtype=torch.bool).scatter(-1, likely, True)
    torch.testing.assert_close(got[kept], expected[kept], atol=1e-5, rtol=1e-5)
    assert torch.equal(got[~kept], own[~kept]) and not torch.equal(got[kept], own[kept])
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "bart"])
def test_losses_with_the_vocabulary_in_chunks_are_those_of_such_logits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = model_of(family, torch.bfloat16)
    batch = batch_of(family, examples_for(KIND[family]))
    expected = example_losses(exact(model, batch), batch, None)
    whole = chunked.losses(model, batch, None)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-5)
    (wanted,) = torch.autograd.grad(whole.sum(), rows)
    monkeypatch.setattr(chunked, "LARGEST", 0)
    monkeypatch.setattr(chunked, "POSITIONS", 4)
    parts = chunked.losses(model, batch, None)
    torch.testing.assert_close(parts, expected, atol=1e-4, rtol=1e-5)
    (found,) = torch.autograd.grad(parts.sum(), rows)
    torch.testing.assert_close(found, wanted, atol=0.03 * float(wanted.abs().max()), rtol=0.03)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "bart"])
def test_label_words_get_such_logits(family: str) -> None:
    model, _ = model_of(family, torch.bfloat16)
    batch = batch_of(family, examples_for(KIND[family]))
    count = len(batch.answers)
    words = torch.tensor([[5, 17, 300]]).expand(count, -1)
    expected = exact(model, batch)[:, 0].gather(1, words)
    asked = Batch(**{**vars(batch), "label_ids": words})
    for _ in range(2):
        torch.testing.assert_close(
            label_word_scores(model, asked, 3), expected, atol=1e-5, rtol=1e-5
        )


def test_a_model_that_does_something_else_with_its_logits_keeps_its_own() -> None:
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            output.logits = output.logits.roll(1, -1)
            return output

    model = Odd(tiny.model("llama").config).eval().requires_grad_(False).to(torch.bfloat16)
    Injector(model).add(torch.randn(3, 32))
    batch = batch_of("llama", examples_for("causal"))
    for _ in range(2):
        assert torch.equal(vocabulary_logits(model, batch), answer_logits(model, batch))
    assert model in module._other


class Packed(Tensor):
    """A quantized weight of torchao's kind: its layer multiplies with it, and nobody else."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.linear:
            hidden, weight, bias = args
            return function(hidden, weight.as_subclass(Tensor), bias)
        if function in (Tensor.T.__get__, Tensor.__getitem__):  # type: ignore[attr-defined]
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_head_whose_weight_is_packed_makes_its_logits_itself() -> None:
    model, rows = model_of("llama", torch.bfloat16)
    batch = batch_of("llama", examples_for("causal"))
    own = answer_logits(model, batch)
    head: Any = output_head(model)
    head.weight = torch.nn.Parameter(head.weight.as_subclass(Packed), requires_grad=False)
    words = torch.tensor([[5, 17, 300]]).expand(len(batch.answers), -1)
    for _ in range(2):
        got = vocabulary_logits(model, batch)
        assert torch.equal(got, own)
        label_word_scores(model, Batch(**{**vars(batch), "label_ids": words}), 3)
    assert torch.autograd.grad(got.float().sum(), rows)[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_has_gone_astray_says_nothing_of_the_model(dtype: torch.dtype) -> None:
    model, rows = model_of("llama", dtype)
    rows.data[0] = torch.nan
    batch = batch_of("llama", examples_for("causal"))
    words = torch.tensor([[5, 17, 300]]).expand(len(batch.answers), -1)
    scores = label_word_scores(model, Batch(**{**vars(batch), "label_ids": words}), 3)
    vocabulary_logits(model, batch)
    assert scores.isnan().any() and model in label_words._alike
    assert model not in module._other


@pytest.mark.parametrize("endless", [False, True])
def test_words_that_a_model_rules_out_stay_ruled_out(
    monkeypatch: pytest.MonkeyPatch, endless: bool
) -> None:
    """As Chameleon does with images' tokens; label words that it compares are none of these."""

    class Strict(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            least = torch.finfo(output.logits.dtype).min
            output.logits[..., 30:60] = -torch.inf if endless else least
            return output

    for dtype in (torch.bfloat16, torch.float32):
        model = Strict(tiny.model("llama").config).eval().requires_grad_(False).to(dtype)
        Injector(model).add(torch.randn(3, 32))
        batch = batch_of("llama", examples_for("causal"))
        words = torch.tensor([[5, 17, 300]]).expand(len(batch.answers), -1)
        label_word_scores(model, Batch(**{**vars(batch), "label_ids": words}), 3)
        assert model in label_words._alike
        own = answer_logits(model, batch)
        expected = example_losses(own, batch, None)
        for largest in (chunked.LARGEST, 0):
            with monkeypatch.context() as patch:
                patch.setattr(chunked, "LARGEST", largest)
                torch.testing.assert_close(chunked.losses(model, batch, None), expected)
        assert torch.equal(vocabulary_logits(model, batch), own)


def test_a_head_sees_all_of_other_threads_meanwhile() -> None:
    head, hidden = torch.nn.Linear(4, 9), torch.randn(2, 5, 4)
    with ThreadPoolExecutor(1) as other, module.seeing(head, slice(0, 1)) as seen:
        assert other.submit(head, hidden).result().shape == (2, 5, 9) and not seen
        assert head(hidden).shape == (2, 1, 9) and torch.equal(seen[0], hidden)


def test_weights_that_are_trained_get_their_gradient_from_the_model_s_own_logits() -> None:
    model, _ = model_of("llama", torch.bfloat16)
    model.requires_grad_(True)
    vocabulary_logits(model, batch_of("llama", examples_for("causal"))).float().sum().backward()
    head: Any = output_head(model)
    assert head.weight.grad is not None and head.weight.grad.abs().max() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_gpu_multiplies_half_precision_without_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 400, bias=False).requires_grad_(False).to(dtype)
    hidden = 30 * torch.randn(3, 5, 64)
    exact = hidden.to(dtype).float() @ head.weight.float().T
    asked = hidden.to("cuda", dtype).requires_grad_()
    assert module._multiplies_unrounded(asked.device, dtype)
    got = module._product(head.to("cuda"), asked)
    assert got.dtype == torch.float32
    assert (got.cpu() - exact).abs().max() < 1e-5 * exact.abs().max()
    got.pow(2).sum().backward()
    assert asked.grad is not None
    plain = 2 * exact @ head.weight.float().cpu()
    assert (asked.grad.float().cpu() - plain).norm() < 0.01 * plain.norm()


def test_scores_of_label_words_are_not_rounded_by_autocast() -> None:
    torch.manual_seed(0)
    hidden, weights = torch.randn(3, 64), torch.randn(3, 5, 64)
    expected = module._of_words(weights, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module._of_words(weights, hidden), expected)
