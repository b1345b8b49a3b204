"""``ptuning distill``: what it writes, says and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import ptuning

from ..scaffold import Run

TEMPLATE = "[P*4] {text} Answer: [MASK]"
WORDS = ("Paris is", "does it rain", "Rome and", "she wrote", "Madrid", "Oslo yes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts with labels, and a teacher."""
    rows = [
        {"text": f"{text} {n}", "label": "yes" if n % 2 else "no"}
        for n in range(4)
        for text in WORDS
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "teacher.txt").write_text("Is France a country? Answer: yes\n\nIs it? Answer: no\n")
    return tmp_path


def options(
    folder: Path, model: Path, without: tuple[str, ...] = (), **more: object
) -> list[object]:
    chosen = {
        "model": model,
        "teacher": folder / "teacher.txt",
        "data": folder / "texts.jsonl",
        "template": TEMPLATE,
        "labels": "yes=yes,no=no",
        "output": folder / "out",
        "epochs": 2,
        **more,
    }
    given = [(name, value) for name, value in chosen.items() if name not in without]
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in given]
    return [part for pair in pairs for part in pair if part is not None]


def test_it_says_how_far_prompt_and_teacher_agree_and_what_is_saved(
    run: Run, folder: Path, model_folder: Path
) -> None:
    more = {"test": folder / "texts.jsonl", "label_weight": 0.25}
    code, out, err = run("distill", *options(folder, model_folder, **more))
    assert code == 0, err
    assert "% of 24 texts held out are answered as the teacher does" in out
    assert "right: prompt" in out and "a request: " in out and "keys and values kept" in out
    assert "reads 24 texts" in err and f"ptuning evaluate {folder / 'out'}" in out
    kept = json.loads((folder / "out/result.json").read_text())["teacher"]
    assert kept["examples"] == 24 and kept["teacher_tokens"] > kept["tokens"]
    prompt = ptuning.Prompt.load(folder / "out")
    assert prompt.training["teacher"]["label_weight"] == 0.25
    assert "Is France a country?" in prompt.training["teacher"]["template"]
    settings = yaml.safe_load((folder / "out/run.yaml").read_text())
    assert settings["teacher"] == str(folder / "teacher.txt")
    code, out, _ = run("distill", "--config", folder / "out/run.yaml", "--output",
                       folder / "again", "--json")  # fmt: skip
    assert code == 0 and json.loads(out)["teacher"]["agreement"] == kept["agreement"]


def test_a_run_that_was_stopped_goes_on(
    run: Run,
    folder: Path,
    model_folder: Path,
    on_cpu: None,
    ctrl_c_after: Callable[[int | None], None],
) -> None:
    assert run("distill", *options(folder, model_folder, output=folder / "whole"))[0] == 0
    ctrl_c_after(1)
    code, _, err = run("distill", *options(folder, model_folder))
    assert code == 130 and f"ptuning distill --output {folder / 'out'} --resume" in err
    ctrl_c_after(None)
    code, _, err = run("train", "--output", folder / "out", "--resume")
    assert code == 2 and "is a distillation: ptuning distill" in err
    code, _, err = run("distill", "--output", folder / "out", "--resume")
    assert code == 0, err
    vectors = [ptuning.Prompt.load(folder / name).trained_vectors() for name in ("whole", "out")]
    assert vectors[0].equal(vectors[1])
    assert not (folder / "out/checkpoints").exists()


def test_a_distillation_from_a_saved_prompt_is_repeated_with_what_that_prompt_has(
    run: Run, folder: Path, model_folder: Path, on_cpu: None
) -> None:
    first = options(folder, model_folder, encoder="lstm", output=folder / "first")
    begun = options(folder, model_folder, template=None, labels=None, init_from=folder / "first")
    begun = [part for part in begun if part not in ("--template", "--labels")]
    again = ["--config", folder / "out/run.yaml", "--output", folder / "again"]
    for chosen in (first, begun, again):
        code, _, err = run("distill", *chosen)
        assert code == 0, err
    out, again_out = (ptuning.Prompt.load(folder / name) for name in ("out", "again"))
    assert out.settings() == again_out.settings() and out.encoder == "lstm"
    assert out.trained_vectors().equal(again_out.trained_vectors())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "missing.txt"}, "missing.txt"),
        ({"template": None}, "no --template"),
        ({"template": "auto"}, "distill needs none; write --template and --labels"),
        ({"labels": "auto"}, "distill needs none; write --template and --labels"),
        ({"labels": None}, "how long may the teacher's answers be"),
        ({"label_weight": 2}, "label_weight is 2"),
        ({"data": "teacher.txt"}, "teacher.txt"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    change: dict[str, object], message: str, run: Run, folder: Path, model_folder: Path
) -> None:
    chosen = options(folder, model_folder, **change)
    if change.get("template", "") is None or change.get("labels", "") is None:
        name = "--template" if "template" in change else "--labels"
        chosen = [part for part in chosen if part != name]
    code, _, err = run("distill", *chosen)
    assert code == 2 and message in err and err.count("error:") == 1
    assert not (folder / "out/run.yaml").exists()


def test_texts_may_have_a_label_of_something_else(
    run: Run, folder: Path, model_folder: Path
) -> None:
    rows = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "label": "something else"}) + "\n" for row in rows]
    (folder / "texts.jsonl").write_text("".join(lines))
    code, out, err = run("distill", *options(folder, model_folder))
    assert code == 0, err
    assert "that chose the epoch are answered as the teacher does" in out and "right:" not in out


def test_an_ensemble_becomes_one_prompt(
    run: Run,
    folder: Path,
    model_folder: Path,
    on_cpu: None,
    ctrl_c_after: Callable[[int | None], None],
) -> None:
    learn = options(folder, model_folder, ("teacher",), output=folder / "four", ensemble=2)
    code, _, err = run("train", *learn, "--dev", folder / "texts.jsonl", "--population", "2")
    assert code == 0, err

    def from_ensemble(*without: str, **more: object) -> tuple[int, str, str]:
        more = {"teacher": folder / "four", "encoder": "none", **more}
        return run("distill", *options(folder, model_folder, without, **more))

    code, out, err = from_ensemble("template", "labels", output=folder / "whole")
    assert code == 0, err
    assert "the teacher (prompts: 2) reads 24 texts" in err and "as the teacher does" in out
    ctrl_c_after(2)
    assert from_ensemble("template", "labels")[0] == 130
    ctrl_c_after(None)
    code, _, err = run("distill", "--output", folder / "out", "--resume")
    assert code == 0, err
    whole, resumed = (ptuning.Prompt.load(folder / name) for name in ("whole", "out"))
    assert whole.trained_vectors().equal(resumed.trained_vectors())
    assert whole.template == TEMPLATE and not whole.others
    other = {"template": "{text} [P*2] [MASK]", "output": folder / "other"}
    code, _, err = from_ensemble("labels", **other)
    assert code == 0, err
    assert ptuning.Prompt.load(folder / "other").labels == {"yes": ("yes",), "no": ("no",)}
    code, _, err = from_ensemble(teacher=folder, output=folder / "x")
    assert code == 2 and "give the folder of a saved prompt" in err
    code, _, err = from_ensemble(labels="a=yes,b=no", output=folder / "y")
    assert code == 2 and "give the prompt the teacher's verbalizer" in err


def test_a_trained_teacher_s_free_answers_are_learnt_behind_another_template(
    run: Run, folder: Path, model_folder: Path, on_cpu: None
) -> None:
    names = ("teacher", "labels", "template")
    learn = options(folder, model_folder, names, output=folder / "free")
    code, _, err = run("train", *learn, "--template", "[P*2] {text} [P*2] [MASK]",
                       "--dev", folder / "texts.jsonl", "--no-answer-end")  # fmt: skip
    assert code == 0, err
    taught = options(folder, model_folder, ("labels",), teacher=folder / "free")
    code, _, err = run("distill", *taught)
    assert code == 0, err
    one, teacher = (ptuning.Prompt.load(folder / name) for name in ("out", "free"))
    assert (one.answer_tokens, one.answer_end) == (teacher.answer_tokens, False)
    again = ("--config", folder / "out/run.yaml", "--output", folder / "again")
    code, _, err = run("distill", *again)
    assert code == 0, err
    vectors = [ptuning.Prompt.load(folder / name).trained_vectors() for name in ("out", "again")]
    assert vectors[0].equal(vectors[1])


def test_a_teacher_that_is_not_there_is_said_by_its_option(
    run: Run, folder: Path, model_folder: Path
) -> None:
    code, _, err = run("distill", *options(folder, model_folder, teacher=folder / "teach"))
    assert code == 2 and f"--teacher {folder / 'teach'} does not exist; give a text file" in err
