"""A label matrix where it is not asked for, and where numbers are of less precision."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ptuning import Prompt
from ptuning.training.population import Member

from .. import tiny


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
