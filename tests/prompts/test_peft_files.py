from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

import ptuning
from ptuning.backbone.identity import describe
from ptuning.backbone.lookups import input_embedding
from ptuning.errors import InputError, PromptFileError, PtuningError
from ptuning.prompts import peft_files
from ptuning.prompts.encoder import PromptEncoder
from ptuning.prompts.encoder_config import REFERENCE_VERSION

from .. import tiny

FIXTURES = Path(__file__).parent.parent / "fixtures"
FOLDERS = [FIXTURES / "peft_mlp", FIXTURES / "peft_lstm"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24, 25]])


def theirs(model: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """PEFT's vectors and logits with a saved adapter."""
    loaded = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        return loaded.get_prompt(batch_size=1)[0], loaded(input_ids=IDS).logits


def ours(model: Any, prompt: ptuning.Prompt) -> Tensor:
    with torch.no_grad(), ptuning.attach(model, None, prompt) as attached:
        return model(**attached.prepend(prompt, IDS)).logits


def prompt_with(encoder: str, family: str = "llama") -> ptuning.Prompt:
    prompt = ptuning.Prompt(num_virtual_tokens=4, encoder=encoder)
    width = input_embedding(tiny.model(family)).embedding_dim
    module = PromptEncoder(prompt.encoder_config(width)).eval()
    prompt.encoder_weights = module.state_dict()
    prompt.vectors = module.table().detach()
    prompt.base_model = {**describe(tiny.model(family), tiny.tokenizer()), "name": "makers/tiny"}
    return prompt


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a folder that PEFT wrote, free to change."""
    return Path(shutil.copytree(request.param, tmp_path / "copy"))


@pytest.mark.parametrize("saved", FOLDERS, ids=lambda folder: folder.name)
def test_a_prompt_saved_by_peft_gives_pefts_vectors_and_logits(saved: Path) -> None:
    vectors, logits = theirs(tiny.model("llama"), saved)
    prompt = ptuning.Prompt.load(saved)
    assert torch.equal(prompt.trained_vectors(), vectors)
    assert prompt.template is None and prompt.special_tokens == "after"
    assert prompt.num_virtual_tokens == 4 and prompt.encoder_hidden_size == 16
    assert prompt.encoder == saved.name.removeprefix("peft_")
    assert prompt.encoder_weights is None
    torch.testing.assert_close(ours(tiny.model("llama"), prompt), logits, atol=1e-5, rtol=1e-5)


def test_the_fixtures_are_small_and_hold_no_pickle() -> None:
    for path in FIXTURES.rglob("*"):
        assert path.is_dir() or path.stat().st_size < 50_000
        assert path.suffix not in (".bin", ".pt")


def test_a_prompt_from_peft_is_saved_by_us_and_both_read_it(folder: Path, tmp_path: Path) -> None:
    prompt = ptuning.Prompt.load(folder)
    prompt.save(tmp_path / "again")
    assert torch.equal(
        ptuning.Prompt.load(tmp_path / "again").trained_vectors(), prompt.trained_vectors()
    )
    vectors, _ = theirs(tiny.model("llama"), tmp_path / "again")
    assert torch.equal(vectors, prompt.trained_vectors())


def test_our_own_files_are_preferred_to_pefts(folder: Path) -> None:
    prompt = prompt_with("none")
    prompt.save(folder, peft=False)
    assert torch.equal(ptuning.Prompt.load(folder).trained_vectors(), prompt.trained_vectors())


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "none"])
def test_peft_loads_our_prompt_without_a_warning_and_with_equal_logits(
    encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = prompt_with(encoder)
    prompt.save(tmp_path / "p")
    model = tiny.model("llama")
    expected = ours(model, prompt)
    model.config._name_or_path = "makers/tiny"
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        # transformers' own, about a name that PEFT asks it for; no file of ours has a part in it
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        vectors, logits = theirs(model, tmp_path / "p")
    assert not caplog.records
    assert torch.equal(vectors, prompt.trained_vectors())
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_peft_loads_a_template_prompt_in_front(tmp_path: Path) -> None:
    prompt = ptuning.Prompt("[P*4]{text} [MASK]", special_tokens="after")
    prompt.vectors = torch.randn(4, 32)
    prompt.base_model = prompt_with("none").base_model
    prompt.save(tmp_path / "p")
    vectors, logits = theirs(tiny.model("llama"), tmp_path / "p")
    assert torch.equal(vectors, prompt.vectors)
    expected = ours(tiny.model("llama"), prompt)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "none"])
def test_adapter_config_has_exactly_pefts_keys(encoder: str, tmp_path: Path) -> None:
    prompt_with(encoder).save(tmp_path / "p")
    ours = json.loads((tmp_path / "p" / CONFIG).read_text())
    reference = json.loads((FOLDERS[0] / CONFIG).read_text())
    assert list(ours) == list(reference)
    assert ours["inference_mode"] is True and ours["peft_type"] == "P_TUNING"
    assert ours["peft_version"] == reference["peft_version"] == REFERENCE_VERSION
    expected = {"mlp": "MLP", "lstm": "LSTM", "none": "MLP"}[encoder]
    assert ours["encoder_reparameterization_type"] == expected
    assert ours["num_virtual_tokens"] == 4 and ours["token_dim"] == 32
    assert ours["task_type"] == "CAUSAL_LM"  # without it PEFT leaves the prompt out, in silence
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "p"))
    assert isinstance(config, peft.PromptEncoderConfig)


@pytest.mark.parametrize("family", tiny.SEQ2SEQ)
def test_peft_puts_our_prompt_before_an_encoder_decoders_input(family: str, tmp_path: Path) -> None:
    prompt = prompt_with("mlp", family)
    prompt.save(tmp_path / "p")
    inputs = {"input_ids": IDS, "decoder_input_ids": torch.tensor([[2, 5], [2, 6]])}
    base = tiny.model(family)
    with torch.no_grad(), ptuning.attach(base, None, prompt) as attached:
        expected = base(**{**inputs, **attached.prepend(prompt, IDS)}).logits
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "p")).eval()
    with torch.no_grad():
        got = loaded(**inputs, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_adapter_weights_have_exactly_pefts_tensors(tmp_path: Path) -> None:
    prompt_with("mlp").save(tmp_path / "p")
    mine = safetensors.torch.load_file(tmp_path / "p" / WEIGHTS)
    reference = safetensors.torch.load_file(FOLDERS[0] / WEIGHTS)
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {
        k: (v.shape, v.dtype) for k, v in reference.items()
    }


def test_of_an_encoder_decoders_rows_the_first_are_used(tmp_path: Path) -> None:
    torch.manual_seed(3)
    settings = peft.PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny.model("t5"), settings).eval()
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / WEIGHTS)["prompt_embeddings"]
    prompt = ptuning.Prompt.load(tmp_path)
    assert saved.shape == (8, 32) and torch.equal(prompt.trained_vectors(), saved[:4])
    inputs = {"decoder_input_ids": torch.tensor([[0, 5], [0, 6]])}
    base = tiny.model("t5")
    with torch.no_grad(), ptuning.attach(base, None, prompt) as attached:
        got = base(**attached.prepend(prompt, IDS), **inputs).logits
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **inputs).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# --- what cannot be read ----------------------------------------------------------------------


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def reconfigure(folder: Path, **changes: Any) -> None:
    values = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps(values))


@pytest.mark.parametrize("tensors", [{}, {"embedding.weight": torch.ones(4, 32)}])
def test_a_missing_tensor_is_an_error_that_lists_what_is_there(
    tensors: dict[str, Tensor], folder: Path
) -> None:
    rewrite(folder, tensors)
    with pytest.raises(PromptFileError, match="no tensor 'prompt_embeddings'; it holds") as caught:
        ptuning.Prompt.load(folder)
    assert all(name in str(caught.value) for name in tensors)


def test_tensors_of_another_method_are_an_error(folder: Path) -> None:
    name = "score.lora_A.weight"
    rewrite(folder, {"prompt_embeddings": torch.ones(4, 32), name: torch.ones(2)})
    with pytest.raises(PromptFileError, match=r"also holds \['score.lora_A.weight'\]"):
        ptuning.Prompt.load(folder)


def test_a_prompt_with_trained_modules_is_not_attached_without_them(folder: Path) -> None:
    name = "base_model.score.weight"
    rewrite(folder, {"prompt_embeddings": torch.ones(4, 32), name: torch.ones(2)})
    prompt = ptuning.Prompt.load(folder)
    assert list(prompt.modules) == ["score.weight"]
    with pytest.raises(InputError, match=r"together with score\.weight .*ptuning\.peft_compat"):
        ptuning.attach(tiny.model("llama"), None, prompt)


@pytest.mark.parametrize("shape", [(3, 32), (8, 32), (4,), (4, 1, 32), (0, 32)])
def test_a_misshaped_tensor_is_an_error(shape: tuple[int, ...], folder: Path) -> None:
    rewrite(folder, {"prompt_embeddings": torch.ones(shape)})
    with pytest.raises(PromptFileError, match=r"has shape \(.* asks for 4 rows"):
        ptuning.Prompt.load(folder)


def test_another_width_than_the_configuration_names_is_an_error(folder: Path) -> None:
    rewrite(folder, {"prompt_embeddings": torch.ones(4, 31)})
    with pytest.raises(PromptFileError, match="31"):
        ptuning.Prompt.load(folder)


def test_a_configuration_may_leave_the_width_out(folder: Path) -> None:
    before = ptuning.Prompt.load(folder).trained_vectors()
    reconfigure(folder, token_dim=None)
    assert torch.equal(ptuning.Prompt.load(folder).trained_vectors(), before)


def test_a_lora_adapter_is_an_error(folder: Path) -> None:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(tiny.model("llama"), lora).save_pretrained(folder)
    with pytest.raises(InputError, match="peft_type is LORA, and this package has only P_TUNING"):
        ptuning.Prompt.load(folder)


def test_a_prompt_tuning_adapter_is_an_error(folder: Path) -> None:
    reconfigure(folder, peft_type="PROMPT_TUNING")
    with pytest.raises(InputError, match="peft_type is PROMPT_TUNING"):
        ptuning.Prompt.load(folder)


def test_a_configuration_without_a_count_is_an_error(folder: Path) -> None:
    reconfigure(folder, num_virtual_tokens=None)
    with pytest.raises(PtuningError, match=r"num_virtual_tokens|asks for None rows"):
        ptuning.Prompt.load(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_damaged_configuration_is_an_error(content: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(PromptFileError, match=CONFIG):
        ptuning.Prompt.load(folder)


@pytest.mark.parametrize(
    "change",
    [{"num_virtual_tokens": "four"}, {"num_transformer_submodules": "x"}, {"token_dim": [32]}],
    ids=lambda change: next(iter(change)),
)
def test_a_configuration_value_of_the_wrong_type_is_an_error_of_ours(
    change: dict[str, Any], folder: Path
) -> None:
    reconfigure(folder, **change)
    with pytest.raises(PtuningError, match=f"{next(iter(change))}|{CONFIG}"):
        ptuning.Prompt.load(folder)


def test_truncated_weights_are_an_error(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(PromptFileError, match="truncated or damaged"):
        ptuning.Prompt.load(folder)


def test_missing_weights_are_an_error(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(PromptFileError, match=f"{WEIGHTS} does not exist"):
        ptuning.Prompt.load(folder)


def test_keys_of_a_newer_peft_warn_and_are_ignored(folder: Path) -> None:
    reconfigure(folder, new_setting=1)
    with pytest.warns(UserWarning, match=r"\['new_setting'\].*ignored"):
        vectors, config, _ = peft_files.read(folder)
    assert len(vectors) == config.num_virtual_tokens == 4
