"""Prompts in training side by side on one frozen model; one prompt is a population of one.

`Population` is the thin module that every training drives, our loop and ``transformers.Trainer``
alike (`hf_trainer`): the members' encoders make the tables, the tables are written into the model's
embedding, one forward of the base model gives every row's loss, and each row counts for its member
alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.injection import Injector
from ..backbone.lookups import input_embedding, vectors_of
from ..backbone.modes import eval_mode, in_training
from ..backbone.tokens import first_free_id
from ..errors import PromptFileError
from ..forward.engine import Engine
from ..forward.label_scores import Words
from ..forward.plain import Shortener
from ..prompts.encoder import PromptEncoder, initialise
from ..prompts.prompt import Prompt
from ..rendering.collate import Batch
from ..threads import CHANGING
from .label_matrix import packed, rows_of, unpacked
from .settings import AT_WORDS
from .word_noise import WordNoise


class Member(nn.Module):
    """One prompt in training: its encoder and a random state of its own.

    Args:
        prompt: a trained one continues from its encoder's weights, or from its vectors.
        model: gives the embedding's width and the vectors of words.
        seed: of initialisation and dropout; other members never change what it gives.
        words: for each virtual token the id of the word that initialises it, or None.
        unit: in which it learns (`rates`).

    Attributes:
        draws: its vectors in training are random: the encoder has dropout.
        matrix: what its label matrix is made of, ``(W, W)``, or None (`add_matrix`).
        matrix_scale: the label matrix is so many times `matrix`.
    """

    def __init__(
        self,
        prompt: Prompt,
        model: nn.Module,
        seed: int,
        words: Sequence[int | None],
        unit: float = 1.0,
    ):
        super().__init__()
        embedding = input_embedding(model)
        with CHANGING, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU: others stay as they are
            self.encoder = PromptEncoder(prompt.encoder_config(embedding.embedding_dim)).float()
            self.encoder.unit = unit
            self._initialise(prompt, embedding, words)
            self.random_state = torch.get_rng_state()
        self.draws = prompt.encoder == "lstm" and prompt.encoder_dropout > 0
        self._labels, self._begun_matrix = prompt.labels, prompt.label_matrix
        self.matrix: nn.Parameter | None = None
        self.matrix_scale = 1.0

    def _initialise(
        self, prompt: Prompt, embedding: nn.Embedding, words: Sequence[int | None]
    ) -> None:
        if prompt.encoder_weights is not None:
            try:
                self.encoder.load_weights(prompt.encoder_weights)
            except RuntimeError as error:
                raise PromptFileError(
                    f"the saved encoder does not fit its settings: {error}"
                ) from None
            return
        if prompt.encoder == "mixture":
            ids = torch.randint(embedding.num_embeddings, (len(self.encoder.words),))
            self.encoder.words.copy_(vectors_of(embedding, ids))
        if prompt.vectors is not None:
            initialise(self.encoder, prompt.vectors)
            return
        if prompt.encoder in AT_WORDS:  # the vectors themselves begin where real words are
            ids = torch.randint(embedding.num_embeddings, (len(words),))
            initialise(self.encoder, vectors_of(embedding, ids))
        named = [(row, word) for row, word in enumerate(words) if word is not None]
        if named:
            rows, ids = (torch.tensor(column) for column in zip(*named, strict=True))
            initialise(self.encoder, vectors_of(embedding, ids), rows)

    def add_matrix(self, scale: float) -> None:
        """Have a label matrix, zero or the prompt's own, which is so many times its parameter."""
        self.matrix_scale = scale
        if self._begun_matrix is not None:
            begun = self._begun_matrix.of(self._labels).detach()
        else:
            begun = torch.zeros(2 * (sum(map(len, self._labels.values())),))
        own = begun.to(self.encoder.embedding.weight.device, torch.float32)
        self.matrix = nn.Parameter(own / scale)

    @property
    def rows(self) -> int:
        """Of its `table`."""
        count = self.encoder.total_virtual_tokens
        if self.matrix is None:
            return count
        return count + rows_of(len(self.matrix), self.encoder.token_dim)

    def table(self) -> Tensor:
        """The vectors ``(virtual tokens, width)``, and behind them the label matrix, if there is
        one (`label_matrix.packed`)."""
        if self.matrix is None:
            return self._vectors()
        return torch.cat([self._vectors(), self.packed_matrix()])

    def packed_matrix(self) -> Tensor:
        """The label matrix as rows of the table."""
        assert self.matrix is not None
        return packed(self.matrix_scale * self.matrix, self.encoder.token_dim)

    def give_gradient(self, rows: Tensor) -> None:
        """The label matrix gets the gradient of its rows of the table, where an optimizer looks."""
        assert self.matrix is not None
        self.matrix.grad = self.matrix_scale * unpacked(rows, len(self.matrix)).contiguous()

    def matrix_in(self, table: Tensor) -> Tensor:
        """The label matrix ``(W, W)`` that is in such a table."""
        assert self.matrix is not None
        return unpacked(table[self.encoder.total_virtual_tokens :], len(self.matrix))

    def _vectors(self) -> Tensor:
        """The vectors, with the member's own dropout."""
        if not (self.draws and self.training):
            return self.encoder.table()
        device = self.encoder.embedding.weight.device
        devices = [device] if device.type == "cuda" else []
        with CHANGING, torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.random_state)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(int(torch.randint(2**31, ())))
            table = self.encoder.table()
            self.random_state = torch.get_rng_state()
        return table


class Population(nn.Module):
    """Encoders on a frozen base model.

    Only the encoders are parameters to train, and only they are in the state dict. Use as a context
    manager, or call `close`: it takes the hooks off and gives the base model its state back.

    Args:
        engine: computes on the base model, which is always in eval mode here, its parameters frozen
            meanwhile.
        members: one or more.
        words: for label comparison the label of each word (`Renderer.owner`), else None; all
            members have a label matrix, or none has.
        tune_model: the base model's parameters are trained too, and ask for gradients meanwhile.
        noise: on words' vectors in training, as a share of their size.
    """

    def __init__(
        self,
        engine: Engine,
        members: Sequence[Member],
        words: Sequence[int] | None = None,
        tune_model: bool = False,
        noise: float = 0.0,
    ):
        super().__init__()
        model, tokenizer = engine.base.model, engine.base.tokenizer
        self.base, self.engine = model, engine
        self.noise = WordNoise(model, tokenizer, noise) if noise else None
        self.members = nn.ModuleList(members)
        self.words = None if words is None else Words.of(words)
        for member in members:
            member.eval()  # a member's random state moves only when it trains
        with torch.no_grad():
            rows = self.tables()
        with ExitStack() as stack:
            stack.enter_context(in_training(model, tune_model))
            stack.enter_context(eval_mode(model))
            with CHANGING:
                self._injector = Injector.on(model)
                self._span = self._injector.add(rows, first_free_id(tokenizer))
            stack.callback(self._injector.remove, self._span)
            self._undo = weakref.finalize(self, stack.pop_all().close)  # also at the exit
        self.register_state_dict_post_hook(_drop_base)
        self.register_load_state_dict_post_hook(_expect_no_base)

    def tables(self) -> Tensor:
        """All members' tables ``(rows, width)``, one member behind the other."""
        return torch.cat([member.table() for member in self.roster])

    @property
    def roster(self) -> list[Member]:
        """The members, in order."""
        return [member for member in self.members if isinstance(member, Member)]

    def rows_of_members(self) -> list[slice]:
        """For each member where its rows stand in `tables`, the vectors first."""
        sizes = [member.rows for member in self.roster]
        ends = list(accumulate(sizes))
        return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def first_ids(self) -> list[int]:
        """For each member the id of its first virtual token."""
        return [self._span.first + rows.start for rows in self.rows_of_members()]

    def train(self, mode: bool = True) -> Population:
        """Set the encoders' mode; the base model's dropout stays off."""
        if any(member.training != mode for member in self.roster):  # going through all takes time
            self.members.train(mode)
        if self.base.training:
            self.base.eval()  # never in train mode, not for a moment: other threads may use it
        self.training = mode
        return self

    def write_tables(self) -> None:
        """Put the encoders' present output into the embedding, for evaluation."""
        with torch.no_grad():
            tables = self.tables()
            self._injector.write(self._span, tables)
            self.words = self._words_with(tables)

    def step(self, batch: Batch) -> Tensor:
        """Each member's loss ``(members,)``, summed over its answer tokens (or its examples)."""
        with self.written(self.tables()):
            return self.losses(batch)

    @contextmanager
    def one_table(
        self,
        sharing: Sequence[Batch] = (),
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Iterator[Tensor]:
        """A micro-batch whose parts share one run of the encoders, and so each member's dropout.

        Gives the table ``(rows of all, width)``, a leaf. The parts' `losses` bring their
        gradients to it, and at the end they go on into the encoders together.

        Args:
            sharing: the parts, if what stands in front of their rows' first fields is to be
                computed once for all of them.
            autocast: accelerate's mixed precision.
        """
        tables = self.tables()
        table = tables.detach().requires_grad_()
        with self.written(table), self.engine.sharing(sharing, autocast):
            yield table
        if table.grad is not None:
            tables.backward(table.grad)

    @contextmanager
    def written(self, table: Tensor) -> Iterator[None]:
        """The table ``(rows of all, width)`` in the embedding, and its label matrices in `words`,
        for this thread: others never meet its graph."""
        before, self.words = self.words, self._words_with(table)
        try:
            with self._injector.serving({self._span: table}, alone=True, words=self.noise):
                yield
        finally:
            self.words = before

    def _words_with(self, table: Tensor) -> Words | None:
        """The label words with the matrices that are in the table, if the members have some."""
        if self.words is None or self.roster[0].matrix is None:
            return self.words
        pairs = zip(self.roster, self.rows_of_members(), strict=True)
        return replace(
            self.words, matrices=torch.stack([one.matrix_in(table[rows]) for one, rows in pairs])
        )

    def losses(self, batch: Batch, shortener: Shortener | None = None) -> Tensor:
        """Each member's loss ``(members,)`` with the table that is in the embedding now.

        Args:
            batch: on the model's device.
            shortener: instead of the engine's own choice.
        """
        losses = self.engine.losses(batch, self.words, shortener)
        return losses.new_zeros(len(self.members)).index_add(0, batch.member, losses)

    @property
    def is_open(self) -> bool:
        """It is not closed yet."""
        return self._undo.alive

    def close(self) -> None:
        """Take the hooks off and give the base model its mode and gradients back."""
        self._undo()

    def __enter__(self) -> Population:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _drop_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}base.")]:
        del state[key]


def _expect_no_base(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if "base." not in k]
