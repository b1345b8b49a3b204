"""Rendered examples -> batches of rows of like length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..backbone.base_model import BaseModel
from ..backbone.kinds import ModelKind
from ..backbone.traits import counts_columns, sees_padding
from ..errors import InputError
from ..rendering.collate import Batch, collate
from ..rendering.layout import Sequence as Tokens
from ..rendering.render import Rendered

Numbered = tuple[Rendered, int]
"""An example and the number of its prompt among those of a call."""
_BUSY = {"cpu": 512, "cuda": 16384}
_ROWS, _ANSWERED = 32, 2048
"""Rows of a batch that computes no gradient, and tokens of answers up to which it may have more:
each has logits over the whole vocabulary."""
_SEQUENCES = 1024
"""Rows of the model's in such a batch, where an example has one for each of many label words."""
_AT_ONCE = 2**22
"""Input ids of batches that are there together: with their mask 64 MiB."""


@dataclass(frozen=True)
class Batching:
    """How a model takes its batches, without the model: it may go to processes that load data.

    Attributes:
        kind: how the model gives an answer.
        pad_id: as `BaseModel.pad_id`.
        decoder_start_id: as `BaseModel.decoder_start_id`.
        refusal: why rows of unlike length cannot stand together; None where they can.
    """

    kind: ModelKind
    pad_id: int
    decoder_start_id: int
    refusal: str | None

    @classmethod
    def of(cls, base: BaseModel) -> Batching:
        """How a model takes its batches now: its embedding may grow."""
        name, refusal = type(base.model).__name__, None
        if base.kind == ModelKind.CAUSAL and counts_columns(base.model):
            refusal = (
                f"{name} counts padding as positions, so that rows of unlike "
                "length would change each other: give batch_size=1 and one prompt"
            )
        elif sees_padding(base.model):
            refusal = (
                f"{name} reads padding as text, so that rows of unlike length "
                "would change each other: give batch_size=1, one prompt, and label words of one "
                "token each"
            )
        return cls(base.kind, base.pad_id, base.decoder_start_id, refusal)

    def __call__(self, rows: Sequence[Numbered], first_ids: Sequence[int]) -> Batch:
        """Rows as one batch, on the CPU; `Batch.member` is each example's prompt.

        Args:
            rows: all prepared for label comparison, or none.
            first_ids: for each prompt the id of its first virtual token; 0 for a manual template.

        Raises:
            InputError: the model cannot tell padding from text.
        """
        batch = collate(
            [example for example, _ in rows],
            self.kind,
            [first_ids[number] for _, number in rows],
            pad_id=self.pad_id,
            decoder_start_id=self.decoder_start_id,
        )
        if self.refusal and len(set(batch.lengths)) > 1:
            raise InputError(self.refusal)
        return replace(batch, member=torch.tensor([number for _, number in rows]))


def chunks_by_length(
    examples: Sequence[Rendered], rows: int | None, device: torch.device, members: int
) -> Iterator[list[int]]:
    """The numbers of some examples at a time, the shortest inputs first.

    Args:
        examples: to be computed without gradients.
        rows: of a forward at most; None for 32, or more where that does not keep the device busy,
            or fewer where each has many label words of several tokens.
        device: that will compute them.
        members: rows that each example is, one for each that answers.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].sequences[0].ids))
    full = size = max(1, (rows or _ROWS) // members)
    enough = busy_with(device) if rows is None else 0
    chunk: list[int] = []
    computed = answered = sequences = 0
    for index in order:
        more = members * len(examples[index].sequences)
        if rows is None and chunk and more > members and sequences + more > _SEQUENCES:
            yield chunk
            chunk, computed, answered, sequences, full = [], 0, 0, 0, size
        chunk.append(index)
        sequences += more
        computed += members * computed_tokens(examples[index], False)
        answered += members * sum(len(s.answer) for s in examples[index].sequences)
        much = computed >= enough or answered >= _ANSWERED
        if len(chunk) < size or (len(chunk) < full and not much):
            continue
        if 2 * computed <= enough and 2 * answered <= _ANSWERED:
            full *= 2  # so that shapes come again (`graphed_scores`)
            continue
        yield chunk
        chunk, computed, answered, sequences, full = [], 0, 0, 0, size
    if chunk:
        yield chunk


def some_at_once(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """As many batches as may be there together, made when their turn comes: many label words repeat
    a row as often, so that the inputs of all rows may be more than the memory holds."""
    some: list[Batch] = []
    held = 0
    for batch in batches:
        some.append(batch)
        held += batch.input_ids.numel()
        if held >= _AT_ONCE:
            yield some
            some, held = [], 0
    if some:
        yield some


def by_length(
    rows: Sequence[Numbered], device: torch.device, kept: bool = False, packed: bool = False
) -> Iterator[list[Numbered]]:
    """Rows of like length together, in parts of some size, so that little is padding.

    A part is as large as the device needs to be busy; what the parts' losses add up to is the whole
    batch's.

    Args:
        rows: examples, each with its member.
        device: that will compute them.
        kept: what stands before the first virtual token or the first field is not computed with
            them (`prefix_store`, `shared_prefix`); a part may have four times as much of it.
        packed: rows behind a shared prefix may be packed (`packing`): a member's are together.
    """
    if not rows:
        return
    busy = busy_with(device)
    sizes = [
        (computed_tokens(example, kept), computed_tokens(example, False)) for example, _ in rows
    ]
    computed, whole = map(sum, zip(*sizes, strict=True))
    enough = computed / max(1, round(computed / busy), round(whole / (4 * busy)))
    groups = [n if kept and packed and _begins_virtual(e) else -1 for e, n in rows]
    order = sorted(range(len(rows)), key=lambda i: (groups[i], sizes[i]), reverse=True)
    part: list[Numbered] = []
    tokens = cut = 0
    for index in order:
        part.append(rows[index])
        tokens += sizes[index][0]
        if tokens >= (cut + 1) * enough and index != order[-1]:
            yield part
            part, cut = [], cut + 1
    yield part


def busy_with(device: torch.device) -> int:
    """Tokens of a forward that keep a device busy; more of them run no faster for each."""
    return _BUSY.get(device.type, _BUSY["cuda"])


def computed_tokens(example: Rendered, kept: bool) -> int:
    """Tokens of an example that a forward computes.

    Args:
        example: of a batch.
        kept: as for `by_length`.
    """
    return sum(len(s.ids) - (_known(s) if kept else 0) for s in example.sequences)


def _known(tokens: Tokens) -> int:
    """How many stand in front of the first virtual one, or of the first field behind that."""
    return max(tokens.opening, tokens.plain_prefix)


def _begins_virtual(example: Rendered) -> bool:
    return any(s.opening > s.plain_prefix for s in example.sequences)
