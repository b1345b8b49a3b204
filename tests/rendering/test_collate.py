from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptuning.forward.batching import by_length, chunks_by_length
from ptuning.rendering.collate import IGNORED, collate
from ptuning.rendering.layout import Sequence
from ptuning.rendering.render import Rendered

ONE = Rendered((Sequence((7, -1, 8, -2), 4, (20, 21, 2)),))
TWO = Rendered((Sequence((9, -2), 2, (22, 2)),))


def test_causal_inputs_are_padded_on_the_left_with_answers_aligned_right() -> None:
    batch = collate([ONE, TWO], "causal", [400, 500], pad_id=3)
    assert batch.input_ids.tolist() == [[7, 400, 8, 401, 20, 21], [3, 3, 3, 9, 501, 22]]
    assert batch.attention_mask.tolist() == [[1] * 6, [0, 0, 0, 1, 1, 1]]
    assert batch.answers.tolist() == [[20, 21, 2], [IGNORED, 22, 2]]
    assert batch.slots.tolist() == [4, 2]
    assert batch.decoder_input_ids is None and batch.labels is None and batch.label_ids is None


def test_a_causal_answers_token_is_predicted_at_the_position_before_it() -> None:
    batch = collate([ONE, TWO], "causal", [400, 500])
    count = batch.answers.shape[1]
    for row, answer in zip(batch.input_ids.tolist(), batch.answers.tolist(), strict=True):
        window = row[-count:]  # what logits_to_keep=count keeps
        for at in range(count - 1):
            if answer[at] != IGNORED:
                assert window[at + 1] == answer[at]


def test_masked_inputs_are_padded_on_the_right_and_answers_aligned_left() -> None:
    one = Rendered((Sequence((1, -1, 4, 4, 8, 2), 2, (20, 21)),))
    two = Rendered((Sequence((1, 4, -1, 2), 1, (22,)),))
    batch = collate([one, two], "masked", [400, 400], pad_id=3)
    assert batch.input_ids.tolist() == [[1, 400, 4, 4, 8, 2], [1, 4, 400, 2, 3, 3]]
    assert batch.attention_mask.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert batch.answers.tolist() == [[20, 21], [22, IGNORED]]
    assert batch.slots.tolist() == [2, 1]


def test_seq2seq_decoders_start_with_their_start_id_and_see_the_answer_shifted() -> None:
    batch = collate([ONE, TWO], "seq2seq", [400, 500], pad_id=3, decoder_start_id=1)
    assert batch.input_ids.tolist() == [[7, 400, 8, 401], [9, 501, 3, 3]]
    assert batch.attention_mask.tolist() == [[1] * 4, [1, 1, 0, 0]]
    assert batch.answers.tolist() == [[20, 21, 2], [22, 2, IGNORED]]
    assert batch.decoder_input_ids is not None
    assert batch.decoder_input_ids.tolist() == [[1, 20, 21], [1, 22, 2]]


def test_seq2seq_decoder_ids_behind_a_short_answer_are_valid_ones() -> None:
    short = Rendered((Sequence((5,), 1, (23,)),))
    batch = collate([ONE, short], "seq2seq", [400, 400])
    assert batch.decoder_input_ids is not None
    assert batch.decoder_input_ids.tolist() == [[0, 20, 21], [0, 23, 0]]


def test_each_example_uses_the_ids_of_its_own_prompt() -> None:
    batch = collate([TWO, TWO, TWO], "masked", [400, 450, 403])
    assert batch.input_ids[:, 1].tolist() == [401, 451, 404]


def test_rows_know_their_example() -> None:
    pair = Rendered((Sequence((5,), 1, (20,)), Sequence((5,), 1, (21, 22))), label=1)
    batch = collate([pair, pair], "causal", [400, 400])
    assert batch.example.tolist() == [0, 0, 1, 1]
    assert batch.member.tolist() == [0, 0]
    assert batch.labels is not None and batch.labels.tolist() == [1, 1]
    assert batch.label_ids is None
    assert batch.answers.tolist() == [[IGNORED, 20], [21, 22]] * 2


def test_single_token_labels_need_one_row_per_example() -> None:
    examples = [Rendered((Sequence((5,), 1, (20,)),), (20, 21), label) for label in (1, 0)]
    batch = collate(examples, "causal", [400, 400])
    assert batch.label_ids is not None and batch.label_ids.tolist() == [[20, 21]] * 2
    assert batch.labels is not None and batch.labels.tolist() == [1, 0]
    assert batch.input_ids.shape == (2, 1)


@pytest.mark.parametrize("labels", [(None, None), (1, None)])
def test_unlabelled_examples_give_no_labels(labels: tuple[int | None, ...]) -> None:
    examples = [Rendered((Sequence((5,), 1, (20,)),), (20, 21), label) for label in labels]
    assert collate(examples, "causal", [400, 400]).labels is None


def test_a_label_whose_word_is_learnt_over_the_vocabulary_is_compared_with_none() -> None:
    spoken = Rendered((Sequence((5,), 1, (20,)),), label=1)
    assert collate([spoken, spoken], "causal", [400, 400]).labels is None


def test_an_unanswered_causal_input_ends_with_its_last_token() -> None:
    batch = collate([Rendered((Sequence((5, 6), 2),))], "causal", [400])
    assert batch.input_ids.tolist() == [[5, 6]]
    assert batch.answers.tolist() == [[IGNORED]]


def test_a_batch_moves_all_its_tensors() -> None:
    here = collate([ONE], "seq2seq", [400])
    batch = here.to("meta")
    for value in vars(batch).values():
        assert not isinstance(value, torch.Tensor) or value.is_meta
    assert batch.kind == "seq2seq"
    assert batch.here is here and batch.to("meta").here is here


IDS = st.lists(st.integers(-3, 399), min_size=1, max_size=9)
ANSWER = st.lists(st.integers(5, 399), min_size=1, max_size=4)


@given(
    rows=st.lists(st.tuples(IDS, ANSWER), min_size=1, max_size=5),
    kind=st.sampled_from(["causal", "masked", "seq2seq"]),
)
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_or_invented_by_padding(
    rows: list[tuple[list[int], list[int]]], kind: str
) -> None:
    examples = [Rendered((Sequence(tuple(ids), 0, tuple(answer)),)) for ids, answer in rows]
    batch = collate(examples, kind, [400] * len(rows), pad_id=0)
    assert batch.input_ids.shape == batch.attention_mask.shape
    for index, (ids, answer) in enumerate(rows):
        real = batch.input_ids[index][batch.attention_mask[index].bool()].tolist()
        expected = [399 - i if i < 0 else i for i in ids]
        assert real == expected + (answer[:-1] if kind == "causal" else [])
        assert batch.answers[index][batch.answers[index] != IGNORED].tolist() == answer
        pads = batch.attention_mask[index] == 0
        assert batch.input_ids[index][pads].eq(0).all()
    order = batch.attention_mask if kind == "causal" else batch.attention_mask.flip(1)
    assert order.diff(dim=1).ge(0).all()


def rows_of(lengths: list[tuple[int, int]], head: int) -> list[tuple[Rendered, int]]:
    """Rows with `head` virtual tokens in front of a field, as (text length, member)."""
    return [
        (
            Rendered((Sequence((-1,) * head + (5,) * n, head + n, (20,), head),)),
            m,
        )
        for n, m in lengths
    ]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3)), max_size=40),
    st.booleans(),
    st.booleans(),
)
def test_parts_hold_every_row_once_and_keep_the_device_busy(
    lengths: list[tuple[int, int]], kept: bool, packed: bool
) -> None:
    rows = rows_of(lengths, 6)
    parts = list(by_length(rows, torch.device("cpu"), kept, packed))
    assert sorted(map(id, (row for part in parts for row in part))) == sorted(map(id, rows))
    assert all(parts)
    sizes = [sum(len(e.sequences[0].ids) - (6 if kept else 0) for e, _ in p) for p in parts]
    assert sum(sizes) < 900 or max(sizes) < 2 * 512 + 306
    members = [member for part in parts for _, member in part]
    if kept and packed:  # a member's rows stand together
        assert members == sorted(members, reverse=True)
    elif parts:
        spans = [[len(e.sequences[0].ids) for e, _ in part] for part in parts]
        assert all(min(a) >= max(b) for a, b in itertools.pairwise(spans))


def test_what_is_kept_does_not_count_as_computed() -> None:
    rows = rows_of([(20, 0)] * 8, 500)
    assert len(list(by_length(rows, torch.device("cpu")))) == 8
    assert len(list(by_length(rows, torch.device("cpu"), kept=True))) == 2  # kept: four times 512


def sizes_of(
    examples: list[Rendered], rows: int | None, device: str = "cuda", members: int = 1
) -> list[int]:
    """Of the chunks; each example is in one, and none is longer than those of a later chunk."""
    chunks = list(chunks_by_length(examples, rows, torch.device(device), members))
    assert sorted(number for chunk in chunks for number in chunk) == list(range(len(examples)))
    spans = [[len(examples[number].sequences[0].ids) for number in chunk] for chunk in chunks]
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(spans))
    return [len(chunk) for chunk in chunks]


def test_a_gpu_computes_more_short_rows_at_once_unless_their_number_is_given() -> None:
    short = [example for example, _ in rows_of([(26, 0)] * 1000, 6)]  # 32 tokens: 512 keep it busy
    assert sizes_of(short, None) == [512, 488]
    assert sizes_of(short, None, members=4) == [128] * 7 + [104]
    assert sizes_of(short, None, "cpu") == [32] * 31 + [8]
    assert sizes_of(short, 300) == [300, 300, 300, 100]
    assert sizes_of(short[:5], 8, members=4) == [2, 2, 1]
    assert sizes_of(short[:3], 2, members=4) == [1, 1, 1]
    mixed = [example for example, _ in rows_of([(1018, 0)] * 40 + [(10, 0)] * 1024, 6)]
    assert sizes_of(mixed, None) == [1024, 32, 8]
    assert sizes_of([], None) == []
    late = [example for example, _ in rows_of([(6, 0)] * 513 + [(994, 0)] * 40, 6)]
    assert sizes_of(late, None) == [524, 29]  # ends at 16,384 tokens, though no doubling is there


def test_long_answers_have_logits_so_that_no_more_rows_are_computed_at_once() -> None:
    said = [Rendered((Sequence((5,) * 8, 8, (20,) * 64),)) for _ in range(70)]
    assert sizes_of(said, None) == [32, 32, 6]
    assert sizes_of(said, 50) == [50, 20]
    compared = [Rendered((Sequence((5,) * 8, 8, (20,) * 8),) * 9) for _ in range(70)]
    assert sizes_of(compared, None) == [32, 32, 6]
