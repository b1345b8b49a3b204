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
