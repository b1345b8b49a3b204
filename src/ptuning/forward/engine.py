"""The one chooser of fast paths: from batches to logits, scores and losses by the cheapest way.

Training, prediction, evaluation and ranking hold an `Engine` and know no fast path by name. Every
path computes what `plain` computes; which one a batch takes depends on the model's traits and on
what the batch's rows have in common.

    causal    openings shared in this call, else the frozen prefix that is kept, else whole rows
    labels    single-token words by their rows of the output head (`label_words`)
    answers   long ones, and labels' of several tokens, with the vocabulary in chunks (`chunked`)
    a GPU     many predictions of a small model by replayed graphs (`graphed_scores`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..backbone.base_model import BaseModel
from ..backbone.kinds import ModelKind
from ..backbone.traits import packs_rows
from ..prompts.prompt import Prompt
from ..prompts.task import Task
from ..rendering.collate import Batch
from ..rendering.render import Rendered, Renderer
from . import chunked
from .batching import (
    Batching,
    Numbered,
    by_length,
    chunks_by_length,
    computed_tokens,
    some_at_once,
)
from .compiled import CompiledLayers as CompiledLayers
from .compiled import Work as Work
from .compiled import layers_worth_it
from .compiled_on_cpu import LayersOnCpu as LayersOnCpu
from .graphed_scores import graphed_scores
from .greedy import continue_greedily
from .kv_cache import pooled_cache
from .label_scores import Words
from .packing import pack
from .plain import Shortened, Shortener
from .prefix_store import Common, PrefixStore, for_prediction, in_common
from .shared_prefix import SharedPrefix, share_openings
from .vocabulary import vocabulary_logits


class Engine:
    """A base model, and what was computed for it that serves again.

    Args:
        base: the frozen model; prompts are attached by whoever needs them.
        kept_bytes: of keys and values of frozen prefixes; None for part of the free memory, 0 to
            keep none.
        plain: take the plain path always: every row is computed as a whole.
        repeats: many batches without gradients come: on a GPU those of one shape are replayed.

    An engine belongs to one call, or to one thread.
    """

    def __init__(
        self,
        base: BaseModel,
        kept_bytes: int | None = None,
        *,
        plain: bool = False,
        repeats: bool = False,
    ):
        self.base = base
        self._graphed = graphed_scores(base.model) if repeats and not plain else None
        self.shares = base.kind is ModelKind.CAUSAL and not plain
        keeps = self.shares and kept_bytes != 0
        self.store = PrefixStore(base.model, kept_bytes) if keeps else None
        self._shared: SharedPrefix | None = None
        self._common: Common | None = None

    def ends(self, task: Task) -> list[int]:
        """The tokens that end a free answer of a task: those of the model's generation settings
        too, but not for a trained prompt, which has learnt the tokenizer's end alone."""
        config = getattr(self.base.model, "generation_config", None)
        more = None if isinstance(task, Prompt) else getattr(config, "eos_token_id", None)
        own = self.base.tokenizer.eos_token_id
        found = [own, *(more if isinstance(more, list | tuple) else [more])]
        return list(dict.fromkeys(int(one) for one in found if one is not None))

    # Rows to batches.

    def renderer(self, task: Task, candidates: list[str] | None = None) -> Renderer:
        """What renders rows for a task on this model; its arguments are `Renderer`'s."""
        base = self.base
        limits = base.longest_answer, base.known_tokens
        return Renderer(base.tokenizer, task, base.kind, base.context, candidates, *limits)

    def batch(self, rows: Sequence[Numbered], first_ids: Sequence[int]) -> Batch:
        """As `batching.Batching`, on the model's device."""
        return self.batching()(rows, first_ids).to(self.base.device)

    def batching(self) -> Batching:
        """What makes such batches without the model."""
        return Batching.of(self.base)

    def parts(
        self, rows: Sequence[Numbered], device: torch.device | None = None
    ) -> list[list[Numbered]]:
        """Rows in parts that keep a device busy, the model's by default (`batching.by_length`)."""
        packs = packs_rows(self.base.model)
        return list(by_length(rows, device or self.base.device, self.shares, packs))

    def batches(
        self, rows: Sequence[Numbered], first_ids: Sequence[int], device: torch.device
    ) -> list[Batch]:
        """Rows of a training step as batches of such parts, still on the CPU."""
        batching = self.batching()
        return [batching(part, first_ids) for part in self.parts(rows, device)]

    def prediction_batch(self, rows: Sequence[Numbered], first_ids: Sequence[int]) -> Batch:
        """A batch, still on the CPU, whose rows share all that they can; nothing is trained."""
        batch = self.batching()(rows, first_ids)
        batch = replace(batch, member=torch.zeros_like(batch.member))  # prompts may share rows too
        if self.store is not None:
            batch = for_prediction(batch, self._common)
        return batch

    def chunks(
        self, examples: Sequence[Rendered], rows: int | None, members: int = 1
    ) -> Iterator[list[int]]:
        """As `batching.chunks_by_length`, for the model's device."""
        return chunks_by_length(examples, rows, self.base.device, members)

    def some_at_once(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """As `batching.some_at_once`: those that `sharing` is for."""
        return some_at_once(batches)

    # What serves several batches.

    def tokens(self, examples: Sequence[Rendered]) -> float:
        """How many tokens an example's forward computes, on average."""
        return sum(computed_tokens(one, self.shares) for one in examples) / len(examples)

    def expect(self, examples: Iterable[Rendered]) -> None:
        """Room for the frozen prefixes of these, at once and no more than they need."""
        if self.store is not None:
            prefixes = {s.ids[: s.plain_prefix] for one in examples for s in one.sequences}
            self.store.expected = sum(map(len, prefixes))

    @contextmanager
    def sharing(
        self,
        batches: Sequence[Batch],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Iterator[None]:
        """What the batches' rows open with is computed once for all of them, if that is worth it.

        Where gradients are on they arrive there from the batches' losses, and go on to the prompts'
        vectors when the block ends.
        """
        if self.shares:
            with autocast():
                self._shared = share_openings(self.base.model, batches)
        try:
            yield
            if self._shared is not None:
                self._shared.backward()
        finally:
            self._shared = None

    @contextmanager
    def one_document(self, tasks: Sequence[Sequence[Rendered]]) -> Iterator[None]:
        """Several prompts ask about the same rows: the text in common is computed once.

        Args:
            tasks: for each prompt its rows, in the same order.
        """
        several = self.store is not None and len(tasks) > 1
        self._common = in_common(tasks) if several else None
        try:
            yield
        finally:
            self._common = None

    def _shorten(self, batch: Batch) -> Shortened | None:
        """What is left to compute of a causal batch: the first path that saves anything."""
        for path in (self._shared, self.store):
            shortened = path(batch) if path is not None else None
            if shortened is not None:
                return shortened
        return None

    # What a captured step asks (`training.cuda_graphs`).

    def serves_kept(self, batch: Batch) -> bool:
        """The batch's frozen prefixes are read from the store."""
        return self.store is not None and self.store.serves(batch)

    def stands_still(self, batch: Batch, padded: float) -> bool:
        """A graph can hold what the batch's `losses` compute, with so many times its rows: no look
        at values, no new packing."""
        packs = self.serves_kept(batch) and pack(self.base.model, batch) is not None
        return not packs and not chunked.reads_in_chunks(self.base.model, batch, padded)

    def kept_at(self, slots: Tensor) -> Cache | None:
        """A cache around slots ``(R, kept)`` of the store's pool; None where there is no pool."""
        pool = None if self.store is None else self.store.pool
        return None if pool is None else pooled_cache(pool, slots)

    def compiled_layers(self, work: Work) -> CompiledLayers | None:
        """The model's layers for captured steps, if compiling them is worth it (`compiled`)."""
        layers = layers_worth_it(self.base.model, work)
        return CompiledLayers(self.base.model, layers) if layers else None

    def layers_on_cpu(self, work: Work) -> LayersOnCpu | None:
        """The same for plain steps on a CPU (`compiled_on_cpu`)."""
        layers = layers_worth_it(self.base.model, work)
        return LayersOnCpu(layers) if layers else None

    # Batches to numbers.

    def logits(self, batch: Batch) -> Tensor:
        """Logits ``(R, K, vocabulary)``, as `plain.answer_logits`."""
        return vocabulary_logits(self.base.model, batch.to(self.base.device), self._shorten)

    def losses(
        self, batch: Batch, words: Words | None, shortener: Shortener | None = None
    ) -> Tensor:
        """The loss ``(N,)`` of each example, as `plain.example_losses`.

        Args:
            batch: on the model's device.
            words: that label comparison compares, else None.
            shortener: instead of the engine's own choice.
        """
        return chunked.losses(self.base.model, batch, words, shortener or self._shorten)

    def losses_and_right(self, batch: Batch, words: Words | None) -> tuple[Tensor, Tensor]:
        """`losses`, and which examples ``(N,)`` are answered right, as `plain.examples_right`."""
        return chunked.losses_and_right(self.base.model, batch, words, self._shorten)

    def word_scores(self, batch: Batch, words: int) -> Tensor:
        """Scores ``(N, words)`` of label words, as `plain.word_scores`."""
        one_token = batch.label_ids is not None  # of several tokens there may be many logits
        kept = self._shared is not None or self.serves_kept(batch)
        if self._graphed is not None and one_token and not kept:
            return self._graphed(batch.here, words)
        return chunked.word_scores(
            self.base.model, batch.to(self.base.device), words, self._shorten
        )

    def continue_greedily(
        self,
        batch: Batch,
        limit: int,
        ends: list[int],
        watch: Callable[[Tensor, Tensor], Tensor] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The most likely tokens behind each row, and how likely they are (`greedy`)."""
        batch = batch.to(self.base.device)
        cache = self.store.cache(batch) if self.store is not None else None
        return continue_greedily(self.base, batch, limit, ends, watch, sizes, cache)
