"""Our attention against transformers' own: the same numbers, and the model as it was."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, DynamicCache

from ptuning.forward import attention as module
from ptuning.forward import attention_products
from ptuning.forward.attention import own_attention

from .. import tiny

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Granite", "Olmo2", "StableLm")
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def model_of(family: str, **changes: Any) -> Any:
    """A random model whose four query heads read two pairs of keys and values."""
    values = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "sliding_window": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**values, **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each attention in groups: true; for each that transformers computes there: false."""
    seen: list[bool] = []
    plain, attention = module.sdpa_attention_forward, module.attention

    def ours(*args: Any, **kwargs: Any) -> Any:
        seen.append(True)
        return attention(*args, **kwargs)

    def theirs(*args: Any, **kwargs: Any) -> Any:
        seen[-1] = False
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, "attention", ours)
    monkeypatch.setattr(module, "sdpa_attention_forward", theirs)
    return seen


def found(model: Any, grouped: bool, behind: int = 0) -> tuple[Tensor, Tensor]:
    """Last logits, and the gradient of the inputs, `behind` so many kept columns."""
    torch.manual_seed(1)
    vectors = torch.randn(2, 7, model.config.hidden_size).to(model.dtype)
    cache = DynamicCache()
    if behind:
        with torch.no_grad():
            body = model.get_decoder()
            body(inputs_embeds=vectors[:, :behind], attention_mask=MASK[:, :behind],
                 past_key_values=cache, use_cache=True)  # fmt: skip
    asked = vectors[:, behind:].detach().requires_grad_()
    with own_attention(model) if grouped else nullcontext():
        logits = model(inputs_embeds=asked, attention_mask=MASK, past_key_values=cache).logits
    logits[:, -1].float().logsumexp(-1).sum().backward()
    assert asked.grad is not None
    return logits[:, -1].detach(), asked.grad


@pytest.mark.parametrize("behind", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_plain_ones(
    family: str, behind: int, groups: list[bool]
) -> None:
    model = model_of(family)
    plain = found(model, False, behind)
    assert groups == []
    grouped = found(model, True, behind)
    assert groups == [True] * model.config.num_hidden_layers
    torch.testing.assert_close(grouped, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pairs", [2, 4])
def test_half_precision_is_as_near_to_float32_as_the_plain_one(pairs: int) -> None:
    model = model_of("Llama", num_key_value_heads=pairs)
    exact = found(model, False)[1]
    model.to(torch.bfloat16)
    plain, ours = (found(model, own)[1].float() for own in (False, True))
    assert (ours - exact).norm() < 1.5 * (plain - exact).norm() + 1e-3


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("columns", "trains", "dtype", "units", "computed_in"),
    [
        (20, True, HALF, False, FULL),
        (20, True, torch.float16, True, FULL),
        (20, True, HALF, True, None),
        (20, True, FULL, True, FULL),
        (20, False, HALF, True, HALF),
        (300, True, HALF, False, HALF),
    ],
)
def test_gradients_of_short_rows_in_half_precision_are_products_or_computed_in_float32(
    columns: int,
    trains: bool,
    dtype: torch.dtype,
    units: bool,
    computed_in: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_products, "cpu_has_amx", lambda: units)
    seen = []
    plain = module.sdpa_attention_forward

    def theirs(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.dtype)
        return plain(layer, query, *args, **kwargs)

    monkeypatch.setattr(module, "sdpa_attention_forward", theirs)
    model = model_of("Llama", num_key_value_heads=4, max_position_embeddings=512)
    model.requires_grad_(False).to(dtype)
    vectors = torch.randn(2, columns, 32, dtype=dtype, requires_grad=trains)
    with own_attention(model):
        logits = model(inputs_embeds=vectors).logits
    assert seen == ([computed_in] * 2 if computed_in else [])  # none of transformers'
    assert logits.dtype == dtype


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_masked_models_and_those_with_two_parts_keep_their_gradients(family: str) -> None:
    model = tiny.model(family)
    ids = torch.randint(5, 40, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    more = {"decoder_input_ids": ids[:, :3]} if family == "t5" else {}

    def gradient(own: bool, dtype: torch.dtype) -> Tensor:
        model.to(dtype)
        vectors = model.get_input_embeddings()(ids).detach().requires_grad_()
        with own_attention(model) if own else nullcontext():
            logits = model(inputs_embeds=vectors, attention_mask=mask, **more).logits
        logits.float().logsumexp(-1).sum().backward()
        assert vectors.grad is not None
        return vectors.grad.float()

    exact = gradient(False, torch.float32)
    torch.testing.assert_close(gradient(True, torch.float32), exact, atol=1e-6, rtol=1e-5)
    plain, ours = (gradient(own, torch.bfloat16) for own in (False, True))
    assert (ours - exact).norm() < 1.5 * (plain - exact).norm() + 1e-3


@pytest.mark.parametrize("columns", [63, 64, 128, 192])
def test_on_a_gpu_no_gradient_in_half_precision_reads_half_a_tile_of_keys(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = module.sdpa_attention_forward

    def theirs(layer: Any, *args: Any, **more: Any) -> Any:
        _, key, value, mask = args
        seen.append((key.shape[2], value.shape[2], None if mask is None else mask.shape[3]))
        return plain(layer, *args, **more)

    monkeypatch.setattr(module, "sdpa_attention_forward", theirs)
    # What a GPU's tensors say; the numbers are the same on every device.
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True), raising=False)
    monkeypatch.setattr(module, "_slow_backwards", lambda query, key: False)
    monkeypatch.setattr(module, "products_serve", lambda query, key: False)
    model = model_of("Llama", max_position_embeddings=256).requires_grad_(False)
    mask = torch.ones(2, columns)
    mask[0, : columns - 5] = 0
    vectors = torch.randn(2, columns, 32)

    def gradient(dtype: torch.dtype, mask: Tensor | None = mask) -> Tensor:
        seen.clear()
        model.to(dtype)
        asked = vectors.detach().to(dtype).clone().requires_grad_()
        with own_attention(model):
            logits = model(inputs_embeds=asked, attention_mask=mask).logits
        logits[:, -1].float().logsumexp(-1).sum().backward()
        assert asked.grad is not None
        return asked.grad.float()

    exact = gradient(FULL)
    assert seen == [(columns, columns, columns)] * 2  # float32 has other kernels
    got = gradient(HALF)
    keys = columns + 8 if columns % 128 == 64 else columns
    assert seen == [(keys, keys, keys)] * 2
    assert (got - exact).norm() < 0.05 * exact.norm()
    gradient(HALF, mask=None)
    assert seen == [(columns, columns, None)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("columns", [63, 64, 192])
def test_gradients_in_half_precision_are_numbers_on_a_gpu(columns: int) -> None:
    model = model_of("Llama", max_position_embeddings=256).requires_grad_(False)
    model.to(device="cuda", dtype=HALF)
    mask = torch.ones(2, columns, device="cuda")
    mask[0, : columns - 5] = 0
    vectors = torch.randn(2, columns, 32, device="cuda", dtype=HALF, requires_grad=True)
    with own_attention(model):
        logits = model(inputs_embeds=vectors, attention_mask=mask).logits
    logits[:, -1].float().logsumexp(-1).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()


def test_without_a_mask_or_with_one_query_transformers_computes(groups: list[bool]) -> None:
    model = model_of("Llama")
    with own_attention(model), torch.no_grad():
        cache = DynamicCache()
        model(input_ids=torch.ones(2, 3, dtype=torch.long), past_key_values=cache, use_cache=True)
        model(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=cache,
              attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))  # fmt: skip
    assert groups == [False] * 4


@pytest.mark.parametrize("eager", [True, False])
def test_other_attentions_and_models_without_groups_stay_as_they_are(
    eager: bool, groups: list[bool]
) -> None:
    model = model_of("Llama", num_key_value_heads=2 if eager else 4)
    if eager:
        model.set_attn_implementation("eager")
    found(model, True)
    assert groups == ([] if eager else [False] * 2)


def test_for_a_gpu_s_forwards_alone_cudnn_s_attention_is_off_for_their_time() -> None:
    is_on = torch.backends.cuda.cudnn_sdp_enabled
    before = is_on()
    try:
        for user in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(user)
            with module._ours(on_gpu=False):
                assert is_on() == user
            with module._ours(on_gpu=True), module._ours(on_gpu=True):
                assert not is_on()
                with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
                    with module._ours(on_gpu=True):  # compiled layers ask for it
                        assert is_on()
                    assert is_on()
                assert not is_on()
            assert is_on() == user
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_the_name_stands_for_its_own_attention_again_even_after_an_error() -> None:
    model, plain = model_of("Llama"), AttentionInterface()["sdpa"]

    def fails() -> None:
        with own_attention(model):
            assert AttentionInterface()["sdpa"] is module.attention
            with own_attention(model):  # as another thread may
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert AttentionInterface()["sdpa"] is plain


def test_what_the_name_stood_for_before_stands_there_again() -> None:
    plain = AttentionInterface()["sdpa"]

    def somebodys(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    AttentionInterface.register("sdpa", somebodys)
    try:
        with own_attention(model_of("Llama")):
            assert AttentionInterface()["sdpa"] is module.attention
        assert AttentionInterface()["sdpa"] is somebodys
    finally:
        AttentionInterface.register("sdpa", plain)


def test_forwards_that_overlap_take_ours_away_with_the_last() -> None:
    model, plain = model_of("Llama"), AttentionInterface()["sdpa"]
    first, second = own_attention(model), own_attention(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert AttentionInterface()["sdpa"] is module.attention
    second.__exit__(None, None, None)
    assert AttentionInterface()["sdpa"] is plain


def test_what_looks_no_attention_up_runs_as_ever() -> None:
    model, line = tiny.model("gpt2"), nn.Linear(2, 2)
    model.set_attn_implementation("eager")
    with own_attention(model), own_attention(line):
        assert AttentionInterface()["sdpa"] is module.sdpa_attention_forward
        assert line(torch.zeros(1, 2)).shape == (1, 2)
