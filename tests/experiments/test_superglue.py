"""SuperGLUE: files to rows, templates, metrics, and the command from files to figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptuning.errors import DataError
from ptuning.experiments.superglue import few_shot as experiment
from ptuning.experiments.superglue import metrics as metrics
from ptuning.experiments.superglue.examples import read_few, read_full, read_rows
from ptuning.experiments.superglue.options import SuperGlueOptions
from ptuning.experiments.superglue.tasks import TASKS
from ptuning.inference.evaluation import teacher_forced
from ptuning.prompts.task import Task
from ptuning.rendering.render import Renderer
from ptuning.training import ensemble
from ptuning.training.settings import TrainSettings

from .. import tiny
from ..scaffold import Run, saved

PASSAGE = {
    "text": "Ann has a dog. Bob has a cat.",
    "questions": [
        {
            "idx": 7,
            "question": "Who has a dog?",
            "answers": [
                {"text": "Ann", "idx": 1, "label": 1},
                {"text": "Bob", "idx": 2, "label": 0},
            ],
        },
        {"idx": 8, "question": "A cat?", "answers": [{"text": "Bob", "idx": 3, "label": 1}]},
    ],
}
WSC = {
    "text": "Ann told Bob that she won.",
    "target": {"span1_index": 0, "span1_text": "Ann", "span2_index": 4, "span2_text": "she"},
}
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "BoolQ": [
        {"question": "is it so", "passage": "It is so.", "label": True, "idx": 0},
        {"question": "is it", "passage": "It is not.", "label": False, "idx": 1},
    ],
    "CB": [
        {"premise": "It rains.", "hypothesis": "it is wet", "label": label, "idx": 0}
        for label in ("entailment", "contradiction", "neutral")
    ],
    "COPA": [
        {"premise": "It rained.", "choice1": "The road was wet.", "choice2": "I ran.",
         "question": "effect", "label": 0, "idx": 0},
        {"premise": "He fell.", "choice1": "He sat.", "choice2": "The road was wet.",
         "question": "cause", "label": 1, "idx": 1},
    ],
    "MultiRC": [{"idx": 3, "version": 1.1, "passage": PASSAGE}],
    "RTE": [
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": label, "idx": 0}
        for label in ("entailment", "not_entailment")
    ],
    "WiC": [
        {"word": "run", "sentence1": "I run.", "sentence2": "A run.", "label": label, "idx": 0}
        for label in (True, False)
    ],
    "WSC": [{**WSC, "label": True, "idx": 0}],
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """FewGLUE in small; WiC has no file to test on."""
    for folder, rows in EXAMPLES.items():
        (tmp_path / "few" / folder).mkdir(parents=True)
        for part in ("train", "dev32", *(["val"] if folder != "WiC" else [])):
            shown = rows * 2
            if folder == "WSC" and part != "train":
                shown = [*rows, {**WSC, "label": False, "idx": 1}]
            text = "".join(json.dumps(row) + "\n" for row in shown)
            (tmp_path / "few" / folder / f"{part}.jsonl").write_text(text)
    return tmp_path / "few"


@pytest.fixture
def superglue(data: Path, tmp_path: Path, run: Run) -> Run:
    tokenizer = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    saved(model, tokenizer, tmp_path / "base")

    def call(*options: str, **changes: str) -> tuple[int, str, str]:
        given = {"model": tmp_path / "base", "output": tmp_path / "out", "epochs": 2, "seeds": 2}
        given |= {"data": data} | changes
        named = [part for k, v in given.items() if v for part in (f"--{k}", v)]
        return run("superglue", *named, *options)

    return call


def test_nested_questions_become_rows_that_know_their_question(data: Path) -> None:
    rows = read_rows(data / "MultiRC/train.jsonl", TASKS["multirc"])[:3]
    assert [(r["answer_text"], r["label"], r["of_question"]) for r in rows] == [
        ("Ann", "1", "3-7"),
        ("Bob", "0", "3-7"),
        ("Bob", "1", "3-8"),
    ]


def test_choices_are_clauses_behind_the_word_that_joins_them(data: Path) -> None:
    effect, cause = read_rows(data / "COPA/train.jsonl", TASKS["copa"])[:2]
    assert (effect["premise"], effect["joined"]) == ("It rained", "so")
    assert (effect["choice1"], effect["choice2"]) == ("the road was wet", "I ran")
    assert cause["joined"] == "because"


def test_the_pronoun_is_marked_and_the_noun_is_the_answer(data: Path) -> None:
    file = data / "WSC/train.jsonl"
    (row, *_) = read_rows(file, TASKS["wsc"])
    assert row["text"] == "Ann told Bob that *she* won."
    assert (row["pronoun"], row["noun"]) == ("she", "Ann")
    at_end = {**WSC, "text": 'Ann said: "Bob saw her,"', "label": True}
    at_end["target"] = {**WSC["target"], "span2_text": "her"}  # type: ignore[dict-item]
    _write(file, [at_end])
    assert read_rows(file, TASKS["wsc"])[0]["text"] == 'Ann said: "Bob saw *her*,"'
    at_end["target"]["span2_text"] = "him"
    _write(file, [at_end])
    with pytest.raises(DataError, match="the text has no 'him'"):
        read_rows(file, TASKS["wsc"])


@pytest.mark.parametrize(
    ("text", "pronoun", "word", "marked"),
    [
        ("The hen saw him; he ran, he fell.", "he", 4, "The hen saw him; *he* ran, he fell."),
        ("The hen saw him; he ran, he fell.", "he", 8, "The hen saw him; he ran, *he* fell."),
        ("She saw Ann.\nThen she left", "she", 0, "*She* saw Ann.\nThen she left"),
        ("She  saw Ann.\nThen she'd leave", "She", 99, "She  saw Ann.\nThen *she*'d leave"),
        ('Ann said "her dog" to her', "her", 2, 'Ann said "*her* dog" to her'),
        ("Ann gave it\nto him", "it to", 2, "Ann gave *it\nto* him"),
    ],
)  # fmt: skip
def test_a_pronoun_is_found_where_the_file_counts_or_spells_otherwise(
    text: str, pronoun: str, word: int, marked: str, tmp_path: Path
) -> None:
    target = {"span1_text": "Ann", "span2_text": pronoun, "span2_index": word}
    _write(tmp_path / "wsc.jsonl", [{"text": text, "target": target, "label": True}])
    assert read_rows(tmp_path / "wsc.jsonl", TASKS["wsc"])[0]["text"] == marked


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_splits_of_fewglue(data: Path) -> None:
    few = read_few(data, TASKS["rte"], most=3)
    assert (len(few.train), len(few.dev), len(few.test)) == (4, 4, 3)
    assert read_few(data, TASKS["wic"]).test == []
    (data / "CB/train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train.jsonl is not there"):
        read_few(data, TASKS["cb"])
    (data / "COPA/train.jsonl").write_text('{"premise": "a"}\n')
    with pytest.raises(DataError, match="example 1 is no example of COPA"):
        read_few(data, TASKS["copa"])
    for file in (data / "RTE").iterdir():
        file.unlink()
    (data / "RTE").rmdir()
    with pytest.raises(DataError, match="no folder RTE"):
        read_few(data, TASKS["rte"])


def test_one_file_is_cut_in_three(tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    rows = [{"question": str(n), "passage": "x", "label": n % 2 == 0} for n in range(20)]
    _write(file, rows)
    full = read_full(TASKS["boolq"], file, None, None)
    assert (len(full.train), len(full.dev), len(full.test)) == (12, 3, 5)
    seen = {row["question"] for part in (full.train, full.dev, full.test) for row in part}
    assert len(seen) == 20
    for count in range(3, 20):
        _write(file, rows[:count])
        full = read_full(TASKS["boolq"], file, None, None)
        assert full.train and full.dev and full.test
    _write(file, rows[:2])
    with pytest.raises(DataError, match="too few examples to be cut"):
        read_full(TASKS["boolq"], file, None, None)


def test_passages_stay_whole_where_examples_are_cut(data: Path, tmp_path: Path) -> None:
    passages = [{"idx": n, "passage": PASSAGE} for n in range(10)]
    _write(tmp_path / "all.jsonl", passages)
    full = read_full(TASKS["multirc"], tmp_path / "all.jsonl", None, None)
    questions = [{row["of_question"] for row in rows} for rows in (full.train, full.dev, full.test)]
    assert [len(part) for part in questions] == [12, 2, 6]
    assert not (questions[0] & questions[1] or questions[0] & questions[2])
    _write(data / "MultiRC/val.jsonl", passages)
    few = read_few(data, TASKS["multirc"], most=4)
    assert len(few.test) == 4 * 3  # two questions with three answers


def test_labels_are_text_and_the_tasks_own(data: Path) -> None:
    _write(data / "BoolQ/dev32.jsonl", [{"question": "q", "passage": "p", "label": "True"}])
    assert [row["label"] for row in read_few(data, TASKS["boolq"]).dev] == ["true"]
    _write(data / "BoolQ/val.jsonl", [{"question": "q", "passage": "p", "label": 1}])
    with pytest.raises(DataError, match=r"val.jsonl, example 1 has the label 1; BoolQ has true"):
        read_few(data, TASKS["boolq"])
    _write(data / "WSC/val.jsonl", [WSC])
    with pytest.raises(DataError, match=r"example 1 has no label"):
        read_few(data, TASKS["wsc"])


def test_a_test_file_without_labels_is_passed_over(data: Path) -> None:
    unlabelled = [{k: v for k, v in row.items() if k != "label"} for row in EXAMPLES["RTE"]]
    _write(data / "RTE/test.jsonl", unlabelled)
    assert len(read_few(data, TASKS["rte"]).test) == 4  # val.jsonl
    _write(data / "RTE/test.jsonl", EXAMPLES["RTE"])
    assert len(read_few(data, TASKS["rte"]).test) == 2


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("name", list(TASKS))
def test_every_template_renders_a_row_of_its_task(name: str, kind: str, data: Path) -> None:
    task = TASKS[name]
    (row, *_) = read_few(data, task).train
    tokenizer = tiny.tokenizer(around=kind == "masked")
    assert len(task.templates) >= 3
    for prompt in task.prompts():
        words = []
        for asked in (prompt, prompt.manual()):
            renderer = Renderer(tokenizer, asked, kind, 512)
            rendered = renderer(row)
            assert rendered.compares != task.generates
            start = [id for group in renderer.groups for id in group]
            words.append(
                [[start[-1 - i] if i < 0 else i for i in s.ids] for s in rendered.sequences]
            )
        assert words[0] == words[1]  # training starts from the manual template


def test_metrics_are_the_official_ones() -> None:
    gold, said = ["1", "0", "1", "1"], ["1", "1", "0", "1"]
    rows: list[dict[str, Any]] = [{"of_question": q} for q in ("a", "a", "b", "c")]
    assert metrics.accuracy(gold, said, rows) == 0.5
    assert metrics.f1a(gold, said, rows) == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert metrics.em(gold, said, rows) == pytest.approx(1 / 3)
    labels = ["x", "x", "y", "z"]
    # x: precision 1, recall 1/2; y: precision 1/2, recall 1; z: right
    assert metrics.macro_f1(labels, ["x", "y", "y", "z"], rows) == pytest.approx(
        (2 / 3 * 2 + 1) / 3
    )
    # x: precision 1, recall 1/2; y, which is never right: 0
    assert metrics.macro_f1(["x", "x"], ["x", "y"], rows) == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize(
    ("said", "noun", "same"),
    [
        ("the dog", "Dog", True),
        ("Ann Smith", "Ann", True),
        ("Bob", "Ann", False),
        ("", "Ann", False),
        ("the", "the dog", False),
    ],
)
def test_a_noun_is_the_same_without_articles_and_case(said: str, noun: str, same: bool) -> None:
    assert metrics.same_noun(said, noun) == same


def test_the_command_measures_tasks_and_goes_on_where_it_stopped(
    superglue: Run, tmp_path: Path
) -> None:
    code, out, err = superglue(task="copa")
    assert code == 0, err
    assert "copa" in out and "±" in out
    first = json.loads((tmp_path / "out/superglue.json").read_text())["tasks"]["copa"]
    code, _, err = superglue(task="copa,cb,multirc,wic,wsc")
    assert code == 0, err
    report = json.loads((tmp_path / "out/superglue.json").read_text())
    assert report["tasks"]["copa"] == first
    for name, metric in (("cb", "macro_f1"), ("multirc", "em"), ("wsc", "accuracy")):
        task = report["tasks"][name]
        assert task["measured_on"] == "test" and metric in task["metrics"]
        assert len(task["seeds"]) == 2 and 0 <= task["mean"] <= 1
        assert (tmp_path / f"out/prompts/{name}-1/prompt.safetensors").is_file()
    assert report["tasks"]["wic"]["measured_on"] == "dev"
    assert report["tasks"]["wic"]["majority"] == 0.5
    assert report["mean"]["tasks"] == ["copa", "cb", "multirc", "wsc"]
    majority = report["tasks"]["wsc"]["baselines"]["majority"]["accuracy"]
    assert majority == 0.5  # all training examples are true
    assert (tmp_path / "out/superglue.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = superglue(task="copa", epochs="3")
    assert code == 2 and "epochs=2" in err


@pytest.mark.usefixtures("on_cpu")  # a GPU replays other steps then, which round otherwise
def test_a_training_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    superglue: Run, tmp_path: Path, ctrl_c_after: Callable[[int | None], None]
) -> None:
    given = {"task": "copa", "epochs": "3", "seeds": "1"}
    code, _, err = superglue("--output", str(tmp_path / "whole"), **given)
    assert code == 0, err
    ctrl_c_after(2)  # of three epochs
    assert superglue(**given)[0] == 130
    running = tmp_path / "out/running/copa-0"
    saved = sorted(folder.name for folder in (running / "checkpoints").iterdir())
    code, _, err = superglue("--batch-size", "4", **given)
    assert code == 2 and "--overwrite" in err, err
    assert sorted(folder.name for folder in (running / "checkpoints").iterdir()) == saved
    ctrl_c_after(2)  # which would be reached if it began anew
    code, _, err = superglue(**given)
    assert code == 0, err
    assert not running.exists()
    one, other = (
        json.loads((tmp_path / folder / "superglue.json").read_text())["tasks"]["copa"]
        for folder in ("whole", "out")
    )
    for report in (one, other):
        del report["seeds"][0]["seconds"]
    assert one == other


def test_a_masked_model_has_a_mask_for_each_token_of_the_candidate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tiny.tokenizer(around=True)
    nouns = ["Ann", "Mr. Bob Smith", "Ann", "dog", "Mr. Bob Smith"]
    rows = [{"text": "x", "noun": noun, "label": "true"} for noun in nouns]
    ids = tokenizer([" " + noun for noun in nouns], add_special_tokens=False)["input_ids"]
    size = dict(zip(nouns, map(len, ids), strict=True))
    asked = [TASKS["wsc"].prompts()[0].manual()]
    seen = []

    def says_the_noun(_: Any, __: Any, tasks: Any, rows: Any, **options: Any) -> list[list[str]]:
        seen.append(options["answer_tokens"])
        assert {size[row["noun"]] for row in rows} == {options["answer_tokens"]}
        return [[row["noun"] for row in rows] for _ in tasks]

    monkeypatch.setattr(experiment, "predict", says_the_noun)
    (figures,) = experiment.measured(tiny.model("bert"), tokenizer, TASKS["wsc"], asked, rows)
    assert figures == {"accuracy": 1.0} and sorted(seen) == sorted(set(size.values()))


def test_the_command_asks_a_masked_model(superglue: Run, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(around=True)
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    tiny.model("bert", **changes).save_pretrained(tmp_path / "masked")
    tokenizer.save_pretrained(tmp_path / "masked")
    rates = ("--learning-rate", "1e-3,1e-2")
    code, _, err = superglue(*rates, task="wsc,copa", model=str(tmp_path / "masked"), seeds="1")
    assert code == 0, err
    tasks = json.loads((tmp_path / "out/superglue.json").read_text())["tasks"]
    for task in (tasks["wsc"], tasks["copa"]):
        assert task["measured_on"] == "test" and 0 <= task["mean"] <= 1
        (run,) = task["seeds"]
        assert {member["name"]["learning_rate"] for member in run["members"]} == {1e-3, 1e-2}


def test_where_training_examples_have_one_label_the_majority_is_devs(
    superglue: Run, data: Path, tmp_path: Path
) -> None:
    _write(data / "WSC/dev32.jsonl", [{**WSC, "label": label} for label in (True, False, False)])
    code, _, err = superglue(task="wsc", seeds="1")
    assert code == 0, err
    task = json.loads((tmp_path / "out/superglue.json").read_text())["tasks"]["wsc"]
    assert task["baselines"]["majority_answer"] == "false"


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", ["boolq", "copa", "wsc"])
def test_members_near_the_best_answer_together_with_a_bias_from_dev(
    name: str, together: bool, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, task = tiny.model("llama"), tiny.tokenizer(), TASKS[name]
    splits = read_few(data, task, None)
    found = experiment.baselines(model, tokenizer, task, splits)
    settings = TrainSettings(choose_by="loss", patience=0, epochs=1, learning_rate=0.3)
    options = SuperGlueOptions(best_templates=3, together=together, settings=settings)
    for near in (1.0, 100.0):
        monkeypatch.setattr(ensemble, "_NEAR", near)
        figures, prompt = experiment.tuned(model, tokenizer, task, splits, found, options)
        every = sum(
            t["verbalizer"] == found["templates"][0]["verbalizer"] for t in found["templates"]
        )
        several = together and name != "wsc" and near > 1
        assert len(figures["together"]) == len(prompt.members) == (min(3, every) if several else 1)
        assert prompt.training.get("members", 1) == len(prompt.members)
        dropped = together and name != "wsc" and near == 1.0  # what all did on dev is nobody's
        assert ("dev_loss" in prompt.training) == (not dropped)
        assert figures["together"][0] == prompt.template == figures["template"]
        # Of choices that each row names itself, none can be preferred.
        assert (prompt.label_bias is not None) == (together and name == "boolq")
        assert figures["label_bias"] == prompt.label_bias
    assert (found["bias"] is not None) == (name == "boolq")
    by_hand = experiment.best_by_hand(task, found, found["bias"])
    assert by_hand.label_bias == found["bias"]


@pytest.mark.parametrize("name", ["boolq", "copa", "wsc"])
def test_manual_templates_are_ordered_by_score_and_then_by_loss(name: str, data: Path) -> None:
    """By the numbers that each template has alone, in a forward of its own."""
    model, tokenizer, task = tiny.model("llama"), tiny.tokenizer(), TASKS[name]
    splits = read_few(data, task, None)
    found = experiment.baselines(model, tokenizer, task, splits)["templates"]
    answered = [row for row in splits.dev if not task.generates or row["label"] == "true"]
    order = []
    for template in found:
        by_hand = Task(
            template["manual"],
            answer=task.answer,
            verbalizer=template["verbalizer"],
            max_length=task.max_length,
        )
        (alone,) = experiment.measured(model, tokenizer, task, [by_hand], splits.dev)
        assert template["dev"] == alone
        loss = teacher_forced(model, tokenizer, by_hand, answered)[1]
        order.append((-experiment.score(alone), round(loss, 4)))
    assert order == sorted(order)
    assert len({loss for _, loss in order}) > 1


def test_the_folder_has_a_name_of_its_own(
    superglue: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = superglue(task="copa", output="", seeds="1")
    assert code == 0 and "superglue_output" in out, err
    assert (tmp_path / "superglue_output/superglue.json").is_file()


def test_a_test_file_that_comes_later_is_measured_with_the_prompts_there_are(
    superglue: Run, data: Path, tmp_path: Path
) -> None:
    code, out, err = superglue(task="wic")
    assert code == 0 and "(dev" in out, err
    trained = (tmp_path / "out/done/wic-1.json").read_bytes()
    _write(data / "WiC/val.jsonl", EXAMPLES["WiC"])
    code, out, err = superglue(task="wic")
    assert code == 0 and "(dev" not in out, err
    task = json.loads((tmp_path / "out/superglue.json").read_text())["tasks"]["wic"]
    assert task["measured_on"] == "test" and task["test_examples"] == 2
    assert (tmp_path / "out/done/wic-1.json").read_bytes() == trained
    _write(data / "WiC/dev32.jsonl", EXAMPLES["WiC"])
    code, _, err = superglue(task="wic")
    assert code == 2 and "part wic-manual was made of other data" in err
    shutil.rmtree(tmp_path / "out/prompts")
    _write(data / "WiC/dev32.jsonl", EXAMPLES["WiC"] * 2)
    code, _, err = superglue(task="wic")  # trained again
    assert code == 0 and (tmp_path / "out/prompts/wic-0/prompt.json").is_file(), err


def test_fully_supervised_from_one_file(superglue: Run, tmp_path: Path) -> None:
    rows = "".join(
        json.dumps({"question": f"is it {n}", "passage": "It is.", "label": n % 2 == 0}) + "\n"
        for n in range(20)
    )
    (tmp_path / "boolq.jsonl").write_text(rows)
    code, _, err = superglue("--train", str(tmp_path / "boolq.jsonl"), task="boolq", data="")
    assert code == 0, err
    report = json.loads((tmp_path / "out/superglue.json").read_text())
    task = report["tasks"]["boolq"]
    assert [task["baselines"][f"{part}_examples"] for part in ("train", "dev")] == [12, 3]
    assert task["test_examples"] == 5


@pytest.mark.parametrize(
    ("options", "changes", "part"),
    [
        ([], {"task": "snli"}, "'snli'; there are boolq"),
        ([], {"task": "rte", "data": ""}, "give FewGLUE's folder"),
        (["--train", "x.jsonl"], {"task": "rte,cb"}, "--train is for one task"),
        ([], {"task": "rte", "seeds": "0"}, "Invalid value for '--seeds'"),
        (["--max-examples", "0"], {"task": "rte"}, "Invalid value for '--max-examples'"),
        (["--best-templates", "0"], {"task": "rte"}, "best_templates is 0"),
        (["--encoder", "gru"], {"task": "rte"}, "'gru'; expected one of mlp"),
        (["--template", "{premise} [MASK]"], {"task": "rte"}, "no virtual token"),
        (["--template", "{premise} [P] [MASK]"], {"task": "rte,copa,boolq"}, "names {premise}"),
        (["--train", "x.jsonl"], {"task": "rte"}, "exclude each other"),
        (["--test", "x.jsonl"], {"task": "rte"}, "belong to --train"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    superglue: Run, options: list[str], changes: dict[str, str], part: str
) -> None:
    code, _, err = superglue(*options, **changes)
    assert code == 2 and "Traceback" not in err
    assert part in err.splitlines()[-1], err


def test_a_test_file_whose_labels_are_held_back_is_passed_over(data: Path) -> None:
    for hidden in (-1, None):
        _write(data / "RTE/test.jsonl", [{**row, "label": hidden} for row in EXAMPLES["RTE"]])
        assert len(read_few(data, TASKS["rte"]).test) == 4  # val.jsonl
    (data / "RTE/val.jsonl").unlink()
    assert read_few(data, TASKS["rte"]).test == []


def test_labels_are_read_as_in_every_table(data: Path) -> None:
    spelled = [1.0, " 0 ", "1", 0]
    _write(data / "COPA/dev32.jsonl", [{**EXAMPLES["COPA"][0], "label": s} for s in spelled])
    dev = read_few(data, TASKS["copa"]).dev
    assert [row["label"] for row in dev] == ["1", "0", "1", "0"]


def test_a_file_without_an_answer_to_label_is_refused(data: Path) -> None:
    empty = {"idx": 3, "passage": {"text": "x", "questions": []}}
    _write(data / "MultiRC/train.jsonl", [empty])
    with pytest.raises(DataError, match=r"train.jsonl has no answers that could be labelled"):
        read_few(data, TASKS["multirc"])
    _write(data / "WSC/train.jsonl", [{**WSC, "target": {**WSC["target"], "span1_text": " "}}])
    with pytest.raises(DataError, match=r"example 1 is no example of WSC: .*a span has no text"):
        read_few(data, TASKS["wsc"])


@pytest.mark.parametrize(
    ("task", "part", "row", "said"),
    [
        ("rte", "val", {"premise": "x", "label": "entailment"},
         "RTE, test example 1: the template names the column 'hypothesis'"),
        ("rte", "train", {"premise": "x", "label": "entailment"}, "RTE, training example 1: "),
        ("rte", "dev32", {"premise": "x", "hypothesis": [1], "label": "entailment"},
         "RTE, dev example 1: the column 'hypothesis' holds a list"),
        ("wsc", "train", {**WSC, "label": False},
         "WSC is trained on its true examples, and the training file has none"),
    ],
)  # fmt: skip
def test_what_no_training_could_use_is_said_before_anything_is_trained(
    task: str, part: str, row: dict[str, Any], said: str, superglue: Run, data: Path, tmp_path: Path
) -> None:
    _write(data / task.upper() / f"{part}.jsonl", [row])
    code, out, err = superglue(task=task)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert not (tmp_path / "out" / "done").exists()


def test_a_folder_that_is_not_there_is_said(superglue: Run, data: Path) -> None:
    code, _, err = superglue(task="rte", data=str(data / "nowhere"))
    assert code == 2
    assert "nowhere is not there; give FewGLUE's folder" in " ".join(err.split())
