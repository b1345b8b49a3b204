"""Words for labels whose names say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import ptuning
from ptuning import Prompt
from ptuning.backbone.base_model import BaseModel
from ptuning.training import found_words
from ptuning.training.found_words import find_words

from .. import tiny
from ..scaffold import Run

GOOD = ("wonderful", "a joy to watch", "the best film of the year", "moving and beautiful")
BAD = ("dreadful", "a waste of time", "the worst film of the year", "dull and badly made")
REVIEWS = [
    {"text": f"{what} , {more}", "label": label}
    for label, texts in ((1, GOOD), (0, BAD))
    for what in texts
    for more in texts
    if what != more
]
TEXTS = ("France", "Italy and all of its islands", "Oslo", "Berlin", "Vienna, it rains", "Madrid")
ROWS = [{"text": f"{text} {n}", "label": n % 2} for n in range(4) for text in TEXTS]


def base_of(family: str = "llama") -> BaseModel:
    tokenizer = tiny.tokenizer(around=family in (*tiny.MASKED, "t5"))
    return BaseModel.of(tiny.model(family, vocab_size=len(tokenizer)), tokenizer)


def saying(base: BaseModel, likely: dict[int, str]) -> Any:
    """In place of what the model says: behind each label's rows the label's word is likely."""
    words = {label: base.tokenizer(f" {word}")["input_ids"][-1] for label, word in likely.items()}

    def said(_: Any, __: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
        found = torch.randn(len(rows), 400, generator=torch.manual_seed(0)) * 0.1
        for number, row in enumerate(rows):
            found[number, words[row["label"]]] += 5
        return found.log_softmax(1).half()

    return said


@pytest.mark.parametrize(
    ("labels", "column", "nameless"),
    [
        ([0, 1], "label", True),
        ([1, 2, 3], "class", True),
        (["0.0", "1.0"], "class", True),
        ([True, False], "target", True),
        (["LABEL_0", "LABEL_1"], "label", True),
        (["A", "B", "C"], "y", True),
        ([0, 1], "sentiment", True),
        ([1, 2, 3, 4, 5], "stars", True),
        (["yes", "no"], "spam", False),
        (["good", "bad"], "label", False),
        (["0", "other"], "label", False),
    ],
)
def test_numbers_truths_and_letters_have_no_names(
    labels: list[Any], column: str, nameless: bool
) -> None:
    rows = [{"text": f"{t} {n}", column: labels[n % len(labels)]} for n in range(9) for t in TEXTS]
    assert Prompt.for_rows(rows, column).nameless is nameless


def test_numbers_that_another_column_names_have_names() -> None:
    rows = [{**row, "label_text": ("land", "city")[row["label"]]} for row in ROWS]
    assert not Prompt.for_rows(rows, "label").nameless


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_what_the_model_says_is_its_next_word_behind_the_template(family: str) -> None:
    base = base_of(family)
    prompt = Prompt.for_rows(ROWS, num_virtual_tokens=4)
    said = found_words._said(base, prompt, ROWS[:3])
    manual = ptuning.Task("{text} Type: [MASK]", "label", answer_tokens=1)
    details = ptuning.predict_details(base.model, base.tokenizer, manual, ROWS[:3])
    assert said.shape == (3, 400) and said.dtype == torch.float16
    best = said.float().max(1)
    for row, detail in enumerate(details):
        assert base.tokenizer.decode([int(best.indices[row])]).strip() in (detail.answer, "")
        assert detail.probability == pytest.approx(float(best.values[row].exp()), rel=5e-3)


def test_words_that_tell_more_than_the_names_take_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, prompt = base_of(), Prompt.for_rows(ROWS)
    monkeypatch.setattr(found_words, "_said", saying(base, {0: "Paris", 1: "Oslo"}))
    find_words(base, prompt, ROWS)
    assert prompt.labels["0"][0] == "Paris" and prompt.labels["1"][0] == "Oslo"
    assert not prompt.nameless and prompt.name_words is None


def test_a_long_table_that_is_sorted_is_looked_at_all_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, seen = base_of(), list[Any]()
    rows = [{"text": f"{n}", "label": int(n >= 900)} for n in range(1000)]
    prompt = Prompt.for_rows(rows)
    real = saying(base, {0: "Paris", 1: "Oslo"})

    def said(*args: Any) -> torch.Tensor:
        seen.extend(args[2])
        return real(*args)  # type: ignore[no-any-return]

    monkeypatch.setattr(found_words, "_said", said)
    find_words(base, prompt, rows)
    assert len(seen) == 400 and 20 < sum(row["label"] for row in seen) < 60
    assert prompt.labels["0"][0] == "Paris" and prompt.labels["1"][0] == "Oslo"


def test_names_that_tell_as_much_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    base, prompt = base_of(), Prompt.for_rows(ROWS)
    prompt.verbalizer = {"0": ("Paris",), "1": ("Oslo",)}
    prompt.name_words = {"0": ("Paris",), "1": ("Oslo",)}
    monkeypatch.setattr(found_words, "_said", saying(base, {0: "Paris", 1: "Oslo"}))
    find_words(base, prompt, ROWS)
    assert prompt.labels == {"0": ("Paris",), "1": ("Oslo",)} and not prompt.nameless


def test_a_label_of_one_example_gets_words_too(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of()
    rows = [*ROWS, {"text": "it", "label": 2}]
    monkeypatch.setattr(found_words, "_said", saying(base, {0: "Paris", 1: "Oslo", 2: "capital"}))
    prompt = Prompt.for_rows(rows)
    find_words(base, prompt, rows)
    assert [words[0] for _, words in sorted(prompt.labels.items())] == ["Paris", "Oslo", "capital"]


@pytest.mark.parametrize("name", ["does", "it rains"])  # of one token, of several
def test_a_label_for_which_nothing_is_found_keeps_a_name_of_one_token(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of()
    rows = [*ROWS, {"text": "it", "label": 2}]
    monkeypatch.setattr(found_words, "_said", saying(base, {0: "Paris", 1: "Oslo", 2: "capital"}))
    real = found_words._telling
    monkeypatch.setattr(found_words, "_telling", lambda *args: [*real(*args)[:2], []])
    prompt = Prompt.for_rows(rows)
    prompt.verbalizer = {"0": ("yes",), "1": ("not",), "2": (name,)}
    prompt.name_words = None
    find_words(base, prompt, rows)
    found = ("Paris", "Oslo") if name == "does" else ("yes", "not")
    assert (prompt.labels["0"][0], prompt.labels["1"][0]) == found
    assert prompt.labels["2"] == (name,)


def test_rows_are_read_alone_where_padding_would_change_them() -> None:
    tokenizer = tiny.tokenizer(around=True)
    config = transformers.ConvBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        embedding_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        pad_token_id=0,
    )
    base = BaseModel.of(transformers.ConvBertForMaskedLM(config).eval(), tokenizer)
    prompt = Prompt.for_rows(ROWS, num_virtual_tokens=4)
    together = found_words._said(base, prompt, ROWS[:3])
    for number, row in enumerate(ROWS[:3]):
        alone = found_words._said(base, prompt, [row])
        torch.testing.assert_close(together[number], alone[0])


def test_given_words_and_trained_prompts_are_left_alone() -> None:
    base = base_of()
    given = Prompt.for_rows(ROWS, verbalizer={"0": "Paris", "1": "Oslo"})
    assert not given.nameless
    trained = Prompt.for_rows(ROWS, num_virtual_tokens=4)
    ptuning.train(base.model, base.tokenizer, trained, ROWS, epochs=1, verbose=False)
    words = trained.labels
    assert not trained.nameless
    trained.nameless = True
    find_words(base, trained, ROWS)
    assert trained.labels == words


def test_reviews_of_0_and_1_get_words_of_praise_and_blame(smollm2: tuple[Any, Any]) -> None:
    prompt = Prompt.for_rows(REVIEWS)
    assert prompt.labels == {"1": ("yes",), "0": ("no",)}
    base = BaseModel.of(*smollm2)
    find_words(base, prompt, REVIEWS)
    assert all(2 <= len(words) <= 4 for words in prompt.labels.values())
    known = [word for words in prompt.labels.values() for word in words]
    assert len({word.casefold() for word in known}) == len(known)
    unseen = [{"text": "a lovely , funny film"}, {"text": "boring , ugly and far too long"}]
    details = ptuning.predict_details(*smollm2, prompt.manual(), unseen)
    good, bad = (detail.probabilities["1"] for detail in details)
    assert good > bad


def test_trainers_of_others_train_with_the_words_too(monkeypatch: pytest.MonkeyPatch) -> None:
    base, prompt = base_of(), Prompt.for_rows(ROWS, num_virtual_tokens=4)
    monkeypatch.setattr(found_words, "_said", saying(base, {0: "Paris", 1: "Oslo"}))
    module, *_ = ptuning.trainer_parts(base.model, base.tokenizer, prompt, ROWS)
    assert module.draft.labels["0"][0] == "Paris" and module.draft.labels["1"][0] == "Oslo"
    module.close()


def test_a_run_keeps_the_words_that_it_has_found(
    tmp_path: Path, model_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ptuning.load_model(str(model_folder))[1]
    base = BaseModel.of(tiny.model(), tokenizer)
    monkeypatch.setattr(found_words, "_said", saying(base, {0: "Paris", 1: "Oslo"}))
    data, output = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    code, _, err = run(
        "train", "--model", model_folder, "--data", data, "--output", output, "--epochs", 1
    )
    assert code == 0 and "words: 0=Paris" in err, err
    words = Prompt.load(output).labels
    assert words["0"][0] == "Paris" and words["1"][0] == "Oslo"
    settings = yaml.safe_load((output / "run.yaml").read_text())
    assert {label: tuple(of) for label, of in settings["labels"].items()} == words
