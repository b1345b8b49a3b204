"""From the gradient of all tables to new weights and new tables, without a look at a number.

    gradient of the tables -> encoders backward -> each member: clip, AdamW -> encoders forward

A label matrix is a part of its member's table that no encoder makes.

What is not finite is found where it is: a member with such a loss or gradient takes no step any
more, and the host reads that later. So all of it can be one CUDA graph. The plain twin is
`Learner.update` of each member.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from ..prompts.encoder import PromptEncoder
from .learner import Learner


class Encoders:
    """Encoders that run together where they are alike.

    Their parameters become rows of one tensor for each name, so that a matrix product of all
    encoders is one operation; the modules stay what they are, around these rows.

    Args:
        encoders: in the order of their tables.
    """

    def __init__(self, encoders: Sequence[PromptEncoder]):
        groups: dict[Any, list[int]] = {}
        for number, encoder in enumerate(encoders):
            form = [(name, tuple(p.shape)) for name, p in encoder.named_parameters()]
            # cuDNN's LSTMs run one at a time, and what is not trained (words) is each one's own.
            single = hasattr(encoder, "lstm_head") or any(True for _ in encoder.buffers())
            alone = number if single else -1
            groups.setdefault((tuple(form), encoder.unit, alone), []).append(number)
        self._groups = [
            _Alike([encoders[first], *(encoders[n] for n in others)])
            if others
            else _Alone(encoders[first])
            for first, *others in groups.values()
        ]
        order = [number for numbers in groups.values() for number in numbers]
        self._back = sorted(range(len(order)), key=order.__getitem__)

    def tables(self) -> Tensor:
        """All vectors ``(virtual tokens, width)``, in the encoders' order."""
        return self._in_order([group.tables(group.leaves()) for group in self._groups])

    def backward(self, gradient: Tensor) -> None:
        """From the tables' gradient ``(virtual tokens of all, width)`` to every parameter's."""
        leaves = [group.leaves() for group in self._groups]
        with torch.enable_grad():
            pairs = zip(self._groups, leaves, strict=True)
            tables = self._in_order([group.tables(own) for group, own in pairs])
        flat = [tensor for own in leaves for tensor in own.values()]
        gradients = iter(torch.autograd.grad(tables, flat, gradient))
        for group, own in zip(self._groups, leaves, strict=True):
            # Contiguous: fused optimizers read memory in its order, whatever the strides.
            group.give_gradients({name: next(gradients).contiguous() for name in own})

    def _in_order(self, tables: Sequence[Sequence[Tensor]]) -> Tensor:
        found = [table for of_group in tables for table in of_group]
        return torch.cat([found[number] for number in self._back])


class _Alone:
    """An encoder of a form of its own."""

    def __init__(self, encoder: PromptEncoder):
        self.encoder = encoder

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are asked for."""
        return dict(self.encoder.named_parameters())

    def tables(self, leaves: dict[str, Tensor]) -> Sequence[Tensor]:
        """Its vectors."""
        return [self.encoder.table()]

    def give_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Put them where the optimizer looks."""
        for name, parameter in self.encoder.named_parameters():
            parameter.grad = gradients[name]


class _Alike:
    """Encoders of one form, their parameters stacked."""

    def __init__(self, encoders: list[PromptEncoder]):
        self.encoders = encoders
        stacked, _ = stack_module_state(encoders)
        self.parameters = {name: tensor.detach() for name, tensor in stacked.items()}
        for row, encoder in enumerate(encoders):
            for name, parameter in encoder.named_parameters():
                parameter.data = self.parameters[name][row]

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are asked for: fresh, so that no older graph hangs on them."""
        return {name: tensor.detach().requires_grad_() for name, tensor in self.parameters.items()}

    def tables(self, leaves: dict[str, Tensor]) -> Sequence[Tensor]:
        """Each one's vectors."""
        first = self.encoders[0]
        device = first.embedding.weight.device
        indices = torch.arange(first.total_virtual_tokens, device=device)[None]

        def table(own: dict[str, Tensor]) -> Tensor:
            return functional_call(first, own, (indices,)).squeeze(0)

        return vmap(table)(leaves).unbind(0)

    def give_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Put them where the optimizers look."""
        for row, encoder in enumerate(self.encoders):
            for name, parameter in encoder.named_parameters():
                parameter.grad = gradients[name][row]


class Update:
    """The end of a step for some members.

    Args:
        learners: all of them.
        active: the numbers of those in training.
        rows: for each learner where its rows stand in `table`.
        table: of all members' vectors; gets the new ones.
        gradient: of `table`; zeros afterwards.
        losses: of all members ``(members,)``; zeros afterwards.
        failed: ``(members,)``, 1 from a member's first number on that is not finite.

    Attributes:
        rates: ``(members,)`` the learning rates of the next step.
        report: ``(2, members)`` losses, and `failed`, of the last step.
    """

    def __init__(
        self,
        learners: Sequence[Learner],
        active: Sequence[int],
        rows: Sequence[slice],
        table: Tensor,
        gradient: Tensor,
        losses: Tensor,
        failed: Tensor,
    ):
        self.learners = [learners[number] for number in active]
        self.table, self.gradient, self.losses, self.failed = table, gradient, losses, failed
        self.encoders = Encoders([learner.member.encoder for learner in self.learners])
        of_vectors, self._matrices = [], []
        for learner, own in zip(self.learners, (rows[number] for number in active), strict=True):
            behind = own.start + learner.member.encoder.total_virtual_tokens
            of_vectors.append(torch.arange(own.start, behind))
            if learner.member.matrix is not None:
                self._matrices.append((learner.member, slice(behind, own.stop)))
        self._rows = torch.cat(of_vectors).to(table.device)
        self._active = torch.tensor(active, device=table.device)
        self.rates = torch.zeros_like(failed)
        self.report = torch.stack([losses, failed])
        for number in active:
            learners[number].update_unseen(self.rates[number], failed[number])

    def __call__(self) -> None:
        """Take the step."""
        self.encoders.backward(self.gradient[self._rows])
        for member, rows in self._matrices:
            member.give_gradient(self.gradient[rows])
        with torch.no_grad():
            self._step()
            self.table.index_copy_(0, self._rows, self.encoders.tables())
            for member, rows in self._matrices:
                self.table[rows].copy_(member.packed_matrix())
            self.report.copy_(torch.stack([self.losses, self.failed]))
            self.gradient.zero_()
            self.losses.zero_()

    def _step(self) -> None:
        norms = torch.stack([learner.clip() for learner in self.learners])
        bad = ~(torch.isfinite(norms) & torch.isfinite(self.losses[self._active]))
        failed = torch.maximum(self.failed[self._active], bad.to(self.failed.dtype))
        self.failed.index_copy_(0, self._active, failed)
        for learner in self.learners:
            learner.optimizer.step()
