"""A prompt learns what the frozen model says behind a long text."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ptuning
from ptuning.backbone.base_model import BaseModel
from ptuning.errors import DataError, InputError
from ptuning.forward.engine import Engine
from ptuning.forward.label_scores import by_label
from ptuning.forward.plain import word_scores
from ptuning.inference import distillation, kept_answers, teaching
from ptuning.inference.agreement import compare
from ptuning.inference.attachment import all_placed
from ptuning.inference.teaching import Said, own_label, teacher_renderers
from ptuning.prompts.teacher import Teacher
from ptuning.rendering.lesson import Lessons
from ptuning.training.guidance import dev_far_above

from .. import tiny

WORDS = {"yes": "yes", "no": ["not", "no"], "maybe": "Berlin"}
LONG = {"yes": "yes, it does", "no": "is not"}
TEACHER = (
    "The capital of France is Paris. Answer: yes\n\nDoes it rain in Oslo? Answer: not\n\n"
    "Vienna and Madrid are cities of Europe. Answer: Berlin\n"
)
TEMPLATE = "[P*4] {text} Answer: [MASK]"
TEXTS = [
    {"text": f"{start} {end}"}
    for start in ("Paris is", "it rains", "Rome and", "she", "Question:", "Lisbon", "Oslo")
    for end in ("of France", "in 2024", "not a city!")
]
FAMILIES = ("llama", "gpt2", "gemma2", "bert", "modernbert", "t5", "bart")


def sharp(family: str, tokenizer: Any, **changes: Any) -> Any:
    """A random model that is sure of what it says, and says something else to each text."""
    model = tiny.model(family, vocab_size=len(tokenizer), **changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "position" not in name:
                weight *= 6 if family in ("t5", "bart") else 4
    return model


def prompt_of(template: str = TEMPLATE, **settings: Any) -> ptuning.Prompt:
    settings = {"verbalizer": WORDS, **settings}
    return ptuning.Prompt(template, **settings)


def distilled(
    family: str, prompt: ptuning.Prompt, teacher: str | ptuning.Prompt = TEACHER, **options: Any
) -> tuple[Any, Any, ptuning.Distillation]:
    tokenizer = tiny.tokenizer()
    model = options.pop("model", None) or tiny.model(family, vocab_size=len(tokenizer))
    rows, dev = options.pop("rows", TEXTS), options.pop("dev", ())
    options = {"epochs": 2, "verbose": False, **options}
    result = ptuning.distill(model, tokenizer, prompt, rows, dev, teacher=teacher, **options)
    return model, tokenizer, result


def ask(engine: Engine, teacher: Any, rows: Any, **options: Any) -> Said:
    renderers = teacher_renderers(engine, teacher)
    tasks = [renderer.task for renderer in renderers]
    with all_placed(engine.base.model, engine.base.tokenizer, tasks) as first_ids:
        return teaching.ask(engine, renderers, first_ids, rows, **options)


def lessons(engine: Engine, teacher: Any, rows: Any, weight: float = 0.0) -> list[Any]:
    return teaching.lessons(engine.base, teacher, rows, ask(engine, teacher, rows), weight)


def engine_of(family: str, model: Any = None) -> tuple[Any, Any, Engine]:
    tokenizer = tiny.tokenizer()
    model = model or tiny.model(family, vocab_size=len(tokenizer))
    return model, tokenizer, Engine(BaseModel.of(model, tokenizer))


# What a teacher is.


def test_none_is_no_texts_of_their_own_to_choose_and_to_measure_with() -> None:
    prompts = prompt_of(), prompt_of()
    results = [
        distilled("llama", prompt, epochs=1, dev=none, test=none)[2]
        for prompt, none in zip(prompts, (None, ()), strict=True)
    ]
    assert torch.equal(prompts[0].trained_vectors(), prompts[1].trained_vectors())
    told = [(r.agreement.examples, r.agreement.agreement) for r in results]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("text", "template"),
    [
        ("Say what it is.\n", "Say what it is.\n\n{text} Answer: [MASK]"),
        ("Text: {text}\nSo: [MASK]\n", "Text: {text}\nSo: [MASK]"),
        ("About {text} I say", "About {text} I say"),
        ("{{json}} and [[P]]", "{{json}} and [[P]]\n\n{text} Answer: [MASK]"),
    ],
)
def test_a_text_stands_in_front_of_the_prompt_s_words_or_is_a_template(
    text: str, template: str
) -> None:
    teacher = Teacher.of(text, prompt_of(special_tokens="after", max_length=30))
    assert teacher.template == template
    assert teacher.labels == prompt_of().labels
    assert teacher.special_tokens == "around" and teacher.max_length is None


def test_in_a_chat_a_text_is_the_system_s_turn() -> None:
    teacher = Teacher.of("Be {{brief}}.\n", prompt_of("[P*4] {text}", chat=True))
    assert (teacher.system, teacher.template) == ("Be {brief}.", "{text}")
    assert teacher.turns("x") == [
        {"role": "system", "content": "Be {brief}."},
        {"role": "user", "content": "x"},
    ]
    assert Teacher.of("Be brief: {text}", prompt_of("[P] {text}", chat=True)).system is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "the teacher is empty"),
        ("[P*3] {text}", "the teacher has virtual tokens"),
        ("Answer: [MASK]", "names no column"),
        ("a { brace", "the teacher: template column 3"),
    ],
)
def test_what_is_no_teacher_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Teacher.of(text, prompt_of())


# What a teacher says.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("words", [WORDS, LONG], ids=["short", "long"])
def test_its_shares_are_those_of_the_model_that_reads_the_whole_text(
    family: str, words: Any
) -> None:
    model, tokenizer, engine = engine_of(family)
    teacher = Teacher.of(TEACHER, prompt_of(verbalizer=words))
    said = lessons(engine, teacher, TEXTS)
    plain = Engine(BaseModel.of(model, tokenizer), plain=True)
    renderer = plain.renderer(teacher)
    for row, lesson in zip(TEXTS, said, strict=True):
        example = renderer(row, answered=False)
        batch = plain.batch([(example, 0)], [0])
        with torch.no_grad():
            scores = word_scores(plain.logits(batch), batch, len(renderer.owner))
        shares = by_label(scores, torch.tensor(renderer.owner))[0].softmax(0)
        torch.testing.assert_close(torch.from_numpy(lesson.shares), shares, atol=1e-5, rtol=0)
        assert lesson.answer == list(words)[int(shares.argmax())]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "t5", "bart"])
@pytest.mark.parametrize("ends", [True, False])
def test_its_free_answers_are_what_the_model_generates(family: str, ends: bool) -> None:
    tokenizer = tiny.tokenizer()
    model, _, engine = engine_of(family, sharp(family, tokenizer))
    prompt = ptuning.Prompt("[P*4] {text}", answer_tokens=5, answer_end=ends)
    teacher = Teacher.of(TEACHER, prompt)
    said = lessons(engine, teacher, TEXTS)
    texts = ptuning.predict(model, tokenizer, teacher, TEXTS)
    assert [lesson.answer for lesson in said] == texts
    assert len({lesson.tokens for lesson in said}) > 1
    plain = Engine(BaseModel.of(model, tokenizer), plain=True)
    renderer = plain.renderer(teacher)
    for row, lesson in zip(TEXTS, said, strict=True):
        (one,) = renderer(row, answered=False).sequences
        answered = ptuning.Rendered((replace(one, answer=lesson.tokens),))
        with torch.no_grad():
            shares = plain.logits(plain.batch([(answered, 0)], [0]))[0].softmax(-1)
        assert shares.argmax(-1).tolist() == list(lesson.tokens)
        likely = shares.gather(1, torch.from_numpy(lesson.likely))
        torch.testing.assert_close(torch.from_numpy(lesson.shares), likely, atol=1e-4, rtol=0)


def test_however_it_ends_is_the_one_end_that_a_prompt_learns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ptuning.inference.teaching.LIKELIEST", 400)
    tokenizer = tiny.tokenizer()
    model, _, engine = engine_of("llama", sharp("llama", tokenizer))
    teacher = Teacher.of(TEACHER, ptuning.Prompt("[P*4] {text}", answer_tokens=5))
    (before,) = lessons(engine, teacher, TEXTS[:1])
    first, other = before.tokens[:2]
    own = tokenizer.eos_token_id
    assert len({first, other, own}) == 3
    model.generation_config.eos_token_id = [own, other]
    (lesson,) = lessons(engine, teacher, TEXTS[:1])
    assert lesson.tokens == (first, own)
    shares = dict(zip(before.likely[1].tolist(), before.shares[1].tolist(), strict=True))
    said = dict(zip(lesson.likely[1].tolist(), lesson.shares[1].tolist(), strict=True))
    assert said[own] == pytest.approx(shares[own] + shares[other], rel=1e-4) and not said[other]


def test_answers_of_many_tokens_are_found_a_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, engine = engine_of("llama", sharp("llama", tiny.tokenizer()))
    teacher = Teacher.of(TEACHER, ptuning.Prompt("[P*4] {text}", answer_tokens=5))
    expected = [one.tokens for one in lessons(engine, teacher, TEXTS[:4])]
    monkeypatch.setattr("ptuning.inference.teaching._LOGITS", 7)
    rows, said = [], engine.continue_greedily

    def counted(batch: Any, *rest: Any, **options: Any) -> Any:
        rows.append(len(batch.input_ids))
        return said(batch, *rest, **options)

    monkeypatch.setattr(engine, "continue_greedily", counted)
    assert [one.tokens for one in lessons(engine, teacher, TEXTS[:4])] == expected
    assert rows == [1, 1, 1, 1]


def test_it_may_fill_all_the_room_that_there_is_beside_its_answer() -> None:
    teacher = Teacher.of(TEACHER, ptuning.Prompt("[P*4] {text}", answer_tokens=5))
    _, tokenizer, engine = engine_of("llama")
    alone = len(engine.renderer(teacher).layout({"text": ""}, None).ids)
    for more in (0, -1):
        model = tiny.model("llama", max_position_embeddings=alone + 5 + more)
        small = Engine(BaseModel.of(model, tokenizer))
        if more:
            with pytest.raises(InputError, match="give fewer answer_tokens"):
                teacher_renderers(small, teacher)
        else:
            assert teacher_renderers(small, teacher)[0].limit == alone + 5


@pytest.mark.parametrize("words", [WORDS, LONG], ids=["short", "long"])
def test_its_text_is_read_once(words: Any) -> None:
    model, _, engine = engine_of("llama")
    teacher = Teacher.of(TEACHER, prompt_of(verbalizer=words))
    (renderer,) = teacher_renderers(engine, teacher)
    computed: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, values: computed.append(values["input_ids"].numel()), with_kwargs=True
    )
    ask(engine, teacher, TEXTS, batch_size=4)
    rows = [renderer(row, answered=False).sequences for row in TEXTS]
    assert rows[0][0].opening > 40 and engine.store is not None and engine.store.computed == 1
    assert sum(computed) < sum(len(one.ids) for row in rows for one in row) / 2


def test_a_system_s_turn_is_read_once() -> None:
    model, tokenizer, _ = engine_of("llama")
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>answer:"
    )
    teacher = Teacher.of(TEACHER, ptuning.Prompt("[P] {text}", chat=True, answer_tokens=3))
    engine = Engine(BaseModel.of(model, tokenizer))
    (renderer,) = teacher_renderers(engine, teacher)
    examples = [renderer(row, answered=False).sequences[0] for row in TEXTS]
    assert tokenizer.decode(examples[0].ids).startswith(f"<s>system: {TEACHER.strip()}</s>")
    openings = {one.ids[: one.opening] for one in examples}
    assert len(openings) <= 2 and min(map(len, openings)) > 60  # the last word may begin a token
    said = lessons(engine, teacher, TEXTS)
    assert [one.answer for one in said] == ptuning.predict(model, tokenizer, teacher, TEXTS)


def test_labels_of_the_rows_are_mixed_in() -> None:
    _, _, engine = engine_of("llama")
    teacher = Teacher.of(TEACHER, prompt_of())
    rows = [{**TEXTS[0], "label": "maybe"}, {**TEXTS[1], "label": None}, TEXTS[2]]
    plain, mixed = lessons(engine, teacher, rows), lessons(engine, teacher, rows, 0.75)
    expected = torch.from_numpy(plain[0].shares) / 4 + torch.tensor([0, 0, 0.75])
    torch.testing.assert_close(torch.from_numpy(mixed[0].shares), expected)
    assert mixed[0].answer == "maybe"
    for one, other in zip(plain[1:], mixed[1:], strict=True):
        assert one.shares.tolist() == other.shares.tolist()


def test_a_label_weight_may_be_numpys(tmp_path: Path) -> None:
    prompt, rows = prompt_of(), [{**row, "label": "yes"} for row in TEXTS]
    distilled("llama", prompt, rows=rows, label_weight=np.float32(0.25), epochs=1)
    prompt.save(tmp_path)
    assert ptuning.Prompt.load(tmp_path).training["teacher"]["label_weight"] == 0.25


def test_a_calibrated_teacher_takes_the_labels_for_equally_frequent() -> None:
    tokenizer = tiny.tokenizer()
    model, _, engine = engine_of("llama", sharp("llama", tokenizer))
    teacher = Teacher.of(TEACHER, prompt_of())
    plain = lessons(engine, teacher, TEXTS)
    said = teaching.calibrate(teacher, ask(engine, teacher, TEXTS), len(TEXTS))
    told = teaching.lessons(engine.base, teacher, TEXTS, said)
    mean = torch.from_numpy(sum(one.shares for one in plain)) / len(TEXTS)
    for one, other in zip(plain, told, strict=True):
        expected = torch.from_numpy(one.shares) / mean
        shares = torch.from_numpy(other.shares)
        torch.testing.assert_close(shares, expected / expected.sum(), atol=1e-5, rtol=0)
    prompt = prompt_of()
    distilled("llama", prompt, model=model, calibrate_teacher=True)
    assert prompt.label_bias is None and prompt.training["teacher"]["calibrated"]


def test_a_teacher_is_calibrated_where_a_long_label_is_never_likely() -> None:
    words = {"yes": "yes", "no": "The capital of Italy is Rome, and rain in Oslo, yes, it does"}
    tokenizer = tiny.tokenizer()
    prompt, model = prompt_of(verbalizer=words), sharp("llama", tokenizer)
    _, _, engine = engine_of("llama", model)
    plain = lessons(engine, Teacher.of(TEACHER, prompt), TEXTS)
    assert min(max(one.shares[n] for one in plain) for n in (0, 1)) == 0
    _, _, result = distilled("llama", prompt, model=model, calibrate_teacher=True)
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in result.training.history)


# What a prompt learns.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_learns_labels_of_every_kind_of_model(family: str) -> None:
    tokenizer = tiny.tokenizer()
    prompt = prompt_of(encoder="none")
    model, _, result = distilled(
        family, prompt, model=sharp(family, tokenizer), epochs=12, learning_rate=0.003
    )
    losses = [record["loss"] for record in result.training.history]
    assert min(losses) < losses[0] and all(loss > -1e-6 for loss in losses)
    teacher = Teacher.of(TEACHER, prompt)
    answers = [ptuning.predict(model, tokenizer, task, TEXTS) for task in (prompt, teacher)]
    found = compare(model, tokenizer, prompt, teacher, TEXTS)
    same = [a == b for a, b in zip(*answers, strict=True)]
    assert found.agreement == sum(same) / len(same)
    told = ptuning.predict_details(model, tokenizer, teacher, TEXTS)
    most = [sorted(prediction.probabilities.values()) for prediction in told]
    sure = [alike for alike, shares in zip(same, most, strict=True) if shares[-1] >= 2 * shares[-2]]
    assert found.sure == len(sure)
    assert found.sure_agreement == (sum(sure) / len(sure) if sure else None)
    assert found.teacher_tokens - found.tokens == pytest.approx(
        len(tokenizer(TEACHER.strip() + "\n\n")["input_ids"]) - 4, abs=1
    )
    assert (found.kept_seconds is not None) == (family in tiny.CAUSAL)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_a_prompt_learns_free_answers(family: str) -> None:
    tokenizer = tiny.tokenizer()
    prompt = ptuning.Prompt("[P*4] {text}", answer_tokens=3, encoder="none")
    _, _, result = distilled(
        family, prompt, model=sharp(family, tokenizer), epochs=12, learning_rate=0.1
    )
    losses = [record["loss"] for record in result.training.history]
    assert min(losses) < losses[0] and prompt.answer_tokens == 3


@pytest.mark.parametrize("settings", [{}, {"answer_tokens": 4, "verbalizer": None}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_who_has_the_teacher_s_very_text_agrees_with_it(
    family: str, settings: dict[str, Any]
) -> None:
    """A virtual token that begins as a word, in the place of that word."""
    template = f"{TEACHER.strip()}\n\n{{text}} Answer:[P: the] [MASK]"
    prompt = prompt_of(template, encoder="none", **settings)
    tokenizer = tiny.tokenizer()
    teacher = f"{TEACHER.strip()}\n\n{{text}} Answer: the [MASK]"
    model = sharp(family, tokenizer)
    _, _, result = distilled(family, prompt, teacher, model=model, epochs=1, learning_rate=1e-9)
    assert result.agreement.agreement == 1
    assert result.agreement.sure_agreement in (None, 1)
    assert not (settings and result.agreement.sure)  # a free answer has nothing to compare with
    assert result.training.best["dev_accuracy"] == 1
    assert result.training.best["dev_loss"] == pytest.approx(0, abs=1e-5)


def test_members_of_a_population_learn_as_alone_and_the_grid_competes() -> None:
    prompt = prompt_of()
    grid = {"learning_rate": [1e-3, 3e-3], "encoder": ["mlp", "none"]}
    options: dict[str, Any] = {"halving": False, "patience": 0}
    _, _, result = distilled("llama", prompt, grid=grid, **options)
    assert len(result.training.members) == 4
    alone = prompt_of(encoder="none")
    _, _, own = distilled("llama", alone, learning_rate=3e-3, **options)
    (member,) = (
        m
        for m in result.training.members
        if (m["name"]["learning_rate"], m["name"]["encoder"]) == (3e-3, "none")
    )
    assert member["best"]["dev_loss"] == pytest.approx(own.training.best["dev_loss"], abs=1e-5)


def test_the_model_stays_as_it_is_and_rows_need_no_label_that_is_known() -> None:
    tokenizer = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer))
    before = tiny.weights(model)
    rows = [{**row, "label": "something else"} for row in TEXTS]
    dev = [{**row, "label": "yes"} for row in TEXTS[:6]]
    prompt = prompt_of()
    _, _, result = distilled("llama", prompt, model=model, rows=rows, dev=dev)
    assert all(torch.equal(before[name], weight) for name, weight in tiny.weights(model).items())
    found = result.agreement
    assert found.examples == 6 and None not in (found.accuracy, found.teacher_accuracy)
    assert prompt.training["teacher"]["template"].startswith(TEACHER.strip())
    assert json.loads(json.dumps(found.to_dict()))["agreement"] == found.agreement


@pytest.mark.parametrize("teacher", [TEACHER, TEACHER + "{where} {text} Answer: [MASK]"])
def test_texts_that_say_the_same_do_not_train_and_choose(teacher: str) -> None:
    rows = [{"text": "it rains in Oslo", "where": "here"} for _ in range(18)]
    rows += [{"text": text, "where": "here"} for text in ("Paris is a city", "she is not")]
    rows += [{**row, "where": "there"} for row in rows[:1]]
    _, _, result = distilled("llama", prompt_of(), teacher, rows=rows, epochs=1)
    differ = 3 if "{where}" in teacher else 2
    assert result.agreement.examples == differ


def test_a_training_that_is_stopped_goes_on_to_the_same_numbers(
    tmp_path: Path, on_cpu: None, ctrl_c_after: Any
) -> None:
    options: dict[str, Any] = {"epochs": 3, "checkpoint_seconds": 0, "population": 2}
    whole = prompt_of()
    distilled("llama", whole, **options)
    ctrl_c_after(3)
    with pytest.raises(KeyboardInterrupt):
        distilled("llama", prompt_of(), output=tmp_path, **options)
    ctrl_c_after(None)
    with pytest.raises(InputError, match="cannot resume: the teacher differs"):
        distilled("llama", prompt_of(), "Another text.", output=tmp_path, resume=True, **options)
    tokenizer = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer))
    labelled = [{**row, "label": "yes"} for row in TEXTS]
    with pytest.raises(InputError, match="cannot resume"):
        ptuning.train(
            model, tokenizer, prompt_of(), labelled, output=tmp_path, resume=True, **options
        )
    resumed = prompt_of()
    distilled("llama", resumed, output=tmp_path, resume=True, **options)
    assert torch.equal(resumed.trained_vectors(), whole.trained_vectors())


@pytest.mark.parametrize(
    ("settings", "calibrated"),
    [({}, False), ({}, True), ({"answer_tokens": 4, "verbalizer": None}, False)],
    ids=["labels", "calibrated", "free"],
)
def test_what_the_teacher_has_said_is_kept_while_a_run_lasts(
    tmp_path: Path,
    on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    calibrated: bool,
) -> None:
    options: dict[str, Any] = {"calibrate_teacher": calibrated, "epochs": 1}
    asked: list[int] = []
    said = teaching._said

    def counted(engine: Engine, renderers: Any, examples: Any, *rest: Any) -> Any:
        if len(asked) == stop_after:
            raise KeyboardInterrupt
        asked.append(len(examples[0]))
        return said(engine, renderers, examples, *rest)

    monkeypatch.setattr(teaching, "_said", counted)
    monkeypatch.setattr(teaching, "_TOGETHER", 5)
    stop_after, whole = -1, prompt_of(**settings)
    rows, dev = TEXTS[:12], TEXTS[12:]
    distilled("llama", whole, rows=rows, dev=dev, **options)
    assert asked == [5, 5, 5, 5, 1]
    asked.clear()
    stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        distilled("llama", prompt_of(**settings), rows=rows, dev=dev, output=tmp_path, **options)
    kept = sorted((tmp_path / "checkpoints" / "teacher").iterdir())
    assert len(kept) == 3
    kept[0].write_bytes(kept[0].read_bytes()[:50])
    stop_after = -1
    for resume in (False, True):
        again = prompt_of(**settings)
        distilled("llama", again, rows=rows, dev=dev, output=tmp_path, resume=resume, **options)
        assert torch.equal(again.trained_vectors(), whole.trained_vectors())
    assert asked[3:] == [5, 5, 1]  # the damaged one, and those not yet asked
    asked.clear()
    other = prompt_of(**settings)
    distilled("llama", other, "Else.", rows=rows, dev=dev, output=tmp_path, **options)
    assert asked == [5, 5, 5, 5, 1]
    kept_answers.delete_all(tmp_path)
    assert not (tmp_path / "checkpoints" / "teacher").exists()


def test_a_listener_hears_the_teacher_before_the_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(teaching, "_TOGETHER", 8)
    heard: list[Any] = []
    distilled("llama", prompt_of(), listener=heard.append, epochs=1)
    first = [(one.step, one.steps) for one in heard if one.before]
    assert first == [(8, 21), (16, 21), (21, 21)] and all(one.before for one in heard[:3])
    assert not any(one.before for one in heard[3:]) and len(heard) > 3
    monkeypatch.setattr("ptuning.training.progress._SILENCE", 0)
    distilled("llama", prompt_of(), verbose=True, epochs=1)
    said = capsys.readouterr().err
    assert "the teacher reads, 38 %\nthe teacher reads, 76 %, about 1 s left" in said
    assert "nan" not in said and "epoch 1 of 1" in said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"listener": 3}, "listener is 3"), ({"resume": True}, "give the run's folder as output")],
)
def test_what_is_wrong_is_said_before_the_teacher_speaks(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(distillation, "ask", lambda *arguments, **options: pytest.fail("asked"))
    with pytest.raises(InputError, match=message):
        distilled("llama", prompt_of(), **wrong)


def test_other_labels_of_the_same_words_are_asked_for_anew(tmp_path: Path, on_cpu: None) -> None:
    options: dict[str, Any] = {"output": tmp_path, "epochs": 1}
    for words in ({"yes": ["yes", "not"], "no": "no"}, {"yes": "yes", "no": ["not", "no"]}):
        kept, anew = prompt_of(verbalizer=words), prompt_of(verbalizer=words)
        distilled("llama", kept, **options)
        distilled("llama", anew, epochs=1)
        assert torch.equal(kept.trained_vectors(), anew.trained_vectors())


def ensemble_of(model: Any, tokenizer: Any, **settings: Any) -> ptuning.Prompt:
    """Two trained prompts that answer together, one behind the text and one around it."""
    prompt = prompt_of(encoder="none", **settings)
    rows = [{**row, "label": "yes" if n % 2 else "no"} for n, row in enumerate(TEXTS)]
    grid = {"template": [TEMPLATE, "[P*2] {text} it [P*2] [MASK]"]}
    options: dict[str, Any] = {"epochs": 2, "learning_rate": 0.1, "verbose": False}
    ptuning.train(model, tokenizer, prompt, rows, rows, grid=grid, ensemble=2, **options)
    assert len(prompt.members) == 2
    return prompt


@pytest.mark.parametrize("settings", [{}, {"answer_tokens": 5, "verbalizer": None}], ids=str)
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_an_ensemble_becomes_one_prompt(
    tmp_path: Path, on_cpu: None, family: str, settings: dict[str, Any]
) -> None:
    tokenizer = tiny.tokenizer()
    model = sharp(family, tokenizer)
    if family == "bert" and settings:
        pytest.skip("a masked model teaches labels")
    teacher = ensemble_of(model, tokenizer, **settings)
    _, _, engine = engine_of(family, model)
    details = ptuning.predict_details(model, tokenizer, teacher, TEXTS)
    taught = lessons(engine, teacher, TEXTS)
    assert [one.answer for one in taught] == [one.answer for one in details]
    for lesson, expected in zip(taught, details, strict=True):
        shares = list(expected.probabilities.values()) or expected.probability
        said = lesson.shares if expected.probabilities else lesson.shares.max(1).prod()
        assert said == pytest.approx(shares, abs=1e-5)
    vectors = [member.trained_vectors().clone() for member in teacher.members]
    prompt = prompt_of(encoder="none", **settings)
    prompt.begin_from(teacher)
    options: dict[str, Any] = {"epochs": 6, "learning_rate": 0.005, "output": tmp_path}
    _, _, result = distilled(family, prompt, teacher, model=model, dev=TEXTS[:8], **options)
    losses = [record["loss"] for record in result.training.history]
    assert min(losses) < losses[0] and not prompt.others
    told = prompt.training["teacher"]
    assert (told["template"], len(told["others"])) == (teacher.template, 1)
    same = [
        a.answer == b.answer
        for a, b in zip(
            ptuning.predict_details(model, tokenizer, prompt, TEXTS[:8]), details[:8], strict=True
        )
    ]
    assert result.agreement.agreement == sum(same) / 8
    assert result.agreement.teacher_tokens > 1.5 * result.agreement.tokens
    for member, before in zip(teacher.members, vectors, strict=True):
        assert torch.equal(member.trained_vectors(), before)


def test_an_ensemble_speaks_in_batches_as_large_as_one_teacher_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer, engine = engine_of("llama")
    teacher = ensemble_of(model, tokenizer, verbalizer=None, answer_tokens=5)
    monkeypatch.setattr("ptuning.inference.teaching._LOGITS", 8 * 5 * len(tokenizer))
    rows, said = [], engine.continue_greedily

    def counted(batch: Any, *rest: Any, **options: Any) -> Any:
        rows.append(len(batch.input_ids))
        return said(batch, *rest, **options)

    monkeypatch.setattr(engine, "continue_greedily", counted)
    lessons(engine, teacher, TEXTS[:8])
    assert rows == [8, 8]  # four texts for two members


def test_a_trained_teacher_s_bias_counts_once() -> None:
    tokenizer = tiny.tokenizer()
    model, _, engine = engine_of("llama", sharp("llama", tokenizer))
    teacher = ensemble_of(model, tokenizer)
    teacher.label_bias = {"yes": 0.5, "no": -0.5, "maybe": 1.0}
    details = ptuning.predict_details(model, tokenizer, teacher, TEXTS)
    for lesson, expected in zip(lessons(engine, teacher, TEXTS), details, strict=True):
        assert lesson.shares == pytest.approx(list(expected.probabilities.values()), abs=1e-5)


def test_what_no_trained_prompt_can_teach_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    model = sharp("llama", tokenizer)
    teacher = ensemble_of(model, tokenizer)
    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (teacher, teacher, {}, "cannot teach itself"),
        (prompt_of(), prompt_of(), {}, "has no vectors yet"),
        (teacher, prompt_of(verbalizer={"no": "no", "yes": "yes"}), {}, "give the prompt the teac"),
        (teacher, prompt_of(verbalizer=None, answer_tokens=3), {}, "labels are none, and the"),
        (teacher, prompt_of(), {"calibrate_teacher": True}, "calibrate_teacher is for a text"),
    ]
    free = {"verbalizer": None, "answer_tokens": 5}
    speaks = ensemble_of(model, tokenizer, **free)
    wrong += [(speaks, prompt_of(**free, answer_end=False), {}, "answer_end is False for the pro")]
    for trained, prompt, options, message in wrong:
        with pytest.raises(InputError, match=message):
            distilled("llama", prompt, trained, model=model, **options)


def test_the_time_that_is_given_counts_what_the_teacher_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[float] = []
    train, asked = distillation.train, distillation.ask

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.12)
        return asked(*args, **kwargs)

    def told(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["settings"].max_minutes)
        return train(*args, **kwargs)

    monkeypatch.setattr(distillation, "ask", slow)
    monkeypatch.setattr(distillation, "train", told)
    distilled("llama", prompt_of(), max_minutes=10, epochs=1)
    assert 0 < given[0] < 10 - 0.002


# What is refused.


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {"teacher": "About {topic}: {text} [MASK]"}, "the teacher names the column 'topic'"),
        ({}, {"teacher": "word " * 400}, "the teacher alone has"),
        ({}, {"teacher": ""}, "the teacher is empty"),
        ({}, {"rows": TEXTS[:9]}, "9 texts, and none to choose the epoch by"),
        ({}, {"rows": []}, "0 texts"),
        ({}, {"tune_model": True}, "tune_model is not for distilling"),
        ({}, {"calibrate": "batch"}, "leave calibrate out"),
        ({}, {"folds": 3}, "leave folds out"),
        ({}, {"label_weight": 1.5}, "label_weight is 1.5; give a share, 0 to 1"),
        ({}, {"label_weight": True}, "label_weight is True; give a share, 0 to 1"),
        ({}, {"label_weight": 0.5}, "no text has one"),
        ({}, {"test": [{"text": "x", "label": "green"}]}, "'green' is none"),
        ({}, {"test": [{"other": "x"}]}, "names the column 'text'"),
        (
            {"template": "[P] {text} {more} [MASK]"},
            {
                "teacher": "Of {text}: [MASK]",
                "rows": [{**row, "more": "x"} for row in TEXTS],
                "test": TEXTS,
            },
            "test example 1: the template names the column 'more'",
        ),
        (
            {},
            {
                "rows": [{**row, "label": "no"} for row in TEXTS],
                "dev": [{**TEXTS[0], "label": "no"}, {**TEXTS[1], "label": "green"}],
                "label_weight": 0.5,
            },
            "example 2: 'green' is none",
        ),
        ({}, {"epoch": 3}, "unknown training setting 'epoch'"),
        ({"label_mode": "vocabulary"}, {}, "distilling compares label words"),
        ({"verbalizer": None}, {}, "how long may the teacher's answers be"),
        ({"verbalizer": None, "answer_tokens": 3}, {"label_weight": 0.5}, "label_weight mixes"),
        (
            {"verbalizer": None, "answer_tokens": 3},
            {"calibrate_teacher": True},
            "calibrate_teacher is for labels",
        ),
        (
            {"verbalizer": None, "answer_tokens": 3},
            {"family": "bert"},
            "a masked model teaches label words only",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_input_is_refused_before_a_step(
    settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    prompt, options = prompt_of(**settings), dict(options)
    heard: list[Any] = []
    with pytest.raises((InputError, DataError), match=message):
        distilled(options.pop("family", "llama"), prompt, listener=heard.append, **options)
    assert not heard and prompt.vectors is None


@pytest.mark.parametrize(
    "options", [{"folds": 2}, {"calibrate": "batch"}, {"refit": True}], ids=lambda o: str(*o)
)
def test_a_training_by_lessons_reads_no_answers_of_the_rows(options: dict[str, Any]) -> None:
    model, tokenizer, engine = engine_of("llama")
    prompt = prompt_of()
    taught = lessons(engine, Teacher.of(TEACHER, prompt), TEXTS)
    learnt = Lessons({}, taught[:9], taught[9:])
    with pytest.raises(InputError, match=f"leave {next(iter(options))} out|with a teacher leave"):
        ptuning.train(model, tokenizer, prompt, TEXTS[:9], TEXTS[9:], lessons=learnt, **options)


def test_a_chat_without_a_system_s_turn_is_told() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    model = tiny.model("llama", vocab_size=len(tokenizer))
    prompt = ptuning.Prompt("[P*4] {text}", chat=True, answer_tokens=3)
    with pytest.raises(InputError, match=r"no turns of system and user \(no system role\)"):
        ptuning.distill(model, tokenizer, prompt, TEXTS, teacher="Be brief.", verbose=False)


def test_a_row_s_own_label_is_read_as_a_training_reads_it() -> None:
    task = prompt_of(verbalizer={"0": "no", "1": "yes"})
    own = [own_label(task, {"text": "it rains", "label": cell}) for cell in (1.0, " 0 ", "1")]
    assert own == ["1", "0", "1"]
    assert own_label(prompt_of(verbalizer=None), {"text": "x", "label": " Oslo "}) == "Oslo"
    with pytest.raises(DataError, match="example 3: '2' is none of the prompt's labels"):
        own_label(task, {"text": "it rains", "label": 2}, 3)


def test_members_that_answer_together_are_beside_their_teacher() -> None:
    prompt = prompt_of()
    options = {"population": 2, "ensemble": 2, "epochs": 1}
    model, tokenizer, result = distilled("llama", prompt, test=TEXTS, **options)
    said = ptuning.predict(model, tokenizer, prompt, TEXTS)
    known = ptuning.predict(model, tokenizer, Teacher.of(TEACHER, prompt), TEXTS)
    same = [a == b for a, b in zip(said, known, strict=True)]
    assert len(prompt.others) == 1
    assert result.agreement.agreement == pytest.approx(sum(same) / len(same))
    assert isinstance(result.agreement.agreement, float)
    alone = compare(model, tokenizer, prompt.alone(), Teacher.of(TEACHER, prompt), TEXTS)
    assert result.agreement.tokens == 2 * alone.tokens  # each member reads the text
    assert result.agreement.teacher_tokens == alone.teacher_tokens


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("free", [False, True])
def test_members_together_have_the_loss_against_the_teacher_that_each_has(
    family: str, free: bool
) -> None:
    """Two members of one seed answer as one does, and their loss is that one's."""
    if free and family == "bert":
        pytest.skip("a masked model teaches labels")
    changes: dict[str, Any] = {"verbalizer": None, "answer_tokens": 3} if free else {}
    together = {"grid": {"learning_rate": [1e-3, 1e-3 + 1e-12]}, "ensemble": 2}
    model = sharp(family, tiny.tokenizer())
    _, _, result = distilled(family, prompt_of(**changes), model=model, epochs=1, **together)
    of_each = [member["best"]["dev_loss"] for member in result.training.members]
    assert of_each[0] == pytest.approx(of_each[1], abs=1e-3)
    assert result.training.ensemble["dev_loss"] == pytest.approx(of_each[0], abs=1e-3)


def test_texts_may_have_a_label_of_something_else() -> None:
    rows = [{**row, "label": f"topic{n}"} for n, row in enumerate(TEXTS)]
    _, _, result = distilled("llama", prompt_of(), rows=rows, epochs=1)
    assert result.agreement.accuracy is None
    with pytest.raises(DataError, match="'topic0' is none of the prompt's labels"):
        distilled("llama", prompt_of(), rows=rows, test=rows, epochs=1)
    with pytest.raises(DataError, match="'topic"):
        distilled("llama", prompt_of(), rows=rows, label_weight=0.5, epochs=1)


def test_a_text_that_cannot_be_read_has_its_own_number() -> None:
    rows: list[Any] = [*TEXTS[:15], {"other": "x"}, *TEXTS[16:]]
    with pytest.raises(DataError, match="training example 16: the template names the column"):
        distilled("llama", prompt_of(), rows=rows)


def test_a_teacher_that_says_nothing_is_told_and_not_trained_on() -> None:
    tokenizer = tiny.tokenizer()
    model = tiny.model("gpt2", vocab_size=len(tokenizer), tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all words alike, of which the first that is likeliest ends
    tokenizer.eos_token_id = 0
    prompt = ptuning.Prompt("[P*4] {text}", answer_tokens=3, answer_end=False)
    with pytest.raises(DataError, match="the teacher says nothing to any of the 17 texts"):
        ptuning.distill(model, tokenizer, prompt, TEXTS, teacher="Be brief.", verbose=False)


def test_a_teacher_is_a_text(tmp_path: Any) -> None:
    with pytest.raises(InputError, match=r"the teacher is a \w*Path; give its text"):
        distilled("llama", prompt_of(), teacher=tmp_path)


def test_agreement_with_a_teacher_is_no_promise_of_right_answers() -> None:
    facts = {"dev_accuracy": 1.0, "dev_examples": 50}
    assert dev_far_above(facts, 0.4, 500)
    assert dev_far_above({**facts, "teacher": {}}, 0.4, 500) is None


@pytest.mark.parametrize("cell", [None, "", " ", float("nan")])
def test_a_row_with_nothing_in_its_answer_column_has_no_label_of_its_own(cell: Any) -> None:
    assert own_label(prompt_of(), {"text": "it rains", "label": cell}) is None
    assert own_label(prompt_of(), {"text": "it rains"}) is None
