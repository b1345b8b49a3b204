"""The report on a prompt: its figures, and that it is harmless and stands alone."""

from __future__ import annotations

import json
import re
import sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

import ptuning
from ptuning import Prompt
from ptuning.cli import evaluate, main
from ptuning.inference.answering import Prediction
from ptuning.inference.evaluation import WIDEST, Evaluation
from ptuning.inference.nearest_words import nearest_words
from ptuning.inference.report import Bin, _f1_interval, calibration, report_on, wilson
from ptuning.inference.report_page import page

from .. import tiny
from ..scaffold import Run

EVIL = "<script>alert(1)</script>\"'&"


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_intervals_are_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right / count, count) == pytest.approx((low, high), abs=1e-4)


def test_a_sure_answer_stands_among_the_sure_ones() -> None:
    answers = [Prediction("a", 1.0), Prediction("a", 0.05), Prediction("b", 0.95)]
    result: Any = SimpleNamespace(predictions=answers, right_answers=["a", "b", "a"])
    assert calibration(result) == [Bin(1, 0.05, 0.0), Bin(2, pytest.approx(0.975), 0.5)]


def test_the_interval_of_macro_f1_stands_around_it() -> None:
    said = [Prediction(label, 0.9) for label in "ab" * 100]
    result: Any = SimpleNamespace(labels=["a", "b"], predictions=said, right_answers=["a"] * 200)
    low, high = _f1_interval(result)  # a: 2 · 100 / (200 + 100); b: 0
    assert 0.28 < low < 1 / 3 < high < 0.38


def _of_many_labels(count: int) -> Evaluation:
    """Every label once: the first is right, each other is taken for the first."""
    labels = [f"<kind {number}>" for number in range(count)]
    return Evaluation(
        examples=count,
        accuracy=1 / count,
        loss=1.0,
        macro_f1=0.0,
        manual_template="{text}",
        manual_accuracy=0.0,
        majority_answer=labels[0],
        majority_accuracy=1 / count,
        labels=labels,
        confusion=[[1] + [0] * (count - 1) for _ in labels],
        predictions=[Prediction(labels[0], 0.9) for _ in labels],
        right_answers=labels,
    )


def test_the_pages_of_very_many_labels_show_those_that_are_mistaken_most() -> None:
    prompt = _setting()[2]
    few, many = (_of_many_labels(count) for count in (WIDEST, 600))
    for result in (few, many):
        made = report_on("n", "d", prompt, [{"text": "a"}] * 600, result, ([], 1.0))
        for shown in (page(made), result._repr_html_()):
            whole = len(result.labels) == WIDEST
            assert shown.count("<td") < 2500  # a matrix of 600 labels has 360,000 cells
            assert ("20 of 600 labels, the most mistakes first" in shown) != whole
            assert "&lt;kind 20&gt;" in shown and ("&lt;kind 21&gt;" in shown) == whole
            assert ("&lt;kind 0&gt; (1)" in shown) != whole
        assert [*result.most_mistaken(2)] == [1, 2]
        assert result.confused(0) == ["<kind 0>", "1", "1", ""]


def test_the_interval_of_macro_f1_makes_no_matrix_of_the_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []
    count = numpy.bincount

    def counted(values: Any, minlength: int = 0) -> Any:
        found = count(values, minlength=minlength)
        lengths.append(len(found))
        return found

    monkeypatch.setattr(numpy, "bincount", counted)
    low, high = _f1_interval(_of_many_labels(600))
    assert 0 <= low <= high < 0.01
    assert set(lengths) == {600}


def _setting(labels: bool = True) -> tuple[Any, Any, Prompt, list[dict[str, Any]]]:
    tokenizer = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer))
    options: dict[str, Any] = {"answer": "kind"}
    if labels:
        options["verbalizer"] = {EVIL: "Paris", "bad": "Rome", "never": "Oslo"}
    else:
        options["answer_tokens"] = 3
    prompt = Prompt(f"[P*2] {{text}} {EVIL} [P] so [MASK]", **options)
    weight = model.get_input_embeddings().weight
    prompt.vectors = torch.randn(3, weight.shape[1]) * float(weight.std())
    prompt.training = {"majority_answer": EVIL, "note": EVIL}
    rows = [{"text": f"{EVIL} {n}", "kind": EVIL if n % 3 else "bad"} for n in range(30)]
    return model, tokenizer, prompt, rows


@pytest.mark.parametrize("labels", [True, False])
def test_a_report_has_all_figures_and_runs_nothing(labels: bool) -> None:
    model, tokenizer, prompt, rows = _setting(labels)
    result = ptuning.evaluate(model, tokenizer, prompt, rows)
    history = [
        {"epoch": 1, "loss": 2.0, "dev_accuracy": 0.5},
        {"epoch": EVIL, "loss": float("nan")},
    ]
    words = nearest_words(model, tokenizer, prompt)
    made = report_on(
        EVIL, EVIL, prompt, rows, result, words, history=history, versions={EVIL: EVIL}
    )
    text = page(made)
    assert "<script" not in text and "<img" not in text and EVIL in unescape(text)
    assert not re.search(r"(src|href)=|url\(|@import|https?:", text)
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Answered right",
        *(["Confusion"] if labels else []),
        "Calibration",
        "The surest mistakes",
        "Training",
        "Nearest words of each virtual token",
        "Settings",
        "Made with",
    ]
    assert f"{100 * result.accuracy:.1f} %" in text and f"{result.loss:.4f}" in text
    wrong = [p.probability for p, g in zip(result.predictions, result.right_answers, strict=True)
             if p.answer != g]  # fmt: skip
    assert [m[3] for m in made.mistakes] == sorted(wrong, reverse=True)[:20]
    if made.f1_interval is not None:
        low, high = made.f1_interval
        assert 0 <= low <= (result.macro_f1 or 0) <= high <= 1 and low < high
    assert (made.f1_interval is not None) == labels


def test_a_report_has_what_evaluate_compares_with() -> None:
    model, tokenizer, prompt, rows = _setting()
    prompt.label_bias = dict.fromkeys(prompt.labels, 0.5)
    result = ptuning.evaluate(model, tokenizer, prompt, rows)
    made = report_on("mine", "test", prompt, rows, result, nearest_words(model, tokenizer, prompt))
    assert [name for name, *_ in made.shares()] == [name for name, _ in result.rows()]
    assert "the same, calibrated" in page(made)


def test_mistakes_show_the_columns_that_label_words_name_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer, prompt, _ = _setting()
    prompt = ptuning.Prompt(
        "[P*2] {text} [P] so [MASK]",
        answer="right",
        verbalizer={"0": "{first}", "1": "{second}"},
        vectors=prompt.vectors,
    )
    rows = [
        {"text": "it rains", "first": "Paris", "second": "Rome", "right": str(n % 2)}
        for n in range(4)
    ]
    result = ptuning.evaluate(model, tokenizer, prompt, rows)
    made = report_on("mine", "test", prompt, rows, result, nearest_words(model, tokenizer, prompt))
    assert made.mistakes
    assert all([*row] == ["text", "first", "second"] for row, *_ in made.mistakes)
    evaluate._show_mistakes(result, rows, prompt)
    assert "it rains, Paris, Rome" in capsys.readouterr().out


def test_calibration_counts_every_row_once() -> None:
    model, tokenizer, prompt, rows = _setting()
    result = ptuning.evaluate(model, tokenizer, prompt, rows)
    bins = calibration(result)
    assert sum(b.rows for b in bins) == len(rows)
    assert sum(b.rows * b.right for b in bins) / len(rows) == pytest.approx(result.accuracy)
    mean = sum(p.probability for p in result.predictions) / len(rows)
    assert sum(b.rows * b.probability for b in bins) / len(rows) == pytest.approx(mean)


def test_the_command_writes_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, prompt, rows = _setting()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompt.base_model = {}
    prompt.save(tmp_path / "mine")
    (tmp_path / "mine" / "result.json").write_text('{"history": [{"epoch": 1, "loss": 1.0}, 7]}')
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    command = ["ptuning", "report", "mine", "--data", "test.jsonl", "--model", "model"]

    def run() -> int:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main()
        return int(str(end.value.code))

    assert run() == 0, capsys.readouterr().err
    assert "<title>mine</title>" in Path("report.html").read_text()
    (tmp_path / "mine" / "result.json").write_text(
        '{"history": [{"epoch": 1, "loss": 1%s}, {"epoch": 2, "loss": NaN, "dev_accuracy": 0.5}]}'
        % ("0" * 400)
    )
    command += ["--output", "odd.html"]
    assert run() == 0, capsys.readouterr().err
    command[-1:] = ["report.html"]
    assert run() == 2  # what is there is not replaced unasked
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file/x.html", "folder", "/dev/null", "x" * 300])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    place: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    code, _, err = run("report", "nowhere", "--data", "x", "--output", place, "--overwrite")
    assert code in (1, 2) and "nowhere" not in err and len(err.splitlines()) == 1
    assert any(why in err for why in ("cannot write to", "is not replaced", "too long for a file"))


def test_control_characters_are_escaped_on_the_page() -> None:
    model, tokenizer, prompt, rows = _setting()
    prompt.training = {"note\x1b[2J": "\x9b31m"}
    result = ptuning.evaluate(model, tokenizer, prompt, rows)
    words = nearest_words(model, tokenizer, prompt)
    text = page(report_on("name\x07", "data", prompt, rows, result, words))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text) and "note\\x1b[2J" in text


def test_nearest_words_are_the_tokenizers_and_as_the_model_reads_them() -> None:
    tokenizer = tiny.tokenizer()
    model = tiny.model("gemma2", vocab_size=len(tokenizer) + 8)
    embedding = model.get_input_embeddings()
    prompt = Prompt("[P] {text}")
    prompt.vectors = embedding(torch.tensor([len(tokenizer) + 3])).detach()
    (token,), mean = nearest_words(model, tokenizer, prompt, 3)
    read = embedding(torch.arange(len(tokenizer))).norm(dim=1).mean().item()
    assert mean == pytest.approx(read)
    assert read > 2 * embedding.weight.norm(dim=1).mean().item()  # it scales what it looks up
    assert token.words[0][1] < 0.99  # not the row of no token, which is the vector itself
