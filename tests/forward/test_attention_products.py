"""Attention as two products against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from ptuning.forward import attention as module
from ptuning.forward import attention_products
from ptuning.forward.attention import own_attention
from ptuning.forward.attention_products import attention_in_products, products_serve

from .. import tiny
from .test_attention import FAMILIES, found, model_of

ROWS, HEADS, GROUPS, WIDTH = 3, 6, 2, 8


def inputs(asking: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As layers have them: heads are the second dimension of a view."""
    torch.manual_seed(0)

    def of(heads: int, columns: int, width: int = WIDTH) -> Tensor:
        return torch.randn(ROWS, columns, heads, width, dtype=dtype).transpose(1, 2)

    tensors = of(HEADS, asking), of(GROUPS, keys), of(GROUPS, keys, WIDTH + 2)
    return tuple(tensor.requires_grad_() for tensor in tensors)  # type: ignore[return-value]


def masks(asking: int, keys: int) -> dict[str, Tensor | None]:
    seen = torch.ones(ROWS, 1, asking, keys, dtype=torch.bool).tril(keys - asking)
    seen[0, :, :, 0] = asking == 1
    added = torch.zeros(ROWS, 1, asking, keys).masked_fill(~seen, torch.finfo(torch.float32).min)
    of_heads = added + torch.arange(HEADS)[:, None, None] * torch.linspace(-1, 0, keys)
    return {
        "none": None, "seen": seen, "of all rows": seen[1:2], "added": added, "of heads": of_heads,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "seen", "of all rows", "added", "of heads"])
@pytest.mark.parametrize(("asking", "keys"), [(7, 7), (5, 20), (40, 40), (1, 50)])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_outputs_and_gradients_are_those_of_pytorch_s_attention(
    kind: str, asking: int, keys: int, scaling: float | None
) -> None:
    tensors, mask = inputs(asking, keys, torch.float32), masks(asking, keys)[kind]
    hidden = torch.zeros(1, 1, 1, 1) if mask is None else mask
    blind = (~hidden if hidden.dtype == torch.bool else hidden < -1e30).all(-1, keepdim=True)
    expected = F.scaled_dot_product_attention(*tensors, mask, scale=scaling, enable_gqa=True)
    got = attention_in_products(*tensors, mask, scaling).transpose(1, 2)
    # What sees nothing is asked for by nobody.
    weights = torch.randn_like(expected).masked_fill(blind, 0.0)
    torch.testing.assert_close(got * weights, expected * weights, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad((x * weights).sum(), tensors) for x in (got, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_without_a_mask_a_query_sees_the_keys_up_to_its_own_where_that_is_asked_for() -> None:
    tensors = inputs(9, 9, torch.float32)
    expected = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    got = attention_in_products(*tensors, causal=True)
    torch.testing.assert_close(got.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hidden", [False, torch.finfo(torch.float32).min, -torch.inf], ids=str)
@pytest.mark.parametrize("asking", [9, 40])
def test_what_sees_nothing_gets_numbers_and_gives_no_gradient_that_is_none(
    asking: int, hidden: bool | float
) -> None:
    tensors = inputs(asking, asking, torch.bfloat16)
    mask = torch.full((ROWS, 1, asking, asking), hidden)
    got = attention_in_products(*tensors, mask)
    assert got.dtype == torch.bfloat16
    for tensor in (got, *torch.autograd.grad(got.float().sum(), tensors)):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("behind", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_s_gradient_is_as_near_to_float32_as_the_plain_one(
    family: str, behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def products(*args: object, **more: object) -> Tensor:
        used.append(True)
        return attention_in_products(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_products, "cpu_has_amx", lambda: True)
    monkeypatch.setattr(module, "attention_in_products", products)
    # Weights so large that the gradient goes through attention.
    model = model_of(family, initializer_range=0.3).requires_grad_(False)
    exact = found(model, False, behind)[1]
    model.to(torch.bfloat16)
    plain = found(model, False, behind)[1].float()
    assert not used
    ours = found(model, True, behind)[1].float()
    assert len(used) == model.config.num_hidden_layers
    assert (ours - exact).norm() < 1.5 * (plain - exact).norm() + 1e-3 * exact.norm()

    def wrong(query: Tensor, key: Tensor, value: Tensor, *others: object) -> Tensor:
        return attention_in_products(query, key, value)  # no mask

    monkeypatch.setattr(module, "attention_in_products", wrong)
    blind = found(model, True, behind)[1].float()
    assert (blind - exact).norm() > 2 * (plain - exact).norm() + 1e-3 * exact.norm()


def test_one_query_behind_known_columns_sees_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers drops the mask there, and its attention is causal."""
    model = model_of("Llama", initializer_range=0.3).requires_grad_(False).to(torch.bfloat16)

    def gradient(units: bool) -> Tensor:
        monkeypatch.setattr(attention_products, "cpu_has_amx", lambda: units)
        torch.manual_seed(2)
        known, asked = torch.randn(2, 2, 9, 32).to(torch.bfloat16).split(1)
        cache, asked = DynamicCache(), asked[0, :, :1].clone().requires_grad_()
        with torch.no_grad():
            model.get_decoder()(inputs_embeds=known[0], past_key_values=cache, use_cache=True)
        mask = torch.ones(2, 10)
        with own_attention(model):
            logits = model(inputs_embeds=asked, attention_mask=mask, past_key_values=cache).logits
        logits.float().logsumexp(-1).sum().backward()
        assert asked.grad is not None
        return asked.grad.float()

    plain, ours = gradient(False), gradient(True)
    assert not torch.equal(plain, ours)
    assert (ours - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize("common", [0.0, 8.0, 60.0])
def test_what_all_keys_have_in_common_costs_no_precision(common: float) -> None:
    """As biases of keys give it to them, times queries that have one, too."""
    query, key, value = (tensor.detach() for tensor in inputs(20, 40, torch.float32))
    tensors = [(query + common / 4).requires_grad_(), (key + common / 4).requires_grad_(), value]
    rounded = [tensor.detach().to(torch.bfloat16).requires_grad_() for tensor in tensors]
    exact = [tensor.detach().float().requires_grad_() for tensor in rounded]
    weights = torch.randn(ROWS, 20, HEADS, WIDTH + 2)

    def gradients(tensors: list[Tensor], own: bool) -> tuple[Tensor, ...]:
        if own:
            got = attention_in_products(*tensors)
        else:
            attended = F.scaled_dot_product_attention(*tensors, enable_gqa=True)
            got = attended.transpose(1, 2)
        return torch.autograd.grad((got.float() * weights).sum(), tensors)

    for got, expected in zip(gradients(rounded, True), gradients(exact, False), strict=True):
        assert (got.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("padded", [False, True])
def test_models_that_see_backwards_or_both_ways_keep_their_gradients(
    family: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_products, "cpu_has_amx", lambda: True)
    model = tiny.model(family)
    ids = torch.randint(5, 40, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * (6 if padded else 9) + [0] * (3 if padded else 0)])

    def gradient(own: bool, dtype: torch.dtype) -> Tensor:
        model.to(dtype)
        vectors = model.get_input_embeddings()(ids).detach().requires_grad_()
        with own_attention(model):
            monkeypatch.setattr(module, "products_serve", products_serve if own else never)
            logits = model(inputs_embeds=vectors, attention_mask=mask).logits
        logits[:, :6].float().logsumexp(-1).sum().backward()
        assert vectors.grad is not None
        return vectors.grad.float()

    def never(query: Tensor, key: Tensor) -> bool:
        return False

    exact = gradient(False, torch.float32)
    plain, ours = (gradient(own, torch.bfloat16) for own in (False, True))
    assert not torch.equal(plain, ours)
    assert (ours - exact).norm() < 1.5 * (plain - exact).norm() + 1e-3


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "units", "serves"),
    [
        (8, 100, torch.bfloat16, True, True),
        (8, 100, torch.bfloat16, False, False),
        (8, 100, torch.float16, True, False),
        (8, 100, torch.float32, True, False),
        (8, 1000, torch.bfloat16, True, False),
        (800, 100, torch.bfloat16, True, False),
    ],
)
def test_they_serve_in_bfloat16_while_the_probabilities_are_small(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    units: bool,
    serves: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_products, "cpu_has_amx", lambda: units)
    query, key = (torch.empty(rows, heads, columns, 4, dtype=dtype) for heads in (9, 3))
    assert products_serve(query, key) == serves
