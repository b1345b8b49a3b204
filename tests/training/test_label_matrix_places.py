"""A label matrix where it is not asked for, and where numbers are of less precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import ptuning
from ptuning import Prompt
from ptuning.backbone.identity import describe
from ptuning.forward.label_scores import mixed
from ptuning.prompts.label_matrix import LabelMatrix
from ptuning.training.population import Member

from .. import tiny

WORDS = {"a": "Paris", "b": "Oslo"}
EYE = LabelMatrix(("Paris", "Oslo"), torch.eye(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_mixed_precision_it_counts_in_float32(dtype: torch.dtype) -> None:
    """Scores of words of several tokens are in the hundreds, and their differences small."""
    made = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 14, generator=made) * 50 - 200
    matrix = torch.randn(14, 14, generator=made, requires_grad=True)
    expected = mixed(scores, matrix)
    (wanted,) = torch.autograd.grad(expected.sum() * 2**16, matrix)
    with torch.autocast("cpu", dtype=dtype):
        found = mixed(scores, matrix)
    (gradient,) = torch.autograd.grad(found.sum() * 2**16, matrix)
    assert torch.equal(found, expected) and torch.equal(gradient, wanted)


class Largest(TorchFunctionMode):
    """Keeps how many numbers the largest tensor has that is made meanwhile."""

    most = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.most = max(self.most, made.numel())
        return made


def test_a_member_without_one_takes_no_room_for_it() -> None:
    """Of 20,000 label words that would be 1.6 GB for each member."""
    words = {f"label {n}": f"word{n}" for n in range(1000)}
    prompt = Prompt("[P*2] {text} [MASK]", verbalizer=words, encoder="none")
    model = tiny.model("llama")
    with Largest() as largest:
        member = Member(prompt.checked(num_virtual_tokens=2), model, 0, [None, None])
    assert largest.most < 1000**2 and member.matrix is None
    member.add_matrix(2.0)
    assert member.matrix is not None and member.matrix.shape == (1000, 1000)
    assert not member.matrix.any()


def with_one(**settings: Any) -> Prompt:
    prompt = Prompt("[P*2] {text} [MASK]", answer="label", verbalizer=WORDS, **settings)
    prompt.vectors = torch.zeros(2, 32)
    return prompt


def test_what_merge_says_of_it_names_the_prompt() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompts = {"first": with_one(label_matrix=EYE), "second": with_one()}
    with pytest.warns(UserWarning, match="the prompt 'first' compares its labels by a matrix"):
        ptuning.merge(model, tokenizer, prompts)


@pytest.mark.parametrize("own", [True, False])
def test_inspect_tells_of_one_of_any_member(
    own: bool, tmp_path: Path, model_folder: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    model, tokenizer = ptuning.load_model(str(model_folder))
    one, other = with_one(label_matrix=EYE), with_one()
    prompt = replace(one, others=[other]) if own else replace(other, others=[one])
    prompt.base_model = describe(model, tokenizer)
    for members, told in ((prompt, True), (replace(other, base_model=prompt.base_model), False)):
        members.save(tmp_path / "out")
        code, said, err = run("inspect", tmp_path / "out")
        assert code == 0 and ("label matrix" in said) is told, err
        code, said, err = run("inspect", tmp_path / "out", "--json")
        assert code == 0 and json.loads(said)["label_matrix"] is told, err
