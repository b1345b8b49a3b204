from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from tokenizers import decoders
from torch import nn

import ptuning
from ptuning import DataError, InputError, Prompt, PtuningError, Task
from ptuning.backbone.identity import describe
from ptuning.backbone.kinds import kind_of
from ptuning.inference import answering, evaluation
from ptuning.inference import prediction as predicting
from ptuning.inference.baselines import automatic_templates
from ptuning.inference.evaluation import teacher_forced
from ptuning.inference.prediction import stream_predictions
from ptuning.training.guidance import dev_far_above

from .. import tiny
from ..scaffold import hooks_of

ROWS = [
    {"country": name, "capital": capital, "label": n % 2}
    for n, (name, capital) in enumerate(
        [("France", "Paris"), ("Italy and all of its many islands", "Rome"), ("Oslo", "Madrid")]
    )
]
TEMPLATE = "[P*3] {country} [P] is [MASK]"


def setting(family: str, **options: Any) -> tuple[Any, Any, Prompt]:
    """A tiny model and a prompt with random vectors, as large as the model's own."""
    tokenizer = tiny.tokenizer(around=family not in tiny.CAUSAL)
    model = tiny.model(family, vocab_size=len(tokenizer))
    prompt = Prompt(**{"template": TEMPLATE, "answer": "capital", "answer_tokens": 4, **options})
    embedding = model.get_input_embeddings().weight
    prompt.vectors = torch.randn(4, embedding.shape[1]) * float(embedding.std())
    return model, tokenizer, prompt


@pytest.mark.parametrize(
    "setting_of_model",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"suppress_tokens": list(range(5, 300))},
        {"repetition_penalty": 3.0},
        {"num_return_sequences": 2, "num_beams": 2},
        {"guidance_scale": 3.0},
    ],
    ids=str,
)
def test_the_models_own_generation_settings_change_no_answer(
    setting_of_model: dict[str, Any],
) -> None:
    model, tokenizer, prompt = setting(
        "llama", template="The big old capital city of [P*4] {country} is [MASK]"
    )
    expected = ptuning.predict(model, tokenizer, prompt, ROWS)
    own = model.generation_config
    own.update(**setting_of_model)
    assert ptuning.predict(model, tokenizer, prompt, ROWS) == expected
    assert model.generation_config is own


def test_the_token_that_the_model_has_to_begin_with_stands_in_front() -> None:
    model, tokenizer, prompt = setting("bart")
    forced = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("Rome")[0])
    model.generation_config.forced_bos_token_id = forced
    (answer, *_) = ptuning.predict(model, tokenizer, prompt, ROWS, answer_tokens=1)
    assert answer == tokenizer.decode([forced]).strip()


@pytest.mark.parametrize("family", [*tiny.CAUSAL, *tiny.SEQ2SEQ])
def test_free_answers_are_the_models_greedy_continuation(family: str) -> None:
    model, tokenizer, prompt = setting(family)
    said = ptuning.predict(model, tokenizer, prompt, ROWS)
    renderer = ptuning.Renderer(tokenizer, prompt, "causal" if family in tiny.CAUSAL else "seq2seq")
    with ptuning.attach(model, tokenizer, prompt) as attached:
        first = attached.first_id(prompt)
        for row, answer in zip(ROWS, said, strict=True):
            ids = [first - 1 - i if i < 0 else i for i in renderer(row).sequences[0].ids]
            made = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=4,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=2,
            )
            new = made[0, len(ids) :] if family in tiny.CAUSAL else made[0, 1:]
            assert answer == tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.parametrize("labelled", [False, True])
def test_batch_size_and_order_do_not_change_a_prediction(family: str, labelled: bool) -> None:
    labels = {"verbalizer": {"0": "yes", "1": ["no", "not at all"]}, "answer": None}
    model, tokenizer, prompt = setting(family)
    if labelled:
        vectors, prompt = prompt.vectors, Prompt(TEMPLATE, **labels)  # type: ignore[arg-type]
        prompt.vectors = vectors
    together = ptuning.predict_details(model, tokenizer, prompt, ROWS)
    apart = [
        ptuning.predict_details(model, tokenizer, prompt, [row], batch_size=1)[0] for row in ROWS
    ]
    assert [p.answer for p in together] == [p.answer for p in apart]
    for one, other in zip(together, apart, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-5)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        if labelled:
            assert set(one.probabilities) == {"0", "1"}
            assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_probability_of_a_free_answer_is_the_product_of_its_tokens() -> None:
    model, tokenizer, prompt = setting("llama")
    prediction = ptuning.predict_details(model, tokenizer, prompt, ROWS[:1], answer_tokens=1)[0]
    renderer = ptuning.Renderer(tokenizer, prompt, "causal")
    with ptuning.attach(model, tokenizer, prompt) as attached, torch.no_grad():
        first = attached.first_id(prompt)
        ids = [first - 1 - i if i < 0 else i for i in renderer(ROWS[0]).sequences[0].ids]
        best = model(torch.tensor([ids])).logits[0, -1].softmax(-1).max()
    assert prediction.probability == pytest.approx(float(best), abs=1e-5)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_candidates_are_ranked_by_the_probability_of_the_whole_answer(family: str) -> None:
    model, tokenizer, prompt = setting(family)
    candidates = ["Paris", "Rome and Paris", "Lisbon"]
    best = ptuning.predict_details(model, tokenizer, prompt, ROWS, candidates=candidates)
    for row, prediction in zip(ROWS, best, strict=True):
        losses = {}
        for answer in candidates:
            labelled = [{**row, "capital": answer}]
            kind = kind_of(model)
            renderer = ptuning.Renderer(tokenizer, prompt, kind)
            tokens = len(renderer(labelled[0]).sequences[0].answer)
            losses[answer] = tokens * ptuning.evaluate(model, tokenizer, prompt, labelled).loss
        scores = torch.tensor([-losses[answer] for answer in candidates]).softmax(0)
        expected = dict(zip(candidates, scores.tolist(), strict=True))
        if family != "t5":  # an encoder-decoder's candidates are compared without the end token
            assert prediction.probabilities == pytest.approx(expected, abs=1e-4)


def test_of_rows_that_compare_many_words_few_are_rendered_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer, prompt = setting("llama")
    options: Any = {"candidates": [f"Paris {n}" for n in range(10)]}
    rows = [{"country": f"{row['country']} {n}"} for n in range(3) for row in ROWS]
    whole = ptuning.predict_details(model, tokenizer, prompt, rows, **options)
    rendered, each = list[int](), ptuning.Renderer.each

    def noted(renderer: Any, some: Any, *rest: Any, **more: Any) -> Any:
        rendered.append(len(some))
        return each(renderer, some, *rest, **more)

    monkeypatch.setattr(predicting, "_WORDS_AT_ONCE", 40)
    monkeypatch.setattr(ptuning.Renderer, "each", noted)
    in_parts = ptuning.predict_details(model, tokenizer, prompt, rows, **options)
    assert max(rendered) == 4 and sum(rendered) == len(rows)
    for one, other in zip(whole, in_parts, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_a_manual_task_predicts_without_vectors() -> None:
    model, tokenizer, prompt = setting("llama")
    task = Task("{country} is [MASK]", answer_tokens=2)
    assert len(ptuning.predict(model, tokenizer, task, ROWS)) == 3
    assert not model.get_input_embeddings()._forward_hooks
    del prompt


def test_a_manual_task_ends_where_the_model_ends_its_turns() -> None:
    model, tokenizer, prompt = setting("llama")
    task = Task("{country} is [MASK]", answer_tokens=6)
    rows = ROWS[:1]
    said = tokenizer(ptuning.predict(model, tokenizer, task, rows)[0]).input_ids
    long = ptuning.predict(model, tokenizer, prompt, rows)
    renderer = ptuning.Renderer(tokenizer, task, "causal")
    ids = torch.tensor([[*renderer(rows[0]).sequences[0].ids]])
    whole = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert len(said) >= 3 and 2 not in whole
    model.generation_config.eos_token_id = [2, whole[2]]
    (ended,) = ptuning.predict_details(model, tokenizer, task, rows)
    assert ended.answer == tokenizer.decode(whole[:2], skip_special_tokens=True).strip()
    steps = model(torch.cat([ids, torch.tensor([whole[:2]])], 1)).logits[0, -3:].softmax(-1)
    expected = float(steps.detach().gather(1, torch.tensor(whole[:3])[:, None]).prod())
    assert ended.probability == pytest.approx(expected, rel=1e-4)
    # A trained prompt has learnt the tokenizer's end alone.
    assert ptuning.predict(model, tokenizer, prompt, rows) == long


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_padding_that_only_the_tokenizer_knows_changes_no_answer(family: str, labels: bool) -> None:
    words = {"verbalizer": {"0": "Paris", "1": "Rome and Oslo"}, "answer": "label"}
    model, tokenizer, prompt = setting(family, **(words if labels else {}))

    def end_one(module: nn.Module, args: Any, logits: torch.Tensor) -> None:
        logits[:1, ..., tokenizer.eos_token_id] = 100.0  # others go on beside its padding

    model.get_output_embeddings().register_forward_hook(end_one)
    expected = ptuning.predict_details(model, tokenizer, prompt, ROWS)
    assert labels or [one.answer for one in expected].count("") == 1
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == len(model.get_input_embeddings().weight)
    assert ptuning.predict_details(model, tokenizer, prompt, ROWS) == expected
    assert ptuning.evaluate(model, tokenizer, prompt, ROWS).predictions == expected


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_text_with_a_token_that_the_model_has_not_is_refused(family: str, labels: bool) -> None:
    words = {"verbalizer": {"0": "Paris", "1": "Rome and Oslo"}, "answer": "label"}
    model, tokenizer, prompt = setting(family, **(words if labels else {}))
    tokenizer.add_tokens(["<new>"])
    rows = [*ROWS, {name: f"{text} <new>" for name, text in ROWS[0].items()}]
    for task in (prompt, prompt.manual()):
        assert len(ptuning.predict(model, tokenizer, task, rows[:-1])) == len(ROWS)
        with pytest.raises(DataError, match=rf"example {len(rows)}: '<new>' stands here, which is"):
            ptuning.predict(model, tokenizer, task, rows)
    model.resize_token_embeddings(len(tokenizer))
    assert len(ptuning.predict(model, tokenizer, prompt, rows)) == len(rows)


def test_attached_or_not_the_prediction_is_the_same() -> None:
    model, tokenizer, prompt = setting("llama")
    alone = ptuning.predict_details(model, tokenizer, prompt, ROWS)
    with ptuning.attach(model, tokenizer, prompt):
        assert ptuning.predict_details(model, tokenizer, prompt, ROWS) == alone
        assert len(model.get_input_embeddings()._forward_hooks) == 1
    assert not model.get_input_embeddings()._forward_hooks


def test_modes_of_modules_are_given_back() -> None:
    model, tokenizer, prompt = setting("llama")
    model.model.layers[1].train()
    before = {name: module.training for name, module in model.named_modules()}
    ptuning.predict(model, tokenizer, prompt, ROWS)
    ptuning.evaluate(model, tokenizer, prompt, ROWS)
    ptuning.train(model, tokenizer, prompt, ROWS, epochs=1)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_what_is_missing_is_said() -> None:
    model, tokenizer, prompt = setting("llama", answer_tokens=None)
    with pytest.raises(InputError, match="Give answer_tokens"):
        ptuning.predict(model, tokenizer, prompt, ROWS)
    with pytest.raises(InputError, match="example 2: the template names the column 'country'"):
        ptuning.predict(model, tokenizer, prompt, [ROWS[0], {"x": 1}], answer_tokens=2)
    with pytest.raises(InputError, match="no vectors yet"):
        ptuning.predict(model, tokenizer, Prompt(TEMPLATE), ROWS, answer_tokens=2)
    config = model.config
    from transformers import LlamaForSequenceClassification

    with pytest.raises(InputError, match="has no language-model head"):
        ptuning.predict(LlamaForSequenceClassification(config), tokenizer, prompt, ROWS)


def test_an_evaluation_asks_each_template_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What labels were predicted says the loss, too, and few rows are all that choose."""
    model, tokenizer, free = setting("llama")
    prompt = Prompt("[P*4] {country}? [MASK]", verbalizer={"0": "yes", "1": "no"})
    prompt.vectors = free.vectors
    asked: list[str] = []
    ask = evaluation.teacher_forced

    def told(model: Any, tokenizer: Any, task: Task, *rest: Any) -> Any:
        asked.append(task.parsed.text)
        return ask(model, tokenizer, task, *rest)

    monkeypatch.setattr(evaluation, "teacher_forced", told)
    result = ptuning.evaluate(model, tokenizer, prompt, ROWS)
    assert result.manual_template in asked and len(set(asked)) == len(asked) > 2
    assert prompt.parsed.text not in asked


def test_evaluation_counts_what_was_predicted() -> None:
    model, tokenizer, _ = setting("llama")
    prompt = Prompt("[P*4] {country}? [MASK]", verbalizer={"0": "yes", "1": "no"})
    rows = ROWS * 5
    ptuning.train(model, tokenizer, prompt, rows[:7], epochs=1)
    result = ptuning.evaluate(model, tokenizer, prompt, rows)
    said = ptuning.predict(model, tokenizer, prompt, rows)
    gold = [str(row["label"]) for row in rows]
    assert result.accuracy == sum(a == b for a, b in zip(said, gold, strict=True)) / 15
    for i, right in enumerate(result.labels):
        for j, predicted in enumerate(result.labels):
            count = sum((a, b) == (right, predicted) for a, b in zip(gold, said, strict=True))
            assert result.confusion[i][j] == count
    assert result.majority_answer == "0"
    assert result.majority_accuracy == gold.count("0") / 15
    others = [row for row in rows if row["label"]]  # whose commonest answer is not the training's
    assert ptuning.evaluate(model, tokenizer, prompt, others).majority_accuracy == 0.0
    asked = Prompt("[P] {country}? [MASK]", verbalizer={"true": "yes", "false": "no"})
    rows = [{"country": row["country"], "label": n % 3 > 0} for n, row in enumerate(rows)]
    ptuning.train(model, tokenizer, asked, rows, epochs=1)
    result = ptuning.evaluate(model, tokenizer, asked, rows)
    assert (result.majority_answer, result.majority_accuracy) == ("true", 10 / 15)
    assert (
        Prompt("[P] {country}? [MASK]").label_text(True) == "True"
    )  # as a free answer is rendered
    mistakes = result.confident_mistakes(100)
    wrong = [
        n for n, right in enumerate(result.right_answers) if result.predictions[n].answer != right
    ]
    assert sorted(mistakes) == wrong
    confidence = [result.predictions[n].probability for n in mistakes]
    assert confidence == sorted(confidence, reverse=True)
    assert result.confident_mistakes(1) == mistakes[:1]


def test_the_manual_baseline_is_the_best_of_plain_forms_unless_one_is_given() -> None:
    model, tokenizer, _ = setting("llama")
    prompt = Prompt("[P*2] {the_land} of {ruler} [MASK]", answer="capital", answer_tokens=1)
    prompt.vectors = torch.zeros(2, 32)
    forms = automatic_templates(prompt, "capital")
    assert forms == [
        "{the_land} of {ruler} [MASK]",
        "The land: {the_land}. Ruler: {ruler}. Capital: [MASK]",
        "The land: {the_land}\nRuler: {ruler}\nCapital: [MASK]",
        "{the_land}\n{ruler}\nCapital: [MASK]",
    ]
    assert automatic_templates(Task("[P] {x} [MASK]"), "label", masked=True)[1] == (
        "X: {x}. Answer: [MASK]."
    )
    rows = [{"the_land": "France", "ruler": "Louis", "capital": "Paris"}]
    rows[0]["capital"] = ptuning.predict(model, tokenizer, Task(forms[2], answer_tokens=1), rows)[0]
    result = ptuning.evaluate(model, tokenizer, prompt, rows)
    assert result.manual_accuracy == 1.0 and result.manual_template in forms
    own = ptuning.evaluate(model, tokenizer, prompt, rows, manual="{ruler} [MASK]")
    assert own.manual_template == "{ruler} [MASK]"


def test_a_test_far_below_dev_is_said() -> None:
    training = {"dev_accuracy": 0.95, "dev_examples": 20}
    assert "60.0 % is far below the 95.0 % on the 20 dev" in (
        dev_far_above(training, 0.6, 200) or ""
    )
    assert dev_far_above(training, 0.88, 200) is None  # chance, with twenty examples
    assert dev_far_above({}, 0.1, 200) is None
    model, tokenizer, prompt = setting("llama")
    prompt.training = {"dev_accuracy": 1.0, "dev_examples": 1000}
    with pytest.warns(UserWarning, match="far below"):
        ptuning.evaluate(
            model, tokenizer, prompt, [{"country": "France", "capital": "nothing"}] * 9
        )


def test_the_nearest_words_of_a_word_are_itself() -> None:
    model, tokenizer, prompt = setting("llama")
    embedding = model.get_input_embeddings().weight.detach()
    ids = [50, 99, 120, 200]
    prompt.vectors = embedding[ids] * 3
    neighbours, mean = ptuning.nearest_words(model, tokenizer, prompt, 2)
    with pytest.raises(InputError, match="prompt is 'capital/'; expected a Prompt"):
        ptuning.nearest_words(model, tokenizer, "capital/", 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prompt is 'capital/'; expected a Prompt"):
        ptuning.predict(model, tokenizer, "capital/", [])  # type: ignore[arg-type]
    for index, neighbour in zip(ids, neighbours, strict=True):
        assert neighbour.words[0][1] == pytest.approx(1, abs=1e-5)
        word = tokenizer.decode([index]).strip() or repr(tokenizer.decode([index]))
        assert neighbour.words[0][0] == word
        assert neighbour.norm == pytest.approx(3 * float(embedding[index].norm()), rel=1e-5)
    assert mean == pytest.approx(float(embedding.norm(dim=1).mean()), rel=1e-5)


def test_the_nearest_words_are_of_the_prompts_own_model() -> None:
    model, tokenizer, prompt = setting("llama")
    prompt.base_model = describe(tiny.model("llama", seed=1), tokenizer)
    with pytest.warns(UserWarning, match="has other weights"):
        ptuning.nearest_words(model, tokenizer, prompt)
    prompt.base_model, prompt.vectors = {}, torch.randn(4, 20)
    with pytest.raises(InputError, match=r"shape \(4, 20\), .* vectors of 32 numbers"):
        ptuning.nearest_words(model, tokenizer, prompt)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_an_answer_that_is_not_a_number_is_no_answer(family: str, labels: bool) -> None:
    options = {"verbalizer": {"0": "Paris", "1": "Rome"}, "answer": "label"} if labels else {}
    model, tokenizer, prompt = setting(family, **options)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layer" in n).fill_(torch.nan)
    for work in (ptuning.predict, ptuning.predict_details, ptuning.evaluate):
        with pytest.raises(PtuningError, match=r"float32.* not finite \(NaN\).*--dtype"):
            work(model, tokenizer, prompt, ROWS)


def test_one_answer_that_is_not_a_number_is_found_among_others() -> None:
    model, tokenizer, prompt = setting("llama")
    (token,) = tokenizer(" Oslo")["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    assert len(ptuning.predict(model, tokenizer, prompt, ROWS[:1])) == 1
    with pytest.raises(PtuningError, match="not finite"):
        ptuning.predict(model, tokenizer, prompt, [ROWS[0], ROWS[2]])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_rows_have_no_answers(family: str) -> None:
    model, tokenizer, prompt = setting(family)
    assert ptuning.predict(model, tokenizer, prompt, []) == []
    assert ptuning.predict(model, tokenizer, [prompt, prompt], []) == [[], []]


@pytest.mark.parametrize("family", tiny.MASKED)
def test_a_masked_model_has_one_mask_where_nobody_says_how_many(family: str) -> None:
    model, tokenizer, _ = setting(family)
    (said,) = ptuning.predict_details(model, tokenizer, Task("{country} is [MASK]"), ROWS[:1])
    ids = tokenizer(f"France is{tokenizer.mask_token}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        shares = model(ids).logits[ids == tokenizer.mask_token_id].softmax(-1)
    assert said.answer == tokenizer.decode(shares.argmax(), skip_special_tokens=True).strip()
    assert said.probability == pytest.approx(float(shares.max()), rel=1e-4)


def test_vectors_that_are_not_finite_cannot_be_attached() -> None:
    model, tokenizer, prompt = setting("llama")
    prompt.vectors[1, 3] = torch.inf  # type: ignore[index]
    with pytest.raises(InputError, match="reach inf"):
        ptuning.attach(model, tokenizer, prompt)
    assert not hooks_of(model)


def labelled() -> tuple[Any, Any, Prompt, list[dict[str, Any]]]:
    model, tokenizer, prompt = setting("llama", answer="label", verbalizer={"0": "no", "1": "yes"})
    rows = [{"country": "town " * (1 + n % 5), "label": n % 2} for n in range(12)]
    return model, tokenizer, prompt, rows


def test_a_batch_is_read_when_the_next_one_has_been_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer, prompt, rows = labelled()
    expected = ptuning.predict_details(model, tokenizer, prompt, rows, batch_size=12)
    heard: list[str] = []

    def fetched(scores: torch.Tensor) -> Any:
        number = len([line for line in heard if line.startswith("asked")])
        heard.append(f"asked {number}")
        return lambda: heard.append(f"read {number}") or scores

    monkeypatch.setattr(answering, "fetched", fetched)
    found = ptuning.predict_details(model, tokenizer, prompt, rows, batch_size=4)
    assert heard == ["asked 0", "asked 1", "read 0", "asked 2", "read 1", "read 2"]
    for mine, other in zip(found, expected, strict=True):
        assert mine.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_the_device_is_looked_at_once_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, prompt, rows = labelled()
    looks: list[str] = []
    for name in ("item", "cpu", "nonzero", "__float__"):
        plain = getattr(torch.Tensor, name)

        def noted(tensor: Any, *args: Any, name: str = name, plain: Any = plain) -> Any:
            looks.append(name)
            return plain(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, noted)
    ptuning.predict(model, tokenizer, prompt, rows, batch_size=2)
    looks.clear()  # the first call compares paths
    ptuning.predict(model, tokenizer, prompt, rows, batch_size=2)
    assert looks == ["cpu"] * 6


def test_rows_that_are_rendered_in_a_thread_have_the_answers_that_they_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer, prompt, rows = labelled()
    blocks = [rows[:5], rows[5:6], rows[6:]]
    expected = ptuning.predict_details(model, tokenizer, prompt, rows)
    ahead = predicting._ahead
    monkeypatch.setattr(predicting, "_ahead", lambda *given: ahead(*given[:3], True))
    found = [*chain.from_iterable(stream_predictions(model, tokenizer, prompt, blocks))]
    for mine, other in zip(found, expected, strict=True):
        assert mine.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    blocks[2] = [{"town": "Oslo"}]
    stream = stream_predictions(model, tokenizer, prompt, blocks)
    assert [len(next(stream)), len(next(stream))] == [5, 1]
    with pytest.raises(DataError, match="prediction example 7"):
        next(stream)


def test_rows_that_were_cut_are_counted_over_all_blocks() -> None:
    model, tokenizer, prompt = setting("llama")
    long = {"country": "Italy and all of its many islands " * 40}
    blocks = [[long, ROWS[0]], [long], [ROWS[2]]]
    with pytest.warns(UserWarning, match="^2 of 4 prediction examples were shortened"):
        list(stream_predictions(model, tokenizer, prompt, blocks))


@pytest.mark.parametrize("size", [0, -2, 1.5])
def test_a_batch_has_at_least_one_row(size: Any) -> None:
    model, tokenizer, prompt = setting("llama")
    for answer in (ptuning.predict, ptuning.evaluate):
        with pytest.raises(InputError, match=f"batch_size is {size}; give a whole number"):
            answer(model, tokenizer, prompt, ROWS, batch_size=size)
    with pytest.raises(InputError, match=f"batch_size is {size}; give a whole number"):
        list(stream_predictions(model, tokenizer, prompt, [ROWS], batch_size=size))


def test_a_manual_task_with_virtual_tokens_is_refused() -> None:
    """Nobody has vectors for them, and words of the vocabulary would stand in their place."""
    model, tokenizer, prompt = setting("llama")
    with pytest.raises(InputError, match=r"no virtual tokens; leave them out of: \[P"):
        ptuning.predict(model, tokenizer, Task(TEMPLATE, answer="capital"), ROWS)
    with pytest.raises(InputError, match="no virtual tokens"):
        ptuning.evaluate(model, tokenizer, prompt, ROWS, manual="[P] {country} [MASK]")


def test_candidates_take_the_place_of_labels_with_their_columns_and_their_bias() -> None:
    model, tokenizer, free = setting("llama", answer_end=False)
    words = {"good": "{mayor}", "bad": "Rome"}
    prompt = Prompt(TEMPLATE, verbalizer=words, label_bias={"good": 0.0, "bad": 50.0})
    prompt.vectors = free.vectors
    rows = [{"country": row["country"]} for row in ROWS]
    ask = partial(ptuning.predict_details, model, tokenizer, rows=rows)
    assert ask(prompt, candidates=["Paris", "Oslo"]) == ask(free, candidates=["Paris", "Oslo"])


def test_candidates_are_for_free_answers() -> None:
    model, tokenizer, prompt = setting("llama", answer="label", verbalizer={"0": "no", "1": "yes"})
    with pytest.raises(InputError, match="candidates are for free answers"):
        ptuning.evaluate(model, tokenizer, prompt, ROWS, candidates=["no", "yes"])


def test_templates_of_ours_that_have_no_room_are_not_compared_with() -> None:
    """The prompt fits its limit; `Country: {country}. Capital: [MASK]` would not."""
    model, tokenizer, _ = setting("llama")
    short = Prompt("[P] {country} [MASK]", answer="capital", verbalizer={"a": "no", "b": "it"})
    rows = [{"country": "it", "capital": "a"}, {"country": "is", "capital": "b"}]
    short.max_length = 5
    ptuning.train(model, tokenizer, short, rows, epochs=1, verbose=False)
    result = ptuning.evaluate(model, tokenizer, short, rows)
    assert result.manual_template == short.manual().template and result.examples == 2
    with pytest.raises(DataError, match="longer than the 5 tokens"):
        ptuning.evaluate(model, tokenizer, short, rows, manual="Country: {country}. So: [MASK]")


def test_a_decoder_has_room_for_so_long_an_answer() -> None:
    model, tokenizer, prompt = setting("bart")
    room = model.config.max_position_embeddings
    assert len(ptuning.predict(model, tokenizer, prompt, ROWS, answer_tokens=room)) == len(ROWS)
    with pytest.raises(InputError, match=f"decoder has room for {room} tokens"):
        ptuning.predict(model, tokenizer, prompt, ROWS, answer_tokens=room + 1)
    long = "Paris " * room
    with pytest.raises(DataError, match=r"example 1: the answer has \d+ tokens"):
        ptuning.predict(model, tokenizer, prompt, ROWS, candidates=["Rome", long])
    with pytest.raises(DataError, match=r"training example 2: the answer has \d+ tokens"):
        ptuning.train(
            model,
            tokenizer,
            Prompt(TEMPLATE, answer="capital"),
            [ROWS[0], {**ROWS[1], "capital": long}],
        )


def test_candidates_are_a_list_of_answers() -> None:
    model, tokenizer, prompt = setting("llama")
    asked = partial(ptuning.predict, model, tokenizer, prompt, ROWS)
    for candidates in ("yes", [], {"a": "b"}):
        with pytest.raises(InputError, match="give a list of the answers that compete, or None"):
            asked(candidates=candidates)
        with pytest.raises(InputError, match="give a list of the answers that compete, or None"):
            ptuning.evaluate(model, tokenizer, prompt, ROWS, candidates=candidates)  # type: ignore[arg-type]
    assert asked(candidates=[1, 2]) == asked(candidates=["1", "2"])


def test_what_is_no_prompt_is_said() -> None:
    model, tokenizer, prompt = setting("llama")
    for wrong in (None, "capital/", [prompt, None], 3):
        with pytest.raises(InputError, match=r"expected a (Prompt|Task) \(Prompt.load reads"):
            ptuning.predict(model, tokenizer, wrong, ROWS)
    with pytest.raises(InputError, match="there is no prompt to ask"):
        ptuning.predict(model, tokenizer, [], ROWS)
    with pytest.raises(InputError, match=r"expected a (Prompt|Task) \(Prompt.load reads"):
        ptuning.train(model, tokenizer, "capital/", ROWS)  # type: ignore[arg-type]
    for work in (ptuning.train, ptuning.predict):
        with pytest.raises(InputError, match="tokenizer is None; give the model's"):
            work(model, None, prompt, ROWS)


@pytest.mark.parametrize("answer", ["3.14", "Rome, Italy", "Paris"])
def test_free_answers_are_compared_as_the_tokenizer_reads_them_back(answer: str) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    backend = tokenizer.backend_tokenizer
    spaces = [decoders.Replace(".", ". "), decoders.Replace(",", " ,")]
    backend.decoder = decoders.Sequence([backend.decoder, *spaces])
    prompt = Prompt("[P*2] {country} [MASK]", encoder="none")
    rows = [{"country": "France", "answer": answer}] * 4
    options = {"tune_model": True, "model_learning_rate": 1e-2, "verbose": False}
    ptuning.train(model, tokenizer, prompt, rows, epochs=40, **options)
    result = ptuning.evaluate(model, tokenizer, prompt, rows)
    by_tokens = teacher_forced(model, tokenizer, prompt, rows)[0]
    assert result.accuracy == by_tokens == 1.0
    assert not result.confident_mistakes() and result.majority_accuracy == 1.0
    page = replace(result, majority_answer="a page of words\n" * 200)
    assert page.rows()[-1][0] == "majority: " + ("a page of words " * 4)[:60] + "…"
    chosen = ptuning.evaluate(model, tokenizer, prompt, rows, candidates=[answer, "nowhere"])
    assert chosen.accuracy == 1.0 and chosen.right_answers == [answer] * 4
