"""Adapters as folders and state dicts: both libraries read what either saves."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ptuning
from ptuning import peft_compat
from ptuning.errors import InputError, PromptFileError

from .. import tiny

IDS = torch.tensor([[15, 16, 17, 18], [19, 20, 21, 22]])
TASKS = {
    "CAUSAL_LM": ("llama", None),
    "SEQ_2_SEQ_LM": ("t5", None),
    "SEQ_CLS": ("bert", transformers.AutoModelForSequenceClassification),
    "TOKEN_CLS": ("bert", transformers.AutoModelForTokenClassification),
    "QUESTION_ANS": ("bert", transformers.AutoModelForQuestionAnswering),
    "FEATURE_EXTRACTION": ("roberta", transformers.AutoModel),
}


def base_for(task: str) -> Any:
    family, auto = TASKS[task]
    labels = 2 if task == "QUESTION_ANS" else 3
    model = tiny.model(family, num_labels=labels) if auto else tiny.model(family)
    if auto is None:
        return model
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return auto.from_config(model.config).eval()


def prompted(task: str, encoder: str = "MLP", library: Any = peft_compat) -> Any:
    config = library.PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=3,
        encoder_hidden_size=16,
        encoder_reparameterization_type=encoder,
    )
    model = library.get_peft_model(base_for(task), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.normal_(std=0.2)
    return model.eval()


def outputs(model: Any, task: str) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**inputs, return_dict=True)[0]


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
@pytest.mark.parametrize("task", TASKS)
def test_peft_reads_what_we_save_without_a_warning(task: str, encoder: str, tmp_path: Path) -> None:
    model = prompted(task, encoder)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(base_for(task), str(tmp_path)).eval()
    assert not [w for w in seen if "adapter" in str(w.message) or "nexpected" in str(w.message)]
    torch.testing.assert_close(outputs(theirs, task), outputs(model, task), atol=1e-5, rtol=1e-5)
    again = peft_compat.PeftModel.from_pretrained(base_for(task), tmp_path)
    assert torch.equal(outputs(again, task), outputs(model, task))
    assert type(again) is type(model) and again.peft_config["default"].inference_mode
    own = peft_compat.get_peft_model_state_dict(model)
    reference = peft.get_peft_model_state_dict(theirs)
    assert own.keys() == reference.keys()


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
@pytest.mark.parametrize("task", TASKS)
def test_we_read_what_peft_saves(task: str, encoder: str, tmp_path: Path) -> None:
    theirs = prompted(task, encoder, peft)
    theirs.save_pretrained(str(tmp_path))
    model = peft_compat.PeftModel.from_pretrained(base_for(task), tmp_path)
    expected = outputs(theirs, task)
    torch.testing.assert_close(outputs(model, task), expected, atol=1e-5, rtol=1e-5)
    going_on = peft_compat.PeftModel.from_pretrained(base_for(task), tmp_path, is_trainable=True)
    going_on.eval()
    torch.testing.assert_close(outputs(going_on, task), expected, atol=1e-5, rtol=1e-5)
    assert hasattr(going_on.prompt_encoder["default"], "mlp_head")
    assert any(p.requires_grad for p in going_on.parameters())


@pytest.mark.parametrize("encoder", ["MLP", "LSTM", "NONE"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"])
def test_training_goes_on_as_if_it_had_not_stopped(task: str, encoder: str, tmp_path: Path) -> None:
    model = prompted(task, encoder)
    model.save_pretrained(tmp_path)
    again = peft_compat.PeftModel.from_pretrained(base_for(task), tmp_path, is_trainable=True)
    labels = {"labels": torch.tensor([0, 2]) if task == "SEQ_CLS" else IDS}
    for one in (model, again.eval()):
        trained = [p for p in one.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        one(input_ids=IDS, **labels).loss.backward()
        optimizer.step()
    torch.testing.assert_close(outputs(again, task), outputs(model, task))


def test_several_adapters_are_saved_below_and_loaded_by_name(tmp_path: Path) -> None:
    model = prompted("SEQ_CLS")
    config = peft_compat.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model.add_adapter("other one", config)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "other one" / "adapter_model.safetensors").is_file()
    again = peft_compat.PeftModel.from_pretrained(base_for("SEQ_CLS"), tmp_path)
    again.load_adapter(tmp_path / "other one", "other one")
    for name in ("default", "other one"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(outputs(again, "SEQ_CLS"), outputs(model, "SEQ_CLS"))
    with pytest.raises(InputError, match=r"invalid `selected_adapters`.*'third'"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["third"])
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "new", selected_adapters=["other one"])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["other one"]


def test_a_template_is_saved_without_pefts_files_and_loaded_with_a_tokenizer(
    tmp_path: Path,
) -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    config = peft_compat.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    template = "[P*2] {text} is [P]"
    base = base_for("SEQ_CLS")
    model = peft_compat.get_peft_model(base, config, template=template, tokenizer=tokenizer).eval()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    with pytest.raises(InputError, match="needs a tokenizer"):
        peft_compat.PeftModel.from_pretrained(base_for("SEQ_CLS"), tmp_path)
    again = peft_compat.PeftModel.from_pretrained(
        base_for("SEQ_CLS"), tmp_path, tokenizer=tokenizer
    )
    assert torch.equal(outputs(again, "SEQ_CLS"), outputs(model, "SEQ_CLS"))


def test_the_core_reads_a_prompt_without_a_head_and_refuses_one_with(tmp_path: Path) -> None:
    model = prompted("CAUSAL_LM")
    model.save_pretrained(tmp_path / "lm")
    prompt = ptuning.Prompt.load(tmp_path / "lm")
    base = base_for("CAUSAL_LM")
    with torch.no_grad(), ptuning.attach(base, None, prompt) as attached:
        placed = attached.prepend(prompt, IDS)
        assert torch.equal(base(**placed).logits, outputs(model, "CAUSAL_LM"))
    prompted("SEQ_CLS").save_pretrained(tmp_path / "cls")
    with pytest.raises(InputError, match=r"trained together with classifier\.bias"):
        ptuning.attach(base_for("SEQ_CLS"), None, ptuning.Prompt.load(tmp_path / "cls"))


def test_old_releases_bin_files_are_read_but_no_code_in_them(tmp_path: Path) -> None:
    theirs = prompted("SEQ_CLS", library=peft)
    theirs.save_pretrained(str(tmp_path), safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    model = peft_compat.PeftModel.from_pretrained(base_for("SEQ_CLS"), tmp_path)
    torch.testing.assert_close(outputs(model, "SEQ_CLS"), outputs(theirs, "SEQ_CLS"))

    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("code ran",))

    torch.save({"prompt_embeddings": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(PromptFileError, match="can run any code"):
        peft_compat.PeftModel.from_pretrained(base_for("SEQ_CLS"), tmp_path)
    with pytest.raises(InputError, match="never pickled"):
        prompted("SEQ_CLS").save_pretrained(tmp_path, safe_serialization=False)


def _state(model: Any) -> Any:
    flags = [p.requires_grad for p in model.parameters()]
    hooks = len(model.get_input_embeddings()._forward_hooks)
    return list(model.state_dict()), flags, hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("prompt_embeddings"), "no tensor 'prompt_embeddings'"),
        (lambda t: t.update(prompt_embeddings=torch.ones(2, 32)), "asks for 3 rows"),
        (lambda t: t.update({"base_model.bert.pooler.dense.bias": torch.ones(32)}), "no place for"),
        (lambda t: t.update({"base_model.classifier.bias": torch.ones(9)}), r"\(9,\) for \(3,\)"),
        (lambda t: t.update({"x.lora_A.weight": torch.ones(9)}), "belong to no P-tuned"),
    ],
)
def test_wrong_tensors_are_refused_and_the_model_is_left_as_it_was(
    change: Any, message: str, tmp_path: Path
) -> None:
    prompted("SEQ_CLS", library=peft).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    base = base_for("SEQ_CLS").requires_grad_(True)
    before = _state(base)
    with pytest.raises(PromptFileError, match=message):
        peft_compat.PeftModel.from_pretrained(base, tmp_path)
    assert _state(base) == before
    model = prompted("SEQ_CLS")
    expected = outputs(model, "SEQ_CLS")
    with pytest.raises(PromptFileError, match=message):
        model.load_adapter(tmp_path, "new")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(outputs(model, "SEQ_CLS"), expected)


def test_missing_heads_warn_and_newer_keys_too(tmp_path: Path) -> None:
    prompted("SEQ_CLS", library=peft).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"]}, file)
    with pytest.warns(UserWarning, match="Found missing adapter keys.*classifier"):
        peft_compat.PeftModel.from_pretrained(base_for("SEQ_CLS"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "newer": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['newer'\]"):
        peft_compat.PeftConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    with pytest.raises(InputError, match="LORA"):
        peft_compat.PeftModel.from_pretrained(base_for("SEQ_CLS"), tmp_path)


@pytest.mark.parametrize("encoder", ["LSTM", "RESIDUAL", "MIXTURE"])
def test_a_state_dict_makes_a_trained_encoder_give_its_vectors(encoder: str) -> None:
    source, target = prompted("CAUSAL_LM"), prompted("CAUSAL_LM", encoder)
    with torch.no_grad():
        for parameter in target.prompt_encoder.parameters():
            parameter += torch.randn_like(parameter) / 4
    state = peft_compat.get_peft_model_state_dict(source)
    result = peft_compat.set_peft_model_state_dict(target, state)
    assert not result.missing_keys and not result.unexpected_keys
    expected = outputs(source, "CAUSAL_LM")
    torch.testing.assert_close(outputs(target, "CAUSAL_LM"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [2, 4, None])
def test_a_state_dict_of_other_vectors_changes_nothing(rows: int | None) -> None:
    model = prompted("SEQ_CLS", "NONE")
    before = peft_compat.get_peft_model_state_dict(model)
    state = {key: tensor + 1 for key, tensor in before.items() if key != "prompt_embeddings"}
    if rows:
        state["prompt_embeddings"] = torch.ones(rows, 32)
    with pytest.raises(PromptFileError, match=r"needs prompt_embeddings of shape \(3, 32\)"):
        peft_compat.set_peft_model_state_dict(model, state)
    after = peft_compat.get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_base_models_tensors_are_taken_as_a_whole_unless_told_otherwise() -> None:
    model = prompted("SEQ_CLS")
    state = peft_compat.get_base_model_state_dict(model)
    weight = state.pop("classifier.weight").clone()
    with pytest.raises(RuntimeError, match=r"Missing key.*classifier\.original_module\.weight"):
        peft_compat.set_base_model_state_dict(model, state)
    other = {"classifier.weight": weight + 1}
    peft_compat.set_base_model_state_dict(model, other, strict=False)
    own = model.base_model.classifier
    assert torch.equal(own.original_module.weight, weight + 1)
    assert not torch.equal(own.weight, weight + 1)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM", "RESIDUAL"])
def test_peft_sets_the_state_dict_of_a_model_of_ours(encoder: str) -> None:
    source, target = prompted("CAUSAL_LM"), prompted("CAUSAL_LM", encoder)
    peft.set_peft_model_state_dict(target, peft.get_peft_model_state_dict(source))
    expected = outputs(source, "CAUSAL_LM")
    torch.testing.assert_close(outputs(target, "CAUSAL_LM"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["default", "a.b"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_pefts_functions_give_and_set_what_is_trained_beside_the_prompt(
    task: str, name: str
) -> None:
    def made(seed: int) -> Any:
        model = peft_compat.get_peft_model(
            base_for(task),
            peft_compat.PromptEncoderConfig(task_type=task, num_virtual_tokens=3),
            name,
        ).eval()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            for key, parameter in model.named_parameters():
                if ".modules_to_save." in key:
                    parameter.normal_(std=0.2)
        return model

    source, target = made(1), made(2)
    state = peft.get_peft_model_state_dict(source, adapter_name=name)
    own = peft_compat.get_peft_model_state_dict(source, adapter_name=name)
    assert state.keys() == own.keys() and len(state) == 3
    assert all(torch.equal(state[key], own[key]) for key in own)
    peft.set_peft_model_state_dict(target, state, adapter_name=name)
    torch.testing.assert_close(outputs(target, task), outputs(source, task), atol=1e-5, rtol=1e-5)
    gathered = {key: value + 1 for key, value in source.state_dict().items()}
    moved = peft_compat.get_peft_model_state_dict(source, gathered, name)
    heads = [key for key in own if key.startswith("base_model.")]
    assert heads and all(torch.equal(moved[key], own[key] + 1) for key in heads)


@pytest.mark.parametrize("task", TASKS)
def test_auto_classes_load_base_and_adapter(task: str, tmp_path: Path) -> None:
    base = base_for(task)
    base.save_pretrained(tmp_path / "base")
    loaded = type(base).from_pretrained(tmp_path / "base")
    config = peft_compat.PromptEncoderConfig(task_type=task, num_virtual_tokens=3)
    model = peft_compat.get_peft_model(loaded, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    name = f"Auto{type(model).__name__}"
    again = getattr(peft_compat, name).from_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(again, task), outputs(model, task))
    wrong = "AutoPeftModelForCausalLM" if task != "CAUSAL_LM" else "AutoPeftModelForSeq2SeqLM"
    with pytest.raises(InputError, match="Expected target PEFT class"):
        getattr(peft_compat, wrong).from_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="from_pretrained"):
        peft_compat.AutoPeftModel()


def test_an_adapter_with_a_template_is_loaded_with_its_base(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tiny.model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM")
    template = "[P*2] {text} [P] so: [MASK]"
    model = peft_compat.get_peft_model(base, config, template=template, tokenizer=tokenizer).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft_compat.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", tokenizer=tokenizer
    )
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_an_adapter_of_the_hub_is_asked_for_as_its_base_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    tiny.model("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft_compat.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    asked: list[Any] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append(options.get("local_files_only"))
        return str(tmp_path / "adapter")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    auto = peft_compat.AutoPeftModelForCausalLM
    auto.from_pretrained("makers/adapter", local_files_only=True)
    assert asked and all(asked)


def test_an_adapter_without_a_task_finds_its_base_class(tmp_path: Path) -> None:
    tiny.model("bert").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    config = peft_compat.PromptEncoderConfig(num_virtual_tokens=3)
    model = peft_compat.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft_compat.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    # As in the reference a task's class loads it too, with the base class that the file names.
    asked = peft_compat.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(asked) is peft_compat.PeftModelForCausalLM
    assert isinstance(asked.base_model, transformers.BertForMaskedLM)
    file = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    values["auto_mapping"]["parent_library"] = "os"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match="allowlist"):
        peft_compat.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    for mapping, message in [
        ({"base_model_class": "BertModel"}, "names no parent_library"),
        ({"parent_library": "transformers", "base_model_class": "Bart"}, "there is none in this"),
        ({"parent_library": "transformers.no", "base_model_class": "Bart"}, "there is none in"),
        ({"parent_library": "transformersx", "base_model_class": "Bart"}, "allowlist"),
    ]:
        file.write_text(json.dumps({**values, "auto_mapping": mapping}))
        with pytest.raises(InputError, match=message):
            peft_compat.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_pushing_to_the_hub_uploads_the_saved_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import transformers.utils.hub as hub

    seen: list[list[str]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> Any:
            return type("Repo", (), {"repo_id": name})()

    def upload(self: Any, folder: Any, *args: Any, **options: Any) -> str:
        seen.append(sorted(path.name for path in Path(folder).iterdir()))
        return "done"

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: _Card())
    prompted("CAUSAL_LM").push_to_hub("someone/prompt")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(seen[0])


class _Card:
    def save(self, path: Any) -> None:
        Path(path).write_text("card")


def test_a_copy_saves_what_the_original_saves(tmp_path: Path) -> None:
    model = prompted("SEQ_CLS")
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    again = peft_compat.PeftModel.from_pretrained(base_for("SEQ_CLS"), tmp_path / "copy")
    assert torch.equal(outputs(again, "SEQ_CLS"), outputs(model, "SEQ_CLS"))


@pytest.mark.parametrize(
    "values",
    [
        {"num_virtual_tokens": numpy.int64(3), "encoder_hidden_size": numpy.int32(8)},
        {"num_virtual_tokens": torch.tensor(3)},
        {"num_virtual_tokens": 3, "encoder_dropout": numpy.float32(0.5)},
        {"num_virtual_tokens": 3, "modules_to_save": {"lm_head"}},
    ],
)
def test_what_can_be_trained_can_be_saved(values: dict[str, Any], tmp_path: Path) -> None:
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", **values)
    model = peft_compat.get_peft_model(base_for("CAUSAL_LM"), config).eval()
    model.save_pretrained(tmp_path / "model")
    config.save_pretrained(tmp_path / "config")
    again = peft_compat.PeftModel.from_pretrained(base_for("CAUSAL_LM"), tmp_path / "model")
    assert torch.equal(outputs(again, "CAUSAL_LM"), outputs(model, "CAUSAL_LM"))


def test_a_save_under_autocast_has_the_vectors_in_full(tmp_path: Path) -> None:
    model = prompted("CAUSAL_LM")
    expected = peft_compat.get_peft_model_state_dict(model)["prompt_embeddings"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.save_pretrained(tmp_path)
        assert torch.equal(model.get_prompt(1)[0], model.prompt_encoder["default"].table())
    assert torch.equal(
        load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], expected
    )


def test_what_is_saved_in_training_is_without_dropout_and_training_goes_on() -> None:
    model = peft_compat.get_peft_model(
        base_for("CAUSAL_LM"),
        peft_compat.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=3,
            encoder_reparameterization_type="LSTM",
            encoder_dropout=0.5,
        ),
    ).train()
    saved = [model.get_prompt_embedding_to_save("default") for _ in range(2)]
    assert model.prompt_encoder["default"].training and torch.equal(*saved)
    torch.testing.assert_close(model.eval().get_prompt(1)[0], saved[0])


def test_a_save_leaves_a_readme_of_ones_own(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# My model\n")
    model = prompted("CAUSAL_LM")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "# My model\n"
    card.unlink()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert "virtual tokens" in card.read_text()


def test_training_cannot_go_on_in_an_adapter_that_is_there_for_inference(tmp_path: Path) -> None:
    prompted("CAUSAL_LM").save_pretrained(tmp_path)
    model = peft_compat.PeftModel.from_pretrained(base_for("CAUSAL_LM"), tmp_path)
    with pytest.raises(InputError, match=r"inference alone.*delete_adapter\('default'\)"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "other", is_trainable=True)
    model.load_adapter(tmp_path, "other", is_trainable=True)


@pytest.mark.parametrize("nothing", ["", " ", 3, None])
def test_what_is_no_path_names_no_folder_of_an_adapter(
    nothing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = prompted("CAUSAL_LM")
    uses = (
        model.save_pretrained,
        model.create_or_update_model_card,
        model.peft_config["default"].save_pretrained,
        peft_compat.PeftConfig.from_pretrained,
    )
    for use in uses:
        with pytest.raises(InputError, match="is no path; give the name"):
            use(nothing)
    assert not list(tmp_path.iterdir())


ADDED = torch.tensor([[15, 405, 17, 18]])


def with_added_tokens(folder: Path, seed: int, rows: int = 410) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of the new rows
        model.resize_token_embeddings(rows)
    return model


@pytest.mark.parametrize("reader", [peft_compat, peft])
@pytest.mark.parametrize("writer", [peft_compat, peft])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_added_tokens_are_saved_and_loaded_by_both_libraries(
    tied: bool, writer: Any, reader: Any, tmp_path: Path
) -> None:
    tiny.model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    config = writer.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = writer.get_peft_model(with_added_tokens(tmp_path / "base", 0), config).eval()
    with pytest.warns(UserWarning, match="embedding"):
        model.save_pretrained(tmp_path / "adapter")
    base = with_added_tokens(tmp_path / "base", 1)
    again = reader.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ADDED).logits, model(input_ids=ADDED).logits)


def test_an_adapter_with_a_template_keeps_the_rows_of_added_tokens(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "base")
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    made = {"template": "[P*3] {text} yes", "tokenizer": tiny.tokenizer()}
    model = peft_compat.get_peft_model(with_added_tokens(tmp_path / "base", 0), config, **made)
    with pytest.warns(UserWarning, match="embedding"):
        model.eval().save_pretrained(tmp_path / "adapter")
    again = peft_compat.PeftModel.from_pretrained(
        with_added_tokens(tmp_path / "base", 1), tmp_path / "adapter", tokenizer=made["tokenizer"]
    )
    with torch.no_grad():
        assert torch.equal(again(input_ids=ADDED).logits, model(input_ids=ADDED).logits)


def test_the_embedding_is_saved_where_it_was_resized_or_on_request(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "base")
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)

    def saved(rows: int, **options: Any) -> set[str]:
        base = with_added_tokens(tmp_path / "base", 0, rows)
        model = peft_compat.get_peft_model(base, config.replace())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / "adapter", **options)
        return set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))

    alone = {"prompt_embeddings"}
    layers = {"base_model.model.embed_tokens.weight", "base_model.lm_head.weight"}
    assert saved(400) == saved(400, save_embedding_layers=False) == alone
    assert saved(410, save_embedding_layers=False) == alone
    assert saved(410) == saved(400, save_embedding_layers=True) == alone | layers
    with pytest.raises(InputError, match="save_embedding_layers is 'yes'; give True, False or"):
        saved(400, save_embedding_layers="yes")
    assert saved(410) == alone | layers
    with pytest.raises(PromptFileError, match="resize_token_embeddings first"):
        peft_compat.PeftModel.from_pretrained(base_for("CAUSAL_LM"), tmp_path / "adapter")


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_auto_classes_make_room_for_the_rows_that_were_saved(
    with_tokenizer: bool, tmp_path: Path
) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "base")
    base = with_added_tokens(tmp_path / "base", 0, 416)  # more than the tokenizer has tokens
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft_compat.get_peft_model(base, config).eval()
    with pytest.warns(UserWarning, match="embedding"):
        model.save_pretrained(tmp_path / "adapter")
    if with_tokenizer:
        tokenizer = tiny.tokenizer()
        tokenizer.add_tokens([f"<added {i}>" for i in range(410 - len(tokenizer))])
        tokenizer.save_pretrained(tmp_path / "adapter")
    again = peft_compat.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ADDED).logits, model(input_ids=ADDED).logits)


def test_auto_classes_make_room_for_a_tokenizers_tokens_and_take_none_away(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft_compat.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    tokenizer = tiny.tokenizer("wordpiece")
    for more in (0, 200):
        tokenizer.add_tokens([f"<added {i}>" for i in range(more)])
        tokenizer.save_pretrained(tmp_path / "adapter")
        again = peft_compat.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert len(again.word_embeddings.weight) == max(400, len(tokenizer))
    assert len(tokenizer) > 400 > len(tokenizer) - 200


def test_auto_classes_hand_on_how_the_adapter_shall_be_loaded(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft_compat.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    other = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft_compat.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", "mine", is_trainable=True, config=other
    )
    assert model.active_adapter == "mine" and model.peft_config["mine"] is other
    assert model.training and not other.inference_mode


def test_the_base_model_is_loaded_in_the_revision_that_the_adapter_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.model("llama")
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    base.name_or_path = "us/model"
    peft_compat.get_peft_model(base, config, revision="v2").save_pretrained(tmp_path)
    asked: list[Any] = []

    def load(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return tiny.model("llama")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    auto = peft_compat.AutoPeftModelForCausalLM
    auto.from_pretrained(tmp_path, revision="of_the_adapter", dtype="float32")
    assert asked == [("us/model", {"revision": "v2", "dtype": "float32"})]


def test_an_adapter_of_a_compiled_base_is_that_of_the_base(tmp_path: Path) -> None:
    def made(base: Any) -> Any:
        config = peft_compat.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
        return peft_compat.get_peft_model(base, config)

    compiled = made(torch.compile(base_for("SEQ_CLS"), backend="eager"))
    for parameter in compiled.base_model.classifier.parameters():
        parameter.data += 1
    state = peft_compat.get_peft_model_state_dict(compiled, save_embedding_layers=True)
    assert not any("_orig_mod" in key for key in state)
    assert (
        state.keys()
        == peft_compat.get_peft_model_state_dict(
            made(base_for("SEQ_CLS")), save_embedding_layers=True
        ).keys()
    )
    compiled.save_pretrained(tmp_path)
    loaded = peft_compat.PeftModel.from_pretrained(base_for("SEQ_CLS"), tmp_path)
    assert torch.equal(loaded.base_model.classifier.weight, compiled.base_model.classifier.weight)
    # As PEFT writes it where the base is compiled.
    named = {f"base_model._orig_mod.{k[11:]}" if "." in k else k: v for k, v in state.items()}
    result = peft_compat.set_peft_model_state_dict(made(base_for("SEQ_CLS")), named)
    assert result.missing_keys == result.unexpected_keys == []
    own = peft_compat.get_base_model_state_dict(compiled)
    assert own.keys() == base_for("SEQ_CLS").state_dict().keys()
    peft_compat.set_base_model_state_dict(compiled, own)


def test_a_compiled_base_without_a_task_is_saved_by_its_own_class(tmp_path: Path) -> None:
    base = tiny.model("bert")
    config = peft_compat.PromptEncoderConfig(num_virtual_tokens=3)
    peft_compat.get_peft_model(torch.compile(base, backend="eager"), config).save_pretrained(
        tmp_path
    )
    named = peft_compat.PeftConfig.from_pretrained(tmp_path).auto_mapping
    assert named["base_model_class"] == "BertForMaskedLM"


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_folder_that_another_program_has_written_since_gives_its_vectors(
    is_trainable: bool, tmp_path: Path
) -> None:
    prompted("CAUSAL_LM").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    rows = load_file(file)["prompt_embeddings"] + 1
    save_file({"prompt_embeddings": rows}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="has other vectors than prompt.safetensors"):
        model = peft_compat.PeftModel.from_pretrained(
            base_for("CAUSAL_LM"), tmp_path, is_trainable=is_trainable
        )
    torch.testing.assert_close(model.get_prompt_embedding_to_save("default"), rows)


def test_a_save_that_writes_nothing_makes_no_folder(tmp_path: Path) -> None:
    model, folder, file = prompted("CAUSAL_LM"), tmp_path / "folder", tmp_path / "file"
    model.save_pretrained(folder, selected_adapters=[])
    model.save_pretrained(folder, is_main_process=False)
    file.write_text("mine")
    with pytest.raises(InputError, match="is a file; give a directory"):
        model.save_pretrained(file)
    assert not folder.exists() and file.read_text() == "mine"


def test_heads_of_a_gathered_state_dict_are_saved(tmp_path: Path) -> None:
    model = prompted("SEQ_CLS")
    model.save_pretrained(
        tmp_path, state_dict={key: value + 1 for key, value in model.state_dict().items()}
    )
    saved = load_file(tmp_path / "adapter_model.safetensors")["base_model.classifier.weight"]
    assert torch.equal(saved, model.base_model.classifier.weight + 1)


def test_the_name_of_the_base_model_that_an_adapter_was_made_for_stays(tmp_path: Path) -> None:
    base = base_for("CAUSAL_LM")
    base.config.name_or_path = base.name_or_path = "us/model"
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft_compat.get_peft_model(base, config).save_pretrained(tmp_path)
    base.name_or_path = "/a/copy/of/it"
    peft_compat.PeftModel.from_pretrained(base, tmp_path).save_pretrained(tmp_path / "again")
    again = peft_compat.PeftConfig.from_pretrained(tmp_path / "again")
    assert again.base_model_name_or_path == "us/model"


def test_an_adapter_of_another_base_model_warns(tmp_path: Path) -> None:
    prompted("CAUSAL_LM").save_pretrained(tmp_path)
    other = tiny.model(TASKS["CAUSAL_LM"][0], seed=7)
    with pytest.warns(UserWarning, match="has other weights"):
        peft_compat.PeftModel.from_pretrained(other, tmp_path)


def test_an_adapter_of_another_template_is_not_loaded_into_one(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer("wordpiece", around=True)
    config = peft_compat.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    options = {"template": "[P*2] {text} is [P]", "tokenizer": tokenizer}
    model = peft_compat.get_peft_model(base_for("CAUSAL_LM"), config, **options)
    prompted("CAUSAL_LM").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="another template than the saved one"):
        model.load_adapter(tmp_path, "default")


def test_a_configuration_that_is_given_stands_for_the_saved_one(tmp_path: Path) -> None:
    model = prompted("CAUSAL_LM")
    model.save_pretrained(tmp_path)
    config = peft_compat.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_reparameterization_type="LSTM"
    )
    model.load_adapter(tmp_path, "second", is_trainable=True, config=config)
    assert model.peft_config["second"] is config and config.token_dim == 32
    assert hasattr(model.prompt_encoder["second"], "lstm_head")
    base = base_for("CAUSAL_LM")
    other = peft_compat.PeftModel.from_pretrained(base, tmp_path, is_trainable=True, config=config)
    assert other.peft_config["default"] is config
    for name, loaded in (("second", model), ("default", other)):
        vectors = loaded.get_prompt_embedding_to_save(name)
        torch.testing.assert_close(vectors, model.get_prompt_embedding_to_save("default"))


def test_an_adapters_task_decides_on_the_class_as_in_peft(tmp_path: Path) -> None:
    prompted("CAUSAL_LM").save_pretrained(tmp_path)
    for library in (peft, peft_compat):
        asked = library.PeftModelForSequenceClassification
        model = asked.from_pretrained(base_for("CAUSAL_LM"), tmp_path)
        assert type(model) is library.PeftModelForCausalLM


def test_what_is_loaded_for_inference_is_in_eval_mode(tmp_path: Path) -> None:
    prompted("SEQ_CLS").save_pretrained(tmp_path)
    for is_trainable in (True, False):
        base = base_for("SEQ_CLS").train()
        options = {"is_trainable": is_trainable}
        model = peft_compat.PeftModel.from_pretrained(base, tmp_path, **options)
        assert {m.training for m in model.modules()} == {is_trainable}
        assert any(p.requires_grad for p in model.parameters()) == is_trainable
        model.train().load_adapter(tmp_path, "second", **options)
        assert {m.training for m in model.modules()} == {is_trainable}


def test_an_adapter_below_is_found_by_its_subfolder(tmp_path: Path) -> None:
    model = prompted("CAUSAL_LM")
    model.add_adapter("below", peft_compat.PromptEncoderConfig(num_virtual_tokens=2))
    model.save_pretrained(tmp_path)
    options: dict[str, Any] = {"subfolder": "below"}
    again = peft_compat.PeftModel.from_pretrained(base_for("CAUSAL_LM"), tmp_path, **options)
    again.load_adapter(tmp_path, "second", **options)
    for name in ("default", "second"):
        assert again.peft_config[name].num_virtual_tokens == 2


def test_a_state_dict_without_a_trained_head_is_not_whole() -> None:
    model = prompted("SEQ_CLS")
    state = model.state_dict()
    model.load_state_dict(state)
    name = next(key for key in state if key.endswith(".modules_to_save.default.weight"))
    del state[name]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
