"""What is no model, no tokenizer or no number is refused in words by every public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ptuning
from ptuning.errors import InputError, PromptFileError

from .. import tiny

ROWS = [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}]
WORDS = {"a": "Paris", "b": "Rome"}


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any, ptuning.Prompt]:
    tokenizer = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer))
    prompt = _untrained()
    ptuning.train(model, tokenizer, prompt, ROWS, epochs=1, verbose=False)
    return model, tokenizer, prompt


def _untrained() -> ptuning.Prompt:
    return ptuning.Prompt("[P*2] {text} [MASK]", verbalizer=WORDS, encoder="none")


CALLS: dict[str, Callable[[Any, Any, ptuning.Prompt], Any]] = {
    "attach": lambda model, tokenizer, prompt: ptuning.attach(model, tokenizer, prompt),
    "predict": lambda model, tokenizer, prompt: ptuning.predict(model, tokenizer, prompt, ROWS),
    "evaluate": lambda model, tokenizer, prompt: ptuning.evaluate(model, tokenizer, prompt, ROWS),
    "train": lambda model, tokenizer, _: ptuning.train(
        model, tokenizer, _untrained(), ROWS, epochs=1, verbose=False
    ),
    "trainer_parts": lambda model, tokenizer, _: ptuning.trainer_parts(
        model, tokenizer, _untrained(), ROWS
    ),
    "merge": lambda model, tokenizer, prompt: ptuning.merge(model, tokenizer, {"a": prompt}),
    "nearest_words": lambda model, tokenizer, prompt: ptuning.nearest_words(
        model, tokenizer, prompt
    ),
    "distill": lambda model, tokenizer, _: ptuning.distill(
        model, tokenizer, _untrained(), ROWS * 6, teacher="Say it.", epochs=1, verbose=False
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_models_name_in_its_place_is_refused(
    call: str, trained: tuple[Any, Any, ptuning.Prompt]
) -> None:
    _, tokenizer, prompt = trained
    with pytest.raises(InputError, match="model is 'smollm2'; expected a loaded model"):
        CALLS[call]("smollm2", tokenizer, prompt)


@pytest.mark.parametrize("call", CALLS)
def test_a_tokenizers_name_in_its_place_is_refused(
    call: str, trained: tuple[Any, Any, ptuning.Prompt]
) -> None:
    model, _, prompt = trained
    with pytest.raises(InputError, match="tokenizer is 'smollm2'; give the model's"):
        CALLS[call](model, "smollm2", prompt)


@pytest.mark.parametrize("call", CALLS)
def test_model_and_tokenizer_in_the_wrong_order_are_refused(
    call: str, trained: tuple[Any, Any, ptuning.Prompt]
) -> None:
    model, tokenizer, prompt = trained
    with pytest.raises(InputError, match=r"(model|tokenizer) is .*load_model gives") as error:
        CALLS[call](tokenizer, model, prompt)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("given", [3, 2.5, True, b"ab"])
def test_candidates_that_are_no_list_are_refused(
    given: Any, trained: tuple[Any, Any, ptuning.Prompt]
) -> None:
    with pytest.raises(InputError, match=r"candidates is .*; give a list of the answers"):
        ptuning.predict(*trained, ROWS, candidates=given)


def test_merged_prompts_that_are_none_are_refused(
    trained: tuple[Any, Any, ptuning.Prompt],
) -> None:
    model, tokenizer, prompt = trained
    given: Any = ["a"]
    with pytest.raises(InputError, match=r"already is \['a'\]; give the merged model's"):
        ptuning.merge(model, tokenizer, {"b": prompt}, given)
    for entry in (3, {"text": "q"}, {"text": "q", "virtual_ids": [1]}):
        with pytest.raises(PromptFileError, match="already: the prompt 'a' and the tokenizer do"):
            ptuning.merge(model, tokenizer, {"b": prompt}, {"a": entry})  # type: ignore[dict-item]


def test_the_seed_of_trainer_parts_is_a_whole_number(
    trained: tuple[Any, Any, ptuning.Prompt],
) -> None:
    model, tokenizer, _ = trained
    given: Any = "one"
    with pytest.raises(InputError, match="seed is 'one'; give a whole number"):
        ptuning.trainer_parts(model, tokenizer, _untrained(), ROWS, seed=given)
    prompt = _untrained()
    seed: Any = np.int64(3)
    module, _, _ = ptuning.trainer_parts(model, tokenizer, prompt, ROWS, seed=seed)
    module.finish(prompt)
    assert type(prompt.training["seed"]) is int


@pytest.mark.parametrize("given", [[], ["float32"], {}])
def test_a_dtype_that_is_no_name_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"dtype is .*; expected one of float32"):
        ptuning.load_model("smollm2", dtype=given)


@pytest.mark.parametrize("given", [True, [], 2.5, "", object()])
def test_a_device_that_is_no_name_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"device is .*; give cpu"):
        ptuning.load_model("smollm2", device=given)


@pytest.mark.parametrize("given", [3, b",", [","], True])
def test_a_separator_that_is_no_character_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"separator is .*; give one character"):
        ptuning.read_examples("rows.csv", given)
