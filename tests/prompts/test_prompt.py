from __future__ import annotations

import ast
import copy
import dataclasses
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ptuning
from ptuning import formats, storage
from ptuning.backbone.identity import check_same, describe
from ptuning.errors import InputError, PromptFileError, PtuningError, TemplateError
from ptuning.prompts.encoder import PromptEncoder
from ptuning.prompts.task import as_label

from .. import tiny

TEMPLATE = "[P*2] {text} [P] Answer: [MASK]"
OURS = {"prompt.json", "prompt.safetensors", "README.md"}
PEFTS = {"adapter_config.json", "adapter_model.safetensors"}
FROZEN_KEYS = {
    "format_version",
    "save_id",
    "num_virtual_tokens",
    "template",
    "answer",
    "verbalizer",
    "label_mode",
    "special_tokens",
    "chat",
    "max_length",
    "answer_tokens",
    "answer_end",
    "encoder",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
    "base_model",
    "training",
    "sha256",
}


def trained(template: str | None = TEMPLATE, *, seed: int = 1, **changes: Any) -> ptuning.Prompt:
    prompt = ptuning.Prompt(template, **changes)
    generator = torch.Generator().manual_seed(seed)
    assert prompt.num_virtual_tokens is not None
    prompt.vectors = torch.randn(prompt.num_virtual_tokens, 8, generator=generator)
    return prompt


def with_encoder(prompt: ptuning.Prompt) -> ptuning.Prompt:
    torch.manual_seed(5)
    encoder = PromptEncoder(prompt.encoder_config(8)).eval()
    prompt.encoder_weights = {k: v.clone() for k, v in encoder.state_dict().items()}
    prompt.vectors = encoder.table().detach()
    return prompt


def same(one: ptuning.Prompt, other: ptuning.Prompt) -> None:
    assert one.settings() == other.settings()
    assert one.num_virtual_tokens == other.num_virtual_tokens
    assert one.base_model == other.base_model and one.training == other.training
    assert torch.equal(one.trained_vectors(), other.trained_vectors())
    assert (one.encoder_weights is None) == (other.encoder_weights is None)
    for name, weight in (one.encoder_weights or {}).items():
        assert other.encoder_weights is not None
        assert torch.equal(weight, other.encoder_weights[name])
    assert set(one.encoder_weights or {}) == set(other.encoder_weights or {})


def description_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "prompt.json").read_text(encoding="utf-8"))


def change_json(folder: Path, **changes: Any) -> None:
    """Change prompt.json, as a person with an editor would; the save id stays."""
    description = {**description_of(folder), **changes}
    (folder / "prompt.json").write_text(json.dumps(description), encoding="utf-8")


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# --- settings ---------------------------------------------------------------------------------


def test_neither_template_nor_count_is_an_error() -> None:
    with pytest.raises(InputError, match=r"needs a template.*or num_virtual_tokens"):
        ptuning.Prompt()


def test_a_template_without_virtual_token_is_an_error() -> None:
    with pytest.raises(InputError, match=r"no virtual token; write \[P\].*\[P\*3\] {a} \[MASK\]"):
        ptuning.Prompt("{a} [MASK]")


def test_a_template_counts_its_virtual_tokens() -> None:
    assert ptuning.Prompt("[P*3] {a} [P] [MASK]").num_virtual_tokens == 4
    assert ptuning.Prompt("[P*3] {a} [P] [MASK]", num_virtual_tokens=4).num_virtual_tokens == 4


def test_a_count_that_disagrees_with_the_template_is_an_error() -> None:
    with pytest.raises(InputError, match=r"num_virtual_tokens is 5, and the template has 4"):
        ptuning.Prompt("[P*3] {a} [P] [MASK]", num_virtual_tokens=5)


def test_words_leave_the_count_open_until_they_are_tokenized() -> None:
    prompt = ptuning.Prompt("[P:capital city] {a} [MASK]")
    assert prompt.num_virtual_tokens is None
    prompt.set_count(2)
    with pytest.raises(InputError, match="num_virtual_tokens is 2"):
        prompt.set_count(3)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "name",
    [
        "num_virtual_tokens",
        "encoder_hidden_size",
        "encoder_num_layers",
        "max_length",
        "answer_tokens",
    ],
)
def test_counts_below_one_are_errors(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}; give a whole number of at least 1"):
        ptuning.Prompt(**{"num_virtual_tokens": 3, name: value})


def test_an_unknown_encoder_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(InputError, match="encoder is 'transformer'; expected one of mlp, lstm, no"):
        ptuning.Prompt(TEMPLATE, encoder="transformer")


def test_encoder_names_may_be_written_large() -> None:
    assert ptuning.Prompt(TEMPLATE, encoder="LSTM").encoder == "lstm"


@pytest.mark.parametrize(("name", "value"), [("label_mode", "words"), ("special_tokens", "before")])
def test_unknown_policies_are_errors(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{name} is '{value}'; expected one of"):
        ptuning.Prompt(TEMPLATE, **{name: value})


@pytest.mark.parametrize("template", ["{a} [P*2] [MASK]", "[P] {a} [P] [MASK]", "word [P]{a}"])
def test_special_tokens_after_needs_all_virtual_tokens_in_front(template: str) -> None:
    with pytest.raises(InputError, match="must begin with all of them"):
        ptuning.Prompt(template, special_tokens="after")


def test_special_tokens_after_takes_a_prompt_in_front() -> None:
    prompt = ptuning.Prompt("[P*2][P]{a} [MASK]", special_tokens="after")
    assert prompt.num_virtual_tokens == 3
    assert ptuning.Prompt("[P*2][P]", special_tokens="after").num_virtual_tokens == 3


def test_a_count_alone_is_pefts_placement() -> None:
    assert ptuning.Prompt(num_virtual_tokens=3).special_tokens == "after"


@pytest.mark.parametrize(
    ("verbalizer", "message"),
    [
        ({"yes": "Yes"}, r"at least two labels; it has \['yes'\]"),
        ({}, "at least two labels"),
        ({"yes": "Yes", "no": ""}, "label 'no' has an empty word"),
        ({"yes": "Yes", "no": "  "}, "label 'no' has an empty word"),
        ({"yes": "Yes", "no": []}, "label 'no' has an empty word"),
        ({"yes": ["Yes", ""], "no": "No"}, "label 'yes' has an empty word"),
        ({"yes": ["Yes", 1], "no": "No"}, r"label 'yes' stands for \['Yes', 1\]; expected a word"),
        ({"yes": "Yes", "no": 3}, "'no'"),
        ({"yes": "Yes", "no": ["No", "Yes"]}, "labels 'yes' and 'no' share the word 'Yes'"),
    ],
)
def test_a_verbalizer_that_cannot_be_used_is_an_error(
    verbalizer: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ptuning.Prompt(TEMPLATE, verbalizer=verbalizer)


@pytest.mark.parametrize(
    ("value", "labels", "label"),
    [
        (True, ("true", "false"), "true"),
        (True, ("True", "False"), "True"),
        ("TRUE", ("True", "False"), "True"),
        ("TRUE", ("True", "true"), "TRUE"),  # which of the two?
        (1.0, ("0", "1"), "1"),
        (1.0, ("0.0", "1.0"), "1.0"),
        (1.0, (), 1.0),  # a free answer
        (1.5, ("1", "2"), 1.5),
        (1e22, ("1", "10000000000000000000000"), "10000000000000000000000"),
        (" 1.0", ("0", "1"), "1"),
        ("1.0", ("1", "1.0"), "1.0"),
        ("1", ("0.0", "1.0"), "1.0"),
        (1, ("0.0", "1.0"), "1.0"),
        ("-1.00", ("-1", "1"), "-1"),
        ("1.1", ("1", "1.1.0"), "1.1"),
        ("v1", ("v1.0",), "v1"),
        pytest.param(10**5000, ("1", "2"), 10**5000, id="more digits than Python writes"),
    ],
)
def test_a_cell_is_the_label_that_other_kinds_of_files_write_so(
    value: Any, labels: tuple[str, ...], label: Any
) -> None:
    found = as_label(value, labels)
    assert (found, type(found)) == (label, type(label))


@pytest.mark.parametrize(
    "settings",
    [
        {"answer": "\udcff"},
        {"verbalizer": {"yes": "Yes", "n\udcff": "No"}},
        {"verbalizer": {"yes": "Yes", "no": ["No", "N\udcff"]}},
    ],
)
def test_text_that_no_file_can_hold_is_refused_before_a_training(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"has half a surrogate pair: '.*udcff'; is the text UTF"):
        ptuning.Prompt(TEMPLATE, **settings)


def test_labels_with_spaces_around_them_are_those_of_their_cells() -> None:
    spaced = ptuning.Prompt(TEMPLATE, verbalizer={" a": "yes", "b": "no"})
    assert [spaced.label_text(cell) for cell in (" a", " b ", "c ")] == [" a", "b", "c"]


def test_a_manual_template_has_no_bias_of_the_prompts() -> None:
    words = {"a": "yes", "b": "no"}
    prompt = ptuning.Prompt(TEMPLATE, verbalizer=words, label_bias={"b": 1, "a": 2})
    assert prompt.label_bias == {"a": 2.0, "b": 1.0} and prompt.manual().label_bias is None


def test_a_prompt_that_becomes_another_has_its_words_names_too() -> None:
    rows = [{"text": f"{n} of them", "label": ("good", "bad")[n % 2]} for n in range(9)]
    prompt, other = ptuning.Prompt.for_rows(rows), ptuning.Prompt.for_rows(rows)
    other.name_words, other.verbalizer = None, {"good": "fine", "bad": "poor"}  # settled
    prompt.become(other)
    assert prompt.name_words is None and prompt.labels == other.labels


@pytest.mark.parametrize("wrong", ["1", True, float("nan"), float("inf"), -(10**400)])
def test_a_label_bias_is_a_number_that_floats_can_hold(wrong: Any) -> None:
    words = {"a": "yes", "b": "no"}
    with pytest.raises(InputError, match=r"label_bias gives .* for 'b'; expected a number"):
        ptuning.Prompt(TEMPLATE, verbalizer=words, label_bias={"a": 0, "b": wrong})


def test_verbalizer_keys_become_text() -> None:
    prompt = ptuning.Prompt(TEMPLATE, verbalizer={0: "no", 1: ["yes", "sure"]})
    assert prompt.labels == {"0": ("no",), "1": ("yes", "sure")}


def test_a_broken_template_is_an_error_with_its_column() -> None:
    with pytest.raises(TemplateError, match="column 5") as caught:
        ptuning.Prompt("[P] {a")
    assert caught.value.column == 5


# --- save and load ----------------------------------------------------------------------------

FULL: dict[str, Any] = {
    "answer": "capital",
    "verbalizer": {"ja": ["yes", "sure"], "nein": ["no"], "naïve": "東京"},
    "label_mode": "vocabulary",
    "chat": True,
    "max_length": 77,
    "answer_tokens": 3,
    "answer_end": False,
    "encoder_hidden_size": 12,
    "encoder_num_layers": 3,
    "encoder_dropout": 0.25,
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("encoder", ["mlp", "lstm", "none"])
def test_save_load_save_keeps_every_field_and_each_bit(
    encoder: str, keep: bool, tmp_path: Path
) -> None:
    changes = {**FULL, "encoder": encoder}
    if encoder == "mlp":  # an MLP has no layers to choose
        changes["encoder_num_layers"] = 2
    prompt = with_encoder(ptuning.Prompt("[P*2] {text} [[P]] é [P] [MASK]", **changes))
    prompt.base_model = {**describe(tiny.model(), tiny.tokenizer()), "name": "makers/tiny"}
    prompt.training = {"examples": 12, "majority_answer": "ja", "dev_accuracy": 0.5}
    prompt.save(tmp_path / "one", keep_encoder=keep)
    if not keep or encoder == "none":  # whose weights are the vectors
        prompt = copy.copy(prompt)
        prompt.encoder_weights = None
    loaded = ptuning.Prompt.load(tmp_path / "one")
    same(prompt, loaded)
    loaded.save(tmp_path / "two")
    same(prompt, ptuning.Prompt.load(tmp_path / "two"))
    one, two = description_of(tmp_path / "one"), description_of(tmp_path / "two")
    assert one.pop("save_id") != two.pop("save_id")
    assert one.pop("sha256") != two.pop("sha256")  # the save's id stands beside the vectors too
    assert one == two


def test_loaded_encoder_weights_give_the_vectors_again(tmp_path: Path) -> None:
    for encoder in ("mlp", "lstm", "residual"):
        prompt = with_encoder(ptuning.Prompt(TEMPLATE, encoder=encoder))
        prompt.save(tmp_path / encoder)
        loaded = ptuning.Prompt.load(tmp_path / encoder)
        again = PromptEncoder(loaded.encoder_config(8)).eval()
        again.load_state_dict(loaded.encoder_weights or {})
        torch.testing.assert_close(again.table(), prompt.vectors)


def test_without_a_network_the_vectors_are_saved_once(tmp_path: Path) -> None:
    prompt = with_encoder(ptuning.Prompt(TEMPLATE, encoder="none"))
    prompt.save(tmp_path / "one")
    assert set(formats.read_tensors(tmp_path / "one/prompt.safetensors")[0]) == {"vectors"}
    prompt.vectors = prompt.trained_vectors() + 1  # weights of something else are kept
    prompt.save(tmp_path / "other")
    same(prompt, ptuning.Prompt.load(tmp_path / "other"))


@given(
    words=st.lists(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip),
        min_size=2,
        max_size=5,
        unique=True,
    ),
    answer=st.none() | st.text(st.characters(exclude_categories=("Cs",)), min_size=1),
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=6, max_size=6
    ),
)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_words_and_numbers_survive(
    words: list[str], answer: str | None, values: list[float], tmp_path: Path
) -> None:
    verbalizer = {f"{i} {word}": word for i, word in enumerate(words)}
    prompt = ptuning.Prompt(TEMPLATE, verbalizer=verbalizer, answer=answer)
    prompt.vectors = torch.tensor(values).view(3, 2)
    prompt.save(tmp_path / "p")
    same(prompt, ptuning.Prompt.load(tmp_path / "p"))


def test_half_precision_vectors_are_saved_as_float32(tmp_path: Path) -> None:
    prompt = trained()
    prompt.vectors = prompt.trained_vectors().bfloat16()
    prompt.save(tmp_path / "p")
    loaded = ptuning.Prompt.load(tmp_path / "p").trained_vectors()
    assert loaded.dtype == torch.float32 and torch.equal(loaded, prompt.vectors.float())


def test_an_untrained_prompt_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no vectors yet"):
        ptuning.Prompt(TEMPLATE).save(tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_the_file_format_is_frozen(tmp_path: Path) -> None:
    with_encoder(ptuning.Prompt(TEMPLATE, encoder="mlp")).save(tmp_path / "p")
    description = description_of(tmp_path / "p")
    assert set(description) == FROZEN_KEYS
    assert description["format_version"] == 1 and description["template"] == TEMPLATE
    assert description["num_virtual_tokens"] == 3 and description["encoder"] == "mlp"
    with safetensors.safe_open(tmp_path / "p" / "prompt.safetensors", "pt") as file:
        shapes = {k: tuple(file.get_tensor(k).shape) for k in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert shapes == {
        "vectors": (3, 8),
        "encoder.embedding.weight": (3, 8),
        "encoder.mlp_head.0.weight": (8, 8),
        "encoder.mlp_head.0.bias": (8,),
        "encoder.mlp_head.2.weight": (8, 8),
        "encoder.mlp_head.2.bias": (8,),
        "encoder.mlp_head.4.weight": (8, 8),
        "encoder.mlp_head.4.bias": (8,),
    }
    assert set(metadata) == {"format", "prompt"} and metadata["format"] == "pt"
    tensors = (tmp_path / "p" / "prompt.safetensors").read_bytes()
    checksums = description.pop("sha256")
    assert checksums == {"prompt.safetensors": hashlib.sha256(tensors).hexdigest()}
    assert json.loads(metadata["prompt"]) == description


def ensemble() -> ptuning.Prompt:
    first = with_encoder(ptuning.Prompt(TEMPLATE, answer="right"))
    others = [trained(seed=2, answer="right"), trained("[P*5] {text} [MASK]", answer="right")]
    others[0].training = {"seed": 4}
    return dataclasses.replace(first, others=others)


def test_an_ensemble_is_one_folder_of_version_two(tmp_path: Path) -> None:
    whole = ensemble()
    for member in (whole, *whole.others):
        member.base_model = {**describe(tiny.model(), tiny.tokenizer()), "name": "makers/tiny"}
    whole.save(tmp_path)
    description = description_of(tmp_path)
    assert set(description) == FROZEN_KEYS | {"ensemble"}
    assert description["format_version"] == 2
    own = FROZEN_KEYS - {"format_version", "save_id", "base_model", "sha256"}
    assert [set(member) for member in description["ensemble"]] == [own, own]
    tensors = safetensors.torch.load_file(tmp_path / "prompt.safetensors")
    assert {name for name in tensors if not name.startswith("encoder.")} == {
        "vectors",
        "member.1.vectors",
        "member.2.vectors",
    }
    assert "An ensemble: 3 such prompts" in (tmp_path / "README.md").read_text()
    loaded = ptuning.Prompt.load(tmp_path)
    same(loaded, whole)
    for one, other in zip(loaded.members, whole.members, strict=True):
        same(one, other)
    loaded.alone().save(tmp_path)
    assert description_of(tmp_path)["format_version"] == 1
    same(ptuning.Prompt.load(tmp_path), whole.alone())


def test_members_that_share_a_tensor_are_saved(tmp_path: Path) -> None:
    one = trained()
    dataclasses.replace(one, others=[one]).save(tmp_path)
    same(*ptuning.Prompt.load(tmp_path).members)


def test_a_damaged_member_is_noticed(tmp_path: Path) -> None:
    ensemble().save(tmp_path)
    members = description_of(tmp_path)["ensemble"]
    for damaged, message in [
        ("many", "ensemble is no list of members' settings"),
        ([members[0], 3], "ensemble is no list of members' settings"),
        ([members[0], {**members[1], "num_virtual_tokens": 4}], r"names 4 virtual.* holds 5"),
        ([*members, members[0]], r"no table of member\.3\.vectors"),
        ([{**members[0], "verbalizer": {"a": "b", "c": "d"}}], "members of an ensemble answer the"),
        ([{k: v for k, v in members[0].items() if k != "template"}], "has no template"),
    ]:
        change_json(tmp_path, ensemble=damaged)
        with pytest.raises(PromptFileError, match=message):
            ptuning.Prompt.load(tmp_path)


def test_the_format_of_what_is_known_of_the_base_model_is_frozen() -> None:
    known = describe(tiny.model(), tiny.tokenizer())
    assert set(known) == {"name", "kind", "revision", "embedding", "tokenizer"}
    assert set(known["embedding"]) == {"width", "rows", "columns", "values"}
    assert json.loads(json.dumps(known)) == known


def test_a_prompt_written_by_version_one_loads(tmp_path: Path) -> None:
    description = {
        "format_version": 1,
        "save_id": "0" * 32,
        "num_virtual_tokens": 2,
        "template": "[P*2] {text} [MASK]",
        "answer": None,
        "verbalizer": {"yes": ["Yes"], "no": ["No", "Nope"]},
        "label_mode": "labels",
        "special_tokens": "around",
        "chat": False,
        "max_length": None,
        "answer_tokens": None,
        "answer_end": True,
        "encoder": "none",
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_dropout": 0.0,
        "base_model": {},
        "training": {},
    }
    (tmp_path / "prompt.json").write_text(json.dumps(description))
    safetensors.torch.save_file({"vectors": torch.ones(2, 4)}, tmp_path / "prompt.safetensors")
    prompt = ptuning.Prompt.load(tmp_path)
    assert prompt.labels == {"yes": ("Yes",), "no": ("No", "Nope")}
    assert torch.equal(prompt.trained_vectors(), torch.ones(2, 4))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("template", "changes", "peft", "written"),
    [
        (None, {"num_virtual_tokens": 3}, None, True),
        ("[P*3]{text} [MASK]", {"special_tokens": "after"}, None, True),
        (None, {"num_virtual_tokens": 3}, False, False),
        ("[P*3]{text} [MASK]", {}, None, False),
        (TEMPLATE, {}, None, False),
        (TEMPLATE, {}, True, True),
    ],
)
def test_pefts_files_are_written_where_they_mean_the_same_or_on_request(
    template: str | None, changes: dict[str, Any], peft: bool | None, written: bool, tmp_path: Path
) -> None:
    trained(template, **changes).save(tmp_path / "p", peft=peft)
    assert names_in(tmp_path / "p") == OURS | (PEFTS if written else set())
    assert names_in(tmp_path) == {"p"}


def test_pefts_files_of_an_earlier_prompt_do_not_stay_beside_another(tmp_path: Path) -> None:
    trained(None, num_virtual_tokens=3).save(tmp_path / "p")
    trained(TEMPLATE, seed=2).save(tmp_path / "p")
    assert names_in(tmp_path / "p") == OURS


def test_other_files_in_the_folder_survive(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "sub").mkdir()
    (folder / "sub" / "x.json").write_text("{}")
    for seed in (1, 2):
        trained(seed=seed).save(folder)
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / "sub" / "x.json").read_text() == "{}"
        assert names_in(folder) == OURS | {"notes.txt", "sub"}
        same(ptuning.Prompt.load(folder), trained(seed=seed))


def test_parent_folders_are_made(tmp_path: Path) -> None:
    trained().save(tmp_path / "a" / "b" / "c")
    same(ptuning.Prompt.load(tmp_path / "a" / "b" / "c"), trained())


def test_saving_over_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("mine")
    with pytest.raises(PtuningError, match="is a file; give a folder"):
        trained().save(tmp_path / "p")
    assert (tmp_path / "p").read_text() == "mine"


def test_the_model_card_tells_template_labels_and_use(tmp_path: Path) -> None:
    prompt = trained(verbalizer={"ja": ["yes", "sure"], "nein": "no"})
    prompt.base_model = {"name": "makers/tiny"}
    prompt.training = {"dev_accuracy": 0.75, "majority_answer": "ja"}
    prompt.save(tmp_path / "p")
    card = (tmp_path / "p" / "README.md").read_text(encoding="utf-8")
    for part in (
        "base_model: makers/tiny",
        TEMPLATE,
        "| ja | yes, sure |",
        "| dev accuracy | 0.75",
    ):
        assert part in card
    assert 'load_model("makers/tiny")' in card and "'text'" in card


def test_the_model_cards_example_has_all_columns_that_are_read(tmp_path: Path) -> None:
    words = {"verbalizer": {"0": "{first}", "1": "{second}"}, "answer": "right"}
    other = trained("[P*5] {text} {more} [MASK]", **words)
    dataclasses.replace(trained(**words), others=[other]).save(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "[{'text': '…', 'more': '…', 'first': '…', 'second': '…'}]" in card


# --- damage -----------------------------------------------------------------------------------


def test_a_torn_save_is_detected_and_the_description_of_the_tensors_used(tmp_path: Path) -> None:
    old, new = trained(answer="old"), trained("[P] {text} [MASK]", seed=2, answer="new")
    old.save(tmp_path / "old")
    new.save(tmp_path / "new")
    shutil.copy(tmp_path / "old" / "prompt.json", tmp_path / "new" / "prompt.json")
    with pytest.warns(UserWarning, match="belongs to another save .* is used"):
        same(ptuning.Prompt.load(tmp_path / "new"), new)


def test_a_lost_description_is_read_from_the_tensors(tmp_path: Path) -> None:
    prompt = trained(answer="x")
    prompt.save(tmp_path / "p")
    (tmp_path / "p" / "prompt.json").unlink()
    same(ptuning.Prompt.load(tmp_path / "p"), prompt)


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_truncated_tensors_are_refused(kept: int, tmp_path: Path) -> None:
    trained().save(tmp_path)
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PromptFileError, match=r"prompt\.safetensors is truncated or damaged"):
        ptuning.Prompt.load(tmp_path)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    trained().save(tmp_path)
    path = tmp_path / "prompt.safetensors"
    content = bytearray(path.read_bytes())
    content[9:20] = b"\xff" * 11
    path.write_bytes(content)
    with pytest.raises(PromptFileError, match="truncated or damaged"):
        ptuning.Prompt.load(tmp_path)


@given(content=st.binary(max_size=200))
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_bytes_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "prompt.safetensors").write_bytes(content)
    with pytest.raises(PromptFileError, match=r"prompt\.safetensors"):
        ptuning.Prompt.load(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch exploded",))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_under_a_safetensors_name_is_refused(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained().save(tmp_path / "p")
    (tmp_path / "p" / "prompt.safetensors").write_bytes(pickle.dumps(Bomb(), protocol))
    with pytest.raises(PromptFileError, match="a pickle under a safetensors name"):
        ptuning.Prompt.load(tmp_path / "p")
    assert not (tmp_path / "exploded").exists()


def test_a_torch_file_under_a_safetensors_name_is_refused(tmp_path: Path) -> None:
    trained().save(tmp_path)
    torch.save({"vectors": torch.ones(3, 8)}, tmp_path / "prompt.safetensors")
    with pytest.raises(PromptFileError, match="a pickle under a safetensors name"):
        ptuning.Prompt.load(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "prompt.pt"])
def test_a_folder_with_pickles_only_is_refused(name: str, tmp_path: Path) -> None:
    torch.save({"vectors": torch.ones(3, 8)}, tmp_path / name)
    with pytest.raises(PromptFileError, match=f"holds {name} .* a pickle can run any code"):
        ptuning.Prompt.load(tmp_path)


def test_a_pickle_beside_adapter_config_is_refused(tmp_path: Path) -> None:
    trained(None, num_virtual_tokens=3).save(tmp_path)
    for name in ("prompt.json", "prompt.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).unlink()
    torch.save({"prompt_embeddings": torch.ones(3, 8)}, tmp_path / "adapter_model.bin")
    with pytest.raises(PromptFileError, match=r"adapter_model\.bin .* a pickle can run any code"):
        ptuning.Prompt.load(tmp_path)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["config.json", "prompts.json"], "is a merged model, and no saved prompt"),
        (["config.json"], "is a model, and no saved prompt"),
        (["checkpoints"], "has not come to its end, and no prompt yet; .* go on with it"),
        (["run.yaml"], "has not come to its end, and no prompt yet; .* go on with it"),
        (["notes.txt"], "does not exist; give the folder of a saved prompt"),
    ],
)
def test_a_folder_of_something_else_is_called_what_it_is(
    names: list[str], told: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(PromptFileError, match=told):
        ptuning.Prompt.load(tmp_path)


@pytest.mark.parametrize("name", ["missing", "./a/b", "a/b/c", "~/nothing"])
def test_a_missing_folder_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptFileError, match="is not a folder; give the folder of a saved prompt"):
        ptuning.Prompt.load(name)


def test_a_missing_absolute_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match="is not a folder"):
        ptuning.Prompt.load(tmp_path / "missing")


def test_a_name_that_the_hub_does_not_give_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(PromptFileError, match="neither a folder here nor a repository on the hub"):
        ptuning.Prompt.load("makers/prompt")


def test_a_hub_name_is_loaded_from_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    trained().save(tmp_path / "snapshot")
    asked: list[Any] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    same(ptuning.Prompt.load("makers/prompt", revision="v2"), trained())
    assert asked == [("makers/prompt", "v2")]


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match=r"prompt\.safetensors does not exist"):
        ptuning.Prompt.load(tmp_path)


def test_lost_tensors_are_an_error(tmp_path: Path) -> None:
    trained().save(tmp_path)
    (tmp_path / "prompt.safetensors").unlink()
    with pytest.raises(PromptFileError, match=r"prompt\.safetensors does not exist"):
        ptuning.Prompt.load(tmp_path)


@pytest.mark.parametrize("version", [4, 99, None, "1"])
def test_another_format_version_is_an_error(version: Any, tmp_path: Path) -> None:
    trained().save(tmp_path)
    change_json(tmp_path, format_version=version)
    with pytest.raises(PromptFileError, match=f"format version {version!r}.*reads up to 3"):
        ptuning.Prompt.load(tmp_path)


def test_unknown_keys_warn_and_are_ignored(tmp_path: Path) -> None:
    trained().save(tmp_path)
    change_json(tmp_path, flavour="salt")
    with pytest.warns(UserWarning, match=r"unknown keys are ignored: \['flavour'\]"):
        same(ptuning.Prompt.load(tmp_path), trained())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON: .*; copy it again, or make it anew"),
        (b"", "cannot be read as JSON: .*; copy it again, or make it anew"),
        (b"\xff\xfe{}", "cannot be read as JSON: .*; copy it again, or make it anew"),
        (b"[1]", "holds no JSON object; copy it again, or make it anew"),
        (b"null", "holds no JSON object; copy it again, or make it anew"),
    ],
)
def test_a_damaged_description_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    trained().save(tmp_path)
    (tmp_path / "prompt.json").write_bytes(content)
    with pytest.raises(PromptFileError, match=message):
        ptuning.Prompt.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("template", 5),
        ("template", ["[P*3]"]),
        ("verbalizer", "yes"),
        ("verbalizer", {"a": None, "b": "x"}),
        ("label_mode", None),
        ("special_tokens", []),
        ("max_length", "long"),
        ("answer_tokens", {}),
        ("encoder_hidden_size", "wide"),
        ("encoder_num_layers", []),
        ("encoder_dropout", "some"),
        ("base_model", ["x"]),
        ("base_model", {"name": "x"}),
        ("base_model", {"name": "x", "embedding": 5}),
        ("training", 3),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_of_ours(
    name: str, value: Any, tmp_path: Path
) -> None:
    trained().save(tmp_path)
    change_json(tmp_path, **{name: value})
    with pytest.raises(PtuningError, match=name):
        ptuning.Prompt.load(tmp_path)


def test_a_count_of_the_wrong_type_is_an_error_of_ours(tmp_path: Path) -> None:
    trained().save(tmp_path)
    change_json(tmp_path, num_virtual_tokens="3")
    with pytest.raises(PromptFileError, match="virtual tokens"):
        ptuning.Prompt.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "5"])
def test_a_damaged_description_inside_the_tensors_is_an_error_of_ours(
    content: str, tmp_path: Path
) -> None:
    tensors = {"vectors": torch.ones(3, 8)}
    safetensors.torch.save_file(tensors, tmp_path / "prompt.safetensors", {"prompt": content})
    with pytest.raises(PromptFileError):
        ptuning.Prompt.load(tmp_path)


@pytest.mark.parametrize("tensors", [{}, {"vectors": torch.ones(3)}, {"other": torch.ones(3, 8)}])
def test_tensors_without_a_table_of_vectors_are_refused(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    trained().save(tmp_path)
    safetensors.torch.save_file(tensors, tmp_path / "prompt.safetensors")
    with pytest.raises(PromptFileError, match="no table of vectors"):
        ptuning.Prompt.load(tmp_path)


def test_another_number_of_vectors_than_described_is_refused(tmp_path: Path) -> None:
    trained().save(tmp_path)
    safetensors.torch.save_file({"vectors": torch.ones(4, 8)}, tmp_path / "prompt.safetensors")
    with pytest.raises(PromptFileError, match=r"names 3 virtual tokens.* holds 4"):
        ptuning.Prompt.load(tmp_path)


@pytest.mark.parametrize("damage", ["zeros at the end", "a bit"])
def test_damaged_vectors_are_noticed_by_the_checksum(damage: str, tmp_path: Path) -> None:
    trained().save(tmp_path)
    path = tmp_path / "prompt.safetensors"
    whole = path.read_bytes()
    bit = whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:]
    path.write_bytes(bit if damage == "a bit" else whole[:-40] + bytes(40))
    with pytest.raises(PromptFileError, match=r"damaged \(its SHA-256 is not the one in prompt"):
        ptuning.Prompt.load(tmp_path)
    path.write_bytes(whole)
    same(ptuning.Prompt.load(tmp_path), trained())


def test_an_edited_description_is_used_with_a_warning(tmp_path: Path) -> None:
    trained(answer="right").save(tmp_path)
    change_json(tmp_path, answer="other")
    with pytest.warns(UserWarning, match="another answer than its copy .* edited, or is damaged"):
        assert ptuning.Prompt.load(tmp_path).answer == "other"


WRONG_VECTORS = {
    "NaN": torch.full((3, 8), torch.nan),
    "infinity": torch.full((3, 8), torch.inf),
    "int8": torch.ones(3, 8, dtype=torch.int8),
    "bool": torch.ones(3, 8, dtype=torch.bool),
    "fp8": torch.ones(3, 8).to(torch.float8_e4m3fn),
    "complex": torch.ones(3, 8, dtype=torch.complex64),
    "beyond float32": torch.full((3, 8), 1e300, dtype=torch.float64),
    "width 0": torch.ones(3, 0),
}


@pytest.mark.parametrize("name", WRONG_VECTORS)
def test_vectors_that_are_no_finite_floats_are_refused(name: str, tmp_path: Path) -> None:
    trained().save(tmp_path)
    with safetensors.safe_open(tmp_path / "prompt.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = {"vectors": WRONG_VECTORS[name]}
    if name != "complex":  # which safetensors' releases write differently
        safetensors.torch.save_file(tensors, tmp_path / "prompt.safetensors", metadata)
        with pytest.raises(PromptFileError, match="vectors has"):
            ptuning.Prompt.load(tmp_path)
    prompt = trained()
    prompt.vectors = WRONG_VECTORS[name]
    with pytest.raises(PromptFileError, match="vectors has"):
        prompt.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["encoder_weights", "modules"])
def test_weights_that_are_not_finite_are_not_saved(place: str, tmp_path: Path) -> None:
    prompt = with_encoder(ptuning.Prompt(TEMPLATE))
    counted = {"count": torch.tensor(3)} if place == "modules" else {}
    setattr(prompt, place, {"x": torch.tensor([torch.nan]), **counted})
    with pytest.raises(PromptFileError, match="not finite"):
        prompt.save(tmp_path / "p")
    prompt.modules, prompt.encoder_weights = counted, None
    prompt.save(tmp_path / "p")


def test_a_description_without_a_template_is_refused(tmp_path: Path) -> None:
    trained().save(tmp_path)
    description = description_of(tmp_path)
    del description["template"]
    (tmp_path / "prompt.json").write_text(json.dumps(description))
    with pytest.raises(PromptFileError, match="has no template"):
        ptuning.Prompt.load(tmp_path)


@pytest.mark.parametrize("values", [["nan " * 16] * 16, [], ["1 2"], None, "x"])
def test_a_fingerprint_that_is_no_sample_is_refused(values: Any, tmp_path: Path) -> None:
    prompt = trained()
    prompt.base_model = describe(tiny.model(), tiny.tokenizer())
    prompt.base_model["embedding"]["values"] = values
    prompt.save(tmp_path)
    with pytest.raises(PromptFileError, match="no readable sample of the embedding"):
        ptuning.Prompt.load(tmp_path)


def test_a_base_model_in_the_prompts_folder_moves_with_it(tmp_path: Path) -> None:
    prompt, base = trained(), describe(tiny.model(), tiny.tokenizer())
    prompt.base_model = {**base, "name": str(tmp_path / "p" / "model"), "tuned_from": "makers/m"}
    prompt.save(tmp_path / "p")
    assert description_of(tmp_path / "p")["base_model"]["name"] == "makers/m"
    assert str(tmp_path) not in (tmp_path / "p" / "prompt.json").read_text()
    assert "makers/m" in (tmp_path / "p" / "README.md").read_text()
    (tmp_path / "p").rename(tmp_path / "q")
    loaded = ptuning.Prompt.load(tmp_path / "q")
    assert loaded.base_model["name"] == str(tmp_path / "q" / "model")
    loaded.save(tmp_path / "elsewhere")
    again = ptuning.Prompt.load(tmp_path / "elsewhere")
    assert again.base_model["name"] == str(tmp_path / "q" / "model")


def test_a_base_models_folder_stays_within_the_prompts(tmp_path: Path) -> None:
    trained().save(tmp_path)
    base = {**describe(tiny.model(), None), "folder": "../outside"}
    change_json(tmp_path, base_model=base)
    with pytest.raises(PromptFileError, match=r"base_model's folder: '\.\.' cannot be"):
        ptuning.Prompt.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "x\nlicense: evil\ntags:\n- hacked\n---\n# T",
        'x"); import os; os.system("id"); ("',
        "x\n```\nimport os\n```python\nimport os\n",
        "a: b",
        "`|`",
    ],
)
def test_no_name_writes_the_card(name: str, tmp_path: Path) -> None:
    prompt = trained(verbalizer={f"yes{name}": "a|b\n<script>", "no": "```"})
    prompt.base_model = {**describe(tiny.model(), None), "name": name}
    prompt.save(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert set(front) <= {"library_name", "tags", "base_model"}
    assert front["tags"] == ["p-tuning", "prompt"]
    for code in re.findall(r"^```(?:python|py)\n(.*?)^```", card, re.DOTALL | re.MULTILINE):
        imports = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Import)]
        assert [alias.name for n in imports for alias in n.names] == ["ptuning"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/home/me/secret/my-model", "my-model"),
        ("makers/tiny", "makers/tiny"),
    ],
)
def test_the_card_names_the_model_and_no_path(name: str, shown: str, tmp_path: Path) -> None:
    prompt = trained()
    prompt.base_model = {"name": name}
    prompt.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"`{shown}`" in card and "secret" not in card


# --- writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_or_read_only_disk_is_an_error_and_the_old_prompt_stays(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = trained()
    old.save(tmp_path / "p")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(PtuningError, match=f"cannot write to .*{os.strerror(number)}"):
            trained("[P] {text} [MASK]", seed=2).save(tmp_path / "p")
    same(ptuning.Prompt.load(tmp_path / "p"), old)
    assert names_in(tmp_path) == {"p"} and names_in(tmp_path / "p") == OURS


def test_files_move_within_a_folder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a mounted one: nothing can be moved there from beside it."""
    replace = os.replace

    def within(source: Path, target: Path) -> None:
        assert target.parent in source.parents
        replace(source, target)

    monkeypatch.setattr(os, "replace", within)
    trained = ptuning.Prompt("[P*2] {x} [MASK]", vectors=torch.ones(2, 4))
    (tmp_path / "mounted").mkdir()
    trained.save(tmp_path / "mounted")
    assert not list((tmp_path / "mounted").glob(".*"))
    assert torch.equal(
        ptuning.Prompt.load(tmp_path / "mounted").trained_vectors(), torch.ones(2, 4)
    )


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_nothing_where_nothing_was(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(PtuningError, match="No space left on device; free space there"):
            trained().save(tmp_path / "p")
    assert names_in(tmp_path) == set()


class Crash(BaseException):
    """The process ends here; nothing is cleaned up."""


def crash_at(step: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Make the `step`-th system call of a save the last one; gives the count of calls."""
    calls = [0]

    def counted(real: Any, torn: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == step:
                if torn:
                    torn(*args)
                raise Crash
            return real(*args, **kwargs)

        return call

    def half_a_file(path: Any, mode: str = "r", *_: Any) -> None:
        if "w" in mode:
            Path(path).write_bytes(b"half")

    for name in ("fsync", "replace", "rename", "mkdir", "chmod"):
        patch.setattr(os, name, counted(getattr(os, name)))
    patch.setattr(storage, "open", counted(open, half_a_file), raising=False)
    patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the dead clean nothing up
    return calls


@pytest.mark.parametrize("exists", [True, False])
def test_a_crash_at_any_step_leaves_the_old_or_the_new_prompt(exists: bool, tmp_path: Path) -> None:
    old = trained(None, num_virtual_tokens=3, answer="old")
    new = trained(None, num_virtual_tokens=2, seed=2, answer="new")
    step = 0
    seen = set()
    while True:
        step += 1
        folder = tmp_path / str(step) / "p"
        folder.parent.mkdir()
        if exists:
            old.save(folder)
        with pytest.MonkeyPatch.context() as patch:
            calls = crash_at(step, patch)
            try:
                new.save(folder)
                crashed = False
            except Crash:
                crashed = True
        if not crashed:
            break
        if not exists and not folder.exists():
            seen.add(None)
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*a save was cut off")
            loaded = ptuning.Prompt.load(folder)
        same(loaded, old if loaded.answer == "old" else new)
        seen.add(loaded.answer)
    assert calls[0] == step - 1 and step > 9
    assert seen == ({"old", "new"} if exists else {None, "new"})


def test_no_part_of_a_failed_save_stays_after_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trained().save(tmp_path / "p")
    assert names_in(tmp_path) == set()


def test_a_saved_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    trained().save(tmp_path / "p")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "p").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- base model -------------------------------------------------------------------------------


def named(name: str, **changes: Any) -> Any:
    model = tiny.model(**changes)
    model.config._name_or_path = name
    return model


def test_the_same_model_gives_no_warning_in_any_dtype() -> None:
    model = named("makers/first")
    known = describe(model, tiny.tokenizer())
    check_same(known, model, tiny.tokenizer())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        check_same(known, copy.deepcopy(model).to(dtype), tiny.tokenizer())
    half = describe(copy.deepcopy(model).to(torch.bfloat16), tiny.tokenizer())
    check_same(half, model, tiny.tokenizer())


def test_the_same_model_with_more_rows_gives_no_warning() -> None:
    model = named("makers/first")
    known = describe(model, tiny.tokenizer())
    model.resize_token_embeddings(500, mean_resizing=False)
    check_same(known, model, tiny.tokenizer())


def test_another_width_is_an_error_with_both_names() -> None:
    known = describe(named("makers/wide", hidden_size=64), tiny.tokenizer())
    with pytest.raises(PromptFileError, match=r"'makers/wide' .* width 64; 'makers/thin' has 32"):
        check_same(known, named("makers/thin"), tiny.tokenizer())


def test_other_weights_of_the_same_width_warn_with_both_names() -> None:
    known = describe(named("makers/first"), tiny.tokenizer())
    with pytest.warns(UserWarning, match="'makers/first', and 'makers/second' has other weights"):
        check_same(known, named("makers/second", seed=1), tiny.tokenizer())


def test_a_smaller_vocabulary_of_the_same_width_warns() -> None:
    known = describe(named("makers/first"), tiny.tokenizer())
    with pytest.warns(UserWarning, match="'makers/first', and 'makers/small' has other weights"):
        check_same(known, named("makers/small", vocab_size=100), tiny.tokenizer())


def test_attaching_a_prompt_to_other_weights_warns_at_the_caller() -> None:
    prompt = ptuning.Prompt(num_virtual_tokens=2)
    prompt.vectors = torch.zeros(2, 32)
    prompt.base_model = describe(named("makers/first"), tiny.tokenizer())
    with pytest.warns(UserWarning, match="other weights"):
        ptuning.attach(named("makers/second", seed=1), tiny.tokenizer(), prompt).detach()


def test_another_tokenizer_warns_with_both_names() -> None:
    model = named("makers/first")
    known = describe(model, tiny.tokenizer())
    with pytest.warns(UserWarning, match="'makers/first' with another tokenizer than .*makers/fir"):
        check_same(known, model, tiny.tokenizer("wordpiece"))


def test_no_tokenizer_and_an_unknown_base_model_are_no_matter() -> None:
    model = named("makers/first")
    check_same(describe(model, tiny.tokenizer()), model, None)
    check_same({}, model, tiny.tokenizer())


def test_a_model_that_is_only_compared_is_read_while_a_prompt_is_attached() -> None:
    model = named("makers/first")
    known = describe(model, tiny.tokenizer())
    prompt = ptuning.Prompt(num_virtual_tokens=2)
    prompt.vectors = torch.zeros(2, 32)
    with ptuning.attach(model, tiny.tokenizer(), prompt):
        assert describe(model, tiny.tokenizer()) == known


@pytest.mark.parametrize("name", ["you/capital", "no name", "../capital"])
def test_an_upload_that_cannot_be_says_so_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = rf"^cannot upload to '{re.escape(name)}' \(.*\); check the connection, the name and"
    with pytest.raises(PtuningError, match=expected) as caught:
        trained().push_to_hub(name)
    assert len(str(caught.value).splitlines()) == 1
    assert ("offline" in str(caught.value)) == (name == "you/capital")


@pytest.mark.skipif(os.name == "nt", reason="pipes and devices")
@pytest.mark.parametrize("name", ["prompt.json", "prompt.safetensors", "result.json"])
def test_a_pipe_or_an_endless_device_is_no_file_of_a_prompt(name: str, tmp_path: Path) -> None:
    for number, make in enumerate((os.mkfifo, lambda path: os.symlink("/dev/zero", path))):
        folder = tmp_path / str(number)
        trained().save(folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        if name == "prompt.safetensors":
            with pytest.raises(PromptFileError, match="does not exist"):
                ptuning.Prompt.load(folder)
            continue
        with pytest.raises(PromptFileError, match="is no regular file"):
            formats.read_json(folder / name)
        assert torch.equal(
            ptuning.Prompt.load(folder).trained_vectors(), trained().trained_vectors()
        )


def test_a_template_that_is_assigned_is_the_one_that_is_saved_and_used(tmp_path: Path) -> None:
    prompt = trained("[P*3] {text} [MASK]")
    prompt.template = "[P*3] Is it so that {text}? [MASK]"
    assert prompt.parsed.text == prompt.template
    prompt.save(tmp_path)
    same(ptuning.Prompt.load(tmp_path), prompt)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("template", "[P*5] {text} [MASK]", "num_virtual_tokens is 3, and the template has 5"),
        ("vectors", torch.ones(2, 8), "has 3 virtual tokens, and its vectors are 2"),
        ("vectors", [[1.0]], "vectors is list; expected a tensor"),
        ("max_length", 0, "max_length is 0"),
        ("encoder", "foo", "encoder is 'foo'; expected one of"),
        ("verbalizer", {"yes": "a", "no": "a"}, "share the word 'a'"),
    ],
)
def test_what_was_assigned_and_contradicts_the_rest_is_neither_saved_nor_used(
    name: str, value: Any, said: str, tmp_path: Path
) -> None:
    prompt = trained("[P*3] {text} [MASK]", verbalizer={"yes": "Paris", "no": "Rome"})
    setattr(prompt, name, value)
    tokenizer = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer), hidden_size=8)
    rows = [{"text": "France", "answer": "yes"}, {"text": "Italy", "answer": "no"}]
    works: list[Callable[[], Any]] = [
        lambda: prompt.save(tmp_path / "out"),
        lambda: ptuning.predict(model, tokenizer, prompt, rows),
        lambda: ptuning.evaluate(model, tokenizer, prompt, rows),
        lambda: ptuning.attach(model, tokenizer, prompt),
    ]
    if name != "vectors":
        works.append(lambda: ptuning.train(model, tokenizer, prompt, rows, epochs=1))
    for work in works:
        with pytest.raises(InputError, match=said):
            work()
    assert not (tmp_path / "out").exists()


def test_vectors_of_another_template_are_refused() -> None:
    with pytest.raises(InputError, match="has 1 virtual tokens, and its vectors are 5"):
        ptuning.Prompt("[P] {text} [MASK]", vectors=torch.zeros(5, 8))


def test_a_readme_of_ones_own_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My prompts")
    trained().save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My prompts"
    assert ptuning.Prompt.load(tmp_path).template == TEMPLATE
    trained().save(tmp_path / "new")
    trained("[P] {text} other [MASK]").save(tmp_path / "new")
    assert "other" in (tmp_path / "new/README.md").read_text()


def test_counts_may_be_numpys(tmp_path: Path) -> None:
    import numpy as np

    prompt = trained("[P*3] {text} [MASK]", max_length=np.int64(9), encoder_hidden_size=np.int32(4))
    prompt.save(tmp_path)
    same(ptuning.Prompt.load(tmp_path), prompt)
    assert ptuning.TrainSettings(epochs=np.int64(2)).epochs == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("nothing", ["", " ", 3, None, b"x"])
def test_what_is_no_path_names_no_folder_of_a_prompt(nothing: Any) -> None:
    for use in (trained().save, ptuning.Prompt.load, ptuning.Merged.load):
        with pytest.raises(InputError, match="is no path; give the name"):
            use(nothing)
    for read in (ptuning.read_examples, ptuning.load_model):
        with pytest.raises(InputError, match="is no path; give the name"):
            read(nothing)


def test_a_loaded_prompt_stays_what_it_is_whatever_becomes_of_its_file(tmp_path: Path) -> None:
    prompt = trained()
    prompt.save(tmp_path / "p")
    loaded = ptuning.Prompt.load(tmp_path / "p")
    with open(tmp_path / "p" / "prompt.safetensors", "r+b") as file:  # as cp and rsync write
        file.truncate(0)
        file.write(bytes(4096))
    assert torch.equal(loaded.trained_vectors(), prompt.trained_vectors())


@pytest.mark.parametrize("which", ["", "prompt.json", "prompt.safetensors"])
def test_a_prompt_that_may_not_be_read_says_so(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained().save(tmp_path / "p")
    (tmp_path / "p" / which).chmod(0)
    if os.access(tmp_path / "p" / which, os.R_OK):  # root reads everything
        _refuse_reading(tmp_path / "p" / which, monkeypatch)
    with pytest.raises(
        PromptFileError, match="cannot be read: Permission denied; let this user read it"
    ):
        ptuning.Prompt.load(tmp_path / "p")


def _refuse_reading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does where it is nobody's to read."""

    def refused(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(place: Any, *rest: Any, **more: Any) -> Any:
            inside = Path(place).is_relative_to(path) if isinstance(place, str | Path) else False
            if inside and (Path(place) != path or path.suffix):
                raise PermissionError(errno.EACCES, "Permission denied")
            return function(place, *rest, **more)

        return called

    monkeypatch.setattr(Path, "read_bytes", refused(Path.read_bytes))
    monkeypatch.setattr("builtins.open", refused(open))
    monkeypatch.setattr(safetensors, "safe_open", refused(safetensors.safe_open))
    if not path.suffix:
        monkeypatch.setattr(Path, "is_file", refused(Path.is_file))


def test_a_member_with_modules_of_its_own_is_refused() -> None:
    plain = ptuning.Prompt(TEMPLATE)
    beside = ptuning.Prompt(TEMPLATE, modules={"score": torch.ones(2)})
    for first, other in ((plain, beside), (beside, plain)):
        with pytest.raises(InputError, match="was trained without further modules"):
            dataclasses.replace(first, others=[other])


def test_a_mixture_has_at_least_as_many_words_as_virtual_tokens() -> None:
    sizes = [ptuning.Prompt(f"[P*{n}] {{x}}", encoder="mixture") for n in (2, 130)]
    assert [prompt.encoder_config(8).encoder_hidden_size for prompt in sizes] == [128, 130]


@pytest.mark.parametrize("given", [None, 3, "out"])
def test_members_that_are_no_list_are_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"others is .*; expected a list of trained prompts"):
        ptuning.Prompt("[P] {text} [MASK]", others=given)
