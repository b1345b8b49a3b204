"""``Placement`` against the same written with lists, one token at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ptuning.backbone.placement import Placement, padding

PAD = "pad"


@dataclass(frozen=True)
class Batch:
    """What a `Placement` is made from, row by row."""

    masks: list[list[int]]
    before: list[int]
    after: list[int]
    openings: list[int]
    closings: list[int]
    behind_padding: bool
    pads_right: bool
    fill_left: bool
    masked: bool

    @property
    def length(self) -> int:
        return len(self.masks[0])

    def placement(self) -> Placement:
        return Placement(
            self.length,
            self.before,
            self.after,
            torch.tensor(self.masks) if self.masked else None,
            specials_before=torch.tensor(self.openings) if any(self.openings) else None,
            specials_after=torch.tensor(self.closings) if any(self.closings) else None,
            behind_padding=self.behind_padding,
            pads_right=self.pads_right,
            fill_left=self.fill_left,
        )


def outer(mask: list[int]) -> tuple[int, int]:
    """Padding in front of and behind a row; a row of padding only has it in front."""
    if not any(mask):
        return len(mask), 0
    return mask.index(1), mask[::-1].index(1)


@st.composite
def batches(draw: Any, **fixed: bool) -> Batch:
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    masked = draw(st.booleans())
    flags = {
        name: fixed.get(name, draw(st.booleans()))
        for name in ("behind_padding", "pads_right", "fill_left")
    }
    masks, openings, closings = [], [], []
    for _ in range(rows):
        left = draw(st.integers(0, length)) if masked else 0
        right = draw(st.integers(0, length - left)) if masked else 0
        inner = [1] * (length - left - right)
        if masked and len(inner) > 2:  # masked tokens inside the text are text
            inner[1:-1] = [draw(st.integers(0, 1)) for _ in inner[1:-1]]
        masks.append([0] * left + inner + [0] * right)
        # Special tokens in front of the text have no place where virtual ones stand in front of
        # the padding.
        most = len(inner) if flags["behind_padding"] or flags["pads_right"] else 0
        openings.append(draw(st.integers(0, min(2, most))))
        closings.append(draw(st.integers(0, min(2, len(inner) - openings[-1]))))
    counts = st.lists(st.integers(0, 3), min_size=rows, max_size=rows)
    return Batch(masks, draw(counts), draw(counts), openings, closings, masked=masked, **flags)


Row = list[tuple[str, int]]


def placed_row(batch: Batch, row: int) -> Row:
    """``("text", column)``, ``("new", number)`` and ``("pad", 0)``, one after the other."""
    text: Row = [("text", column) for column in range(batch.length)]
    lead, trail = outer(batch.masks[row]) if batch.masked else (0, 0)
    front, inner = text[:lead], text[lead : batch.length - trail]
    back = text[batch.length - trail :] if trail else []
    if batch.pads_right:
        front, back = [], back + front
    opening, closing = batch.openings[row], batch.closings[row]
    new: Row = [("new", n) for n in range(batch.before[row] + batch.after[row])]
    first, second = new[: batch.before[row]], new[batch.before[row] :]
    start, middle, end = (
        inner[:opening],
        inner[opening : len(inner) - closing],
        inner[len(inner) - closing :],
    )
    if batch.behind_padding:
        result = front + start + first + middle + second + end + back
    else:
        result = start + first + front + middle + second + end + back
    widest = max(b + a for b, a in zip(batch.before, batch.after, strict=True))
    missing: Row = [(PAD, 0)] * (widest - len(new))
    return missing + result if batch.fill_left else result + missing


def placed(batch: Batch) -> list[Row]:
    return [placed_row(batch, row) for row in range(len(batch.masks))]


def code(kind: str, number: int) -> int:
    return {"text": 100, "new": 200, PAD: -7}[kind] + number


@settings(max_examples=150, deadline=None)
@given(batches())
def test_tokens_stand_where_the_lists_have_them(batch: Batch) -> None:
    where = batch.placement()
    rows = len(batch.masks)
    text = (100 + torch.arange(batch.length)).expand(rows, -1)
    new = (200 + torch.arange(where.inserted)).expand(rows, -1)
    expected = [[code(*token) for token in row] for row in placed(batch)]
    assert where(text, new, pad=-7).tolist() == expected
    assert where(text[:1], new, pad=-7).tolist() == expected  # one row for all


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 3))
def test_vectors_stand_where_the_tokens_stand(batch: Batch, width: int) -> None:
    where = batch.placement()
    text = torch.randn(len(batch.masks), batch.length, width)
    new = torch.randn(len(batch.masks), where.inserted, width)
    got = where(text, new, pad=0.5)
    for n, row in enumerate(placed(batch)):
        for column, (kind, number) in enumerate(row):
            sources = {"text": text[n], "new": new[n]}
            wanted = sources[kind][number] if kind in sources else torch.full((width,), 0.5)
            assert torch.equal(got[n, column], wanted)


@settings(max_examples=100, deadline=None)
@given(batches())
def test_one_value_may_stand_for_everything_put_in(batch: Batch) -> None:
    where = batch.placement()
    mask = torch.tensor(batch.masks)
    expected = [
        [batch.masks[n][number] if kind == "text" else int(kind == "new") for kind, number in row]
        for n, row in enumerate(placed(batch))
    ]
    assert where(mask, 1).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(batches())
def test_columns_name_each_text_columns_place(batch: Batch) -> None:
    expected = [
        [row.index(("text", column)) for column in range(batch.length)] for row in placed(batch)
    ]
    assert batch.placement().columns.tolist() == expected


@settings(max_examples=100, deadline=None)
@given(batches())
def test_text_of_undoes_the_placing(batch: Batch) -> None:
    where = batch.placement()
    for shape in [(), (2,), (2, 3)]:
        text = torch.randn(len(batch.masks), batch.length, *shape)
        assert torch.equal(where.text_of(where(text, 0.0)), text)


@settings(max_examples=100, deadline=None)
@given(batches())
def test_lead_and_positions_count_no_padding_in_front(batch: Batch) -> None:
    where = batch.placement()
    for n, row in enumerate(placed(batch)):
        mask = batch.masks[n]
        lead = outer(mask)[0] if batch.masked else 0
        # Padding that virtual tokens stand in front of is counted, as the reference does.
        counted = batch.pads_right or not batch.behind_padding
        is_padding = [
            kind == PAD or (kind == "text" and number < lead and not counted)
            for kind, number in row
        ]
        front = is_padding.index(False) if False in is_padding else len(row)
        if batch.fill_left or not all(is_padding):
            assert where.lead[n] == front
        assert where.position_ids()[n].tolist() == [
            max(0, column - int(where.lead[n])) for column in range(len(row))
        ]


@settings(max_examples=100, deadline=None)
@given(batches(behind_padding=True, pads_right=True))
def test_unrolled_brings_the_padding_back_to_the_left(batch: Batch) -> None:
    where = batch.placement()
    text = (100 + torch.arange(batch.length)).expand(len(batch.masks), -1)
    new = (200 + torch.arange(where.inserted)).expand(len(batch.masks), -1)
    got = where.unrolled(where(text, new, pad=-7)).tolist()
    for n, row in enumerate(placed(batch)):
        lead, trail = outer(batch.masks[n]) if batch.masked else (0, 0)
        assert where.rolled[n] == lead
        real = [
            code(kind, number)
            for kind, number in row
            if kind == "new" or (kind == "text" and lead <= number < batch.length - trail)
        ]
        missing = sum(kind == PAD for kind, _ in row) if batch.fill_left else 0
        assert got[n][lead + missing : lead + missing + len(real)] == real
        assert sorted(got[n]) == sorted(code(*token) for token in row)


@settings(max_examples=50, deadline=None)
@given(batches(pads_right=False))
def test_nothing_is_rolled_where_padding_stays(batch: Batch) -> None:
    where = batch.placement()
    given = torch.randn(len(batch.masks), batch.length + where.inserted)
    assert not where.rolled.any()
    assert torch.equal(where.unrolled(given), given)


@settings(max_examples=100, deadline=None)
@given(batches(behind_padding=True))
def test_a_row_is_placed_as_it_is_alone(batch: Batch) -> None:
    """Whatever padding and other rows there are: the row's own tokens stand in the same order."""
    for n, mask in enumerate(batch.masks):
        lead, trail = outer(mask) if batch.masked else (0, 0)
        inner = batch.length - lead - trail
        assume(inner > 0)
        alone = Placement(
            inner,
            [batch.before[n]],
            [batch.after[n]],
            specials_before=torch.tensor([batch.openings[n]]),
            specials_after=torch.tensor([batch.closings[n]]),
        )
        new = 200 + torch.arange(alone.inserted).unsqueeze(0)
        wanted = alone(100 + lead + torch.arange(inner).unsqueeze(0), new)[0].tolist()
        got = [
            code(kind, number)
            for kind, number in placed_row(batch, n)
            if kind == "new" or (kind == "text" and lead <= number < batch.length - trail)
        ]
        assert got == wanted


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=1, max_size=4))
def test_padding_is_counted_from_both_ends(masks: list[list[int]]) -> None:
    lead, trail = padding(torch.tensor(masks))
    assert [tuple(pair) for pair in torch.cat([lead, trail], 1).tolist()] == [
        outer(mask) for mask in masks
    ]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float32])
def test_padding_is_counted_in_masks_of_any_dtype(dtype: torch.dtype) -> None:
    lead, trail = padding(torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).to(dtype))
    assert lead.flatten().tolist() == [1, 5] and trail.flatten().tolist() == [2, 0]


def test_rows_with_fewer_inserted_tokens_are_ragged() -> None:
    assert Placement(2, [1, 2], [0, 0]).ragged
    assert not Placement(2, [1, 2], [1, 0]).ragged


def test_a_text_of_no_tokens_gets_the_prompt_alone() -> None:
    where = Placement(0, [2, 1], [1, 1])
    text, new = torch.zeros(2, 0, dtype=torch.long), torch.tensor([[1, 2, 3], [4, 5, 0]])
    assert where(text, new, pad=-7).tolist() == [[1, 2, 3], [-7, 4, 5]]
    assert where.columns.shape == (2, 0)


def test_lists_of_different_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        Placement(2, [1, 2], [1])


def test_gradients_flow_through_the_placing() -> None:
    where = Placement(3, [2], [1], torch.tensor([[0, 1, 1]]))
    text, new = torch.randn(1, 3, 2, requires_grad=True), torch.randn(1, 3, 2, requires_grad=True)
    where(text, new).sum().backward()
    assert text.grad is not None and new.grad is not None
    assert torch.equal(text.grad, torch.ones(1, 3, 2))
    assert torch.equal(new.grad, torch.ones(1, 3, 2))
