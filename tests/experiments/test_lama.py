"""LAMA: data, protocol, templates, ranks, and the command from facts to figures."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

import ptuning
from ptuning import Prompt, Task, TrainSettings, predict_details
from ptuning.errors import DataError, InputError
from ptuning.experiments.lama import templates as templates
from ptuning.experiments.lama.options import LamaOptions
from ptuning.experiments.lama.probe import summary
from ptuning.experiments.lama.ranking import metrics, ranks
from ptuning.experiments.lama.relations import (
    Facts,
    Relation,
    is_one_token,
    one_token,
    read_facts,
    read_relations,
)
from ptuning.experiments.superglue.options import SuperGlueOptions
from ptuning.forward import batching
from ptuning.rendering.render import Renderer

from .. import tiny
from ..scaffold import Run

BORN = Relation("P19", "[X] was born in [Y] .", "place of birth")


def one_token_words(tokenizer: Any) -> list[str]:
    words = [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]
    return [w for w in dict.fromkeys(words) if w.isalpha() and is_one_token(tokenizer, w)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty facts of two relations, some with objects of several tokens."""
    folder = tmp_path / "lama"
    folder.mkdir()
    words = one_token_words(tiny.tokenizer())[:4]
    assert len(words) == 4
    relations = [
        {"relation": "P19", "template": BORN.template, "label": BORN.label},
        {"relation": "P36", "template": "The {capital} of [X] is [Y] .", "label": "capital"},
        {"relation": "P99", "template": "[Y] has [X] .", "label": "other way"},
    ]
    _write(folder / "relations.jsonl", relations)
    facts = [{"sub_label": f"town {n}", "obj_label": words[n % 4]} for n in range(40)]
    facts += [{"sub_label": "far", "obj_label": "Antananarivo and more"}] * 3
    _write(folder / "P19.jsonl", facts)
    _write(folder / "P36.jsonl", facts[:20])
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def lama(data: Path, tmp_path: Path, model_folder: Path, run: Run) -> Run:
    def call(*options: str) -> tuple[int, str, str]:
        given = ["--model", model_folder, "--data", data, "--epochs", 2]
        return run("lama", *given, "--output", tmp_path / "out", *options)

    return call


def test_facts_are_those_of_one_token_split_by_the_protocol(data: Path) -> None:
    tokenizer = tiny.tokenizer()
    facts = read_facts(data, BORN, tokenizer)
    rows = [json.loads(line) for line in (data / "P19.jsonl").read_text().splitlines()][:40]
    random.Random(0).shuffle(rows)
    assert (facts.train, facts.dev, facts.test) == (rows[:24], rows[24:30], rows[30:])


def test_one_token_means_what_the_renderer_makes_of_the_answer() -> None:
    tokenizer = tiny.tokenizer()
    task = Task("{sub_label} is in [MASK]", answer="obj_label", answer_end=False)
    renderer = Renderer(tokenizer, task, "causal")
    for word in [*one_token_words(tokenizer)[:20], "Antananarivo", "xyzzy"]:
        answer = renderer({"sub_label": "It", "obj_label": word}).sequences[0].answer
        assert is_one_token(tokenizer, word) == (len(answer) == 1)


def test_relations_are_those_with_facts_in_the_order_asked(data: Path) -> None:
    assert [r.name for r in read_relations(data)] == ["P19", "P36"]
    assert [r.name for r in read_relations(data, ["P36", "P19"])] == ["P36", "P19"]
    with pytest.raises(InputError, match="unknown relation 'P1'"):
        read_relations(data, ["P1"])
    with pytest.raises(InputError, match="P99 has no facts"):
        read_relations(data, ["P99"])
    with pytest.raises(DataError, match=r"relations.jsonl is not there"):
        read_relations(data.parent)


def test_lamas_template_as_text_before_the_object_or_around_it() -> None:
    assert templates.manual_template(BORN, "causal") == "{sub_label} was born in [MASK]"
    assert templates.manual_template(BORN, "masked") == "{sub_label} was born in [MASK] ."
    odd = Relation("P1", "[Y] has {x} [X] .", "")
    assert templates.manual_template(odd, "causal") is None
    assert templates.manual_template(odd, "masked") == "[MASK] has {{x}} {sub_label} ."


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_virtual_tokens_stand_in_front_and_behind_the_subject(kind: str) -> None:
    groups = {"causal": 2, "masked": 3}[kind]
    made = [templates.plain_template(kind, 4)]
    made += [templates.anchored_template(t, kind, 4) for t in templates.all_manual(BORN, kind)]
    for template in made:
        parsed = Prompt(template, answer="obj_label").parsed
        assert [piece.count for piece in parsed.virtual] == [4] * groups
        assert parsed.fields == ("sub_label",) and parsed.slot is not None


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_worded_templates_begin_as_their_manual_template(kind: str) -> None:
    for manual in templates.all_manual(BORN, kind):
        template = templates.worded_template(manual, kind, 4)
        if template == templates.anchored_template(manual, kind, 4):
            assert kind == "masked" and manual.index("[MASK]") < manual.index("{sub_label}")
            continue
        prompt = Prompt(template, answer="obj_label")
        assert prompt.manual().template == manual
        assert all(piece.words for piece in prompt.parsed.virtual)


@pytest.mark.parametrize("manual", ["{sub_label} [MASK]", "A [b] of {sub_label} is [MASK]"])
def test_without_words_to_begin_with_the_template_is_anchored(manual: str) -> None:
    made = templates.worded_template(manual, "causal", 4)
    assert made == templates.anchored_template(manual, "causal", 4)


@pytest.mark.parametrize("options", [LamaOptions, SuperGlueOptions])
def test_a_grid_without_encoders_has_the_default_one_and_any_other_is_looked_at(
    options: Any,
) -> None:
    assert options(grid={}).grid == options().grid == {"encoder": ["none"]}
    rates = options(grid={"learning_rate": (1e-3, 1e-2)}).grid
    assert rates == {"learning_rate": [1e-3, 1e-2], "encoder": ["none"]}
    for grid, said in (({"encoder": []}, r"gives \[\] for encoder"), ({"lr": [1]}, "has 'lr'")):
        with pytest.raises(InputError, match=f"the grid {said}"):
            options(grid=grid)


@pytest.mark.parametrize(("facts", "epochs"), [(28, 10), (246, 5), (800, 3)])
def test_small_relations_are_passed_over_more_often(facts: int, epochs: int) -> None:
    options = LamaOptions(("own",), settings=TrainSettings(batch_size=8))
    some = Facts([{}] * facts, [], [])
    assert options.settings_for(some).epochs == epochs
    assert replace(options, epochs=2).settings_for(some).epochs == 2


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_rank_counts_what_the_model_finds_at_least_as_likely(family: str) -> None:
    tokenizer = tiny.tokenizer(around=family == "bert")
    model = tiny.model(family, vocab_size=len(tokenizer))
    words = one_token_words(tokenizer)[:6]
    rows = [{"sub_label": "town " * (n + 1), "obj_label": w} for n, w in enumerate(words)]
    task = Task("{sub_label} is in [MASK]", answer="obj_label", answer_end=False)
    (found,) = ranks(model, tokenizer, [task], rows)
    ids = [tokenizer(" " + w, add_special_tokens=False)["input_ids"][0] for w in words]
    (among,) = ranks(model, tokenizer, [task], rows, candidates=ids)
    for row, right, rank, few in zip(rows, ids, found, among, strict=True):
        text = f"{row['sub_label']} is in" + ("<mask>" if family == "bert" else "")
        inputs = tokenizer(text, return_tensors="pt")["input_ids"]
        at = int((inputs[0] == tokenizer.mask_token_id).nonzero()) if family == "bert" else -1
        with torch.no_grad():
            logits = model(input_ids=inputs).logits[0, at]
        assert rank == int((logits >= logits[right]).sum())
        assert few == int((logits[ids] >= logits[right]).sum())
    with pytest.raises(DataError, match="no candidate"):
        ranks(model, tokenizer, [task], rows, candidates=ids[1:])


def test_tasks_that_share_batches_have_the_ranks_that_each_has_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer))
    rows = [
        {"sub_label": "town " * (n % 5 + 1), "obj_label": w}
        for n, w in enumerate(one_token_words(tokenizer)[:12])
    ]
    texts = ("{sub_label} is in [MASK]", "The town of {sub_label} lies in [MASK]")
    tasks = [Task(text, answer="obj_label", answer_end=False) for text in texts]
    prompt = Prompt("[P*2] {sub_label} [MASK]", answer="obj_label", answer_end=False)
    prompt.vectors = torch.randn(2, model.config.hidden_size)
    alone = [ranks(model, tokenizer, [task], rows)[0] for task in (*tasks, prompt)]
    monkeypatch.setitem(batching._BUSY, "cpu", 40)
    assert ranks(model, tokenizer, [*tasks, prompt], rows) == alone


def test_metrics_of_ranks() -> None:
    assert metrics([1, 2, 10, 11]) == pytest.approx(
        {"p1": 0.25, "p10": 0.75, "mrr": (1 + 1 / 2 + 1 / 10 + 1 / 11) / 4}
    )


def test_the_mean_counts_each_relation_once_and_leaves_out_what_is_missing() -> None:
    one = {"manual_p1": None, "best_manual_p1": 0.5, "majority_p1": 0.1, "ptuned_p1": 1.0}
    one |= {"ptuned_p10": 1.0, "ptuned_mrr": 1.0}
    means = summary({"P1": one, "P2": {**one, "ptuned_p1": 0.5}})
    assert means["manual_p1"] is None and means["ptuned_p1"] == 0.75


def test_the_command_probes_relations_and_goes_on_where_it_stopped(
    lama: Run, tmp_path: Path
) -> None:
    code, out, err = lama("--relations", "P36")
    assert code == 0, err
    assert "P36" in out and "mean" in out
    first = json.loads((tmp_path / "out/lama.json").read_text())
    figures = first["relations"]["P36"]
    assert figures["test_examples"] == 5
    for key in ("manual_p1", "best_manual_p1", "majority_p1", "ptuned_p1", "ptuned_mrr"):
        assert 0 <= figures[key] <= 1 and first["mean"][key] == figures[key]
    assert {m["name"]["encoder"] for m in figures["members"]} == {"none"}
    assert len({m["name"]["template"] for m in figures["members"]}) == len(figures["members"]) == 2
    assert Prompt.load(tmp_path / "out/prompts/P36").template == figures["template"]
    assert (tmp_path / "out/lama.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = lama("--relations", "P19,P36")
    assert code == 0, err
    both = json.loads((tmp_path / "out/lama.json").read_text())
    assert list(both["relations"]) == ["P19", "P36"] and both["relations"]["P36"] == figures
    code, _, err = lama("--relations", "P36", "--seed", "3")
    assert code == 2 and "holds a run with seed=0" in err and "--overwrite" in err
    code, _, err = lama("--relations", "P36", "--seed", "3", "--overwrite")
    assert code == 0, err


@pytest.mark.usefixtures("on_cpu")  # a GPU replays other steps then, which round otherwise
def test_a_training_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    lama: Run,
    tmp_path: Path,
    ctrl_c_after: Callable[[int | None], None],
) -> None:
    given = ("--relations", "P36", "--epochs", "3")
    code, _, err = lama(*given, "--output", str(tmp_path / "whole"))
    assert code == 0, err
    ctrl_c_after(2)  # of three epochs
    assert lama(*given)[0] == 130
    assert (tmp_path / "out/running/P36/checkpoints").is_dir()
    ctrl_c_after(2)  # which would be reached if it began anew
    code, _, err = lama(*given)
    assert code == 0, err
    assert not (tmp_path / "out/running/P36").exists()
    one, other = (
        json.loads((tmp_path / folder / "lama.json").read_text())["relations"]["P36"]
        for folder in ("whole", "out")
    )
    assert one | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--relations", "P7"], ["unknown relation 'P7'"]),
        (
            ["--template", "[P*3] no subject [MASK]"],
            ["none of own, best, own-words, best-words, plain", "{sub_label}"],
        ),
        (["--candidates", "nowhere.txt"], ["nowhere.txt cannot be read"]),
        (["--candidates", "/dev/null"], ["--candidates /dev/null is empty"]),
        (["--relations", ""], ["--relations is empty"]),
        (["--encoder", "gru"], ["gru"]),
        (["--learning-rate", "1e-3,much"], ["'much' is no positive number"]),
        (["--learning-rate", "-1"], ["'-1' is no positive number"]),
        (["--template", "{sub_label} [MASK]"], ["no virtual token"]),
        (["--template", "[P] {sub_label}[MASK]"], ["write a space before [MASK]"]),
        (["--epochs", "0"], ["epochs is 0"]),
        (["--population", "0"], ["population is 0"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    lama: Run, options: list[str], parts: list[str]
) -> None:
    code, _, err = lama(*options)
    assert code == 2 and "Traceback" not in err
    assert all(part in err.splitlines()[-1] for part in parts), err


def test_the_command_probes_a_masked_model(lama: Run, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(around=True)
    tiny.model("bert", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "masked")
    tokenizer.save_pretrained(tmp_path / "masked")
    rates = ("--learning-rate", "1e-3,3e-3")
    code, _, err = lama("--model", str(tmp_path / "masked"), "--relations", "P36", *rates)
    assert code == 0, err
    figures = json.loads((tmp_path / "out/lama.json").read_text())["relations"]["P36"]
    assert figures["template"].count("[P*10]") == 3
    assert {m["name"]["learning_rate"] for m in figures["members"]} == {1e-3, 3e-3}
    saved = Prompt.load(tmp_path / "out/prompts/P36")
    assert saved.num_virtual_tokens == 30 and saved.encoder_weights is None


def test_candidates_compete_alone(
    lama: Run, data: Path, model_folder: Path, tmp_path: Path
) -> None:
    words = one_token_words(tiny.tokenizer())
    (tmp_path / "words.txt").write_text("\n".join(words[:4]))
    code, _, err = lama("--relations", "P36", "--candidates", str(tmp_path / "words.txt"))
    assert code == 0, err
    report = json.loads((tmp_path / "out/lama.json").read_text())
    assert report["mean"]["ptuned_p10"] == 1.0
    prompt = Prompt.load(tmp_path / "out/prompts/P36")
    model, tokenizer = ptuning.load_model(str(model_folder))
    for written in ("utf-16", "utf-8-sig"):  # any text file means the same
        (tmp_path / "words.txt").write_bytes("\r\n".join(words[:4]).encode(written))
        code, _, err = lama("--relations", "P36", "--candidates", str(tmp_path / "words.txt"))
        assert code == 0, err  # nothing is made again: the candidates are the same
    relation = read_relations(data, ["P36"])[0]
    dev = read_facts(data, relation, tokenizer).dev
    ids = [one_token(tokenizer, word) for word in words[:4]]
    among = metrics(ranks(model, tokenizer, [prompt], dev, candidates=ids)[0])
    assert report["relations"]["P36"]["dev_p1"] == among["p1"]
    (tmp_path / "words.txt").write_text("\n".join(words[1:4]))
    code, _, err = lama(
        "--relations", "P36", "--candidates", str(tmp_path / "words.txt"), "--overwrite"
    )
    assert code == 2 and f"{words[0]!r} is not among the candidates" in err


def test_a_relation_that_cannot_be_asked_does_not_end_the_others(
    lama: Run, data: Path, tmp_path: Path
) -> None:
    _write(data / "P99.jsonl", [{"sub_label": "far", "obj_label": "Antananarivo and more"}] * 9)
    code, _, err = lama()
    assert code == 0 and "P99 is left out" in err, err
    report = json.loads((tmp_path / "out/lama.json").read_text())
    assert list(report["relations"]) == ["P19", "P36"] and list(report["left_out"]) == ["P99"]
    code, _, err = lama("--relations", "P36,P99")
    assert code == 2 and "0 facts whose object is one token" in err
    (data / "P99.jsonl").write_text("{")
    (tmp_path / "out/done/P36.json").unlink()
    code, _, err = lama()
    assert code == 2 and "P99.jsonl line 1" in err
    assert not (tmp_path / "out/done/P36.json").exists()  # refused before anything was trained


def test_finished_parts_of_other_facts_are_not_taken(lama: Run, data: Path) -> None:
    code, _, err = lama("--relations", "P36")
    assert code == 0, err
    with (data / "P36.jsonl").open("a") as file:
        file.write((data / "P19.jsonl").read_text().splitlines()[0] + "\n")
    code, _, err = lama("--relations", "P36")
    assert code == 2 and "part P36 was made of other data" in err and "--overwrite" in err


def test_a_run_that_was_refused_leaves_the_folder_free(lama: Run, tmp_path: Path) -> None:
    code, _, _ = lama("--relations", "P36", "--model", str(tmp_path / "nowhere"))
    assert code == 2
    code, _, err = lama("--relations", "P36")
    assert code == 0, err
    settings = (tmp_path / "out/run.json").read_text()
    (tmp_path / "out/run.json").write_text("[1]")
    code, _, err = lama("--relations", "P36")
    assert code == 2 and "run.json is missing or damaged" in err
    (tmp_path / "out/run.json").write_text(settings)
    (tmp_path / "out/done/P36.json").write_text("")  # a damaged part is measured again
    code, _, err = lama("--relations", "P36")
    assert code == 0, err


def test_relations_in_a_run_file_may_be_a_list(lama: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("relations: [P36, P7]\n")
    code, _, err = lama("--config", str(tmp_path / "run.yaml"))
    assert code == 2 and "unknown relation 'P7'" in err


def test_syntax_in_a_relations_words_is_text() -> None:
    relation = Relation("P1", "[X] {a} [P] [MASK] is [Y] .", "kind [P*3]")
    for template in templates.all_manual(relation, "causal"):
        assert Task(template, answer="obj_label").parsed.virtual == ()
    assert templates.manual_template(relation, "causal") == (
        "{sub_label} {{a}} [[P]] [[MASK]] is [MASK]"
    )


def test_scores_that_are_no_numbers_rank_last() -> None:
    model, tokenizer = tiny.model("llama", vocab_size=len(tiny.tokenizer())), tiny.tokenizer()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    words = one_token_words(tokenizer)
    task = Task("{sub_label} [MASK]", answer="obj_label", answer_end=False)
    rows = [{"sub_label": "a", "obj_label": words[0]}]
    assert ranks(model, tokenizer, [task], rows) == [[len(tokenizer)]]


def test_ctrl_c_is_one_line(lama: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ptuning.cli.lama._probe_all", interrupted)
    code, _, err = lama("--relations", "P36")
    assert code == 130 and "stopped; the same command goes on" in err.splitlines()[-1]
    code, _, err = lama("--relations", "P36", "--overwrite")
    assert code == 130 and "the same command without --overwrite" in err.splitlines()[-1]


def test_a_number_is_a_subject_and_a_file_without_facts_leaves_its_relation_out(
    lama: Run, data: Path, tmp_path: Path
) -> None:
    _write(data / "P99.jsonl", [{"sub_label": 0, "obj_label": "Paris"}] * 4)
    facts = read_facts(data, Relation("P99", "[X] is in [Y] .", ""), tiny.tokenizer())
    assert facts.train[0]["sub_label"] == 0
    (data / "P99.jsonl").write_text("")
    code, _, err = lama()
    assert code == 0 and "P99 is left out" in err, err


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_ensembles_ranks_are_those_of_its_members_mean(family: str) -> None:
    tokenizer = tiny.tokenizer(around=family == "bert")
    model = tiny.model(family, vocab_size=len(tokenizer))
    words = one_token_words(tokenizer)[:9]
    rows = [{"sub_label": "town " * (n % 4 + 1), "obj_label": w} for n, w in enumerate(words)]
    texts = ("[P*2] {sub_label} is in [MASK]", "[P*3] The town of {sub_label} [P] [MASK]")
    members = [Prompt(text, answer="obj_label", answer_end=False) for text in texts]
    for member in members:
        count = member.num_virtual_tokens
        member.vectors = torch.randn(count or 0, model.config.hidden_size)
    both = copy.copy(members[0])
    both.others = (members[1],)
    ids = [tokenizer(" " + w, add_special_tokens=False)["input_ids"][0] for w in words]
    said = [predict_details(model, tokenizer, m, rows, candidates=words) for m in members]
    for candidates in (ids, None):
        found = ranks(model, tokenizer, [both, *members], rows, candidates=candidates)
        assert found[1:] == [ranks(model, tokenizer, [m], rows, candidates)[0] for m in members]
        assert found[0] != found[1]
        if candidates:
            for row, rank, one, other in zip(rows, found[0], *said, strict=True):
                mean = {w: log(one.probabilities[w]) + log(other.probabilities[w]) for w in words}
                right = mean[row["obj_label"]]
                assert rank == sum(value >= right - 1e-6 for value in mean.values())
