"""The two hooks that turn virtual token ids into vectors; nothing else of the model is touched.

    embed(id) = rows[id - first]      where the id is virtual (at or above the embedding's rows)
              = E[id]                 elsewhere, bit for bit

A pre-hook on the input embedding replaces virtual ids by a valid one, a post-hook writes the
prompt's rows over the result. Rows are written *after* any scaling inside the embedding module
(Gemma, BART), as the reference does. This module knows nothing of prompts, templates or training.

Threads share a model. Attaching computes nothing, so no thread's gradient mode is in what another
one reads: each forward puts together the rows that its own ids name. Rows in training are served to
the training's thread alone (`Injector.serving`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, compress
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.rows import listed
from ..devices import on_cpu_by_default
from ..errors import InputError
from ..threads import CHANGING
from .lookups import (
    check_fits,
    check_width,
    input_embedding,
    looks_up_on,
    second_lookups,
    shared_embeddings,
)
from .spans import Lookup, Span, near
from .upstream import hook_owners, remove_hooks_of

Words = Callable[[Tensor, Tensor], Tensor]
SAFE_ID = 0
"""Virtual positions get its row where ids are looked up."""


class Injector:
    """The hooks of one model and the spans that they serve.

    Any number of spans can be added; the hooks leave with the last of them. Forward passes only
    read, so threads may share the model.

    Attributes:
        modules: the input embedding and those of the same weight.
        threshold: the first id that is no word.
        width: of a row.
        spans: in the order of their ids.
    """

    def __init__(self, model: nn.Module):
        self.modules = shared_embeddings(model)
        weight_owner = self.modules[0]
        self.threshold: int = weight_owner.num_embeddings
        self.width: int = weight_owner.embedding_dim
        self.spans: list[Span] = []
        self._lookup: Lookup
        self._local = threading.local()
        self.second_lookups = second_lookups(model)
        _at[_holder(model)] = ref(self)

    @property
    def _device(self) -> torch.device:
        return looks_up_on(self.modules[0])

    @property
    def attached(self) -> object:
        """Another object whenever spans or their rows have changed."""
        return self._lookup

    @staticmethod
    def on(model: nn.Module) -> Injector:
        """The injector of `model`: the one that it has, or a new one."""
        return Injector.of(model) or Injector(model)

    @staticmethod
    def of(model: nn.Module) -> Injector | None:
        """The injector that has spans on `model`, or None; its hooks may be on an embedding that
        another one has replaced since, and follow then."""
        owners = hook_owners(input_embedding(model))
        known = _at.get(_holder(model))
        found = known() if known is not None else None
        if found is None or not found.spans:  # of a copied model the hooks alone tell
            found = next((owner for owner in owners if isinstance(owner, Injector)), None)
        if found is not None and not any(owner is found for owner in owners):
            found.follow(model)
        elif found is not None:
            found.settle()
        return found

    def add(self, rows: Tensor, at_least: int = 0) -> Span:
        """Claim ids for `rows` ``(count, width)``, behind all claimed ones, from `at_least` on.

        Raises:
            InputError: the rows are not as wide as the embedding.
        """
        (span,) = self.add_all([rows], at_least)
        return span

    def add_all(self, several: Sequence[Tensor], at_least: int = 0) -> list[Span]:
        """As `add`, for each of several, all or none."""
        for rows in several:
            check_width(rows, self.width)
            check_fits(rows, self.modules[0].weight.dtype)
        with CHANGING:
            free = max(self.spans[-1].end if self.spans else self.threshold, at_least)
            spans: list[Span] = []
            for rows in several:
                spans.append(Span(free, rows))
                free = spans[-1].end
            hooked = bool(self.spans)
            self._serve([*self.spans, *spans])
            if not hooked:
                self._hook()
        return spans

    def follow(self, model: nn.Module) -> None:
        """After a change of the embedding, of its size or of the module itself, serve the one that
        the model has now (`settle`)."""
        first = input_embedding(model)
        if self.modules[0] is not first or self.threshold != first.num_embeddings:
            with CHANGING:
                self._unhook()
                self.modules, self.second_lookups = shared_embeddings(model), second_lookups(model)
                if self.spans:
                    self._serve(self.spans)
                    self._hook()
        self.settle()

    def settle(self) -> None:
        """After a change of the embedding's size let ids begin behind its rows again: all that are
        words now move, whoever claimed them."""
        if self.threshold == self.modules[0].num_embeddings:
            return
        with CHANGING:
            self.threshold = free = self.modules[0].num_embeddings
            for span in self.spans:
                span.first = max(span.first, free)
                free = span.end
            if self.spans:
                self._serve(self.spans)

    def _hook(self) -> None:
        for module in self.modules:
            _remove_copies(module)
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after)
        for again in self.second_lookups:
            again.register_forward_pre_hook(self._guard)

    def _unhook(self) -> None:
        for module in [*self.modules, *self.second_lookups]:
            remove_hooks_of(self, module)

    def write(self, span: Span, rows: Tensor) -> None:
        """Give a span new rows ``(count, width)`` for all threads. They may carry a gradient: of
        forwards whose ids name them, and no others."""
        with CHANGING:
            same = rows.shape == span.rows.shape and self._lookup.owner.device == self._device
            span.rows = rows
            if same:
                self._lookup = self._lookup.having({span: near(rows, self._device)})
            else:
                self._serve(self.spans)

    @contextmanager
    def serving(
        self, rows: Mapping[Span, Tensor], alone: bool = False, words: Words | None = None
    ) -> Iterator[None]:
        """In this thread spans have other rows meanwhile, which may carry a gradient; those that
        are served around it keep theirs (a prompt in front of another one's).

        Args:
            rows: for each span its rows ``(count, width)``, where the embedding is.
            alone: rows of one span, and forwards have no virtual ids but its own. Nothing else is
                read then, and no id is looked at, so that a GPU need not wait, and a graph that is
                captured holds no tensor of others.
            words: makes of words ``(…)`` and their vectors ``(…, width)`` what these are instead.
        """
        before = self._served
        self._local.served = (rows if alone else {**before[0], **rows}, alone, words)
        try:
            yield
        finally:
            self._local.served = before

    def borrow(self, rows: Tensor) -> Span | None:
        """The span whose rows ``(count, width)`` are this very tensor, held once more; release it
        with `remove`."""
        with CHANGING:
            for span in self.spans:
                if span.rows is rows:
                    span.users += 1
                    return span
        return None

    def remove(self, *spans: Span) -> None:
        """Release the ids of spans; with the last one the model is as it was."""
        with CHANGING:
            for span in spans:
                span.users -= 1
            over = {span for span in spans if span.users <= 0}
            left = [span for span in self.spans if span not in over]
            if len(left) == len(self.spans):
                return
            if left:
                self._serve(left)
                return
            self.spans = left
            self._unhook()
            self._local = threading.local()  # a thread may be in the embedding, and leave nothing

    @on_cpu_by_default
    def _serve(self, spans: list[Span]) -> None:
        """Have these spans; where there is no room for their rows all stays as it was."""
        lookup = Lookup.of(spans, self.threshold, self._device)
        self.spans, self._lookup = spans, lookup  # in one go each: forwards may run meanwhile

    @property
    def _served(self) -> tuple[Mapping[Span, Tensor], bool, Words | None]:
        return getattr(self._local, "served", ({}, False, None))

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.settle()
        ids = args[0]
        virtual = ids >= self.threshold
        self._local.call = (ids, virtual)
        return (ids.masked_fill(virtual, SAFE_ID), *args[1:])

    def _guard(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.masked_fill(a >= self.threshold, SAFE_ID) if _ids(a) else a for a in args)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        call: tuple[Tensor, Tensor] | None = getattr(self._local, "call", None)
        self._local.call = None
        if call is None:  # the hooks came while this thread was inside the embedding already
            return output
        ids, virtual = call
        served, alone, words = self._served
        if words is not None:
            output = words(args[0], output)
        if alone:
            ((span, table),) = served.items()
            row = (ids - span.first).clamp(0, len(table) - 1)
        else:
            lookup = self._here(output.device)
            found = self._rows_of(ids, lookup.having(served) if served else lookup)
            if found is None:
                return output
            row, table = found
        # Gather in the table's own precision, then convert: gradients add up in float32. Plain
        # indexing would add them up with several threads in an order that changes from run to run.
        vectors = F.embedding(row, table.to(output.device)).to(output.dtype)
        return torch.where(virtual.unsqueeze(-1), vectors, output)

    def _rows_of(self, ids: Tensor, lookup: Lookup) -> tuple[Tensor, Tensor] | None:
        """For each id its row in a table, and the table; None where all are words."""
        at = (ids - (self.threshold - 1)).clamp(0, len(lookup.owner) - 1)
        owner, row = lookup.owner[at], lookup.row[at]
        named = [True] * len(lookup.rows)
        if may_look_at_values(ids):
            seen = owner.new_zeros(2 + len(named), dtype=torch.bool)
            _, lost, *named = seen.index_fill(0, owner.flatten(), True).tolist()
            if lost:
                raise self._unowned(int(ids[owner == 1][0]), lookup.spans)
        tables = list(compress(lookup.rows, named))
        if not tables:
            return None
        if len(tables) == 1:
            (table,), first = tables, lookup.spans[named.index(True)].first
            return (ids - first).clamp(0, len(table) - 1), table
        if not all(named):  # of hundreds of prompts a batch names a few: only theirs are gathered
            counts = (
                0 if here else len(rows) for rows, here in zip(lookup.rows, named, strict=True)
            )
            left_out = torch.tensor([0, 0, *accumulate(counts)], device=at.device)
            row = row - left_out[owner]
        return row, torch.cat([table.to(at.device) for table in tables])

    def _unowned(self, id: int, spans: tuple[Span, ...]) -> InputError:
        return InputError(
            f"input id {id} belongs to no attached prompt: the model has ids 0 to "
            f"{self.threshold - 1}, attached prompts have "
            + listed(f"{s.first} to {s.end - 1}" for s in spans)
        )

    def _here(self, device: torch.device) -> Lookup:
        """The lookup on the device of what runs; moved once where the model was."""
        lookup = self._lookup
        if lookup.owner.device == device:
            return lookup
        moved = lookup.to(device)
        if not torch.compiler.is_compiling() and device == self._device:
            with CHANGING:
                if self._lookup is lookup and not any(rows.requires_grad for rows in lookup.rows):
                    self._lookup = moved
        return moved

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k != "_local"}
        if "_lookup" in state:
            rows = tuple(rows.detach() for rows in self._lookup.rows)
            state["_lookup"] = self._lookup._replace(rows=rows)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


_at: WeakKeyDictionary[nn.Module, ref[Injector]] = WeakKeyDictionary()
"""The module that an input embedding is part of -> the injector of the model."""


def _holder(model: nn.Module) -> nn.Module:
    """The module that the input embedding is part of: the same one when another takes its place,
    and in all wrappers of the model."""
    first = input_embedding(model)
    return next((m for m in model.modules() if any(part is first for part in m.children())), model)


def _remove_copies(module: nn.Module) -> None:
    """Take the hooks of nobody's injector off an embedding that was copied with its hooks."""
    known = [injector() for injector in _at.values()]
    for owner in hook_owners(module):
        if isinstance(owner, Injector) and not any(owner is one for one in known):
            remove_hooks_of(owner, module)


def _ids(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def may_look_at_values(ids: Tensor) -> bool:
    """False while a graph is traced or captured, where a look at values would break it."""
    if torch.compiler.is_compiling() or ids.is_meta:
        return False
    return not (ids.is_cuda and torch.cuda.is_current_stream_capturing())
