"""How wide encoders are where nobody says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ptuning
from ptuning.prompts.encoder import PromptEncoder

TEMPLATE = "[P*3] {text} [MASK]"


@pytest.mark.parametrize(
    ("encoder", "embedding", "expected"),
    [
        ("mlp", 576, 576),
        ("mlp", 1024, 1024),
        ("mlp", 4096, 1024),
        ("lstm", 577, 288),
        ("lstm", 4096, 512),
        ("residual", 576, 288),
        ("residual", 4096, 512),
        ("residual", 1, 1),
        ("mixture", 4096, 128),
    ],
)
def test_a_network_is_as_wide_as_the_embedding_up_to_a_limit(
    encoder: str, embedding: int, expected: int
) -> None:
    prompt = ptuning.Prompt(TEMPLATE, encoder=encoder)
    assert prompt.encoder_config(embedding).encoder_hidden_size == expected
    asked = ptuning.Prompt(TEMPLATE, encoder=encoder, encoder_hidden_size=2000)
    assert asked.encoder_config(embedding).encoder_hidden_size == 2000


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "residual"])
def test_a_saved_network_stays_as_wide_as_it_is(encoder: str, tmp_path: Path) -> None:
    """Files of older releases do not name the width, which was the embedding's."""
    width = 12 if encoder == "mlp" else 6
    wide = ptuning.Prompt(TEMPLATE, encoder=encoder, encoder_hidden_size=width)
    made = PromptEncoder(wide.encoder_config(8)).eval()
    prompt = ptuning.Prompt(TEMPLATE, encoder=encoder)
    prompt.encoder_weights, prompt.vectors = made.state_dict(), made.table().detach()
    prompt.save(tmp_path)
    loaded = ptuning.Prompt.load(tmp_path)
    assert loaded.encoder_hidden_size is None
    again = PromptEncoder(loaded.encoder_config(8)).eval()
    again.load_weights(loaded.encoder_weights or {})
    torch.testing.assert_close(again.table(), prompt.vectors)
