"""Which column is the answer, what is worth reading, and what is set aside to choose with."""

from __future__ import annotations

from collections import Counter
from datetime import date
from typing import Any

import pytest

from ptuning.data.columns import are_labels, columns_of
from ptuning.data.setting_aside import set_aside, usual_share
from ptuning.errors import DataError

TEXTS = [f"I was charged twice on day {n}" for n in range(24)]
TEAMS = ["billing", "support", "access"] * 8


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    """Rows of columns, beside one of texts."""
    table = {"text": TEXTS, **columns}
    return [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({"label": TEAMS, "kind": ["a", "b"] * 12}, "label"),
        ({"label": TEAMS, "answer": TEXTS}, "answer"),
        ({"Label": TEAMS, "kind": ["a", "b"] * 12}, "Label"),
        ({"team": TEAMS}, "team"),
        ({"team": TEAMS, "category": ["a", "b"] * 12}, "category"),
        ({"team_id": [0, 1, 2] * 8, "team": TEAMS}, "team"),
        ({"team": TEAMS, "rating": ["good", "", ""] * 8}, "team"),
        ({"team": TEAMS, "category": ["good", None, None] * 8}, "team"),
        ({"team": [*TEAMS[:23], ""]}, "team"),
        ({"date": ["2024-02-28", "2024-02-29", ""] * 8, "team": TEAMS}, "team"),
        ({"sent": [date(2024, 2, 28), date(2024, 2, 29)] * 12, "team": TEAMS}, "team"),
        ({"sent": ["3/1/2024 9:05", "12.11.2024 10:00", "4 Mar 2024"] * 8, "team": TEAMS}, "team"),
        ({"sent": ["31-Jul-18", "3/1/24", "4 Mar 24 9.30"] * 8, "team": TEAMS}, "team"),
        ({"part": ["1 of 5", "2 of 5"] * 12}, "part"),
        ({"air_sentiment": TEAMS, "airline": ["a", "b"] * 12, "n": [0, 1] * 12}, "air_sentiment"),
        ({"score": [4.5, 3.0, "1,2"] * 8, "team": TEAMS}, "team"),
        ({"score": [1.0, 0.0] * 12}, "score"),
        ({"reply": ["Thanks a lot", "No, not that one"] * 12, "team": TEAMS}, "team"),
    ],
)
def test_the_answer_is_found(columns: dict[str, list[Any]], answer: str) -> None:
    assert columns_of(rows(**columns)).answer == answer


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({}, ["not clear", "'text'", "--answer"]),
        ({"team": TEAMS, "tone": ["a", "b"] * 12}, ["several", "'team'", "'tone'", "--answer"]),
        (
            {"team": [f"t{n % 12}" for n in range(24)], "tone": [f"s{n // 2}" for n in range(24)]},
            ["several", "'team', 'tone'"],
        ),
        (
            {"team": ["a"] * 24},
            ["no column has few values, and of 'team' all are one", "at least two"],
        ),
        ({"team": TEAMS, "a": ["a", "b"] * 12}, ["several", "no header", "--columns"]),
        ({"reply": TEXTS}, ["no column has few values", "'text', 'reply'"]),
        ({"date": ["2024-02-28", "2024-02-29"] * 12}, ["no column has few values", "'date'"]),
        ({"date": ["2024-02-28", "2024-02-29", ""] * 8}, ["no column has few values", "'date'"]),
    ],
)
def test_where_the_answer_is_not_clear_it_is_asked_for(
    columns: dict[str, list[Any]], parts: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        columns_of(rows(**columns))
    assert all(part in str(error.value) for part in parts), error.value


def test_an_answer_column_that_is_no_name_is_refused() -> None:
    given: Any = ["label"]
    with pytest.raises(DataError, match=r"no answer column \['label'\]; it has 'text', 'label'"):
        columns_of(rows(label=TEAMS), given)


def test_a_column_that_is_not_there_and_a_table_without_rows_are_refused() -> None:
    with pytest.raises(DataError, match="no answer column 'team'; it has 'text', 'label'"):
        columns_of(rows(label=TEAMS), "team")
    with pytest.raises(DataError, match="no example"):
        columns_of([])


LEFT_OUT = {
    "": ([*range(24)], "no name"),
    "Unnamed: 0": ([*range(24)], "number"),
    "ticket": ([7 * n for n in range(24)], "code"),
    "user_id": ([(n * 7) % 24 for n in range(24)], "code"),
    "userId": ([f"{'x' * n}" for n in range(1, 25)], "code"),
    "#2 ID": ([f"{n * 7 % 11}" for n in range(24)], "as its name says"),
    "review_id": ([f"{'xyz'[n % 3]}_{'q' * (n % 21)}-k" for n in range(24)], "as its name says"),
    "coordinates": (["", "", *["N 12"] * 2, *[""] * 20], "it is empty in 22 of 24 rows"),
    "index": ([n % 8 for n in range(24)], "as its name says"),
    "ref": ([f"A{n:03}-x" for n in range(24)], "code"),
    "source": (["web"] * 24, "always 'web'"),
    "note": ([None, ""] * 12, "empty"),
    "tags": ([["a"]] * 24, "no text"),
    "bo{d}y": (TEXTS, "braces"),
    " body": (TEXTS, "spaces"),
    "label_text": (["x", "y", "z"] * 8, "in other words"),
    "Created": ([f"2024-03-05 {max(n, 3):02}:10:59" for n in range(24)], "moment"),
    "Timestamp": ([f"3/{n + 1}/2024 14:32:10" for n in range(24)], "moment"),
    "Updated": ([f"{n + 1}/Nov/24 3:04 PM" for n in range(24)], "moment"),
    "posted": ([f"{n + 1}-02-2015 9.3{n % 9}" for n in range(24)], "moment"),
    "Solved at": ([f"2024-03-05T{n:02}:10:59Z" if n % 2 else "" for n in range(24)], "moment"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_columns_that_help_nobody_are_left_out(name: str) -> None:
    cells, why = LEFT_OUT[name]
    found = columns_of(rows(label=TEAMS, **{name: cells}))
    assert found.read == ("text",) and why in found.left_out[name]
    assert (found.twin == name) == (name == "label_text")


@pytest.mark.parametrize(
    "cells",
    [
        [f"name{'x' * n}" for n in range(24)],
        [n * 37 % 24 for n in range(24)],
        [f"{n}.{n}5" for n in range(24)],
        [f"{n + 10}.5" for n in range(24)],
        ["2024-03-05 10:00", "2024-03-06 11:30"] * 12,
        [f"on 2024-03-05 10:{n:02} it broke" for n in range(24)],
        ["red", "green"] * 12,
    ],
)
def test_names_figures_and_kinds_are_read(cells: list[Any]) -> None:
    assert columns_of(rows(label=TEAMS, more=cells)).read == ("text", "more")


@pytest.mark.parametrize("name", ["team_id", "number", "no"])
def test_numbers_of_few_kinds_are_read_whatever_they_are_called(name: str) -> None:
    cells = [n % (4 if name == "team_id" else 11) for n in range(24)]
    assert columns_of(rows(label=TEAMS, **{name: cells})).read == ("text", name)


def test_a_name_that_only_ends_like_one_of_codes_is_read() -> None:
    names = [f"{'x' * n}" for n in range(1, 25)]
    assert columns_of(rows(label=TEAMS, paid=names, piano=names)).read == ("text", "paid", "piano")


def test_two_rows_do_not_tell_codes_from_words() -> None:
    table = [{"text": TEXTS[n], "word": f"w{n}", "label": n} for n in (1, 2)]
    assert columns_of(table).read == ("text", "word")


@pytest.mark.parametrize(("values", "twin"), [(6, "other"), (7, None)])
def test_two_columns_say_the_same_where_each_value_has_four_rows(
    values: int, twin: str | None
) -> None:
    kinds = [f"kind {n % values}" for n in range(24)]
    assert columns_of(rows(label=[*map(str.upper, kinds)], other=kinds)).twin == twin


def test_a_column_that_some_rows_lack_is_left_out() -> None:
    table = rows(label=TEAMS, note=TEXTS)
    del table[3]["note"]
    assert columns_of(table).read == ("text",)


def test_codes_are_read_where_there_is_nothing_else() -> None:
    table = [{"phone": 4_400 + 3 * n, "label": team} for n, team in enumerate(TEAMS)]
    assert columns_of(table).read == ("phone",)
    with pytest.raises(DataError, match="nothing to answer 'label' from: it is the only column"):
        columns_of([{"label": team} for team in TEAMS])


@pytest.mark.parametrize("header", [" text", "text {en}"])
def test_codes_are_not_read_in_place_of_a_text_that_cannot_be(header: str) -> None:
    table = [{"id": n, header: TEXTS[n], " label": TEAMS[n], "": n} for n in range(24)]
    with pytest.raises(
        DataError, match="nothing to answer ' label' from: 'id': the row's number; "
    ):
        columns_of(table)
    with pytest.raises(DataError, match=r"cannot stand in a template .*: rename it"):
        columns_of(table)


def test_codes_are_not_read_in_place_of_a_text_that_some_rows_lack() -> None:
    table = [{"id": n, "text": TEXTS[n], "label": TEAMS[n]} for n in range(24)]
    del table[7]["text"]
    with pytest.raises(DataError, match="'text': it is no text in every row"):
        columns_of(table)


def test_texts_that_come_again_with_their_labels_are_read_where_there_is_nothing_else() -> None:
    few = [{"text": "a joy", "label": 1}, {"text": "dull", "label": 0}] * 12
    found = columns_of([{"id": number, **row} for number, row in enumerate(few)])
    assert found.read == ("text",) and found.twin is None


def test_of_several_columns_that_say_the_same_as_the_answer_the_first_is_its_twin() -> None:
    found = columns_of(rows(label=[0, 1, 2] * 8, name=TEAMS, code=["b", "s", "a"] * 8))
    assert found.twin == "name" and set(found.left_out) == {"name", "code"}


def test_of_very_many_columns_the_longest_texts_are_read() -> None:
    many = {f"c{n}": [f"{'w' * n} {r % 7}" for r in range(24)] for n in range(1, 20)}
    found = columns_of(rows(label=TEAMS, **many))
    assert found.read == ("text", *(f"c{n}" for n in range(9, 20)))
    assert "too many" in found.left_out["c1"]


def test_labels_come_again_and_free_answers_do_not() -> None:
    assert are_labels(TEAMS) and are_labels([*TEAMS, "once"]) and are_labels(["w" * 100, *"aab"])
    assert not are_labels(TEXTS) and not are_labels(["w" * 101, "v" * 101] * 9)


def test_every_label_gives_its_share_and_the_order_stays() -> None:
    table = rows(label=["a"] * 15 + ["b"] * 7 + ["c"] * 2)
    training, dev = set_aside(table, ["text"], "label", 0.25, seed=3)
    assert Counter(row["label"] for row in dev) == {"a": 4, "b": 2}
    assert training == [row for row in table if row not in dev]
    assert [row for row in table if row in dev] == dev
    assert set_aside(table, ["text"], "label", 0.25, seed=3) == (training, dev)
    assert set_aside(table, ["text"], "label", 0.25, seed=4)[1] != dev


def test_the_last_example_of_a_label_and_all_of_free_answers() -> None:
    table = rows(label=["a"] * 20 + ["b", "b", "c", "d"])
    training, _ = set_aside(table, ["text"], "label", 0.9, seed=0)
    assert {row["label"] for row in training} == {"a", "b", "c", "d"}
    training, _ = set_aside(table, ["text"], "label", 0.99, seed=0)
    assert sorted(row["label"] for row in training) == ["a", "b", "c", "d"]
    assert len(set_aside(rows(), ["text"], "text", 0.25, seed=0)[1]) == 6


def test_what_is_left_of_a_share_is_of_the_label_that_has_least_of_its_own() -> None:
    table = rows(label=["a"] * 11 + ["b"] * 13)
    _, dev = set_aside(table, ["text"], "label", 0.25, seed=0)  # 2.75 and 3.25 of them
    assert Counter(row["label"] for row in dev) == {"a": 3, "b": 3}
    _, dev = set_aside(table[::-1], ["text"], "label", 0.21, seed=0)  # 2.29 and 2.71
    assert Counter(row["label"] for row in dev) == {"a": 2, "b": 3}
    _, dev = set_aside(table, ["text"], "label", 0.21, seed=0)
    assert Counter(row["label"] for row in dev) == {"a": 2, "b": 3}


def test_examples_that_say_the_same_stay_together() -> None:
    texts = [f"text {number % 15}" for number in range(60)]
    table = [
        {"n": number, "text": text, "label": "ab"[number % 2]} for number, text in enumerate(texts)
    ]
    training, dev = set_aside(table, ["text"], "label", 0.25, seed=0)
    said = [{(row["text"], row["label"]) for row in part} for part in (training, dev)]
    assert not said[0] & said[1] and 8 <= len(dev) <= 15
    assert {row["label"] for row in training} == {row["label"] for row in dev} == {"a", "b"}
    alone, chosen = set_aside(table, ["n", "text"], "label", 0.25, seed=0)
    assert len(chosen) == 15 and len(alone) == 45  # where the number is read, none are alike


def test_where_nothing_else_is_there_examples_that_say_the_same_are_cut() -> None:
    table = [{"text": text, "label": text} for text in ("a", "b") for _ in range(10)]
    training, dev = set_aside(table, ["text"], "label", 0.2, seed=0)
    assert Counter(row["label"] for row in dev) == {"a": 2, "b": 2} and len(training) == 16


@pytest.mark.parametrize("seed", range(10))
def test_others_are_set_aside_where_examples_that_say_the_same_are_too_many(seed: int) -> None:
    few = [{"text": label + n, "label": label} for label in "ab" for n in "11223"]
    _, dev = set_aside(few, ["text"], "label", 0.2, seed)
    assert [row["text"] for row in dev] == ["a3", "b3"]
    table = [
        {"text": f"{label}{n if n < 10 else n // 10 * 10}", "label": label}
        for label in "abcd"
        for n in range(50)
    ]
    training, dev = set_aside(table, ["text"], "label", 0.1, seed)
    assert [row["label"] for row in dev] == sorted(list("abcd") * 5)
    said = [{row["text"] for row in part} for part in (training, dev)]
    assert not said[0] & said[1]


@pytest.mark.parametrize("share", [1, -0.1, 2, "a", True, 0.001])
def test_a_share_that_is_none_is_refused(share: Any) -> None:
    with pytest.raises(DataError, match="share"):
        set_aside(rows(label=TEAMS), ["text"], "label", share, seed=0)


def test_a_fifth_is_set_aside_of_many_500_and_of_few_none() -> None:
    assert [usual_share(n) for n in (9, 10, 2500)] == [0.0, 0.2, 0.2]
    assert round(usual_share(100_000) * 100_000) == 500


def test_wide_tables_of_columns_that_say_the_same_are_seen_through_at_once() -> None:
    labels = ["red", "green", "blue"]
    rows = [
        {
            "text": f"it is {n} {n % 7} things",
            **{f"c{i}": labels[n % 3] + str(i) for i in range(300)},
        }
        for n in range(600)
    ]
    found = columns_of(rows, "c0")
    assert found.read == ("text",) and len(found.left_out) == 299
