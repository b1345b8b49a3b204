"""The two hooks that turn virtual token ids into vectors; nothing else of the model is touched.

    embed(id) = rows[id - first]      where the id is virtual (at or above the embedding's rows)
              = E[id]                 elsewhere, bit for bit

A pre-hook on the input embedding replaces virtual ids by a valid one, a post-hook writes the
prompt's rows over the result. Rows are written *after* any scaling inside the embedding module
(Gemma, BART), as the reference does. This module knows nothing of prompts, templates or training.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError

SAFE_ID = 0
ATTACHING = threading.RLock()
"""Held while ids are claimed or released, of any model; forward passes never wait for it."""
# Modules that look up the input ids again (Gemma 4); virtual positions get SAFE_ID's row there.
_SECOND_LOOKUPS = ("embed_tokens_per_layer",)


class Span:
    """A range of virtual ids and the rows that stand for them.

    Attributes:
        first: the first id.
        rows: ``(count, embedding width)``.
        users: how many callers hold the span; it leaves with the last.
    """

    def __init__(self, first: int, rows: Tensor):
        self.first = first
        self.rows = rows
        self.users = 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": self.rows.detach()}

    @property
    def end(self) -> int:
        """One past the last id."""
        return self.first + len(self.rows)


class Injector:
    """The hooks of one model and the spans that they serve.

    Any number of spans can be added; the hooks leave with the last of them. Forward passes only
    read, so threads may share the model.
    """

    def __init__(self, model: nn.Module):
        self.modules = _shared_embeddings(model)
        weight_owner = self.modules[0]
        self.threshold: int = weight_owner.num_embeddings
        self.width: int = weight_owner.embedding_dim
        self.spans: list[Span] = []
        self._local = threading.local()
        self._guarded = [m for n, m in model.named_modules() if n.endswith(_SECOND_LOOKUPS)]

    @property
    def _device(self) -> torch.device:
        """Where the embedding is now: models are moved. (Offloaded ones are nowhere.)"""
        device = self.modules[0].weight.device
        return torch.device("cpu") if device.type == "meta" else device

    @staticmethod
    def on(model: nn.Module) -> Injector:
        """The injector of `model`: the one whose hooks it has, or a new one."""
        return Injector.of(model) or Injector(model)

    @staticmethod
    def of(model: nn.Module) -> Injector | None:
        """The injector whose hooks are on `model`, or None."""
        for hook in input_embedding(model)._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Injector):
                return owner
        return None

    def add(self, rows: Tensor, at_least: int = 0) -> Span:
        """Claim ids for `rows`, behind all claimed ones and not below `at_least`."""
        if rows.dim() != 2 or rows.shape[1] != self.width:
            raise InputError(
                f"the prompt's vectors have shape {tuple(rows.shape)}, and the base model's "
                f"embedding takes vectors of {self.width} numbers: this prompt belongs to a model "
                "of another width"
            )
        with ATTACHING:
            first = max([self.threshold, at_least, *(span.end for span in self.spans)])
            span = Span(first, rows)
            self.spans = [*self.spans, span]
            self._refresh()
            if len(self.spans) == 1:
                for module in self.modules:
                    module.register_forward_pre_hook(self._before)
                    module.register_forward_hook(self._after)
                for module in self._guarded:
                    module.register_forward_pre_hook(self._guard)
        return span

    def write(self, span: Span, rows: Tensor) -> None:
        """Give a span new rows of the same shape, which may carry a gradient."""
        with ATTACHING:
            same = rows.shape == span.rows.shape and self._lookup[1].device == self._device
            span.rows = rows
            self._refresh(self._lookup[1] if same else None)

    def borrow(self, rows: Tensor) -> Span | None:
        """The span whose rows are this very tensor, held once more; release it with `remove`."""
        with ATTACHING:
            for span in self.spans:
                if span.rows is rows:
                    span.users += 1
                    return span
        return None

    def remove(self, span: Span) -> None:
        """Release a span's ids; with the last one the model is as it was."""
        with ATTACHING:
            span.users -= 1
            if span.users > 0 or span not in self.spans:
                return
            self.spans = [other for other in self.spans if other is not span]
            if self.spans:
                self._refresh()
            else:
                self._unhook()

    def _unhook(self) -> None:
        # Found by their owner, not by stored handles: a copied or unpickled model has its own.
        for module in [*self.modules, *self._guarded]:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, h in hooks.items() if getattr(h, "__self__", None) is self]:
                    del hooks[key]

    def _refresh(self, owner: Tensor | None = None) -> None:
        """One table of all rows, and for each id above the threshold its row or -1.

        Args:
            owner: the latter, where it is known.
        """
        rows = [span.rows.to(self._device) for span in self.spans]
        table = rows[0] if len(rows) == 1 else torch.cat(rows)
        owner = self._owner().to(self._device) if owner is None else owner
        self._lookup = (table, owner)  # one assignment: forwards may run meanwhile

    def _owner(self) -> Tensor:
        owner = torch.full((max(s.end for s in self.spans) - self.threshold,), -1)
        offset = 0
        for span in self.spans:
            at = span.first - self.threshold
            owner[at : at + len(span.rows)] = torch.arange(offset, offset + len(span.rows))
            offset += len(span.rows)
        return owner

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        self._local.ids = ids
        return (ids.masked_fill(ids >= self.threshold, SAFE_ID), *args[1:])

    def _guard(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].masked_fill(args[0] >= self.threshold, SAFE_ID), *args[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        ids = getattr(self._local, "ids", None)
        self._local.ids = None
        if ids is None:  # the hooks came while this thread was inside the embedding already
            return output
        virtual = ids >= self.threshold
        table, owner = self._here(output.device)
        row = owner[(ids - self.threshold).clamp(0, len(owner) - 1)]
        if _may_look_at_values(ids):
            unowned = virtual & ((row < 0) | (ids - self.threshold >= len(owner)))
            if bool(unowned.any()):
                raise InputError(
                    f"input id {int(ids[unowned][0])} belongs to no attached prompt: the model has "
                    f"ids 0 to {self.threshold - 1}, attached prompts have "
                    + ", ".join(f"{s.first} to {s.end - 1}" for s in self.spans)
                )
        # Gather in the table's own precision, then convert: gradients add up in float32. Plain
        # indexing would add them up with several threads in an order that changes from run to run.
        vectors = F.embedding(row.clamp(min=0), table).to(output.dtype)
        return torch.where(virtual.unsqueeze(-1), vectors, output)

    def _here(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Table and owners on the device of what runs; moved once where the model was."""
        table, owner = self._lookup
        if table.device != device:
            table, owner = table.to(device), owner.to(device)
            if device == self._device and not table.requires_grad:
                self._lookup = (table, owner)
        return table, owner

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k != "_local"}
        if "_lookup" in state:
            table, owner = self._lookup
            state["_lookup"] = (table.detach(), owner)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


def _may_look_at_values(ids: Tensor) -> bool:
    """False while a graph is traced or captured, where a look at values would break it."""
    if torch.compiler.is_compiling() or ids.is_meta:
        return False
    return not (ids.is_cuda and torch.cuda.is_current_stream_capturing())


def input_embedding(model: nn.Module) -> nn.Embedding:
    """The module that turns input ids into vectors.

    Raises:
        InputError: the model has none.
    """
    get = getattr(model, "get_input_embeddings", None)
    try:
        module = get() if get else None
    except NotImplementedError:
        module = None
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise InputError(
            f"{type(model).__name__} has no input embedding to attach a prompt to; give a "
            "transformers model that reads token ids"
        )
    return module  # type: ignore[return-value]


def _shared_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The input embedding and every other embedding of the same weight (T5 and BART have three).

    Offloaded modules have placeholders for the one weight; there the model says what is tied.
    """
    first = input_embedding(model)
    found = {id(first): first}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    own = {f"{name}.weight" for name, module in model.named_modules() if module is first}
    own |= {tied[name] for name in own if name in tied}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            alike = f"{name}.weight" in own or tied.get(f"{name}.weight") in own
            if module.weight is first.weight or alike:
                found.setdefault(id(module), module)
    return list(found.values())
