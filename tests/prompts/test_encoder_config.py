from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest

from ptuning import Prompt, PromptEncoder, PromptEncoderConfig, PtuningError
from ptuning.errors import InputError, PromptFileError
from ptuning.prompts.encoder_config import (
    CONFIG_NAME,
    REFERENCE_VERSION,
    PeftType,
    PromptEncoderReparameterizationType,
    TaskType,
)

PAGE: dict[str, Any] = {
    "peft_type": "P_TUNING",
    "task_type": "SEQ_2_SEQ_LM",
    "num_virtual_tokens": 20,
    "token_dim": 768,
    "num_transformer_submodules": 1,
    "num_attention_heads": 12,
    "num_layers": 12,
    "encoder_reparameterization_type": "MLP",
    "encoder_hidden_size": 768,
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "page": PAGE,
    "lstm": {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "token_dim": 16,
        "encoder_reparameterization_type": "LSTM",
        "encoder_hidden_size": 8,
        "encoder_num_layers": 1,
        "encoder_dropout": 0.25,
    },
    "classifier": {
        "task_type": "SEQ_CLS",
        "num_virtual_tokens": 5,
        "modules_to_save": ["classifier", "score"],
        "base_model_name_or_path": "org/модель",
        "revision": "main",
        "inference_mode": True,
    },
    "custom model": {
        "auto_mapping": {"base_model_class": "Own", "parent_library": "own.models"},
        "peft_version": "0.18.0",
        "num_transformer_submodules": 2,
    },
}
argument_sets = pytest.mark.parametrize(
    "values",
    [{"peft_version": REFERENCE_VERSION, **values} for values in ARGUMENTS.values()],
    ids=ARGUMENTS,
)


def written(config: Any, folder: Path) -> bytes:
    config.save_pretrained(str(folder))
    return (folder / "adapter_config.json").read_bytes()


def test_fields_and_defaults_are_the_reference_s_in_its_order() -> None:
    def described(cls: type) -> list[tuple[str, Any]]:
        return [(f.name, f.default) for f in dataclasses.fields(cls)]

    assert described(PromptEncoderConfig) == described(peft.PromptEncoderConfig)


def test_positional_arguments_mean_what_they_mean_in_the_reference() -> None:
    values = ("CAUSAL_LM", "P_TUNING", None, "0.9", "base")
    ours, theirs = PromptEncoderConfig(*values), peft.PromptEncoderConfig(*values)
    assert ours.to_dict() == theirs.to_dict()


@pytest.mark.skipif(peft.__version__ != REFERENCE_VERSION, reason="of the pinned release")
def test_the_version_that_is_written_is_the_reference_s() -> None:
    assert PromptEncoderConfig().to_dict() == peft.PromptEncoderConfig().to_dict()


@argument_sets
def test_to_dict_equals_the_reference_s(values: dict[str, Any]) -> None:
    ours = PromptEncoderConfig(**values).to_dict()
    theirs = peft.PromptEncoderConfig(**values).to_dict()
    assert list(ours) == list(theirs)
    assert ours == theirs


@argument_sets
def test_written_file_equals_the_reference_s_byte_for_byte(
    values: dict[str, Any], tmp_path: Path
) -> None:
    ours = written(PromptEncoderConfig(**values), tmp_path / "ours")
    assert ours == written(peft.PromptEncoderConfig(**values), tmp_path / "theirs")


@argument_sets
def test_each_library_reads_the_other_s_file(values: dict[str, Any], tmp_path: Path) -> None:
    PromptEncoderConfig(**values).save_pretrained(tmp_path / "ours")
    peft.PromptEncoderConfig(**values).save_pretrained(str(tmp_path / "theirs"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = PromptEncoderConfig.from_pretrained(tmp_path / "theirs")
        theirs = peft.PeftConfig.from_pretrained(str(tmp_path / "ours"))
    assert type(theirs) is peft.PromptEncoderConfig
    assert ours.to_dict() == PromptEncoderConfig(**values).to_dict()
    assert theirs.to_dict() == peft.PromptEncoderConfig(**values).to_dict()


@argument_sets
def test_saving_and_reading_changes_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    first = PromptEncoderConfig(**values)
    first.save_pretrained(tmp_path / "new" / "folder")
    second = PromptEncoderConfig.from_pretrained(str(tmp_path / "new" / "folder"))
    assert second == first
    assert (
        written(second, tmp_path / "again")
        == (tmp_path / "new" / "folder" / CONFIG_NAME).read_bytes()
    )


def test_names_become_members_of_the_enumerations() -> None:
    config = PromptEncoderConfig(**PAGE)
    assert config.task_type is TaskType.SEQ_2_SEQ_LM
    assert config.peft_type is PeftType.P_TUNING
    assert config.encoder_reparameterization_type is PromptEncoderReparameterizationType.MLP


def test_enumerations_know_the_reference_s_names() -> None:
    assert [m.value for m in peft.TaskType] == [m.value for m in TaskType]
    assert PeftType.P_TUNING == peft.PeftType.P_TUNING
    own = {m.value for m in PromptEncoderReparameterizationType}
    theirs = {m.value for m in peft.tuners.p_tuning.PromptEncoderReparameterizationType}
    assert own - theirs == {"NONE", "RESIDUAL", "MIXTURE"}
    assert theirs <= own


def test_the_reference_s_enumerations_are_taken() -> None:
    config = PromptEncoderConfig(
        task_type=peft.TaskType.CAUSAL_LM, peft_type=peft.PeftType.P_TUNING
    )
    assert config.to_dict() == PromptEncoderConfig(task_type="CAUSAL_LM").to_dict()


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    PromptEncoderConfig(num_virtual_tokens=3, token_dim=8).save_pretrained(tmp_path)
    config = PromptEncoderConfig.from_pretrained(tmp_path, inference_mode=True, token_dim=16)
    assert (config.num_virtual_tokens, config.token_dim, config.inference_mode) == (3, 16, True)


def test_head_none_is_written_as_mlp_and_read_by_the_reference(tmp_path: Path) -> None:
    config = PromptEncoderConfig(
        num_virtual_tokens=3,
        token_dim=8,
        num_transformer_submodules=1,
        encoder_hidden_size=8,
        encoder_reparameterization_type="NONE",
        inference_mode=True,
    )
    values = json.loads(written(config, tmp_path))
    assert values["encoder_reparameterization_type"] == "MLP"
    assert config.to_dict()["encoder_reparameterization_type"] == "NONE"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert theirs.to_dict() == {**config.to_dict(), "encoder_reparameterization_type": "MLP"}
    keys = set(PromptEncoder(config).state_dict())
    assert keys == set(peft.PromptEncoder(theirs).state_dict()) == {"embedding.weight"}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"peft_type": "LORA"}, ["LORA", "P_TUNING"]),
        ({"peft_type": peft.PeftType.PROMPT_TUNING}, ["PROMPT_TUNING", "P_TUNING"]),
        (
            {"task_type": "TRANSLATION"},
            ["Invalid task type", "TRANSLATION", "CAUSAL_LM", "TOKEN_CLS"],
        ),
        (
            {"encoder_reparameterization_type": "GRU"},
            ["encoder_reparameterization_type", "GRU", "MLP", "LSTM", "NONE"],
        ),
        ({"num_virtual_tokens": 0}, ["num_virtual_tokens", "0", "at least 1"]),
        ({"num_virtual_tokens": -1}, ["num_virtual_tokens", "-1", "at least 1"]),
        ({"token_dim": 0}, ["token_dim", "0", "at least 1"]),
        ({"encoder_hidden_size": -4}, ["encoder_hidden_size", "-4", "at least 1"]),
    ],
)
def test_wrong_value_is_an_error_that_names_it(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        PromptEncoderConfig(**values)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, PtuningError)
    assert caught.value.exit_code == 2
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan"), 2])
def test_a_dropout_that_no_prompt_can_have_is_refused_before_a_training(dropout: float) -> None:
    with pytest.raises(InputError, match=r"encoder_dropout is .* give a share, from 0 to below 1"):
        PromptEncoderConfig(num_virtual_tokens=3, encoder_dropout=dropout)


def test_only_an_lstm_has_to_say_how_many_layers_it_has() -> None:
    """A file may say null; the network would fail on it when it is built."""
    for make in (
        lambda kind: PromptEncoderConfig(
            encoder_reparameterization_type=kind.upper(), encoder_num_layers=None
        ),
        lambda kind: Prompt("[P] {x} [MASK]", encoder=kind, encoder_num_layers=None),
    ):
        assert make("mlp").encoder_num_layers is None
        with pytest.raises(InputError, match="encoder_num_layers is None; give a whole number"):
            make("lstm")


def test_another_method_s_file_is_an_error_without_a_word_on_its_keys(tmp_path: Path) -> None:
    peft.LoraConfig(r=4).save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="LORA"):
            PromptEncoderConfig.from_pretrained(tmp_path)


def test_keys_of_a_newer_version_are_ignored_with_a_warning(tmp_path: Path) -> None:
    config = PromptEncoderConfig(**PAGE)
    newer = {**config.to_dict(), "encoder_norm": "rms", "a_new_key": 1}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(newer), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"\['a_new_key', 'encoder_norm'\] for class"):
        assert PromptEncoderConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"peft_type": "P_TUNING",', "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "no JSON object"),
        (b'"P_TUNING"', "no JSON object"),
    ],
)
def test_broken_file_is_an_error_that_names_it(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(PromptFileError, match=part) as caught:
        PromptEncoderConfig.from_pretrained(tmp_path)
    assert str(tmp_path / CONFIG_NAME) in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"num_virtual_tokens": "20"},
        {"token_dim": [768]},
        {"encoder_hidden_size": 1.5},
        {"task_type": ["CAUSAL_LM"]},
        {"peft_type": {"name": "P_TUNING"}},
    ],
)
def test_value_of_another_type_in_a_file_is_an_input_error(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError, match=next(iter(values)).replace("_", ".")):
        PromptEncoderConfig.from_pretrained(tmp_path)


def test_missing_file_is_an_error_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PromptFileError, match=CONFIG_NAME) as caught:
        PromptEncoderConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_saving_into_a_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="is a file"):
        PromptEncoderConfig().save_pretrained(file)
    assert file.read_text(encoding="utf-8") == "mine"
