"""The queue before the model: order, limits, faults, the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from ptuning.serving.batcher import GOES_ON, Batcher, Item, Overloaded, Stopping, TooLate


def _items(*questions: Any, seconds: float = 300) -> list[Item]:
    return [Item(question, time.monotonic() + seconds) for question in questions]


class Model:
    """Doubles numbers; waits at `gate`, and fails where it is told to."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[Any]] = []

    def __call__(self, items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
        self.batches.append([item.question for item in items])
        assert self.gate.wait(200)
        for item in items:
            if item.question == "poison":
                raise RuntimeError("poisoned")
            yield item, item.question * 2


def test_what_waits_while_the_model_works_becomes_one_batch() -> None:
    model = Model()
    model.gate.clear()
    batcher = Batcher(model, most=4)
    items = _items(*range(10))
    batcher.ask(items[:1])
    while not model.batches:
        time.sleep(0.001)
    for item in items[1:]:
        batcher.ask([item])
    model.gate.set()
    assert [item.answer.result(200) for item in items] == [2 * n for n in range(10)]
    assert model.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]
    batcher.close()


def test_a_fault_of_one_question_stays_with_it() -> None:
    model = Model()
    batcher = Batcher(model)
    items = _items(1, "poison", 3)
    batcher.ask(items)
    assert items[0].answer.result(200) == 2 and items[2].answer.result(200) == 6
    with pytest.raises(RuntimeError, match="poisoned"):
        items[1].answer.result(200)
    assert batcher.alive
    batcher.close()


def test_brief_questions_are_let_in_by_a_long_batch_for_as_long_as_itself_takes() -> None:
    order: list[Any] = []
    running, asked = threading.Event(), threading.Event()
    seconds = {"long": 0.0, "brief": 0.05}

    def answer(items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
        for item in items:
            if item.question == "long":
                running.set()
                assert asked.wait(200)
                begun = time.monotonic()
                for _ in range(2):
                    batcher.let_in()
                order.append("token")
                while batcher.depth > 2:
                    batcher.let_in()
                seconds["long"] = time.monotonic() - begun
            else:
                batcher.let_in()  # those that were let in let nobody in
                time.sleep(seconds["brief"])
            if item.question == "poison":
                raise RuntimeError("poisoned")
            order.append(item.question)
            yield item, item.question

    batcher = Batcher(answer, most=2)
    (long, *others), brief = _items("long", "other", "another"), _items(1, 2, 3, "poison", 5)
    batcher.ask([long])
    assert running.wait(200)
    for item in brief:
        item.brief = True
    batcher.ask([others[0], *brief, others[1]])
    asked.set()
    for item in [long, *others, *brief]:
        if item.question == "poison":
            with pytest.raises(RuntimeError, match="poisoned"):
                item.answer.result(200)
        else:
            assert item.answer.result(200) == item.question
    assert order == [1, 2, "token", 3, 5, "long", "other", "another"]
    # Five and the one that failed with another, between which as much time went by again.
    assert seconds["long"] > 2 * 5 * seconds["brief"] - seconds["brief"]
    batcher.close()


def test_a_job_waits_neither_for_a_long_batch_nor_for_what_waits() -> None:
    running, begun, order = threading.Event(), threading.Event(), list[Any]()

    def answer(items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
        running.set()
        assert begun.wait(200)
        batcher.let_in()
        for item in items:
            order.append(item.question)
            yield item, item.question

    batcher = Batcher(answer)
    long, behind = _items("long", "behind")
    batcher.ask([long])
    assert running.wait(200)
    batcher.ask([behind])
    fault = batcher.begin(lambda: 1 / 0)
    job = batcher.begin(lambda: order.append("job"))
    assert batcher.depth == 3
    begun.set()
    assert behind.answer.result(200) == "behind"
    assert job.done()
    with pytest.raises(ZeroDivisionError):
        fault.result(0)
    assert order == ["job", "long", "behind"]
    assert batcher.run(lambda: "alone") == "alone"
    batcher.close()
    with pytest.raises(Stopping):
        batcher.run(lambda: None)


def test_what_goes_on_is_asked_again_first_with_what_waits() -> None:
    batches, order = list[list[str]](), list[Any]()
    asked = threading.Event()
    left = {"long": 4, "two": 2, "poison": 2}

    def answer(items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
        batches.append([item.question for item in items])
        assert asked.wait(200)
        for item in items:
            left[item.question] = left.get(item.question, 1) - 1
            if left[item.question] > 0:
                yield item, GOES_ON
                continue
            if item.question == "poison":
                raise RuntimeError("poisoned")
            order.append(item.question)
            yield item, item.question

    batcher = Batcher(answer, most=3)
    items = _items("long", "two", "one", "poison", "behind")
    batcher.ask(items[:1])
    while not batches:
        time.sleep(0.001)
    batcher.ask(items[1:])
    assert batcher.others_wait
    asked.set()
    assert items[-1].answer.result(200) == "behind"
    assert order == ["one", "two", "long", "behind"]
    with pytest.raises(RuntimeError, match="poisoned"):
        items[3].answer.result(0)
    assert batches == [
        ["long"],
        ["long", "two", "one"],
        ["long", "two", "poison"],
        ["long", "poison", "behind"],
        ["poison"],
        ["behind"],
    ]
    assert not batcher.others_wait
    batcher.close()


def test_more_than_may_wait_is_refused_whole() -> None:
    model = Model()
    model.gate.clear()
    batcher = Batcher(model, most=1, waiting=3)
    taken = _items(0, 1, 2, 3)
    batcher.ask(taken[:1])
    while not model.batches:
        time.sleep(0.001)
    batcher.ask(taken[1:3])
    with pytest.raises(Overloaded, match="2 questions wait, and 3 may"):
        batcher.ask(_items(5, 6))
    batcher.ask(taken[3:])
    with pytest.raises(Overloaded):
        batcher.ask(_items(7))
    model.gate.set()
    assert [item.answer.result(200) for item in taken] == [0, 2, 4, 6]
    assert model.batches == [[0], [1], [2], [3]]
    batcher.close()


def test_the_end_answers_what_was_taken_and_takes_no_more() -> None:
    model = Model()
    model.gate.clear()
    batcher = Batcher(model, most=2)
    items = _items(*range(9))
    batcher.ask(items)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while True:
        try:
            batcher.ask([])
        except Stopping:
            break
    model.gate.set()
    closing.join(200)
    assert [item.answer.result(0) for item in items] == [2 * n for n in range(9)]
    assert not batcher.alive
    with pytest.raises(Stopping):
        batcher.run(lambda: None)


def test_questions_that_nobody_waits_for_are_not_answered() -> None:
    model = Model()
    model.gate.clear()
    batcher = Batcher(model, most=1)
    first, late, left, gone, last = [
        *_items(0), *_items(1, seconds=-1), *_items(2), *_items(3), *_items(4)
    ]  # fmt: skip
    left.abandoned = True
    batcher.ask([first, late, left, gone, last])
    assert gone.answer.cancel()
    model.gate.set()
    assert last.answer.result(200) == 8
    for item in (late, left):
        with pytest.raises(TooLate):
            item.answer.result(200)
    assert model.batches == [[0], [4]]
    batcher.close()


def test_a_question_that_fails_alone_is_asked_once() -> None:
    model = Model()
    batcher = Batcher(model)
    (item,) = _items("poison")
    batcher.ask([item])
    with pytest.raises(RuntimeError, match="poisoned"):
        item.answer.result(200)
    batcher.close()
    assert model.batches == [["poison"]]


def test_an_answer_that_is_ready_too_late_is_none() -> None:
    """What a row whose time is over has said until then may be half an answer."""

    def answer(items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
        for item in items:
            item.deadline = time.monotonic() - 1
            yield item, ValueError("a fault") if item.question == "fault" else "half"

    batcher = Batcher(answer)
    late, fault = _items("late", "fault")
    batcher.ask([late, fault])
    with pytest.raises(TooLate, match="took too long"):
        late.answer.result(200)
    with pytest.raises(ValueError, match="a fault"):
        fault.answer.result(200)
    batcher.close()
