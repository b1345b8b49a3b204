"""The size of a model's word vectors does not decide what a prompt learns."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ptuning import Prompt, TrainSettings, evaluate, train
from ptuning.backbone.lookups import input_embedding
from ptuning.backbone.word_size import word_size
from ptuning.errors import InputError
from ptuning.prompts.encoder import PromptEncoder
from ptuning.training.population import Member
from ptuning.training.rates import unit_for, usual_rate

from .. import tiny

ROWS = [
    {"country": country, "capital": capital}
    for country, capital in (("France", "Paris"), ("Italy", "Rome"), ("Norway", "Oslo"))
]
ENCODERS = ["none", "mlp", "lstm", "residual", "mixture"]


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    with torch.no_grad():  # words as large as SmolLM2's
        _scale(model, 0.135 / word_size(input_embedding(model), tokenizer))
    return model, tokenizer


def larger(model: Any, times: float) -> Any:
    """The same function with so much larger word vectors, to the bit where it is a power of two."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        _scale(twin, times)
    return twin


def _scale(model: Any, times: float) -> None:
    """All that is added up along the layers, which norms read whatever its size."""
    model.model.embed_tokens.weight.mul_(times)
    if model.config.tie_word_embeddings:
        model.model.norm.weight.div_(times)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(times)
        layer.mlp.down_proj.weight.mul_(times)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= times * times


def prompt_for(encoder: str = "mlp", **more: Any) -> Prompt:
    return Prompt("[P*3] {country} [P*2] [MASK]", answer="capital", encoder=encoder, **more)


def learnt(model: Any, tokenizer: Any, encoder: str, **options: Any) -> Prompt:
    prompt = prompt_for(encoder)
    train(model, tokenizer, prompt, ROWS, epochs=6, batch_size=2, verbose=False, **options)
    return prompt


@pytest.mark.parametrize("times", [2.0**-6, 2.0**5])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_same_function_learns_the_same(
    plain: tuple[Any, Any], encoder: str, times: float
) -> None:
    model, tokenizer = plain
    expected = learnt(model, tokenizer, encoder).trained_vectors()
    found = learnt(larger(model, times), tokenizer, encoder).trained_vectors()
    short = learnt(model, tokenizer, encoder, max_grad_norm=1e-30).trained_vectors()  # stands still
    assert (expected - short).abs().max() > 1e-3
    torch.testing.assert_close(found / times, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", ["none", "mlp"])
def test_members_alike_learn_what_they_learn_alone_in_a_unit(
    plain: tuple[Any, Any], encoder: str
) -> None:
    model, tokenizer = larger(plain[0], 2.0**-6), plain[1]
    alone = learnt(model, tokenizer, encoder, seed=1)
    together = prompt_for(encoder)
    grid = {"init": ["encoder", "words"]}  # an MLP has one unit each
    options: Any = {"epochs": 6, "batch_size": 2, "verbose": False, "halving": False, "seed": 1}
    result = train(model, tokenizer, together, ROWS, ensemble=2, grid=grid, **options)
    assert len(result.members) == 2
    vectors = [member.trained_vectors() for member in together.members]
    differences = [(own - alone.trained_vectors()).abs().max() for own in vectors]
    assert min(differences) < 1e-6


def test_a_rate_that_is_given_is_the_vectors_own(plain: tuple[Any, Any]) -> None:
    model, tokenizer = larger(plain[0], 2.0**-6), plain[1]
    usual = learnt(model, tokenizer, "none")
    assert usual.training["learning_rate"] == 1e-2 * 2.0**-6
    given = learnt(model, tokenizer, "none", learning_rate=1e-2 * 2.0**-6, max_grad_norm=2.0**6)
    torch.testing.assert_close(given.trained_vectors(), usual.trained_vectors(), atol=1e-7, rtol=0)


def test_as_the_encoder_begins_is_the_papers_way(plain: tuple[Any, Any]) -> None:
    model, tokenizer = larger(plain[0], 2.0**-6), plain[1]
    as_made, usual = TrainSettings(init="encoder"), TrainSettings()
    assert unit_for(model, tokenizer, "mlp", as_made, given_rate=True) == 1
    assert unit_for(model, tokenizer, "mlp", usual, given_rate=True) == 2.0**-6
    assert unit_for(model, tokenizer, "residual", as_made, given_rate=False) == 2.0**-6
    assert unit_for(model, tokenizer, "mixture", usual, given_rate=False) == 1


@pytest.mark.parametrize(
    ("encoder", "width", "rate"),
    [
        ("mlp", 576, 1e-3),
        ("mlp", 128, 1e-3),
        ("mlp", 4608, 1e-3 / 8),
        ("lstm", 576, 2e-3),
        ("lstm", 1152, 2e-3 * 576 / 1024),  # of its last layers; both directions have so many
        ("residual", 1152, 2e-3 / 2),
        ("none", 4608, 1e-2),
        ("mixture", 4608, 1e-2),
    ],
)
def test_a_wide_network_learns_at_a_lower_rate(encoder: str, width: int, rate: float) -> None:
    made = PromptEncoder(prompt_for(encoder, num_virtual_tokens=5).encoder_config(width))
    assert usual_rate(made) == rate


def test_a_model_whose_words_are_zero_has_the_unit_one(plain: tuple[Any, Any]) -> None:
    model, tokenizer = larger(plain[0], 0.0), plain[1]
    assert unit_for(model, tokenizer, "none", TrainSettings(), given_rate=False) == 1


@pytest.mark.parametrize("encoder", ["none", "mlp", "lstm", "residual"])
def test_a_saved_encoder_goes_on_and_makes_the_same_without_a_unit(
    plain: tuple[Any, Any], encoder: str, tmp_path: Path
) -> None:
    model, tokenizer = larger(plain[0], 2.0**-6), plain[1]
    prompt = learnt(model, tokenizer, encoder)
    prompt.save(tmp_path, keep_encoder=True)
    loaded = Prompt.load(tmp_path)
    saved = loaded.encoder_weights or {"embedding.weight": loaded.trained_vectors()}
    for unit in (1.0, 2.0**-6):
        member = Member(loaded, model, 0, [None] * 5, unit).eval()
        torch.testing.assert_close(member.table(), prompt.trained_vectors(), atol=1e-8, rtol=1e-5)
        assert all(
            torch.equal(weights, saved[name]) for name, weights in member.encoder.weights().items()
        )


@pytest.mark.parametrize("encoder", ["none", "mlp"])
@pytest.mark.usefixtures("on_cpu")
def test_an_interrupted_run_goes_on_in_its_unit(
    plain: tuple[Any, Any], encoder: str, tmp_path: Path
) -> None:
    model, tokenizer = larger(plain[0], 2.0**-6), plain[1]
    expected = learnt(model, tokenizer, encoder).trained_vectors()

    class Stopped(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 5:
            raise Stopped

    options: Any = {"output": tmp_path, "checkpoint_seconds": 0}
    with pytest.raises(Stopped):
        learnt(model, tokenizer, encoder, listener=stop, **options)
    with pytest.raises(InputError, match="differs from the interrupted run"):
        learnt(plain[0], tokenizer, encoder, resume=True, **options)
    found = learnt(model, tokenizer, encoder, resume=True, **options).trained_vectors()
    assert torch.equal(found, expected)


def test_a_refit_goes_on_in_the_unit(plain: tuple[Any, Any]) -> None:
    times = 2.0**-6
    prompts = []
    for model in (plain[0], larger(plain[0], times)):
        prompt = prompt_for("none", verbalizer={"Paris": "Paris", "Rome": "Rome", "Oslo": "Oslo"})
        options: Any = {"epochs": 5, "batch_size": 2, "refit": True, "verbose": False}
        train(model, plain[1], prompt, ROWS, ROWS, **options)
        assert evaluate(model, plain[1], prompt, ROWS).examples == 3
        prompts.append(prompt.trained_vectors())
    torch.testing.assert_close(prompts[1] / times, prompts[0], atol=1e-5, rtol=1e-5)
