"""Populations: each member learns what it learns alone, and the best by dev is kept."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ptuning
from ptuning.backbone.base_model import BaseModel
from ptuning.errors import InputError, TrainingError
from ptuning.prompts.prompt_settings import ENCODERS
from ptuning.rendering.render import Renderer, render_all
from ptuning.rendering.short_words import settle_words
from ptuning.training import checkpoint
from ptuning.training.checkpoint import identity_of
from ptuning.training.grid import KEYS, choices, parse_grid, resized
from ptuning.training.loop import Loop
from ptuning.training.members import with_examples
from ptuning.training.population import Member, Population
from ptuning.training.progress import Progress
from ptuning.training.settings import TrainSettings

from .. import tiny
from ..scaffold import Run, Stopped, stop_after

TEMPLATE = "[P*2] {country} [P*2] [MASK]"
ROWS = [
    {"country": country, "capital": capital}
    for country, capital in (
        ("France", "Paris"),
        ("Italy", "Rome"),
        ("Spain", "Madrid"),
        ("Oslo", "Norway"),
        ("Vienna", "Austria"),
    )
]
OPTIONS: dict[str, Any] = {"epochs": 12, "batch_size": 2, "learning_rate": 3e-2}


def fresh(**changes: Any) -> ptuning.Prompt:
    return ptuning.Prompt(**{"template": TEMPLATE, "answer": "capital", **changes})


def learners_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The learners of each training that follows."""
    seen: list[Any] = []
    original = Loop.train

    def train(self: Loop, resume: bool) -> list[Any]:
        seen.append(original(self, resume))
        return seen[-1]

    monkeypatch.setattr(Loop, "train", train)
    return seen


def run(prompt: ptuning.Prompt | None = None, **options: Any) -> ptuning.TrainResult:
    prompt = prompt or fresh()
    return ptuning.train(
        tiny.model("llama"), tiny.tokenizer(), prompt, ROWS, dev=ROWS[:3], **{**OPTIONS, **options}
    )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_member_learns_what_it_learns_alone(
    encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # cuDNN's LSTM rounds to 10 bits by itself, and not alike in batches of other sizes.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    seen = learners_of(monkeypatch)
    run(fresh(encoder=encoder, encoder_dropout=0.2), population=3, halving=False)
    together = seen.pop()
    for seed, learner in enumerate(together):
        run(fresh(encoder=encoder, encoder_dropout=0.2), seed=seed)
        (alone,) = seen.pop()
        # A GPU adds up the products of all members' mixtures in another order.
        close = 1e-4 if encoder == "mixture" and torch.cuda.is_available() else 1e-5
        torch.testing.assert_close(
            learner.made()["vectors"], alone.made()["vectors"], atol=close, rtol=0
        )
        assert learner.history == [pytest.approx(record, abs=1e-4) for record in alone.history]


def test_who_stays_is_not_touched_by_who_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = learners_of(monkeypatch)
    grid = {"learning_rate": [3e-2, 1e-3, 1e-2]}
    result = run(population=2, grid=grid)
    together = seen.pop()
    dropped = [member["dropped"] for member in result.members]
    assert sum(epoch is None for epoch in dropped) == 2 and {4, 8} >= set(dropped) - {None}
    for number, member in enumerate(result.members):
        assert member["epochs"] == (member["dropped"] or 12)
        if member["dropped"] is None:
            run(**member["name"])
            (alone,) = seen.pop()
            vectors = together[number].made()["vectors"]
            torch.testing.assert_close(vectors, alone.made()["vectors"], atol=1e-5, rtol=0)


def test_the_best_by_dev_becomes_the_prompt(tmp_path: Path) -> None:
    prompt = fresh()
    grid = {"virtual_tokens": [1, 3], "encoder": ["none", "lstm"], "learning_rate": [1e-5, 5e-2]}
    result = run(prompt, grid=grid, halving=False)
    ranks = [(m["best"]["dev_accuracy"], -m["best"]["dev_loss"]) for m in result.members]
    assert ranks.index(max(ranks)) == result.winner
    chosen = result.members[result.winner]["name"]
    assert chosen["learning_rate"] == 5e-2 == prompt.training["learning_rate"]
    count = chosen["virtual_tokens"]
    assert prompt.template == f"[P*{count}] {{country}} [P*{count}] [MASK]"
    assert prompt.encoder == chosen["encoder"] and prompt.num_virtual_tokens == 2 * count
    assert prompt.vectors is not None and len(prompt.vectors) == 2 * count
    assert result.best == result.members[result.winner]["best"]
    prompt.save(tmp_path)
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    again = ptuning.evaluate(model, tokenizer, ptuning.Prompt.load(tmp_path), ROWS[:3])
    assert again.accuracy == pytest.approx(result.best["dev_accuracy"])


def test_templates_of_a_grid_have_their_own_renderings() -> None:
    templates = ["[P*2] {country} [MASK]", "The city of [P] {country} has [P*3] [MASK]"]
    result = run(grid={"template": templates}, epochs=2)
    assert [member["name"]["template"] for member in result.members] == templates


def test_dev_losses_are_means_over_the_answers_as_each_template_has_them() -> None:
    templates = [TEMPLATE, "[P*2] {country} [P*2]\n[MASK]"]  # whose answers have other tokens
    result = run(grid={"template": templates}, epochs=1)
    alone = run(fresh(template=templates[1]), epochs=1)
    assert result.members[1]["best"] == pytest.approx(alone.best, abs=1e-5)


NAMED = [
    {"text": f"number {n}", "team": team}
    for n in range(6)
    for team in ("Oslo_capital", "yes_Berlin")
]


def test_all_members_have_the_words_that_a_tokenizer_gave_the_labels_for_good() -> None:
    base = BaseModel.of(tiny.model("llama"), tiny.tokenizer())
    prompt = ptuning.Prompt.for_rows(NAMED, "team", "[P*2] {text} [MASK]")
    variants = with_examples(base, choices(prompt, TrainSettings(), 2, None), NAMED, ())
    words = {"Oslo_capital": ("capital", "Oslo"), "yes_Berlin": ("yes",)}
    for variant in variants:  # the second one becomes the prompt as well as the first
        again = copy.copy(variant.prompt)
        settle_words(again, base.tokenizer, base.kind)
        assert variant.prompt.verbalizer == again.verbalizer == words


def test_labels_have_as_many_words_in_each_template_of_a_grid() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    templates = ["[P*2] {text} [MASK]", "[P*2] {text}\n[MASK]"]  # whose words are other tokens
    prompt = ptuning.Prompt.for_rows(NAMED, "team", templates[0])
    grid = {"template": templates}
    members = choices(prompt, TrainSettings(), 1, grid)
    variants = with_examples(BaseModel.of(model, tokenizer), members, NAMED, ())
    assert [variant.renderer.owner for variant in variants] == [[0, 1], [0, 1]]
    assert variants[0].prompt.labels == {"Oslo_capital": ("capital",), "yes_Berlin": ("yes",)}
    options: dict[str, Any] = {"grid": grid, "ensemble": 2, "epochs": 1, "verbose": False}
    ptuning.train(model, tokenizer, prompt, NAMED, NAMED[:4], **options)
    assert len(ptuning.predict(model, tokenizer, prompt, NAMED[:2])) == 2


@pytest.mark.usefixtures("on_cpu")
def test_an_interrupted_population_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    undisturbed, prompt = fresh(), fresh()
    run(undisturbed, population=4)

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 17:
            raise Stop

    with pytest.raises(Stop):
        run(prompt, population=4, output=tmp_path, checkpoint_seconds=0.0, listener=stop)
    result = run(prompt, population=4, output=tmp_path, resume=True)
    assert len(result.members) == 4 and any(member["dropped"] for member in result.members)
    assert prompt.vectors is not None and undisturbed.vectors is not None
    assert torch.equal(prompt.vectors, undisturbed.vectors)
    with pytest.raises(InputError, match="the population differs"):
        run(population=3, output=tmp_path, resume=True)


def test_a_population_goes_on_only_with_what_each_template_reads(tmp_path: Path) -> None:
    grid = {"template": [TEMPLATE, "[P*2] {country} {more} [MASK]"]}
    rows = [{**row, "more": "it rains"} for row in ROWS]
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    options: dict[str, Any] = {"grid": grid, "epochs": 1, "verbose": False, "output": tmp_path}
    ptuning.train(model, tokenizer, fresh(), rows, **options)
    ptuning.train(model, tokenizer, fresh(), rows, **options, resume=True)
    changed = [{**row, "more": "it snows"} for row in rows]
    with pytest.raises(InputError, match="the data that other templates read differs"):
        ptuning.train(model, tokenizer, fresh(), changed, **options, resume=True)
    state = checkpoint.load_newest(tmp_path)
    assert state is not None
    del state["identity"]["the data that other templates read"]  # as older releases have it
    checkpoint.save(tmp_path, 3, state)
    ptuning.train(model, tokenizer, fresh(), rows, **options, resume=True)


def test_a_member_that_is_no_longer_finite_leaves_and_the_others_go_on() -> None:
    result = run(grid={"learning_rate": [1e30, 3e-2]}, halving=False)
    assert result.members[1]["epochs"] == 12 > result.members[0]["epochs"]
    assert result.winner == 1


@pytest.mark.usefixtures("on_cpu")
def test_an_interrupted_population_goes_on_without_who_is_no_longer_finite(tmp_path: Path) -> None:
    options: dict[str, Any] = {"grid": {"learning_rate": [1e30, 3e-2]}, "halving": False}
    undisturbed, prompt = fresh(), fresh()
    run(undisturbed, **options)
    options |= {"output": tmp_path, "checkpoint_seconds": 0.0}
    with pytest.raises(Stopped):
        run(prompt, listener=stop_after(9), **options)
    state = checkpoint.load_newest(tmp_path)
    assert state is not None and [one["active"] for one in state["learners"]] == [False, True]
    result = run(prompt, resume=True, **options)
    assert result.winner == 1 and prompt.vectors is not None and undisturbed.vectors is not None
    assert torch.equal(prompt.vectors, undisturbed.vectors)


@pytest.mark.parametrize("choose_by", ["accuracy", "loss"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_what_is_not_finite_after_the_last_step_never_wins(choose_by: str, epochs: int) -> None:
    options: dict[str, Any] = {"epochs": epochs, "batch_size": len(ROWS), "warmup": 0.0}
    result = run(grid={"learning_rate": [1e30, 1e-3]}, choose_by=choose_by, **options)
    assert result.winner == 1 and math.isfinite(result.best["dev_loss"])
    for dev in (ROWS, ()):
        prompt = fresh()
        with pytest.raises(TrainingError, match=rf"(not finite|loss is nan) at step 1 of {epochs}"):
            ptuning.train(
                tiny.model("llama"),
                tiny.tokenizer(),
                prompt,
                ROWS,
                dev,
                learning_rate=1e30,
                **options,
            )
        assert prompt.vectors is None


def test_where_the_last_one_is_no_longer_finite_the_best_result_so_far_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses, calls = Population.losses, []

    def spoiled(self: Population, *given: Any) -> Any:
        calls.append(1)
        return losses(self, *given) * (float("nan") if len(calls) > 12 else 1.0)

    monkeypatch.setattr(Population, "losses", spoiled)
    options: dict[str, Any] = {"patience": 1, "halving": False, "choose_by": "loss"}
    result = run(grid={"learning_rate": [1e-12, 1e-3]}, batch_size=len(ROWS), **options)
    assert result.members[0]["epochs"] < result.members[1]["epochs"] < 13
    assert math.isfinite(result.best["dev_loss"])


def test_without_dev_the_lowest_loss_wins() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    result = ptuning.train(
        model, tokenizer, fresh(), ROWS, grid={"learning_rate": [1e-6, 3e-2]}, epochs=4
    )
    assert result.winner == 1 and result.members[0]["dropped"] is None


def test_two_open_populations_on_one_model_never_meet_in_a_graph() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    renderer = Renderer(tokenizer, fresh(), "causal", 128)
    examples = render_all(renderer, ROWS, "training")

    def opened(seed: int) -> Population:
        return Population(tiny.engine(model, tokenizer), [Member(fresh(), model, seed, [None] * 4)])

    def step(population: Population) -> Any:
        ids = population.first_ids() * len(examples)
        return population.step(tiny.batch(model, renderer, examples, ids)).sum()

    def gradients(population: Population) -> list[Any]:
        found = [p.grad.clone() for p in population.roster[0].parameters()]
        population.zero_grad()
        return found

    alone = []
    for seed in (1, 2):
        with opened(seed) as population:
            step(population).backward()
            alone.append(gradients(population))
    with opened(1) as first, opened(2) as second:
        for _ in range(2):  # the second round finds freed graphs, if any is left
            losses = [step(first), step(second)]
            losses[1].backward()
            assert all(p.grad is None for p in first.roster[0].parameters())
            losses[0].backward()
            torch.testing.assert_close([gradients(first), gradients(second)], alone)


def test_masked_and_encoder_decoder_models_take_populations() -> None:
    for family in ("bert", "t5"):
        prompt = fresh()
        tokenizer = tiny.tokenizer("wordpiece", around=True)
        result = ptuning.train(
            tiny.model(family), tokenizer, prompt, ROWS, dev=ROWS, population=3, epochs=2
        )
        assert len(result.members) == 3 and prompt.vectors is not None


def test_a_grid_is_read_as_it_is_typed() -> None:
    grid = parse_grid(["learning_rate=1e-3,3e-3 encoder=mlp,lstm", "virtual_tokens=3,6"])
    assert grid == {
        "learning_rate": [1e-3, 3e-3],
        "encoder": ["mlp", "lstm"],
        "virtual_tokens": [3, 6],
    }
    templates = parse_grid(["template=[P] {a}, so [MASK]|{a} [P] [MASK] warmup=0.1"])
    assert templates == {"template": ["[P] {a}, so [MASK]", "{a} [P] [MASK]"], "warmup": [0.1]}


def test_values_of_a_grid_may_be_numpys() -> None:
    grid = {"virtual_tokens": [np.int64(2)], "learning_rate": list(np.float32([0.5, 0.25]))}
    found = choices(fresh(), ptuning.TrainSettings(), 1, grid)
    assert [prompt.template for _, prompt, _ in found] == [resized(TEMPLATE, 2)] * 2
    names = [{"virtual_tokens": 2, "learning_rate": rate, "seed": 0} for rate in (0.5, 0.25)]
    assert json.loads(json.dumps([name for name, *_ in found])) == names


def test_virtual_tokens_set_the_size_of_each_group() -> None:
    assert resized("[P] {a} [P*7] b [[P*2]] [MASK]", 3) == "[P*3] {a} [P*3] b [[P*2]] [MASK]"


def test_trained_vectors_stay_with_the_template_that_they_are_of() -> None:
    prompt = fresh(vectors=torch.ones(4, 32), encoder_weights={"x": torch.ones(1)})
    other = "[P*4] {country} [MASK]"  # with as many, which begin anew
    grid = {"virtual_tokens": [2, 5]}, {"template": [TEMPLATE, other]}, {"encoder": ["lstm"]}
    chosen = [one for of in grid for _, one, _ in choices(prompt, TrainSettings(), 1, of)]
    assert [one.vectors is prompt.vectors for one in chosen] == [True, False, True, False, True]
    assert [one.num_virtual_tokens for one in chosen] == [4, 10, 4, 4, 4]
    assert all(one.encoder_weights is None for one in chosen)
    (_, alone, _) = choices(prompt, TrainSettings(), 2, None)[1]
    assert alone.encoder_weights is prompt.encoder_weights


def test_a_column_that_is_called_like_virtual_tokens_and_brackets_beside_them_stay() -> None:
    assert resized("[P*7] {[P]} {{[P]}} [MASK]", 3) == "[P*3] {[P]} {{[P*3]}} [MASK]"
    assert resized("[[P*7] {a} [P]] [MASK]", 3) == "[[P*3] {a} [P*3]] [MASK]"
    with pytest.raises(InputError, match="the template has none"):
        resized("{[P]} [P:so] [MASK]", 3)


@pytest.mark.parametrize(
    ("population", "grid", "message"),
    [
        (0, None, "population is 0"),
        (1, {"batch": [1]}, f"'batch'; it may vary {', '.join(KEYS)}"),
        (1, {"encoder": []}, "gives [] for encoder"),
        (1, {"encoder": "mlp"}, "gives 'mlp' for encoder"),
        (1, "encoder=mlp", "the grid is 'encoder=mlp'"),
        (1, {"weight_decay": [-1]}, "weight_decay is -1"),
        (1, {"virtual_tokens": [True]}, "whole numbers from 1 on"),
        (1, {"encoder": ["gru"]}, "encoder is 'gru'"),
        (1, {"learning_rate": [-1.0]}, "learning_rate is -1.0"),
        (1, {"learning_rate": ["fast"]}, "learning_rate"),
        (1, {"virtual_tokens": [0]}, "whole numbers from 1 on"),
        (1, {"virtual_tokens": ["a"]}, "whole numbers from 1 on"),
    ],
)
def test_wrong_populations_are_refused(population: int, grid: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        choices(fresh(), ptuning.TrainSettings(), population, grid)
    assert message in str(caught.value)
    with pytest.raises(InputError, match="names encoder twice"):
        parse_grid(["encoder=mlp", "encoder=lstm"])
    assert parse_grid(["encoder=mlp, lstm"]) == {"encoder": ["mlp", "lstm"]}
    for wrong in ("encoder", "=mlp", "encoder="):
        with pytest.raises(InputError, match="KEY=VALUE"):
            parse_grid([wrong])


def test_the_command_line_trains_a_population(tmp_path: Path, model_folder: Path, run: Run) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    code, out, err = run(
        "train", "--model", model_folder, "--data", rows, "--dev", rows, "--answer", "capital",
        "--template", TEMPLATE, "--epochs", "2", "--population", "2", "--output", tmp_path / "out",
        "--population-grid", "learning_rate=1e-3,3e-2", "encoder=mlp,none",
    )  # fmt: skip
    assert code == 0, err
    assert "Members" in out and "deviation" in out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["members"]) == 8
    assert "learning_rate=1e-3,3e-2 encoder=mlp,none" in (tmp_path / "out/run.yaml").read_text()
    code, _, err = run(
        "train", "--config", tmp_path / "out/run.yaml", "--output", tmp_path / "again"
    )
    assert code == 0, err
    repeated = json.loads((tmp_path / "again" / "result.json").read_text())
    assert repeated["members"] == result["members"]


def trained_there(folder: Path, model: Path, run: Run, *options: str) -> tuple[int, str, str]:
    """An ensemble of two, trained by the command on ``rows.jsonl`` into ``out``."""
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    return run(
        "train", "--model", model, "--data", rows, "--dev", rows, "--answer", "capital",
        "--template", TEMPLATE, "--epochs", "2", "--ensemble", "2", "--output", folder / "out",
        *options,
    )  # fmt: skip


def test_the_command_line_trains_an_ensemble_and_takes_its_best_member(
    tmp_path: Path, model_folder: Path, run: Run
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    code, said, err = trained_there(tmp_path, model_folder, run, "--population", "3")
    assert code == 0, err
    assert "with 1 more as an ensemble, dev" in said
    result = json.loads((out / "result.json").read_text())
    assert len(result["ensemble"]["members"]) == 2
    code, said, err = run("evaluate", out, "--data", rows, "--json")
    assert code == 0, err
    assert json.loads(said)["loss"] == pytest.approx(result["ensemble"]["dev_loss"], abs=1e-5)
    code, said, err = run("inspect", out)
    assert code == 0 and "ensemble" in said and "2 members" in said, err
    assert run("predict", out, "--data", rows)[0] == 0
    for command in (
        ("merge", out, "--output", tmp_path / "merged"),
        ("export", out, "--to", "vllm-embeds", "--output", tmp_path / "parts"),
    ):
        code, _, err = run(*command)
        assert code == 2 and "ensemble of 2 members" in err and "--alone" in err
        code, _, err = run(*command, "--alone")
        assert code == 0, err


def test_a_member_without_a_result_is_told_of_and_the_others_are_saved(
    tmp_path: Path, model_folder: Path, run: Run
) -> None:
    out = tmp_path / "out"
    code, said, err = trained_there(
        tmp_path, model_folder, run, "--encoder", "mlp", "--schedule", "constant", "--warmup", "0",
        "--population-grid", "learning_rate=1e-3,1e25",
    )  # fmt: skip
    assert code == 0, err
    assert "no result: not finite" in said and "virtual tokens saved" in said
    assert "1 of 2 members has a result" in err
    assert len(ptuning.Prompt.load(out).members) == 1


def test_an_ensemble_is_made_of_the_best_members(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = learners_of(monkeypatch)
    prompt, grid = fresh(), {"learning_rate": [3e-2, 1e-3]}
    result = run(prompt, population=2, grid=grid, ensemble=3, halving=False)
    (learners,) = seen
    ranked = sorted(range(4), key=lambda n: learners[n].rank(learners[n].best), reverse=True)
    assert result.ensemble["members"] == ranked[:3] and result.winner == ranked[0]
    for member, number in zip(prompt.members, ranked, strict=False):
        assert torch.equal(member.trained_vectors(), learners[number].best["vectors"])
    assert len(prompt.members) == 3
    assert prompt.training["members"] == 3
    measured = ptuning.evaluate(tiny.model("llama"), tiny.tokenizer(), prompt, ROWS[:3])
    assert prompt.training["dev_loss"] == pytest.approx(measured.loss, abs=1e-5)
    assert result.ensemble["dev_accuracy"] == pytest.approx(measured.accuracy)
    assert "3 of 4 answer together" in result._repr_html_()
    run(prompt, epochs=1)
    assert not prompt.others


def test_few_epochs_have_a_rung_for_each_three_and_the_loss_told_is_of_who_is_left() -> None:
    heard: list[Progress] = []
    options = {"epochs": 6, "patience": 0, "batch_size": len(ROWS), "listener": heard.append}
    result = run(population=8, **options)
    assert Counter(m["dropped"] for m in result.members) == {2: 4, 4: 2, None: 2}
    (rest,) = {one.members for one in heard if one.epoch == 6}
    (told,) = (one.loss for one in heard if one.epoch == 6 and one.record is None)
    assert rest == 2 and told == pytest.approx(heard[-1].loss, rel=0.2)


def test_halving_keeps_those_who_answer_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = learners_of(monkeypatch)
    run(population=4, ensemble=3, patience=0)
    assert sum(learner.dropped is None for learner in seen.pop()) == 3


def test_an_ensemble_needs_a_population() -> None:
    with pytest.raises(InputError, match=r"an ensemble of 4 needs.*and 2 is trained; give a popu"):
        run(population=2, ensemble=4)
    with pytest.raises(InputError, match="ensemble is 0"):
        run(ensemble=0)


def test_checkpoints_of_releases_without_ensembles_go_on() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model("llama")
    base = BaseModel.of(model, tokenizer)
    for settings in (TrainSettings(), TrainSettings(ensemble=2)):
        variants = with_examples(base, choices(fresh(), settings, 2, None), ROWS, ROWS)
        assert ("ensemble" in identity_of(variants, base)) == (settings.ensemble > 1)
    now = [TrainSettings(init="encoder", patience=0), TrainSettings(init="encoder", patience=None)]
    for settings in now:  # the first releases had no other start, and wrote no patience as null
        variants = with_examples(base, choices(fresh(), settings, 1, None), ROWS, ROWS)
        identity = identity_of(variants, base)
        assert "init" not in identity and identity["patience"] == "null"


@pytest.mark.parametrize("encoder", ["residual", "mixture"])
def test_our_own_encoders_begin_at_words_and_leave_a_table(encoder: str, tmp_path: Path) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompt = fresh(encoder=encoder, template="[P*2] {country} [P:it is] [MASK]")
    _, words = Renderer(tokenizer, prompt, "causal").groups
    member = Member(prompt, model, 3, [None, None, *words])
    vocabulary = model.get_input_embeddings().weight
    table = member.table().detach()
    for row, word in enumerate((None, None, *words)):
        distances = (vocabulary - table[row]).abs().amax(1)
        assert distances.min() < 1e-6 and word in (None, int(distances.argmin()))
    run(prompt, epochs=3)
    assert prompt.vectors is not None and prompt.vectors.shape == (2 + len(words), 32)
    prompt.save(tmp_path)
    loaded = ptuning.Prompt.load(tmp_path)
    again = Member(loaded, model, 0, [None] * len(loaded.trained_vectors()))
    torch.testing.assert_close(again.table().detach(), prompt.vectors)
    prompt.save(tmp_path, keep_encoder=False)
    loaded = ptuning.Prompt.load(tmp_path)
    alone = Member(loaded, model, 0, [None] * len(loaded.trained_vectors()))
    torch.testing.assert_close(alone.table().detach(), prompt.vectors)
