"""The rows of the comparison: what both sides do, and the check that they do the same.

A row's function gets two copies of the base model, one for each side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from limits import Part
from sides import VIRTUAL, Ours, Step, Theirs, rendered
from torch import Tensor

from ptuning.forward.label_words import label_word_scores
from ptuning.forward.plain import answer_logits
from ptuning.forward.prefix_store import PrefixStore, for_prediction


@dataclass
class Workload:
    """One row.

    Attributes:
        ours, peft: one run of each side.
        difference: the largest difference of the numbers that must be equal, before any training.
        equal: which numbers these are.
        our_parts, their_parts: what each side's model computes in a run.
        tokens: of one forward of ours, for the rate of matrix products.
        side: ours, to be closed.
    """

    ours: Step
    peft: Step
    difference: float
    equal: str
    our_parts: list[Part]
    their_parts: list[Part]
    tokens: int
    side: Any


def texts(model: Any, rows: int, tokens: int) -> Tensor:
    """Random rows of text and one answer token ``(rows, tokens + 1)``."""
    vocabulary = model.config.vocab_size
    return torch.randint(100, vocabulary - 100, (rows, tokens + 1)).to(model.device)


def train(base: Any, copy: Any, kind: str, rows: int = 8, tokens: int = 128) -> Workload:
    """A training step; `kind` is ``front``, ``first_epoch`` or ``cached``."""
    ids = texts(base, rows, tokens)
    theirs = Theirs(copy)
    ours = Ours(base, theirs.encoder.state_dict())
    examples = rendered(ids, after=kind != "front")
    kept = PrefixStore(base)
    stores: dict[str, Callable[[], PrefixStore | None]] = {
        "front": lambda: kept,  # shares the virtual tokens' keys and values in each step
        "first_epoch": lambda: PrefixStore(base),
        "cached": lambda: kept,
    }
    mine = float(ours.losses(examples, stores[kind]()))
    if kind == "front":
        with torch.no_grad():
            difference, equal = abs(mine - float(theirs.loss(ids))), "loss of both sides"
        parts = _front(1, rows, tokens)
    else:
        plain = float(ours.losses(examples, None))
        difference, equal = abs(mine - plain), "our loss with and without kept keys and values"
        parts = [Part(rows * VIRTUAL, tokens + VIRTUAL / 2, rows, True)]
        if kind == "first_epoch":
            parts.append(Part(rows * tokens, tokens / 2, 0, False))
    return Workload(
        ours.step(examples, stores[kind]),
        theirs.step(ids),
        difference,
        equal,
        parts,
        [_theirs(rows, tokens + 1, backward=True)],
        parts[-1].tokens if kind == "front" else parts[0].tokens,
        ours,
    )


def classify(base: Any, copy: Any, rows: int = 8, tokens: int = 16) -> Workload:
    """Two label words behind short texts; what stands in front of them all is constant."""
    text = texts(base, rows, tokens)[:, :-1]
    theirs, words = Theirs(copy), torch.tensor([330, 441], device=base.device)
    ours = Ours(base, theirs.encoder.state_dict())
    ours.population.eval()
    ours.population.write_tables()
    store = PrefixStore(base)
    answers = torch.cat([text, text[:, :1]], 1)
    batch = ours.batch(ours.rows(rendered(answers, after=False)))
    batch = replace(batch, label_ids=words.expand(rows, -1))

    @torch.no_grad()
    def mine() -> Tensor:
        return label_word_scores(base, for_prediction(batch, {}), len(words), store)

    def other() -> Tensor:
        return theirs.last_logits(text)[:, words]

    return Workload(
        mine,
        other,
        float((mine() - other()).abs().max()),
        "logits of both sides",
        [Part(rows * tokens, VIRTUAL + tokens / 2, 0, False)],
        [_theirs(rows, tokens, backward=False)],
        rows * tokens,
        ours,
    )


def many_prompts(base: Any, copy: Any, prompts: int = 16, tokens: int = 512) -> Workload:
    """Several prompts on one document, which each side reads as little as it can."""
    ids = texts(base, 1, tokens)
    theirs, words = Theirs(copy), torch.tensor([330, 441], device=base.device)
    ours = Ours(base, members=prompts)
    ours.population.eval()
    ours.population.write_tables()
    rows = ours.rows(rendered(ids, after=True))

    @torch.no_grad()
    def mine(store: PrefixStore | None = None) -> Tensor:
        store, batch = store or PrefixStore(base), ours.batch(rows)
        batch = replace(batch, member=torch.zeros_like(batch.member))  # as `predict` has it
        return answer_logits(base, batch, store)[:, -1, words]

    @torch.no_grad()
    def plain() -> Tensor:
        """As `mine`, each row alone."""
        return torch.cat([answer_logits(base, ours.batch([row]))[:, -1, words] for row in rows])

    def other() -> None:
        for _ in range(prompts):
            theirs.last_logits(ids[:, :-1])[:, words]

    return Workload(
        mine,
        other,
        float((mine() - plain()).abs().max()),
        "our logits together and each prompt alone",
        [
            Part(tokens, tokens / 2, 0, False),
            Part(prompts * VIRTUAL, tokens + VIRTUAL / 2, prompts, False),
        ],
        [_theirs(1, tokens, backward=False)] * prompts,
        tokens,
        ours,
    )


def population(
    base: Any, copy: Any, members: int = 16, rows: int = 8, tokens: int = 32
) -> Workload:
    """A training step of several members together, against as many of PEFT's one by one."""
    ids = texts(base, rows, tokens)
    theirs = Theirs(copy)
    ours = Ours(base, theirs.encoder.state_dict(), members)
    examples = rendered(ids, after=False)
    with torch.no_grad():
        difference = (ours.losses(examples, None) - theirs.loss(ids)).abs().max()
    one, store = theirs.step(ids), PrefixStore(base)

    def other() -> None:
        for _ in range(members):
            one()

    return Workload(
        ours.step(examples, lambda: store),
        other,
        float(difference),
        "every member's loss and PEFT's",
        _front(members, rows, tokens),
        [_theirs(rows, tokens + 1, backward=True)] * members,
        min(512, members * rows * (tokens + VIRTUAL)) if base.device.type == "cpu" else 4096,
        ours,
    )


def _front(members: int, rows: int, tokens: int) -> list[Part]:
    """Each member's virtual tokens once, and the texts of its rows behind them."""
    texts = members * rows
    return [
        Part(members * VIRTUAL, VIRTUAL / 2, 0, True),
        Part(texts * tokens, VIRTUAL + tokens / 2, texts, True),
    ]


def _theirs(rows: int, tokens: int, backward: bool) -> Part:
    length = VIRTUAL + tokens
    return Part(rows * length, length / 2, rows * length, backward)


@dataclass(frozen=True)
class Row:
    """Name and size of a row.

    Attributes:
        work: in words.
        make: from two copies of the model to the workload.
        shape: of the model that a GPU row makes up; None is SmolLM2 itself.
        most: runs at most, where one takes long.
    """

    work: str
    make: Callable[[Any, Any], Workload]
    shape: str | None = None
    most: int = 99


CPU_ROWS = {
    "train_front": Row(
        "step, prompt in front, 8 texts of 128 tokens", lambda b, c: train(b, c, "front")
    ),
    "train_after_first_epoch": Row(
        "step, prompt after the text, same sizes, keys and values computed",
        lambda b, c: train(b, c, "first_epoch"),
    ),
    "train_after_cached": Row("the same, later epochs", lambda b, c: train(b, c, "cached")),
    "classify_short": Row(
        "8 texts of 16 tokens, prompt in front, two labels, a later batch of a call", classify
    ),
    "many_prompts_one_document": Row(
        "16 prompts on one document of 512 tokens", many_prompts, most=3
    ),
    "population_cpu": Row(
        "step of 16 members together, 8 texts of 32 tokens each, against 16 runs of PEFT",
        population,
        most=3,
    ),
}
GPU_ROWS = {
    "gpu_1b": Row(
        "1B shape: step, prompt after 16 texts of 256 tokens, keys and values kept",
        lambda b, c: train(b, c, "cached", 16, 256),
        "1b",
    ),
    "gpu_8b_front": Row(
        "8B shape: step, prompt in front of 8 texts of 256 tokens",
        lambda b, c: train(b, c, "front", 8, 256),
        "8b",
    ),
    "gpu_population": Row(
        "135M shape: step of 16 members, 8 texts of 32 tokens each, against 16 runs of PEFT",
        population,
        "135m",
    ),
}
