"""An ensemble answers with the mean of its members' log-probabilities, asked one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ptuning
from ptuning import InputError, Prompt
from ptuning.backbone.base_model import BaseModel
from ptuning.backbone.modes import eval_mode
from ptuning.forward.engine import Engine
from ptuning.forward.scoring import score_together
from ptuning.inference import exports
from ptuning.inference.answering import Question, Reading, answers
from ptuning.inference.attachment import placed
from ptuning.inference.evaluation import teacher_forced

from .. import tiny

ROWS = [
    {"text": "France", "label": "b", "answer": "Paris"},
    {"text": "Italy and all of its many islands", "label": "a", "answer": "Rome!"},
    {"text": "Oslo", "label": "b", "answer": "Madrid, yes"},
]
TEMPLATES = ("[P*3] {text} [P] is [MASK]", "The city of {text} [P*2] so: [MASK]")
LABELS: dict[str, Any] = {
    "one token": {"verbalizer": {"a": "is", "b": "it"}, "answer": "label"},
    "several words": {"verbalizer": {"a": ["yes", "does"], "b": "not"}, "answer": "label"},
    "several tokens": {"verbalizer": {"a": "capital of Italy", "b": "Rome!"}, "answer": "label"},
}
FREE: dict[str, Any] = {"answer_tokens": 4, "answer": "answer"}


def setting(
    family: str,
    options: dict[str, Any],
    count: int = 3,
    templates: tuple[str, str] = TEMPLATES,
) -> tuple[Any, Any, list[Prompt]]:
    """A tiny model and members with random vectors, of two templates."""
    tokenizer = tiny.tokenizer(around=family not in tiny.CAUSAL)
    model = tiny.model(family, vocab_size=len(tokenizer))
    embedding = model.get_input_embeddings().weight
    members = []
    for number in range(count):
        prompt = Prompt(templates[number % 2], **options)
        size = (prompt.num_virtual_tokens, embedding.shape[1])
        prompt.vectors = 3 * torch.randn(size) * float(embedding.std())
        members.append(prompt)
    return model, tokenizer, members


def together(members: list[Prompt]) -> Prompt:
    return replace(members[0], others=members[1:])


@pytest.mark.parametrize("labels", list(LABELS))
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_labels_are_compared_by_the_mean_of_the_members(family: str, labels: str) -> None:
    model, tokenizer, members = setting(family, LABELS[labels])
    alone = [ptuning.predict_details(model, tokenizer, one, ROWS) for one in members]
    said = ptuning.predict_details(model, tokenizer, together(members), ROWS, batch_size=4)
    for number, prediction in enumerate(said):
        means = [
            sum(math.log(of_one[number].probabilities[label]) for of_one in alone) / len(members)
            for label in "ab"
        ]
        shares = torch.tensor(means).softmax(0).tolist()
        expected = dict(zip("ab", shares, strict=True))
        assert prediction.probabilities == pytest.approx(expected, abs=1e-5)
        assert prediction.answer == max(expected, key=expected.__getitem__)


@torch.no_grad()
def by_hand(
    model: Any, tokenizer: Any, members: list[Prompt], row: dict[str, Any]
) -> tuple[str, float]:
    """A free answer: the members are asked for each token one after the other."""
    base = BaseModel.of(model, tokenizer)
    ids, likelihood = [], 0.0
    masked = base.kind == "masked"
    for _ in range(FREE["answer_tokens"]):
        steps = []
        for member in members:
            with placed(model, tokenizer, member) as first, eval_mode(model):
                sequence = Engine(base, 0, plain=True).renderer(member)(row, answered=False)
                (one,) = sequence.sequences
                inputs = torch.tensor([[first - 1 - i if i < 0 else i for i in one.ids]])
                if base.kind == "causal":
                    logits = model(torch.cat([inputs, torch.tensor([ids]).long()], 1)).logits[0, -1]
                elif masked:
                    logits = model(inputs).logits[0, one.slot + len(ids)]
                else:
                    start = torch.tensor([[model.config.decoder_start_token_id, *ids]])
                    logits = model(inputs, decoder_input_ids=start).logits[0, -1]
                steps.append(logits.log_softmax(-1))
        mean = torch.stack(steps).mean(0).log_softmax(-1)
        ids.append(int(mean.argmax()))
        likelihood += float(mean.max())
        if ids[-1] == tokenizer.eos_token_id and not masked:
            break
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), math.exp(likelihood)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_free_answers_are_written_together_token_by_token(family: str) -> None:
    model, tokenizer, members = setting(family, FREE)
    ensemble = together(members)
    for size in (2, 32):
        said = ptuning.predict_details(model, tokenizer, ensemble, ROWS, batch_size=size)
        for row, prediction in zip(ROWS, said, strict=True):
            text, probability = by_hand(model, tokenizer, members, row)
            assert prediction.answer == text
            assert prediction.probability == pytest.approx(probability, rel=1e-3)


@pytest.mark.parametrize("options", [*LABELS.values(), FREE], ids=[*LABELS, "free"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_loss_is_that_of_the_mean(family: str, options: dict[str, Any]) -> None:
    model, tokenizer, members = setting(family, options)
    accuracy, loss = teacher_forced(model, tokenizer, together(members), ROWS, batch_size=4)
    if "verbalizer" in options:
        said = ptuning.predict_details(model, tokenizer, together(members), ROWS)
        expected = [-math.log(p.probabilities[r["label"]]) for p, r in zip(said, ROWS, strict=True)]
        right = [p.answer == r["label"] for p, r in zip(said, ROWS, strict=True)]
        assert accuracy == pytest.approx(sum(right) / 3)
        assert loss == pytest.approx(sum(expected) / 3, abs=1e-5)
        return
    assert teacher_forced(model, tokenizer, together([members[0]] * 2), ROWS) == pytest.approx(
        teacher_forced(model, tokenizer, members[0], ROWS), abs=1e-5
    )
    assert loss == pytest.approx(_loss_by_hand(model, tokenizer, members), abs=1e-4)


@torch.no_grad()
def _loss_by_hand(model: Any, tokenizer: Any, members: list[Prompt]) -> float:
    base, total, count = BaseModel.of(model, tokenizer), 0.0, 0
    for row in ROWS:
        steps = []
        for member in members:
            with placed(model, tokenizer, member) as first, eval_mode(model):
                engine = Engine(base, 0, plain=True)
                batch = engine.batch([(engine.renderer(member)(row), 0)], [first])
                steps.append(engine.logits(batch)[0].log_softmax(-1))
                right = batch.answers[0]
        means = torch.stack(steps).mean(0).log_softmax(-1)
        total -= float(means.gather(1, right[:, None]).sum())
        count += len(right)
    return total / count


def test_free_answers_of_unlike_length_are_right_where_they_are_what_all_write_together() -> None:
    model, tokenizer, members = setting("llama", FREE)
    engine = Engine(BaseModel.of(model, tokenizer), 0)
    with ptuning.attach(model, tokenizer, *members) as attached:
        first = [attached.first_id(member) for member in members]
        renderers = [engine.renderer(member) for member in members]
        examples = [renderer.each(ROWS, "test", answered=False) for renderer in renderers]
        for row, length in enumerate((1, 3, 2)):
            readings = [(of_one[row], member) for member, of_one in enumerate(examples)]
            batch = engine.prediction_batch(readings, first)
            ids, _ = engine.continue_greedily(batch, length, sizes=[len(members)], ends=[])
            for of_one in examples:
                answered = replace(of_one[row].sequences[0], answer=tuple(ids[0].tolist()))
                of_one[row] = replace(of_one[row], sequences=(answered,))
        assert score_together(engine, renderers, examples, first, None)[0] == 1
        (*start, last) = examples[0][1].sequences[0].answer
        wrong = replace(examples[0][1].sequences[0], answer=(*start, (last + 1) % 100))
        examples[0][1] = replace(examples[0][1], sequences=(wrong,))
        assert score_together(engine, renderers, examples, first, None)[0] == 2 / 3


@pytest.mark.parametrize("labels", list(LABELS))
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_an_evaluation_has_the_loss_of_its_predictions(family: str, labels: str) -> None:
    model, tokenizer, members = setting(family, LABELS[labels])
    biased = replace(members[0], label_bias={"a": 0.7, "b": 0.0})
    for prompt in (members[0], biased, together(members)):
        found = ptuning.evaluate(model, tokenizer, prompt, ROWS)
        plain = teacher_forced(model, tokenizer, prompt, ROWS)
        assert (found.accuracy, found.loss) == pytest.approx(plain, abs=1e-5)


def test_members_share_what_stands_in_front_of_their_virtual_tokens() -> None:
    behind = "The city of {text}, as the whole old and wide world knows [P*4] [MASK]"
    model, tokenizer, members = setting("llama", LABELS["one token"], 4, (behind, behind))
    computed = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    ptuning.predict(model, tokenizer, members[0], ROWS)
    alone, computed[:] = sum(computed), []
    ptuning.predict(model, tokenizer, together(members), ROWS)
    handle.remove()
    assert sum(computed) < 2 * alone


def test_an_ensemble_shares_batches_with_other_questions() -> None:
    model, tokenizer, members = setting("llama", LABELS["one token"])
    _, _, others = setting("llama", FREE)
    engine = Engine(BaseModel.of(model, tokenizer), 2**20)
    with ptuning.attach(model, tokenizer, together(members), others[0]) as attached:
        asked = []
        for row in ROWS:
            first, *more = (
                Reading(r := engine.renderer(m), r(row, answered=False), attached.first_id(m))
                for m in members
            )
            asked.append(Question(**vars(first), others=tuple(more)))
            renderer = engine.renderer(others[0])
            example = renderer(row, answered=False)
            asked.append(Question(renderer, example, attached.first_id(others[0])))
        with eval_mode(model):
            found = dict(answers(engine, asked, 4))
    expected = ptuning.predict(model, tokenizer, together(members), ROWS)
    assert [found[number].answer for number in (0, 2, 4)] == expected
    free = ptuning.predict(model, tokenizer, others[0], ROWS)
    assert [found[number].answer for number in (1, 3, 5)] == free


def test_several_ensembles_answer_as_each_does_alone() -> None:
    model, tokenizer, members = setting("llama", LABELS["one token"], 5)
    tasks = [together(members[:2]), members[2], together(members[3:])]
    alone = [ptuning.predict_details(model, tokenizer, task, ROWS) for task in tasks]
    for one, other in zip(
        ptuning.predict_details(model, tokenizer, tasks, ROWS), alone, strict=True
    ):
        for a, b in zip(one, other, strict=True):
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def test_evaluate_measures_all_members() -> None:
    model, tokenizer, members = setting("llama", LABELS["one token"])
    ensemble = together(members)
    result = ptuning.evaluate(model, tokenizer, ensemble, ROWS)
    assert result.predictions == ptuning.predict_details(model, tokenizer, ensemble, ROWS)
    assert result.loss == pytest.approx(
        -sum(
            math.log(p.probabilities[r["label"]])
            for p, r in zip(result.predictions, ROWS, strict=True)
        )
        / 3,
        abs=1e-5,
    )


def test_an_ensemble_may_be_measured_by_another_column() -> None:
    model, tokenizer, members = setting("llama", LABELS["one token"])
    ensemble, expected = (
        together(members),
        ptuning.evaluate(model, tokenizer, together(members), ROWS),
    )
    ensemble.answer = "right"
    rows = [{"text": row["text"], "right": row["label"]} for row in ROWS]
    result = ptuning.evaluate(model, tokenizer, ensemble, rows)
    assert (result.accuracy, result.loss) == (expected.accuracy, expected.loss)


def test_each_row_is_measured_by_the_answer_column_that_it_has() -> None:
    model, tokenizer, (prompt, *_) = setting("llama", {**LABELS["one token"], "answer": None})
    rows = [
        {"text": "France", "answer": "b"},
        {"text": "Italy", "label": "a"},
        {"text": "Oslo", "label": "b", "answer": "a"},
    ]
    result = ptuning.evaluate(model, tokenizer, prompt, rows)
    assert result.right_answers == ["b", "a", "a"]


def test_columns_are_those_of_all_members() -> None:
    templates = (TEMPLATES[0], "{text} {title} [P*2] [MASK]")
    model, tokenizer, members = setting("llama", LABELS["one token"], 2, templates)
    assert together(members).columns == ("text", "title")
    with pytest.raises(ptuning.DataError, match="column 'title'"):
        ptuning.predict(model, tokenizer, together(members), ROWS)


def test_attach_gives_each_member_ids_and_the_ensemble_none() -> None:
    model, tokenizer, members = setting("llama", LABELS["one token"])
    ensemble = together(members)
    with ptuning.attach(model, tokenizer, ensemble) as attached:
        ids = [attached.ids(member) for member in ensemble.members]
        assert [len(i) for i in ids] == [4, 2, 4] and len({i.start for i in ids}) == 3
        message = r"ensemble of 3 members.*prompt\.alone\(\)"
        with pytest.raises(InputError, match=message):
            attached.prepend(ensemble, torch.tensor([[1, 2]]))
    assert not model.get_input_embeddings()._forward_hooks


def test_what_needs_one_prompt_refuses_an_ensemble_and_takes_its_best_member(
    tmp_path: Path,
) -> None:
    model, tokenizer, members = setting("llama", LABELS["one token"])
    ensemble = together(members)
    with pytest.raises(InputError, match=r"cannot be merged into a model.*--alone"):
        ptuning.merge(model, tokenizer, {"one": ensemble})
    with pytest.raises(InputError, match=r"cannot be exported.*--alone"):
        exports.export(ensemble, BaseModel.of(model, tokenizer), "vllm-embeds")
    with pytest.raises(InputError, match="cannot be written in PEFT's form"):
        ensemble.save(tmp_path, peft=True)
    assert not list(tmp_path.iterdir())
    merged = ptuning.merge(model, tokenizer, {"one": ensemble.alone()})
    assert len(merged.prompts["one"]["virtual_ids"]) == 4


def test_members_may_say_the_labels_in_words_of_their_own() -> None:
    model, tokenizer, (first, _, third) = setting("llama", LABELS["one token"])
    third.verbalizer = {"a": ["does"], "b": ["capital of Italy"]}
    alone = [ptuning.predict_details(model, tokenizer, one, ROWS) for one in (first, third)]
    said = ptuning.predict_details(model, tokenizer, together([first, third]), ROWS)
    for number, prediction in enumerate(said):
        products = [
            alone[0][number].probabilities[k] * alone[1][number].probabilities[k] for k in "ab"
        ]
        roots = [math.sqrt(product) for product in products]
        expected = {k: root / sum(roots) for k, root in zip("ab", roots, strict=True)}
        assert prediction.probabilities == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_answers_are_as_long_as_the_first_members(family: str) -> None:
    model, tokenizer, (first, second) = setting(
        family, FREE, 2, ("[P*2] {text} [MASK] so", "[P] {text} is [MASK]")
    )
    second.answer_tokens = 2
    for one, other in ((first, second), (second, first)):
        said = ptuning.predict_details(model, tokenizer, together([one, other]), ROWS)
        alike = together([one, replace(other, answer_tokens=one.answer_tokens)])
        assert said == ptuning.predict_details(model, tokenizer, alike, ROWS)


def test_members_that_answer_something_else_are_refused() -> None:
    _, _, members = setting("llama", LABELS["one token"])
    other = Prompt(TEMPLATES[0], **LABELS["several words"])
    with pytest.raises(InputError, match="members of an ensemble answer the same: labels"):
        together([members[0], other])
    with pytest.raises(InputError, match="that is no ensemble"):
        together([members[0], together(members)])
