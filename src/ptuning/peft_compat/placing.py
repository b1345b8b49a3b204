"""Placing: an adapter's virtual tokens and anchors are inserted among the tokens of each row.

The rows' token ids get the adapters' virtual ids, and everything that has a value per token (mask,
labels, token types, positions, …) is spread likewise. Rows given as ``inputs_embeds`` become
virtual ids too, so there is one way in. The reference's own layout is the exception: it is
reproduced through ``inputs_embeds``, as the reference does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import traits
from ..backbone.injection import Injector, may_look_at_values
from ..backbone.kinds import reads_left_to_right
from ..backbone.lookups import looks_up_on
from ..backbone.placement import Placement
from ..backbone.spans import Span
from ..errors import InputError, warn
from ..prompts.encoder_config import TaskType
from . import arguments
from .adapters import Adapter
from .insertion import Insertion
from .positions import shifted

Rows = Sequence[Adapter | None]
"""The adapter of each row of a batch, None for a row without a prompt."""
_NOTHING = Insertion(())


@dataclass(frozen=True)
class Traits:
    """What placing must know of a base model, found out once.

    Attributes:
        causal: it reads from left to right.
        first_position: what its position ids begin with (RoBERTa's family: behind the padding id).
        several_axes: its positions have several axes and follow from the ids: it finds them itself.
        parameters: names of the arguments that its forward takes, or hands on to its encoder.
        any_keyword: its forward takes further ones.
    """

    causal: bool
    first_position: int
    several_axes: bool
    parameters: frozenset[str]
    any_keyword: bool

    @staticmethod
    def of(model: nn.Module) -> Traits:
        """The traits of a base model."""
        return Traits(
            causal=reads_left_to_right(model),
            first_position=traits.padding_offset(model),
            several_axes=traits.has_positions_on_axes(model),
            parameters=traits.forward_parameters(model) | _handed_on(model),
            any_keyword=traits.takes_any_argument(model),
        )


@dataclass(frozen=True)
class Base:
    """The base model of one call.

    Attributes:
        model: the base model.
        injector: its hooks.
        task: what the model is used for, or None.
        traits: what is known of it.
        reference_layout: place virtual tokens in front of the padding, as the reference does.
        twin: the id of a real token that is spelled like padding; None where nobody looks.
    """

    model: Any
    injector: Injector
    task: TaskType | None
    traits: Traits
    reference_layout: bool
    twin: Span | None = None

    @property
    def encodes_and_decodes(self) -> bool:
        """The model has an encoder and a decoder; prompts stand in the encoder's input."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def logits_of_decoder(self) -> bool:
        """Its logits and hidden states belong to a decoder, whose input has no prompt."""
        per_input = (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
        return self.encodes_and_decodes and self.task not in per_input

    def accepts(self, name: str) -> bool:
        """Its forward has an argument of this name."""
        return name in self.traits.parameters


def place(
    base: Base,
    rows: Rows,
    inputs: dict[str, Any],
    stack: ExitStack,
    *,
    of_text: bool = False,
) -> tuple[dict[str, Any], Placement]:
    """A call's arguments with prompts in them.

    Args:
        base: the model.
        rows: each row's adapter; one for all rows alike.
        inputs: the call's arguments, of B rows and T tokens.
        stack: holds what must be undone after the call.
        of_text: positions of answers count from the text's first token, instead of from the first
            virtual one as the reference's do.

    Returns:
        The base model's arguments, of P tokens, and where the text stands in them.

    Raises:
        InputError: no ids or embeddings, or both, a mask of another shape, or an argument that has
            no room for a prompt.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    arguments.check(inputs)
    text, embedded = _text(base, inputs)
    size, length = text.shape[:2]
    mask = inputs.pop("attention_mask", None)
    check_mask(mask, size, length)
    rows = list(rows) * size if len(rows) == 1 else rows
    where = placement(base, rows, text, mask, embedded)
    if where.ragged and mask is None:
        mask = torch.ones(size, length, dtype=torch.long, device=text.device)
    ids = inserted_ids(rows, where.inserted, text.device)
    if mask is not None:
        inputs["attention_mask"] = where(mask, 1)
    drop_token_types(base, inputs)
    for name in arguments.per_token(inputs, size, length):
        fill = arguments.FILLERS.get(name, 0)
        inputs[name] = where(inputs[name], fill, pad=fill)
    _place_positions(base, inputs, where, mask)
    _place_labels(base, inputs, where)
    _find_answers(inputs, where, [0 if of_text else _in_front(row) for row in rows])
    _find_kept(inputs, where)
    if base.reference_layout:
        inputs["inputs_embeds"] = _embeddings(base, where, text, ids, embedded)
        return inputs, where
    if embedded:
        span = base.injector.add(text.flatten(0, 1))
        stack.callback(base.injector.remove, span)
        text = torch.arange(span.first, span.end, device=text.device).view(size, length)
    inputs["input_ids"] = where(text, ids.clamp(min=0), pad=pad_id(base) or 0)
    if base.twin is not None:
        _mark_padding(base, base.twin, inputs)
    return inputs, where


def placement(
    base: Base, rows: Rows, text: Tensor, mask: Tensor | None, embedded: bool = False
) -> Placement:
    """Where what the adapters of `rows` insert stands in rows of `text` ``(B, T, …)``.

    Raises:
        InputError: special tokens stay in front, and vectors do not show where they stand.
    """
    inserted = [_NOTHING if row is None else row.insertion for row in rows]
    opening = closing = None
    if any(insertion.opening or insertion.closing for insertion in inserted):
        if embedded:
            raise InputError(
                "inputs_embeds do not show where special tokens stand, and the template's virtual "
                "tokens stand inside them; give input_ids"
            )
        opening, closing = _special(inserted, text, mask)
    causal = base.traits.causal
    return Placement(
        text.shape[1],
        [len(insertion.before) for insertion in inserted],
        [len(insertion.after) for insertion in inserted],
        mask,
        specials_before=opening,
        specials_after=closing,
        behind_padding=not base.reference_layout,
        pads_right=not (causal or base.reference_layout),
        fill_left=causal,
        device=text.device,
    )


def inserted_ids(rows: Rows, width: int, device: torch.device) -> Tensor:
    """``(B, width)`` ids that are inserted, -1 where a row has fewer."""
    return torch.tensor([_ids(row, width) for row in rows], device=device).view(len(rows), width)


def check_mask(mask: Any, rows: int, length: int) -> None:
    """Refuse a mask that is not one value for each token of the text.

    Raises:
        InputError: it has another shape, or is no tensor.
    """
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if mask is not None and shape != (rows, length):
        raise InputError(
            f"attention_mask has shape {shape}, and the input ({rows}, {length}): give one value "
            "per token of the text; virtual tokens are added here"
        )


def drop_token_types(base: Base, inputs: dict[str, Any]) -> None:
    """Drop token types that the model does not take, or the reference would not use; with a word.

    Tokenizers give them to models that have none, and so does the reference's user.
    """
    used = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, None)
    dropped = base.reference_layout and base.task not in used
    if inputs.get("token_type_ids") is None or (base.accepts("token_type_ids") and not dropped):
        return
    del inputs["token_type_ids"]
    reason = "the reference does so" if dropped else "the model takes none"
    warn(f"token_type_ids are dropped: {reason}")


def pad_id(base: Base) -> int | None:
    """The model's padding id; None where it has none, or one that is no word of its (-1 in old
    files, a token that was added to the tokenizer alone)."""
    pad = getattr(base.model.config.get_text_config(), "pad_token_id", None)
    return pad if pad is not None and 0 <= pad < base.injector.threshold else None


def _handed_on(model: Any) -> frozenset[str]:
    """What a model of two models that were made apart hands on to the first of them."""
    if model.config.model_type != "encoder-decoder":
        return frozenset()
    return traits.forward_parameters(model.get_encoder())


def _text(base: Base, inputs: dict[str, Any]) -> tuple[Tensor, bool]:
    """The rows' ids, or their embeddings; and which of the two."""
    ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
    if (ids is None) == (embeds is None):
        reads = getattr(base.model, "main_input_name", "input_ids")
        if ids is None and reads != "input_ids":
            raise InputError(
                f"{type(base.model).__name__} reads {reads}, and a prompt stands among token ids: "
                "give input_ids, or use a model that reads text"
            )
        raise InputError("give input_ids or inputs_embeds, one of the two")
    text: Tensor = embeds if ids is None else ids
    if text.dim() != (2 if embeds is None else 3):
        name = "input_ids" if embeds is None else "inputs_embeds"
        raise InputError(
            f"{name} have shape {tuple(text.shape)}; give rows of tokens, one text in each"
        )
    return text, embeds is not None


def _ids(row: Adapter | None, width: int) -> list[int]:
    if row is None:
        return [-1] * width
    first = row.span.first
    inserted = [*row.insertion.before, *row.insertion.after]
    ids = [first - 1 - i if i < 0 else i for i in inserted]
    return ids + [-1] * (width - len(ids))


def _special(inserted: list[Insertion], text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each row's special tokens in front and behind ``(B,)``, as its own template has them."""
    openings, closings = text.new_zeros(len(text)), text.new_zeros(len(text))
    for insertion in set(inserted):
        opening, closing = insertion.special(text, mask)
        own = torch.tensor([other == insertion for other in inserted], device=text.device)
        openings = torch.where(own, opening, openings)
        closings = torch.where(own, closing, closings)
    return openings, closings


def _place_positions(
    base: Base, inputs: dict[str, Any], where: Placement, mask: Tensor | None
) -> None:
    """The caller's positions with room for the prompt; else some that do not count padding."""
    known, positions = base.traits, inputs.pop("position_ids", None)
    if positions is not None and base.reference_layout:
        warn("position_ids are dropped, as the reference does")
    elif positions is not None:
        _check_positions(positions, where)
        inputs["position_ids"] = shifted(positions, where, mask, known.first_position)
    if positions is not None or base.reference_layout:
        return
    if known.several_axes or not base.accepts("position_ids"):
        return
    padded = mask is not None and (not may_look_at_values(mask) or bool(where.lead.any()))
    if known.first_position or padded:
        inputs["position_ids"] = where.position_ids() + known.first_position


def _check_positions(positions: Tensor, where: Placement) -> None:
    rows, shape = len(where.columns), tuple(positions.shape)
    if len(shape) not in (2, 3) or shape[-1] != where.length or shape[-2] not in (1, rows):
        raise InputError(
            f"position_ids have shape {shape}, and the input ({rows}, {where.length}): give one "
            "position per token of the text, on each axis; virtual tokens are added here"
        )


def _place_labels(base: Base, inputs: dict[str, Any], where: Placement) -> None:
    labels, task, causal = inputs.get("labels"), base.task, base.traits.causal
    per_token = task in (TaskType.CAUSAL_LM, TaskType.TOKEN_CLS) or (
        task is None and not base.encodes_and_decodes
    )
    if not per_token or labels is None or labels.dim() != 2 or labels.is_floating_point():
        return
    labels = labels.long()
    if labels.shape[1] == where.length:
        inputs["labels"] = where(labels, -100, pad=-100)
    elif labels.shape[1] == where.length + where.inserted:  # as the reference wants them
        own, virtual = labels[:, where.inserted :], labels[:, : where.inserted]
        inputs["labels"] = where(own, virtual, pad=-100)
    if causal and task != TaskType.TOKEN_CLS and not base.reference_layout:
        inputs["labels"] = _without_first(inputs["labels"], where)


def _without_first(labels: Tensor, where: Placement) -> Tensor:
    """No label for a row's first token if padding is in front: alone nothing would predict it."""
    column = torch.arange(labels.shape[1], device=labels.device)
    lead = where.lead.unsqueeze(1)
    return labels.masked_fill((column == lead) & (lead > 0), -100)


def _in_front(row: Adapter | None) -> int:
    """How many virtual tokens the reference would count before a row's text."""
    return 0 if row is None or row.insertion.template is not None else row.insertion.length


def _find_answers(inputs: dict[str, Any], where: Placement, offsets: list[int]) -> None:
    """Start and end of an answer ``(B,)``, counted from `offsets` before the text, as columns."""
    for name in ("start_positions", "end_positions"):
        if name not in inputs:
            continue
        given = inputs[name].view(-1, 1)
        at = given - torch.tensor(offsets, device=given.device).unsqueeze(1)
        column = where.columns.gather(1, at.clamp(0, where.length - 1))
        column = torch.where(at < 0, given + where.lead.unsqueeze(1), column)
        outside = (at >= where.length) | (given < 0)
        ignored = where.length + where.inserted
        inputs[name] = column.masked_fill(outside, ignored).squeeze(1)


def _find_kept(inputs: dict[str, Any], where: Placement) -> None:
    """Positions of the text whose logits are asked for, as columns.

    Raises:
        InputError: rows with padding or prompts of their own have other columns each.
    """
    kept = inputs.get("logits_to_keep")
    if not isinstance(kept, Tensor):
        return  # the last so many, which are the last so many here too
    if bool((where.columns != where.columns[:1]).any()):
        raise InputError(
            "logits_to_keep names positions of the text, which stand in other columns in each row "
            "of this batch; give a number, or rows of the same length"
        )
    inputs["logits_to_keep"] = where.columns[0][kept]


def _embeddings(base: Base, where: Placement, text: Tensor, ids: Tensor, embedded: bool) -> Tensor:
    embed = base.injector.modules[0]
    rows = text if embedded else embed(text)
    return where(rows, embed(ids.clamp(min=0)))


def twins_vector(base: Base) -> Tensor:
    """The vector ``(1, width)`` of the padding's id, which its twin has too."""
    embed = base.injector.modules[0]
    with torch.no_grad():
        return embed(torch.tensor([pad_id(base) or 0], device=looks_up_on(embed)))


def _mark_padding(base: Base, twin: Span, inputs: dict[str, Any]) -> None:
    """Causal classifiers pool the last token that is not the padding id: let that be the mask's.

    A real token with the padding's id (often the end-of-sequence token) is written as its twin, a
    virtual one that has the same vector.
    """
    pad = pad_id(base)
    if pad is None:
        return
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    same = ids == pad
    if mask is not None:
        ids = ids.masked_fill(mask == 0, pad)
        same = same & (mask != 0)
    inputs["input_ids"] = ids.masked_fill(same, twin.first)
