"""From a table to a trained prompt on the command line, without a template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ptuning import Prompt

from ..scaffold import Run

TEAMS = ["billing", "tech_support", "account-access"]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path, run: Run) -> Run:
    """Train on a table of thirty tickets as people export them."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{n};Ticket {n};I was charged on day {n}\\; help;{TEAMS[n % 3]}" for n in range(30)]
    Path("tickets.csv").write_text(
        ";subject;body;team\n" + "\n".join(line.replace("\\;", ",") for line in lines) + "\n"
    )

    def call(*more: str) -> tuple[int, str, str]:
        options = ("--model", model_folder, "--data", "tickets.csv", "--output", "out")
        return run("train", *options, "--epochs", 2, *more)

    return call


def test_a_table_is_enough(train: Run, run: Run) -> None:
    code, _, err = train()
    assert code == 0, err
    assert "answers: 'team' (3 labels); reads: 'subject', 'body'; left out: '' (it" in err
    assert "6 of 30 examples are set aside" in err
    prompt = Prompt.load("out")
    assert prompt.template == "[P*20] Subject: {subject}\nBody: {body} [P*20] Team: [MASK]"
    assert prompt.answer == "team" and set(prompt.labels) == set(TEAMS)
    assert prompt.training["examples"] == 24 and prompt.training["dev_examples"] == 6
    code, out, err = run("evaluate", "out", "--data", "tickets.csv", "--json")
    assert code == 0 and json.loads(out)["examples"] == 30, err
    code, _, err = run("predict", "out", "--data", "tickets.csv", "--output", "said.csv")
    assert code == 0, err


def test_a_faulty_row_has_its_number_in_the_file_though_some_are_set_aside(
    tmp_path: Path, model_folder: Path, run: Run
) -> None:
    rows = [{"text": f"it rains {n}", "label": "yes" if n % 2 else "no"} for n in range(1, 31)]
    rows[25] = {"label": "yes"}
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = run(
        "train", "--model", model_folder, "--data", tmp_path / "bad.jsonl", "--dev-share", "0.4",
        "--template", "[P*2] {text} [MASK]", "--labels", "yes=yes,no=not",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 2 and "training example 26: the template names the column 'text'" in err


@pytest.mark.usefixtures("on_cpu")
def test_the_run_file_keeps_what_was_found(train: Run, run: Run) -> None:
    train()
    settings, prompt = yaml.safe_load(Path("out/run.yaml").read_text()), Prompt.load("out")
    assert settings["template"] == prompt.template and settings["answer"] == "team"
    assert settings["labels"] == {label: list(words) for label, words in prompt.labels.items()}
    assert settings["dev_share"] == 0.2 and settings["encoder"] == prompt.encoder == "none"
    code, _, err = run("train", "--config", "out/run.yaml", "--output", "again")
    assert code == 0, err
    again = Prompt.load("again")
    assert again.trained_vectors().equal(prompt.trained_vectors())
    assert "answers:" not in err


def test_an_encoder_of_ones_own_for_a_made_template(train: Run) -> None:
    code, _, err = train("--encoder", "mlp")
    assert code == 0, err
    assert Prompt.load("out").encoder == "mlp"


@pytest.mark.usefixtures("on_cpu")
def test_an_interrupted_run_goes_on_with_what_was_found(
    train: Run, run: Run, ctrl_c_after: Callable[[int | None], None]
) -> None:
    train()
    undisturbed = Prompt.load("out").trained_vectors()
    ctrl_c_after(1)
    assert train("--overwrite")[0] == 130
    ctrl_c_after(None)
    code, _, err = run("train", "--output", "out", "--resume")
    assert code == 0, err
    assert Prompt.load("out").trained_vectors().equal(undisturbed)


@pytest.mark.usefixtures("on_cpu")
def test_a_file_without_a_header_in_another_encoding_is_trained_on_and_gone_on_with(
    train: Run, run: Run, ctrl_c_after: Callable[[int | None], None]
) -> None:
    _, *lines = Path("tickets.csv").read_text().splitlines()
    Path("tickets.csv").write_bytes(
        ("\n".join(lines) + "\n").replace(", help", " – hélp").encode("cp1252")
    )
    form = ("--encoding", "cp1252", "--columns", "number,subject,body,team")
    code, _, err = train("--columns", "number,subject,body,team")
    assert code == 2 and "tickets.csv line 1: no valid UTF-8" in err and "--encoding cp1252" in err
    code, _, err = train("--encoding", "cp1252")
    assert code == 2 and "the table has no header: the answer's column is called 'billing'" in err
    assert "another 'I was charged on day 0" in err and "--columns label,text" in err
    ctrl_c_after(1)
    assert train("--overwrite", *form)[0] == 130
    ctrl_c_after(None)
    code, _, err = run("train", "--output", "out", "--resume")
    assert code == 0, err
    assert yaml.safe_load(Path("out/run.yaml").read_text())["columns"] == form[3]
    assert Prompt.load("out").template.startswith("[P*20] Subject: {subject}\nBody: {body}")
    code, out, err = run("evaluate", "out", "--data", "tickets.csv", *form, "--json")
    assert code == 0 and json.loads(out)["examples"] == 30, err


def test_where_folds_choose_nothing_is_set_aside(train: Run) -> None:
    code, _, err = train("--folds", "2", "--epochs", "1")
    assert code == 0, err
    assert "set aside" not in err
    assert Prompt.load("out").training["examples"] == 30


def test_what_is_given_comes_before_what_is_found(train: Run) -> None:
    labels = "billing=a,tech_support=b,account-access=c"
    code, _, err = train("--template", "auto", "--labels", labels, "--dev-share", "0.5")
    assert code == 0, err
    prompt = Prompt.load("out")
    assert prompt.labels["tech_support"] == ("b",) and prompt.training["dev_examples"] == 15
    settings = yaml.safe_load(Path("out/run.yaml").read_text())
    assert settings["labels"] == labels
    own = ("--template", "[P] {body} [MASK]", "--labels", "auto", "--answer", "team")
    code, _, err = train("--overwrite", *own)
    assert code == 0, err
    prompt = Prompt.load("out")
    assert prompt.template == "[P] {body} [MASK]" and len(prompt.labels) == 3
    assert prompt.training["dev_examples"] == 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--answer", "colour"), "no answer column 'colour'; it has '', 'subject', 'body', 'team'"),
        (("--dev-share", "1.5"), "the share to set aside is 1.5"),
        (("--template", "auto", "--init-from", "out"), "leave 'auto' out"),
    ],
)
def test_mistakes_are_one_line(train: Run, options: tuple[str, ...], part: str) -> None:
    code, _, err = train(*options)
    assert code == 2
    assert part in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.usefixtures("on_cpu")
def test_a_run_whose_time_is_over_has_a_prompt_and_goes_on(train: Run, run: Run) -> None:
    train()
    undisturbed = Prompt.load("out").trained_vectors()
    code, out, err = train("--overwrite", "--max-minutes", "0.000001")
    assert code == 0 and "the time was over; go on: ptuning train --output out --resume" in out, err
    assert not json.loads(Path("out/result.json").read_text())["complete"]
    assert not Prompt.load("out").trained_vectors().equal(undisturbed)
    code, _, err = train()
    assert code == 2 and "holds an interrupted run; go on with it (--resume)" in err
    code, _, err = run("train", "--output", "out", "--resume", "--max-minutes", "60")
    assert code == 0, err
    assert Prompt.load("out").trained_vectors().equal(undisturbed)
    assert "complete" not in json.loads(Path("out/result.json").read_text())
    assert not Path("out/checkpoints").exists()


@pytest.mark.usefixtures("on_cpu")
def test_what_was_set_aside_is_trained_on_at_last(
    train: Run, run: Run, ctrl_c_after: Callable[[int | None], None]
) -> None:
    code, out, err = train()
    assert code == 0, err
    assert "6 of 30 examples are set aside to choose with, and trained on at last" in err
    assert "on with all 30 examples" in err and "then on with all 30 examples" in out
    assert "refit: null\n" in Path("out/run.yaml").read_text()
    assert json.loads(Path("out/result.json").read_text())["refit"]["examples"] == 30
    assert not Path("out/checkpoints").exists()
    ctrl_c_after(3)  # behind two epochs, so in what follows
    assert train("--output", "stopped")[0] == 130
    ctrl_c_after(None)
    assert list(Path("stopped/checkpoints/refit").iterdir())
    code, _, err = run("train", "--output", "stopped", "--resume")
    assert code == 0, err
    stopped, whole = Prompt.load("stopped"), Prompt.load("out")
    assert stopped.trained_vectors().equal(whole.trained_vectors())
    code, out, err = run(
        "train", "--config", "out/run.yaml", "--dev", "tickets.csv", "--output", "dev"
    )
    assert code == 0 and "on with all" not in out, err  # rows of --dev are not trained on unasked
    code, _, err = train("--output", "none", "--refit", "--dev-share", 0)
    assert code == 2 and "there are none; give some (dev=, --dev, --dev-share)" in err


@pytest.mark.usefixtures("on_cpu")
def test_a_run_of_an_older_release_ends_when_dev_has_chosen(
    train: Run, run: Run, ctrl_c_after: Callable[[int | None], None]
) -> None:
    code, _, err = train("--no-refit")
    assert code == 0 and "set aside to choose with\n" in err, err
    ctrl_c_after(1)
    assert train("--no-refit", "--output", "old")[0] == 130
    ctrl_c_after(None)
    settings = Path("old/run.yaml").read_text()
    assert "refit: false\n" in settings
    Path("old/run.yaml").write_text(settings.replace("refit: false\n", ""))
    code, _, err = run("train", "--output", "old", "--resume")
    assert code == 0, err
    assert "refit" not in json.loads(Path("old/result.json").read_text())
    old, whole = Prompt.load("old"), Prompt.load("out")
    assert old.trained_vectors().equal(whole.trained_vectors())


def test_a_file_and_a_share_that_choose_exclude_each_other(train: Run) -> None:
    code, _, err = train("--answer", "team", "--dev", "tickets.csv", "--dev-share", "0.2")
    assert code == 2 and "--dev and --dev-share exclude each other" in err
    code, _, err = train()
    assert code == 0, err
    more = ("--config", "out/run.yaml", "--dev", "tickets.csv", "--overwrite")
    code, _, err = train(*more)  # what a run file says gives way
    assert code == 0, err
    assert yaml.safe_load(Path("out/run.yaml").read_text())["dev_share"] == 0
    more = ("--config", "out/run.yaml", "--dev-share", "0.3", "--overwrite")
    code, _, err = train(*more)
    assert code == 0, err
    settings = yaml.safe_load(Path("out/run.yaml").read_text())
    assert settings["dev"] is None and settings["dev_share"] == 0.3
    assert Prompt.load("out").training["dev_examples"] == 9
