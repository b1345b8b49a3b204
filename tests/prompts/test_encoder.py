from __future__ import annotations

import re
import warnings
from typing import Any

import peft
import pytest
import torch

from ptuning import PromptEncoder, PromptEncoderConfig
from ptuning.errors import InputError
from ptuning.prompts.encoder import initialise
from ptuning.prompts.encoder_config import PromptEncoderReparameterizationType

PAGE_EXAMPLE = """
>>> from peft import PromptEncoder, PromptEncoderConfig

>>> config = PromptEncoderConfig(
...     peft_type="P_TUNING",
...     task_type="SEQ_2_SEQ_LM",
...     num_virtual_tokens=20,
...     token_dim=768,
...     num_transformer_submodules=1,
...     num_attention_heads=12,
...     num_layers=12,
...     encoder_reparameterization_type="MLP",
...     encoder_hidden_size=768,
... )

>>> prompt_encoder = PromptEncoder(config)
"""
SHAPES: list[dict[str, Any]] = [
    {"num_virtual_tokens": 1, "token_dim": 4, "encoder_hidden_size": 4},
    {"num_virtual_tokens": 5, "token_dim": 8, "encoder_hidden_size": 3},
    {"num_virtual_tokens": 7, "token_dim": 6, "encoder_hidden_size": 16},
]
HEADS: list[dict[str, Any]] = [
    {"encoder_reparameterization_type": "MLP"},
    {"encoder_reparameterization_type": "LSTM"},
    {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
    {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3, "encoder_dropout": 0.3},
]


def config_of(**values: Any) -> PromptEncoderConfig:
    small = {"num_virtual_tokens": 6, "token_dim": 8, "encoder_hidden_size": 12}
    return PromptEncoderConfig(**{**small, **values})


def state(encoder: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in encoder.state_dict().items()}


def test_the_page_s_example_runs_with_only_the_import_changed() -> None:
    code = re.sub(r"^(>>>|\.\.\.) ?", "", PAGE_EXAMPLE, flags=re.MULTILINE)
    changed = code.replace("from peft import", "from ptuning import")
    assert changed != code
    names: dict[str, Any] = {}
    exec(changed, names)
    encoder = names["prompt_encoder"]
    assert isinstance(encoder, PromptEncoder)
    indices = torch.arange(20).expand(2, -1)
    assert encoder(indices).shape == (2, 20, 768)


@pytest.mark.parametrize("submodules", [1, 2])
@pytest.mark.parametrize("head", ["MLP", "LSTM"])
def test_documented_attributes_exist_with_the_documented_shapes(head: str, submodules: int) -> None:
    encoder = PromptEncoder(
        config_of(encoder_reparameterization_type=head, num_transformer_submodules=submodules)
    )
    total = 6 * submodules
    assert isinstance(encoder.embedding, torch.nn.Embedding)
    assert encoder.embedding.weight.shape == (total, 8)
    assert isinstance(encoder.mlp_head, torch.nn.Sequential)
    assert hasattr(encoder, "lstm_head") == (head == "LSTM")
    if head == "LSTM":
        assert isinstance(encoder.lstm_head, torch.nn.LSTM)
        assert encoder.lstm_head.bidirectional
    sizes = (encoder.token_dim, encoder.input_size, encoder.output_size, encoder.hidden_size)
    assert sizes == (8, 8, 8, 12)
    assert encoder.total_virtual_tokens == total
    assert encoder.encoder_type == head
    assert isinstance(encoder.encoder_type, PromptEncoderReparameterizationType)
    indices = torch.arange(total).expand(3, -1)
    assert encoder(indices).shape == (3, total, 8)
    assert encoder.table().shape == (total, 8)


def test_head_none_gives_the_embedding_itself() -> None:
    encoder = PromptEncoder(config_of(encoder_reparameterization_type="NONE"))
    assert state(encoder) == {"embedding.weight": (6, 8)}
    assert torch.equal(encoder.table(), encoder.embedding.weight)
    encoder.table().sum().backward()
    assert encoder.embedding.weight.grad is not None


@pytest.mark.parametrize("head", ["MLP", "LSTM", "NONE"])
def test_inference_mode_builds_the_embedding_alone(head: str) -> None:
    encoder = PromptEncoder(config_of(encoder_reparameterization_type=head, inference_mode=True))
    assert state(encoder) == {"embedding.weight": (6, 8)}
    assert not hasattr(encoder, "mlp_head")
    assert not hasattr(encoder, "lstm_head")
    assert torch.equal(encoder.table(), encoder.embedding.weight)


def test_table_is_the_output_for_all_indices_once() -> None:
    encoder = PromptEncoder(config_of(encoder_reparameterization_type="LSTM"))
    expected = encoder(torch.arange(6).expand(3, -1))
    assert torch.allclose(encoder.table().expand(3, -1, -1), expected, atol=1e-6)


def test_hidden_size_and_submodules_have_defaults() -> None:
    encoder = PromptEncoder(PromptEncoderConfig(num_virtual_tokens=3, token_dim=5))
    assert encoder.hidden_size == 5
    assert encoder.total_virtual_tokens == 3


@pytest.mark.parametrize("submodules", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
@pytest.mark.parametrize("head", HEADS, ids=lambda head: "-".join(map(str, head.values())))
def test_weights_exchange_with_the_reference_and_give_its_output(
    head: dict[str, Any], shape: dict[str, Any], submodules: int
) -> None:
    values = {**shape, **head, "num_transformer_submodules": submodules}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dropout option adds dropout")
        ours = PromptEncoder(PromptEncoderConfig(**values)).eval()
        theirs = peft.PromptEncoder(peft.PromptEncoderConfig(**values)).eval()
    assert list(state(ours)) == list(state(theirs))
    assert state(ours) == state(theirs)
    indices = torch.arange(ours.total_virtual_tokens).expand(2, -1)
    assert not torch.allclose(ours(indices), theirs(indices), atol=1e-3)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(indices), theirs(indices))


@pytest.mark.parametrize("head", ["MLP", "LSTM"])
def test_equal_seeds_start_from_the_reference_s_weights(head: str) -> None:
    values = config_of(encoder_reparameterization_type=head, num_transformer_submodules=1).to_dict()
    torch.manual_seed(3)
    ours = PromptEncoder(PromptEncoderConfig(**values)).state_dict()
    torch.manual_seed(3)
    theirs = peft.PromptEncoder(peft.PromptEncoderConfig(**values)).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("head", ["MLP", "LSTM", "NONE"])
@pytest.mark.parametrize(
    ("count", "width", "hidden"), [(1, 8, 8), (6, 8, 12), (20, 64, 64), (20, 32, 40)]
)
def test_initialise_hits_the_wanted_rows_and_leaves_the_others(
    head: str, count: int, width: int, hidden: int
) -> None:
    encoder = PromptEncoder(
        PromptEncoderConfig(
            num_virtual_tokens=count,
            token_dim=width,
            encoder_hidden_size=hidden,
            encoder_reparameterization_type=head,
            encoder_dropout=0.5 if head == "LSTM" else 0.0,
        )
    )
    rows = torch.arange(0, count, 2)
    rows = rows[torch.randperm(len(rows))]
    others = torch.tensor([i for i in range(count) if i not in rows.tolist()], dtype=torch.int64)
    encoder.eval()
    before = encoder.table().detach()
    wanted = torch.randn(len(rows), width)
    encoder.train()
    initialise(encoder, wanted, rows)
    assert encoder.training
    encoder.eval()
    after = encoder.table().detach()
    assert (after[rows] - wanted).abs().max() < 1e-4
    if len(others):
        assert (after[others] - before[others]).abs().max() < 1e-4


@pytest.mark.parametrize("head", ["MLP", "LSTM", "NONE"])
def test_initialise_keeps_the_encoder_trainable_and_takes_other_dtypes(head: str) -> None:
    encoder = PromptEncoder(config_of(encoder_reparameterization_type=head))
    wanted = torch.randn(6, 8).to(torch.bfloat16)
    initialise(encoder, wanted, torch.arange(6))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in encoder.parameters())
    assert torch.allclose(encoder.eval().table(), wanted.float(), atol=1e-4)


def test_initialise_beyond_the_head_s_width_is_the_nearest_and_finite() -> None:
    encoder = PromptEncoder(config_of(num_virtual_tokens=40, encoder_hidden_size=4))
    wanted = torch.randn(40, 8)
    start = (encoder.table() - wanted).norm()
    initialise(encoder, wanted, torch.arange(40))
    assert torch.isfinite(encoder.table()).all()
    assert (encoder.table() - wanted).norm() < start


def test_mlp_with_another_number_of_layers_warns_and_keeps_three() -> None:
    with pytest.warns(UserWarning, match="`encoder_num_layers` is ignored"):
        encoder = PromptEncoder(config_of(encoder_num_layers=5))
    linear = [m for m in encoder.mlp_head if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 3


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3},
        {"encoder_reparameterization_type": "NONE", "encoder_num_layers": 3},
        {"inference_mode": True, "encoder_num_layers": 3},
    ],
)
def test_nothing_is_warned_about_where_all_settings_count(values: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptEncoder(config_of(**values))


@pytest.mark.parametrize("missing", ["token_dim", "num_virtual_tokens"])
def test_missing_size_is_an_error_that_names_it(missing: str) -> None:
    with pytest.raises(InputError, match=missing):
        PromptEncoder(config_of(**{missing: None}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_encoder_adds_its_bottleneck_to_the_embedding(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    encoder = PromptEncoder(config_of(encoder_reparameterization_type="RESIDUAL")).to(dtype)
    own = encoder.embedding.weight
    assert torch.equal(encoder.table(), own)  # it begins as these
    down, _, up, norm = encoder.residual_head
    torch.nn.init.normal_(norm.weight)
    inner = up(down(own).relu())
    scaled = (inner - inner.mean(1, keepdim=True)) / (
        inner.var(1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    torch.testing.assert_close(encoder.table(), own + scaled * norm.weight + norm.bias)
    encoder.table().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_a_mixture_is_a_sum_of_words_that_stay() -> None:
    torch.manual_seed(1)
    encoder = PromptEncoder(config_of(encoder_reparameterization_type="MIXTURE"))
    assert encoder.words.shape == (12, 8) and encoder.embedding.weight.shape == (6, 12)
    assert torch.equal(encoder.table(), encoder.words[:6])  # each begins as a word of its own
    torch.nn.init.normal_(encoder.embedding.weight)
    expected = torch.stack([(w[:, None] * encoder.words).sum(0) for w in encoder.embedding.weight])
    torch.testing.assert_close(encoder.table(), expected)
    assert [name for name, _ in encoder.named_parameters()] == ["embedding.weight"]
    with pytest.raises(InputError, match=r"encoder_hidden_size is 5.*6 virtual tokens need at"):
        PromptEncoder(config_of(encoder_reparameterization_type="MIXTURE", encoder_hidden_size=5))


@pytest.mark.parametrize("head", ["RESIDUAL", "MIXTURE"])
def test_our_own_encoders_begin_where_they_are_told_exactly(head: str) -> None:
    encoder = PromptEncoder(config_of(encoder_reparameterization_type=head))
    before, wanted, rows = encoder.table().detach().clone(), torch.randn(2, 8), torch.tensor([4, 1])
    initialise(encoder, wanted, rows)
    after = encoder.table().detach()
    torch.testing.assert_close(after[rows], wanted)
    assert torch.equal(after[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    with torch.no_grad():  # as if it was trained
        for parameter in encoder.parameters():
            parameter += torch.randn_like(parameter)
    wanted = torch.randn(6, 8)
    initialise(encoder, wanted)
    torch.testing.assert_close(encoder.table().detach(), wanted)


@pytest.mark.parametrize("head", ["RESIDUAL", "MIXTURE"])
def test_our_own_encoders_are_written_in_a_form_that_peft_reads(head: str) -> None:
    config = config_of(encoder_reparameterization_type=head)
    assert config.reference_dict()["encoder_reparameterization_type"] == "MLP"
