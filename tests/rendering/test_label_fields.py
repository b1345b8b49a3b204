"""Label words that name columns: each example compares words of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ptuning
from ptuning.errors import DataError
from ptuning.forward.label_scores import Words
from ptuning.forward.plain import answer_logits, example_losses
from ptuning.inference.evaluation import teacher_forced
from ptuning.prompts.task import fill, named_fields
from ptuning.rendering.render import Renderer

from .. import tiny

WORDS = {"0": "{choice1}", "1": "{choice2}"}
ROWS: list[dict[str, Any]] = [
    {"premise": "It rained", "choice1": "the road is wet", "choice2": "Rome", "label": 0},
    {"premise": "He ran", "choice1": "a", "choice2": "he is not here", "label": 1},
    {"premise": "She slept", "choice1": "the road is wet", "choice2": "it rained", "label": 0},
    {"premise": "We go", "choice1": "same", "choice2": "same", "label": 1},
]
KINDS = {"llama": "causal", "bert": "masked", "t5": "seq2seq"}


def task(**options: Any) -> ptuning.Task:
    return ptuning.Task("{premise} so [MASK]", verbalizer=WORDS, **options)


@pytest.mark.parametrize("family", list(KINDS))
def test_each_example_compares_its_own_words(family: str) -> None:
    """The loss is that of a verbalizer written out for the example."""
    tokenizer, model = tiny.tokenizer(around=family == "bert"), tiny.model(family)
    renderer = Renderer(tokenizer, task(), KINDS[family])
    examples = [renderer(row) for row in ROWS]
    batch = tiny.batch(model, renderer, examples, [0] * len(ROWS))
    words_of_labels = Words.of(renderer.owner)
    with torch.no_grad():
        got = example_losses(answer_logits(model, batch), batch, words_of_labels)
        for row, loss in zip(ROWS[:3], got, strict=False):
            words = {"0": row["choice1"], "1": row["choice2"]}
            alone = Renderer(
                tokenizer, ptuning.Task("{premise} so [MASK]", verbalizer=words), KINDS[family]
            )
            one = tiny.batch(model, alone, [alone(row)], [0])
            expected = example_losses(answer_logits(model, one), one, words_of_labels)[0]
            assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert float(got[3]) == pytest.approx(float(torch.log(torch.tensor(2.0))), abs=1e-5)


@pytest.mark.parametrize("family", list(KINDS))
def test_a_prompt_learns_saves_and_predicts_with_them(family: str, tmp_path: Path) -> None:
    tokenizer, model = tiny.tokenizer(around=family == "bert"), tiny.model(family)
    prompt = ptuning.Prompt("[P*2] {premise} so [P] [MASK]", verbalizer=WORDS)
    rows = ROWS[:3]
    result = ptuning.train(
        model, tokenizer, prompt, rows, rows, epochs=40, batch_size=3, learning_rate=1e-2
    )
    accuracy, _ = teacher_forced(model, tokenizer, prompt, rows)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    prompt.save(tmp_path / "prompt")
    loaded = ptuning.Prompt.load(tmp_path / "prompt")
    assert loaded.labels == {"0": ("{choice1}",), "1": ("{choice2}",)}
    unlabelled = [{k: v for k, v in row.items() if k != "label"} for row in rows]
    said = ptuning.predict(model, tokenizer, loaded, unlabelled)
    assert sum(a == str(row["label"]) for a, row in zip(said, rows, strict=True)) / 3 == accuracy


def test_a_column_that_is_missing_or_empty_is_named() -> None:
    renderer = Renderer(tiny.tokenizer(), task(), "causal")
    with pytest.raises(DataError, match="the verbalizer names the column 'choice2'"):
        renderer({"premise": "It", "choice1": "a", "label": 0})
    with pytest.raises(DataError, match=r"choice2.* is empty in this example"):
        renderer({"premise": "It", "choice1": "a", "choice2": " ", "label": 0})


@pytest.mark.parametrize(
    ("word", "text"), [("{", "{"), ("a}", "a}"), ("{}", "{}"), ("{{a}}", "{a}"), ("{{", "{")]
)
def test_braces_that_name_no_column_are_text(word: str, text: str) -> None:
    assert named_fields(word) == () and fill(word, {}) == text


def test_doubled_braces_are_text_and_candidates_are_taken_as_they_are() -> None:
    tokenizer = tiny.tokenizer()
    words = {"0": "{{choice1}}", "1": "x{{"}
    renderer = Renderer(tokenizer, ptuning.Task("{premise} [MASK]", verbalizer=words), "causal")
    given = renderer({"premise": "It", "label": 0})
    texts = [tokenizer.decode(sequence.answer).strip() for sequence in given.sequences]
    assert texts == ["{choice1}", "x{"]
    free = ptuning.Task("{premise} [MASK]", answer_end=False)
    literal = Renderer(tokenizer, free, "causal", candidates=["{choice1}", "b"])
    shown = literal({"premise": "It"}, answered=False)
    assert tokenizer.decode(shown.sequences[0].answer).strip() == "{choice1}"
