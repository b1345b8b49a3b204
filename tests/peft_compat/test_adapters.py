"""Adapters by name in ``ptuning.peft_compat``: adding, switching, disabling, deleting, copying."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import ptuning
from ptuning.backbone.injection import Injector
from ptuning.backbone.lookups import input_embedding
from ptuning.errors import InputError
from ptuning.peft_compat import (
    ModulesToSaveWrapper,
    PromptEncoderConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from ptuning.peft_compat.state_dicts import get_base_model_state_dict, set_base_model_state_dict
from ptuning.prompts.encoder_config import REFERENCE_VERSION

from .. import tiny

N = 3
IDS = torch.tensor([[15, 16, 17, 18, 19, 20], [30, 31, 32, 33, 34, 35]])
MASK = torch.ones_like(IDS)
AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
    None: transformers.AutoModelForMaskedLM,
}
CASES = [
    ("CAUSAL_LM", "llama"),
    ("SEQ_2_SEQ_LM", "t5"),
    ("SEQ_CLS", "bert"),
    ("TOKEN_CLS", "bert"),
    ("QUESTION_ANS", "bert"),
    ("FEATURE_EXTRACTION", "bert"),
]
WITH_HEAD = [case for case in CASES if case[0] in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")]
every_task = pytest.mark.parametrize(("task", "family"), CASES)
every_head = pytest.mark.parametrize(("task", "family"), WITH_HEAD)


def base_model(task: str | None = "CAUSAL_LM", family: str = "llama", **changes: Any) -> Any:
    """A random model with the task's head, in eval mode."""
    name, _, values = tiny.FAMILIES[family]
    spread = {} if family in tiny.SEQ2SEQ else {"initializer_range": 0.2}
    labels = 2 if task == "QUESTION_ANS" else 3
    changes = {**spread, "num_labels": labels, **changes}
    config = getattr(transformers, name)(vocab_size=400, **{**values, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AUTO[task].from_config(config).eval()


VALUES: dict[str, Any] = {"num_virtual_tokens": N, "encoder_hidden_size": 8}


def config_for(task: str | None = "CAUSAL_LM", **changes: Any) -> PromptEncoderConfig:
    return PromptEncoderConfig(task_type=task, **{**VALUES, **changes})


def prompted(task: str | None = "CAUSAL_LM", family: str = "llama", **changes: Any) -> Any:
    return get_peft_model(base_model(task, family), config_for(task, **changes)).eval()


def call(model: Any, task: str | None = None, ids: Tensor = IDS, **options: Any) -> Tensor:
    """A model's main output, for any task."""
    task = getattr(model, "task_type", None) if task is None else task
    if task == "SEQ_2_SEQ_LM":
        options["decoder_input_ids"] = ids[:, :3]
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    if task == "QUESTION_ANS":
        return torch.cat([output.start_logits, output.end_logits], 1)
    return output.last_hidden_state if task == "FEATURE_EXTRACTION" else output.logits


def change_head(model: Any, name: str, by: float = 0.5) -> None:
    """As if an adapter's head had been trained."""
    for module in model.base_model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            with torch.no_grad():
                for n, parameter in enumerate(module.modules_to_save[name].parameters()):
                    parameter += by * torch.randn_like(parameter) + n


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that must be as it was when something was refused or taken off."""
    return {
        "hooks": hooks_of(model),
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "flags": [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "attributes": sorted(vars(model)),
    }


def assert_as_it_was(model: nn.Module, before: dict[str, Any], *, flags: bool = True) -> None:
    now = snapshot(model)
    state, old = now.pop("state"), before["state"]
    assert list(state) == list(old)
    assert all(torch.equal(state[name], old[name]) for name in old)
    for key, value in now.items():
        assert (key == "flags" and not flags) or value == before[key], key


# --- adding and switching ---------------------------------------------------------------------


@every_task
def test_outputs_follow_the_active_adapter(task: str, family: str) -> None:
    model = prompted(task, family)
    first = call(model)
    model.add_adapter("second", config_for(task))
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    assert torch.equal(call(model), first)
    change_head(model, "second")
    model.set_adapter("second")
    second = call(model)
    assert model.active_adapter == "second" and model.active_peft_config is not None
    assert (first - second).abs().max() > 1e-3
    model.set_adapter("default")
    assert torch.equal(call(model), first)


def test_a_mixture_is_of_words_of_the_vocabulary() -> None:
    base = base_model()
    mixture = {"encoder_reparameterization_type": "MIXTURE", "encoder_hidden_size": 5}
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, **mixture)
    encoder = get_peft_model(base, config).prompt_encoder["default"]
    every = base.get_input_embeddings().weight
    assert all(bool((every == word).all(1).any()) for word in encoder.words)


def test_encoders_are_in_float32_whatever_pytorch_makes_by_default() -> None:
    base = base_model()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = get_peft_model(base, PromptEncoderConfig("CAUSAL_LM", num_virtual_tokens=N))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.prompt_encoder.parameters()} == {torch.float32}


def test_adapters_of_different_lengths_stand_beside_each_other() -> None:
    model = prompted()
    model.add_adapter("long", config_for(num_virtual_tokens=7))
    assert call(model).shape[1] == N + IDS.shape[1]
    model.set_adapter("long")
    assert call(model).shape[1] == 7 + IDS.shape[1]
    assert {k: c.num_virtual_tokens for k, c in model.peft_config.items()} == {
        "default": N,
        "long": 7,
    }


def test_an_adapter_of_several_is_as_alone() -> None:
    model = prompted()
    alone = call(model)
    for n, kind in enumerate(["MLP", "LSTM", "NONE"]):
        config = config_for(encoder_reparameterization_type=kind, num_virtual_tokens=n + 1)
        model.add_adapter(kind, config)
        model.set_adapter(kind)
        other = get_peft_model(
            base_model(),
            config_for(encoder_reparameterization_type=kind, num_virtual_tokens=n + 1),
        ).eval()
        other.prompt_encoder["default"].load_state_dict(model.prompt_encoder[kind].state_dict())
        torch.testing.assert_close(call(model), call(other))
    model.set_adapter("default")
    torch.testing.assert_close(call(model), alone)


@every_head
def test_only_the_active_adapters_head_is_trained(task: str, family: str) -> None:
    model = prompted(task, family)
    model.add_adapter("second", config_for(task))

    def trained() -> set[str]:
        return {
            n.rsplit(".", 2)[1] for n, p in model.base_model.named_parameters() if p.requires_grad
        }

    assert trained() == {"default"}
    model.set_adapter("second")
    assert trained() == {"second"}
    model.set_adapter("second", inference_mode=True)
    assert trained() == set()
    model.set_adapter("default")
    assert trained() == {"default"}


@every_task
def test_the_same_parameters_are_trained_as_in_peft(task: str, family: str) -> None:
    mine = prompted(task, family)
    config = peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=N, encoder_hidden_size=8)
    theirs = peft.get_peft_model(base_model(task, family), config)

    def trained(model: Any) -> dict[str, tuple[int, ...]]:
        return {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}

    assert trained(mine) == trained(theirs)
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_a_training_step_of_one_adapter_leaves_the_others() -> None:
    model = prompted("SEQ_CLS", "bert")
    model.add_adapter("second", config_for("SEQ_CLS"))
    first = call(model)
    model.set_adapter("second")
    before = call(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert not torch.equal(call(model), before)
    model.set_adapter("default")
    assert torch.equal(call(model), first)


def test_outputs_follow_the_encoder_when_it_is_changed_through_data() -> None:
    """Averages of weights, and some optimizers, write ``parameter.data``."""
    model = prompted(encoder_reparameterization_type="NONE")
    before = call(model)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.data.add_(1.0)
    assert not torch.equal(call(model), before)


def test_outputs_follow_a_fused_optimizers_step() -> None:
    model = prompted(encoder_reparameterization_type="NONE")
    optimizer = torch.optim.AdamW(model.prompt_encoder.parameters(), lr=0.1, fused=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    before = call(model)
    optimizer.step()
    assert not torch.equal(call(model), before)


@pytest.mark.parametrize("kind", ["MLP", "LSTM", "NONE"])
def test_outputs_follow_a_loaded_state_dict(kind: str) -> None:
    model, other = (prompted(encoder_reparameterization_type=kind) for _ in range(2))
    before = call(model)
    model.prompt_encoder.load_state_dict(other.prompt_encoder.state_dict())
    assert not torch.equal(call(model), before)
    assert torch.equal(call(model), call(other))


# --- names ------------------------------------------------------------------------------------

AWKWARD = [
    "a.b",
    "a b",
    "training",
    "ü",
    "keys",
    "x/y",
    "%2E",
    "%_keys",
    "%",
    "forward",
    "_modules",
    "original_module",
    "modules_to_save",
    "weight",
    "a.b/c.d",
    "0",
]


@pytest.mark.parametrize("name", AWKWARD)
def test_names_of_any_spelling_can_be_used(name: str) -> None:
    model = prompted("SEQ_CLS", "bert")
    first = call(model)
    model.add_adapter(name, config_for("SEQ_CLS"))
    change_head(model, name)
    assert list(model.peft_config) == ["default", name]
    assert list(model.prompt_encoder) == ["default", name] and name in model.prompt_encoder
    model.set_adapter(name)
    second = call(model)
    assert not torch.equal(first, second)
    mixed = call(model, adapter_names=["default", name])
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]))
    assert set(get_peft_model_state_dict(model, adapter_name=name)) == set(
        get_peft_model_state_dict(model)
    )
    model.delete_adapter(name)
    assert list(model.prompt_encoder) == ["default"] and name not in model.prompt_encoder
    assert torch.equal(call(model), first)


@pytest.mark.parametrize("name", AWKWARD)
def test_the_first_adapter_may_have_any_spelling(name: str) -> None:
    model = get_peft_model(base_model(), config_for(), name).eval()
    assert model.active_adapter == name and call(model).shape[1] == N + IDS.shape[1]
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    model.delete_adapter(name)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("name", ["a.b", "keys", "%2E"])
def test_the_encoders_dictionary_gives_names_as_they_are(name: str) -> None:
    model = get_peft_model(base_model(), config_for(), name)
    assert list(model.prompt_encoder.keys()) == [name]
    assert [key for key, _ in model.prompt_encoder.items()] == [name]
    assert model.prompt_encoder[name] is next(iter(model.prompt_encoder.values()))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            ".",
            "./",
            "a/..",
            "..",
            "/abs",
            "../up",
            "a/../../up",
            "..\\up",
            "C:\\x",
            "a\0b",
        ),
        *("a/", "./a", "a//b", ".ptuning-saved", "a\x1b[2J", "\ud800", "x" * 256, "a/" + "x" * 256),
    ],
)
def test_names_that_are_no_folders_are_refused(name: str) -> None:
    base = base_model("SEQ_CLS", "bert")
    before = snapshot(base)
    with pytest.raises(InputError, match="cannot be a folder's name"):
        get_peft_model(base, config_for("SEQ_CLS"), name)
    assert_as_it_was(base, before)
    model = get_peft_model(base, config_for("SEQ_CLS"))
    before = snapshot(model)
    with pytest.raises(InputError, match="cannot be a folder's name"):
        model.add_adapter(name, config_for("SEQ_CLS"))
    assert_as_it_was(model, before)


def test_a_slash_in_a_name_is_a_folder_in_a_folder(tmp_path: Path) -> None:
    model = get_peft_model(base_model(), config_for(), "of/capitals")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "of" / "capitals" / "adapter_config.json").is_file()


def test_the_name_of_rows_without_a_prompt_is_refused() -> None:
    with pytest.raises(InputError):
        get_peft_model(base_model(), config_for(), "__base__")


def test_a_taken_name_is_refused() -> None:
    model = prompted("SEQ_CLS", "bert")
    before = snapshot(model)
    with pytest.raises(InputError, match="'default' already exists"):
        model.add_adapter("default", config_for("SEQ_CLS"))
    assert_as_it_was(model, before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["other", "", "Default", "default "])
def test_an_unknown_name_is_refused(name: str) -> None:
    model = prompted()
    before = snapshot(model)
    for act in (model.set_adapter, model.delete_adapter, model.adapter):
        with pytest.raises(InputError, match=r"default"):
            act(name)
    with pytest.raises(InputError):
        call(model, adapter_names=["default", name])
    with pytest.raises(InputError):
        get_peft_model_state_dict(model, adapter_name=name)
    assert_as_it_was(model, before)
    assert model.active_adapter == "default"


# --- a row's own adapter ----------------------------------------------------------------------


@every_task
def test_each_row_may_name_its_adapter_or_none(task: str, family: str) -> None:
    model = prompted(task, family)
    model.add_adapter("second", config_for(task))
    change_head(model, "second")
    ids = IDS[[0, 1, 0, 1]]
    got = call(model, ids=ids, adapter_names=["second", "__base__", "default", None])
    plain = call(model.base_model, task, ids) if task == "CAUSAL_LM" else None
    for row, name in [(0, "second"), (2, "default")]:
        model.set_adapter(name)
        torch.testing.assert_close(got[row], call(model, ids=ids)[row], atol=1e-5, rtol=1e-4)
    if plain is not None:
        torch.testing.assert_close(got[3, N:], plain[3], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("names", [[], ["default"], ["default"] * 3])
def test_a_wrong_number_of_names_is_refused(names: list[str]) -> None:
    with pytest.raises(InputError, match=f"{len(names)} names, and the batch 2 rows"):
        call(prompted(), adapter_names=names)


def test_threads_use_different_adapters_at_once() -> None:
    model = prompted("SEQ_CLS", "bert")
    for n in range(3):
        model.add_adapter(str(n), config_for("SEQ_CLS", num_virtual_tokens=n + 1))
        change_head(model, str(n))
    names = list(model.peft_config)
    expected = {name: call(model, adapter_names=[name, name]) for name in names}
    wrong: list[Any] = []
    start = threading.Barrier(len(names))

    def run(name: str) -> None:
        start.wait()
        try:
            for _ in range(15):
                got = call(model, adapter_names=[name, name])
                if not torch.allclose(got, expected[name], atol=1e-5):
                    wrong.append(name)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- without adapters -------------------------------------------------------------------------


@every_task
def test_disabled_adapters_leave_the_base_model(task: str, family: str) -> None:
    expected = call(base_model(task, family), task)
    model = prompted(task, family)
    change_head(model, "default")
    before = call(model)
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
        assert torch.equal(call(model), expected)
        with model.disable_adapter():
            assert torch.equal(call(model), expected)
        assert torch.equal(call(model), expected)
    assert model.has_active_enabled_adapter
    assert torch.equal(call(model), before)


def test_an_error_in_the_block_enables_the_adapter_again() -> None:
    model = prompted()
    before = call(model)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        _ = 1 / 0
    assert torch.equal(call(model), before)


def test_an_error_in_a_disabled_call_enables_the_adapter_again() -> None:
    model = prompted("SEQ_CLS", "bert")
    change_head(model, "default")
    before = call(model)
    with pytest.raises((IndexError, ValueError)), model.disable_adapter():
        call(model, ids=IDS[0, 0])
    assert torch.equal(call(model), before)


def test_an_error_in_a_call_leaves_nothing_behind() -> None:
    model = prompted("SEQ_CLS", "bert")
    before, hooks = call(model), hooks_of(model)
    with pytest.raises(InputError, match="attention_mask"):
        model(input_ids=IDS, attention_mask=MASK[:, :2])
    with pytest.raises((InputError, IndexError)):
        call(model, ids=IDS + 10_000)
    assert hooks_of(model) == hooks and torch.equal(call(model), before)


@pytest.mark.parametrize(("task", "family"), [("CAUSAL_LM", "llama"), ("SEQ_2_SEQ_LM", "t5")])
def test_disabled_adapters_generate_what_the_base_model_generates(task: str, family: str) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": MASK}
    expected = base_model(task, family).generate(input_ids=IDS, **options)
    model = prompted(task, family)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=IDS, **options), expected)


def test_disabled_adapters_generate_without_the_layers_that_were_trained_with_them() -> None:
    model = prompted(modules_to_save=["layers.1", "lm_head"])
    change_head(model, "default")
    options = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 4, "do_sample": False}
    with model.disable_adapter():
        got = model.generate(**options)
    assert torch.equal(got, base_model().generate(**options))


def test_a_disabled_call_takes_the_prompts_own_arguments() -> None:
    model = prompted()
    expected = call(base_model())
    with model.disable_adapter():
        got = call(
            model, adapter_names=["default", None], task_ids=None, drop_virtual_positions=True
        )
    assert torch.equal(got, expected)


# --- taking adapters off ----------------------------------------------------------------------


@pytest.mark.parametrize(("task", "family"), [*CASES, ("SEQ_CLS", "llama")])
def test_the_last_adapter_leaves_the_base_model_as_it_was(task: str, family: str) -> None:
    base = base_model(task, family)
    expected, before = call(base, task), snapshot(base)
    model = get_peft_model(base, config_for(task)).eval()
    change_head(model, "default")
    call(model)
    model.delete_adapter("default")
    assert Injector.of(base) is None
    assert_as_it_was(base, before, flags=False)  # it stays frozen, as in the reference
    assert torch.equal(call(base, task), expected)
    assert model.active_adapters == [] and not model.has_active_enabled_adapter
    with pytest.raises(InputError, match="no adapter is active"):
        call(model)


@every_task
def test_another_adapter_becomes_active_where_one_is_deleted(task: str, family: str) -> None:
    model = prompted(task, family)
    model.add_adapter("second", config_for(task))
    model.add_adapter("third", config_for(task))
    change_head(model, "second")
    model.set_adapter("second")
    expected = call(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapter == "second" and list(model.peft_config) == ["second", "third"]
    assert torch.equal(call(model), expected)
    if (task, family) in WITH_HEAD:
        assert any(p.requires_grad for p in model.base_model.parameters())
    model.delete_adapter("third")
    assert torch.equal(call(model), expected)


def test_an_adapter_that_comes_after_another_library_prompt_keeps_its_own_ids() -> None:
    model = get_peft_model(base_model(), PromptEncoderConfig("CAUSAL_LM", num_virtual_tokens=N))
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    with torch.no_grad():
        model.add_adapter("new", config)
        model.set_adapter("new")
        expected = model(input_ids=IDS).logits
        weights = model.prompt_encoder["new"].state_dict()
        for name in ("default", "new"):
            model.delete_adapter(name)
        injector = Injector.on(model.base_model)
        injector.add(torch.ones(N, injector.width))
        model.add_adapter("again", config.replace())
        model.prompt_encoder["again"].load_state_dict(weights)
        model.set_adapter("again")
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_deleted_name_can_be_used_again() -> None:
    model = prompted("SEQ_CLS", "bert")
    model.delete_adapter("default")
    model.add_adapter("default", config_for("SEQ_CLS", num_virtual_tokens=5))
    model.set_adapter("default")
    assert call(model).shape == (2, 3)
    assert model.peft_config["default"].num_virtual_tokens == 5
    assert any(p.requires_grad for p in model.base_model.parameters())


def test_deleting_leaves_prompts_that_were_attached_otherwise() -> None:
    model = prompted()
    prompt = ptuning.Prompt(num_virtual_tokens=2)
    prompt.vectors = torch.randn(2, 32)
    with ptuning.attach(model.base_model, None, prompt) as attached:
        ids = torch.tensor([attached.ids(prompt)])
        model.delete_adapter("default")
        assert torch.equal(input_embedding(model.base_model)(ids)[0], prompt.vectors)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("act", ["set_adapter", "delete_adapter", "adapter"])
def test_a_list_of_names_is_refused(act: str) -> None:
    with pytest.raises(InputError, match="default"):
        getattr(prompted(), act)(["default"])


def test_the_configuration_of_no_adapter_is_refused() -> None:
    model = prompted()
    model.delete_adapter("default")
    with pytest.raises(InputError, match=r"there are \[\]"):
        _ = model.active_peft_config


def test_a_task_that_is_assigned_and_unknown_is_refused() -> None:
    config = config_for()
    config.task_type = "SUMMARY"
    with pytest.raises(InputError, match="Invalid task type: 'SUMMARY'"):
        get_peft_model(base_model(), config)


# --- configurations ---------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "family"), [("CAUSAL_LM", "llama"), ("SEQ_2_SEQ_LM", "t5")])
def test_one_configuration_serves_two_adapters(task: str, family: str) -> None:
    config = config_for(task)
    model = get_peft_model(base_model(task, family), config).eval()
    model.add_adapter("second", config)
    first = call(model)
    model.set_adapter("second")
    assert not torch.equal(call(model), first)
    a, b = (model.prompt_encoder[name] for name in ("default", "second"))
    assert a is not b and a.embedding.weight.shape == b.embedding.weight.shape


def test_one_configuration_serves_models_of_the_same_width() -> None:
    config = config_for(None, encoder_hidden_size=None)
    first = get_peft_model(base_model(), config)
    second = get_peft_model(base_model(None, "bert"), config)
    for model in (first, second):
        assert call(model.eval()).shape[1] == N + IDS.shape[1]


@every_head
@pytest.mark.parametrize("given", [None, "CAUSAL_LM"])
def test_the_head_is_trained_whatever_task_an_adapters_configuration_names(
    given: str | None, task: str, family: str
) -> None:
    """The model's class decides, as in PEFT."""
    kind = type(prompted(task, family))
    model = kind(base_model(task, family), config_for(given))
    model.add_adapter("second", config_for(given))
    for name in ("default", "second"):
        model.set_adapter(name)
        head = f".modules_to_save.{name}."
        assert any(head in key for key, p in model.named_parameters() if p.requires_grad)
        assert model.peft_config[name].task_type == (given or task)


def test_the_configuration_is_completed_in_place_as_pefts_is() -> None:
    mine, theirs = (
        config_for(),
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=8
        ),
    )
    get_peft_model(base_model(), mine)
    peft.get_peft_model(base_model(), theirs)
    values = {k: getattr(v, "value", v) for k, v in theirs.to_dict().items()}
    values |= {"encoder_reparameterization_type": "MLP", "peft_version": REFERENCE_VERSION}
    assert mine.to_dict() == values


def test_a_real_peft_configuration_is_accepted() -> None:
    config = peft.PromptEncoderConfig(
        task_type=peft.TaskType.SEQ_CLS,
        num_virtual_tokens=N,
        encoder_reparameterization_type=peft.PromptEncoderReparameterizationType.LSTM,
        encoder_hidden_size=8,
        encoder_num_layers=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(base_model("SEQ_CLS", "bert"), config).eval()
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    assert hasattr(model.prompt_encoder["default"], "lstm_head")
    assert isinstance(model.peft_config["default"], PromptEncoderConfig)
    model.add_adapter("second", config)
    assert call(model).shape == (2, 3)


def bad_inputs() -> list[Any]:
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    prompt_tuning = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    return [
        pytest.param(lora, {}, "peft_type is LORA", id="lora"),
        pytest.param(prompt_tuning, {}, "peft_type is PROMPT_TUNING", id="prompt tuning"),
        pytest.param({"task_type": "SEQ_CLS"}, {}, "is a dict", id="dict"),
        pytest.param(None, {}, "configuration is None", id="none"),
        pytest.param(
            PromptEncoderConfig(task_type="SEQ_CLS"),
            {},
            "num_virtual_tokens is missing",
            id="count",
        ),
        pytest.param(config_for("SEQ_CLS", token_dim=31), {}, "token_dim is 31", id="width"),
        pytest.param(config_for("SEQ_CLS"), {"mixed": True}, "mixed", id="mixed"),
        pytest.param(
            config_for("SEQ_CLS"), {"template": "[P*3] {text}"}, "needs a tokenizer", id="tokenizer"
        ),
        pytest.param(
            config_for("SEQ_CLS"),
            {"template": "[P*4] {text}", "tokenizer": tiny.tokenizer()},
            "num_virtual_tokens is 3",
            id="template",
        ),
    ]


@pytest.mark.parametrize(("config", "options", "message"), bad_inputs())
def test_bad_input_leaves_the_model_as_it_was(
    config: Any, options: dict[str, Any], message: str
) -> None:
    base = base_model("SEQ_CLS", "bert").train()
    before = snapshot(base)
    values = copy.deepcopy(vars(config)) if isinstance(config, PromptEncoderConfig) else None
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config, **options)
    assert_as_it_was(base, before)
    assert values is None or vars(config) == values
    if "mixed" in options:
        return
    model = get_peft_model(base, config_for("SEQ_CLS"))
    before, output = snapshot(model), call(model.eval())
    model.train()
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", config, **options)
    assert_as_it_was(model, before)
    assert list(model.peft_config) == ["default"] and list(model.prompt_encoder) == ["default"]
    assert torch.equal(call(model.eval()), output)


def test_an_adapter_is_added_in_the_mode_of_its_model() -> None:
    """Dropout of an LSTM would give other vectors in each call."""
    model = prompted()
    config = config_for(encoder_reparameterization_type="LSTM", encoder_dropout=0.5)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert torch.equal(call(model), call(model))
    model.train().add_adapter("third", config)
    assert model.prompt_encoder["third"].training


def test_an_option_that_there_is_none_of_is_refused_as_in_peft() -> None:
    config = config_for()
    with pytest.raises(TypeError, match="drop_virtual_position'"):
        get_peft_model(base_model(), config, drop_virtual_position=True)  # it has an s at its end
    kind = type(get_peft_model(base_model(), config))
    kind(base_model(), config, "default", False, low_cpu_mem_usage=True)


def test_another_methods_name_in_the_configuration_is_an_error() -> None:
    with pytest.raises(InputError, match="peft_type is LORA"):
        PromptEncoderConfig(peft_type="LORA", num_virtual_tokens=3)


def test_a_model_without_an_input_embedding_is_refused() -> None:
    base = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            image_size=8,
            patch_size=4,
        )
    )
    for model in (base, nn.Linear(2, 2)):
        before = snapshot(model)
        with pytest.raises(InputError, match="no input embedding"):
            get_peft_model(model, config_for(None))
        assert_as_it_was(model, before)


def test_modules_to_save_are_trained_beside_the_head() -> None:
    model = prompted("SEQ_CLS", "bert", modules_to_save=["pooler"])
    theirs = peft.get_peft_model(
        base_model("SEQ_CLS", "bert"),
        peft.PromptEncoderConfig(
            task_type="SEQ_CLS",
            num_virtual_tokens=N,
            encoder_hidden_size=8,
            modules_to_save=["pooler"],
        ),
    )
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert model.modules_to_save == theirs.modules_to_save
    assert set(get_peft_model_state_dict(model)) == set(peft.get_peft_model_state_dict(theirs))
    assert {k: v.tolist() for k, v in model.prompt_tokens.items()} == {
        name: theirs.prompt_tokens[name].tolist() for name in theirs.prompt_tokens
    }
    call(model)


def test_an_output_layer_among_modules_to_save_is_trained() -> None:
    model = prompted(modules_to_save=["lm_head"])
    plain = call(prompted())
    assert call(model).shape == plain.shape
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in trained) and all(g is not None for g in trained.values())


def test_the_input_embedding_among_modules_to_save_is_trained_or_refused() -> None:
    """The reference looks up text in the frozen embedding all the same."""
    base = base_model()
    before = snapshot(base)
    try:
        model = get_peft_model(base, config_for(modules_to_save=["embed_tokens"])).eval()
    except InputError:
        assert_as_it_was(base, before)
        return
    other = get_peft_model(base_model(), config_for()).eval()
    other.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    torch.testing.assert_close(call(model), call(other))


# --- numbers and parts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "family", "names", "said"),
    [
        ("SEQ_CLS", "bert", ["clasifier", "pooler"], "modules_to_save names clasifier, which"),
        ("CAUSAL_LM", "llama", ["score"], "no module named score, so its head is not trained"),
        ("SEQ_CLS", "bart", None, "no module named classifier or score, so its head"),
        ("SEQ_CLS", "bart", ["classification_head"], None),
        ("SEQ_CLS", "roberta", ["out_proj"], None),
        ("FEATURE_EXTRACTION", "bert", None, None),
    ],
)
def test_modules_that_are_not_there_to_be_trained_are_told_of(
    task: str, family: str, names: list[str] | None, said: str | None
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = prompted(task, family, modules_to_save=names)
        model.add_adapter("for_use", config_for(task, modules_to_save=names, inference_mode=True))
    messages = [str(w.message) for w in caught if "trained with the prompt" in str(w.message)]
    assert len(messages) == (said is not None) and (said or "") in "".join(messages)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert.embeddings", "names the input embedding"),
        ("encoder.layer", "a ModuleList, which is never called"),
    ],
)
def test_a_module_that_cannot_be_trained_with_a_prompt_is_refused(name: str, message: str) -> None:
    model = base_model("SEQ_CLS", "bert")
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        get_peft_model(model, config_for("SEQ_CLS", modules_to_save=[name]))
    assert_as_it_was(model, before)


def test_a_module_around_or_in_another_adapters_is_refused() -> None:
    """The other's would have other names in its file, and this one's would not be trained."""
    for first, second in (["pooler.dense", "pooler"], ["pooler", "pooler.dense"]):
        model = prompted("SEQ_CLS", "bert", modules_to_save=[first])
        before = snapshot(model)
        with pytest.raises(InputError, match=f"{second}, and another .*{first}; name one"):
            model.add_adapter("second", config_for("SEQ_CLS", modules_to_save=[second]))
        assert_as_it_was(model, before)
        model.add_adapter("third", config_for("SEQ_CLS", modules_to_save=[first]))


@pytest.mark.parametrize(("task", "family"), CASES)
@pytest.mark.parametrize("adapters", [1, 2])
def test_the_numbers_of_parameters_are_pefts(
    task: str, family: str, adapters: int, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = prompted(task, family)

    def config() -> Any:
        return peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=N, encoder_hidden_size=8)

    theirs = peft.get_peft_model(base_model(task, family), config())
    if adapters == 2:
        mine.add_adapter("second", config_for(task))
        theirs.add_adapter("second", config())
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    mine.print_trainable_parameters()
    printed = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert printed == capsys.readouterr().out


def test_the_base_model_is_given_back() -> None:
    base = base_model("SEQ_CLS", "bert")
    model = get_peft_model(base, config_for("SEQ_CLS"))
    assert model.get_base_model() is base and model.base_model is base
    assert model.config is base.config and model.device == base.device
    assert model.word_embeddings is input_embedding(base)


@every_head
def test_the_base_models_own_tensors_are_given_and_taken(task: str, family: str) -> None:
    base = base_model(task, family)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = get_peft_model(base, config_for(task)).eval()
    change_head(model, "default")
    state = get_base_model_state_dict(model)
    assert list(state) == list(before)
    assert all(torch.equal(state[k], before[k]) for k in before)
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in before.items()}
    result = set_base_model_state_dict(model, changed)
    assert not result.missing_keys and not result.unexpected_keys
    state = get_base_model_state_dict(model)
    assert all(torch.equal(state[k], changed[k]) for k in before)


# --- copies -----------------------------------------------------------------------------------


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


every_copy = pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_whole])


@every_copy
@every_task
def test_a_copy_gives_the_same_outputs(copied: Any, task: str, family: str) -> None:
    model = prompted(task, family)
    model.add_adapter("second", config_for(task, num_virtual_tokens=5))
    change_head(model, "second")
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = call(model)
    other = copied(model)
    assert type(other) is type(model) and other.active_adapter == "second"
    for name, wanted in expected.items():
        other.set_adapter(name)
        assert torch.equal(call(other), wanted)


@every_copy
def test_a_copy_that_was_made_before_the_first_call_has_its_prompt(copied: Any) -> None:
    model = prompted()
    other = copied(model)
    assert torch.equal(call(other), call(model))


@every_copy
def test_a_copy_made_after_a_training_step_has_its_prompt(copied: Any) -> None:
    model = prompted()
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.prompt_encoder.parameters(), lr=0.1).step()
    other = copied(model)
    assert torch.equal(call(other), call(model))


@every_copy
def test_copies_are_independent(copied: Any) -> None:
    model = prompted("SEQ_CLS", "bert")
    expected = call(model)
    other = copied(model)
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.add_(1.0)
    changed = call(other)
    assert not torch.equal(changed, expected) and torch.equal(call(model), expected)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.sub_(1.0)
    assert not torch.equal(call(model), expected) and torch.equal(call(other), changed)
    change_head(other, "default")
    assert not torch.equal(call(other), changed)


@every_copy
def test_a_copy_can_be_trained(copied: Any) -> None:
    model = prompted()
    call(model)
    other = copied(model)
    other(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in model.prompt_encoder.parameters()]
    for mine, wanted in zip(other.prompt_encoder.parameters(), grads, strict=True):
        assert mine.grad is not None and wanted is not None
        torch.testing.assert_close(mine.grad, wanted)


@every_copy
def test_deleting_in_a_copy_frees_the_copy_alone(copied: Any) -> None:
    model = prompted("SEQ_CLS", "bert")
    expected, hooks = call(model), hooks_of(model)
    other = copied(model)
    other.delete_adapter("default")
    assert hooks_of(other) == 0
    assert hooks_of(model) == hooks and torch.equal(call(model), expected)
    other.add_adapter("new", config_for("SEQ_CLS"))
    other.set_adapter("new")
    assert call(other).shape == expected.shape


# --- another vocabulary -----------------------------------------------------------------------

NEW_IDS = torch.tensor([[5, 403, 7, 408], [9, 10, 401, 12]])


def resized(model: Any, size: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.resize_token_embeddings(size, mean_resizing=False)


@pytest.mark.parametrize(("task", "family"), [("CAUSAL_LM", "llama"), ("SEQ_2_SEQ_LM", "t5")])
@pytest.mark.parametrize("called", [False, True])
def test_the_embedding_may_grow_under_an_adapter(task: str, family: str, called: bool) -> None:
    model = prompted(task, family)
    if called:
        call(model)
    resized(model, 410)
    base = base_model(task, family)
    resized(base, 410)
    other = get_peft_model(base, config_for(task)).eval()
    other.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    assert torch.equal(call(model, ids=NEW_IDS), call(other, ids=NEW_IDS))
    assert torch.equal(call(model), call(other))
    model.delete_adapter("default")
    assert hooks_of(model) == 0


def test_the_embedding_may_shrink_under_an_adapter() -> None:
    model = prompted()
    call(model)
    resized(model, 60)
    base = base_model()
    resized(base, 60)
    other = get_peft_model(base, config_for()).eval()
    other.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    assert torch.equal(call(model), call(other))


@pytest.mark.parametrize("made", [accelerate.init_empty_weights, partial(torch.device, "meta")])
def test_a_model_is_made_empty_and_counted_as_in_peft(made: Any) -> None:
    with made():
        model = get_peft_model(tiny.model("llama"), config_for())
        config = peft.PromptEncoderConfig(**VALUES, task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(tiny.model("llama"), config)
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_that_is_made_empty_is_filled_later() -> None:
    full = prompted()
    with accelerate.init_empty_weights():
        model = get_peft_model(base_model(), config_for()).eval()
    model.base_model.load_state_dict(full.base_model.state_dict(), assign=True)
    model.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(call(model), call(full))


def test_the_base_model_reads_new_tokens_after_growing() -> None:
    base = base_model()
    resized(base, 410)
    expected = call(base, "CAUSAL_LM", NEW_IDS)
    model = prompted()
    resized(model, 410)
    assert torch.equal(call(model.base_model, "CAUSAL_LM", NEW_IDS), expected)
    with model.disable_adapter():
        assert torch.equal(call(model, ids=NEW_IDS), expected)


@pytest.mark.parametrize("rows", [400, 410])
@pytest.mark.parametrize(
    ("task", "family"),
    [("CAUSAL_LM", "llama"), ("SEQ_2_SEQ_LM", "t5"), ("SEQ_2_SEQ_LM", "bart")],
)
def test_another_embedding_may_take_the_place_under_an_adapter(
    task: str, family: str, rows: int
) -> None:
    model = prompted(task, family)
    expected = call(model)
    old = input_embedding(model.base_model)
    other = copy.deepcopy(old)
    other._forward_hooks.clear()
    other._forward_pre_hooks.clear()
    other.weight = nn.Parameter(old.weight.detach().new_zeros(rows, old.embedding_dim))
    other.weight.data[:400], other.num_embeddings = old.weight.data, rows
    model.base_model.set_input_embeddings(other)
    assert torch.equal(call(model), expected)
    model.delete_adapter("default")
    assert hooks_of(model) == 0 == len(old._forward_hooks)


@pytest.mark.parametrize("copied", [False, True], ids=["new", "copied with its hooks"])
def test_models_on_one_base_keep_their_prompts_when_its_embedding_was_replaced_between_them(
    copied: bool,
) -> None:
    first = prompted()
    expected = call(first)
    old = input_embedding(first.base_model)
    other = nn.Embedding.from_pretrained(old.weight.detach())
    first.base_model.set_input_embeddings(copy.deepcopy(old) if copied else other)
    if copied:
        assert torch.equal(call(first), expected)
    second = get_peft_model(first.base_model, config_for("CAUSAL_LM")).eval()
    of_second = call(second)
    assert not torch.equal(of_second, expected)
    assert torch.equal(call(first), expected) and torch.equal(call(second), of_second)
    first.delete_adapter("default")
    assert torch.equal(call(second), of_second)
    second.delete_adapter("default")
    assert hooks_of(first) == 0 == len(old._forward_hooks)


def test_ids_that_the_model_has_no_row_for_are_refused_and_never_taken_for_virtual_tokens() -> None:
    ids = IDS.clone()
    ids[0, 2] = 401  # a token that was added to the tokenizer alone
    model = prompted()
    calls = [
        lambda: model(input_ids=ids),
        lambda: model(input_ids=ids, adapter_names=["default", None]),
        lambda: model.generate(input_ids=ids, max_new_tokens=1),
        lambda: model.generate(ids, max_new_tokens=1),
    ]
    for run in calls:
        with pytest.raises(InputError, match=r"the id 401, .* rows for 0 to 399: .*resize_token"):
            run()
    with model.disable_adapter(), pytest.raises(InputError, match="the id 401"):
        model(input_ids=ids)
    decoder = prompted("SEQ_2_SEQ_LM", "t5")
    with pytest.raises(InputError, match="decoder_input_ids have the id 401"):
        decoder(input_ids=IDS, decoder_input_ids=ids)
    model.base_model.resize_token_embeddings(402)
    assert model(input_ids=ids).logits.shape == (2, N + 6, 402)


def test_a_model_with_a_prompt_takes_another_prompt_in_front() -> None:
    inner = prompted()
    outer = get_peft_model(inner, config_for(num_virtual_tokens=5))
    tables = [model.prompt_encoder["default"].table() for model in (inner, outer)]
    words = input_embedding(inner)(IDS)
    vectors = torch.cat([*(table.expand(2, -1, -1) for table in tables), words], 1)
    logits = outer(input_ids=IDS).logits
    torch.testing.assert_close(logits, inner.base_model(inputs_embeds=vectors).logits)
    logits.sum().backward()
    assert all(bool(p.grad.any()) for p in outer.prompt_encoder["default"].parameters())


def test_the_embedding_may_grow_under_the_prompts_of_several_owners() -> None:
    grown = base_model()
    resized(grown, 410)
    expected = call(grown, "CAUSAL_LM", NEW_IDS)
    base = base_model()
    models = [get_peft_model(base, config_for(), name).eval() for name in ("one", "two")]
    rows = torch.randn(2, 32)
    span = Injector.on(base).add(rows)
    before = [call(model) for model in models]
    resized(base, 410)
    for model, outputs in zip(models, before, strict=True):
        assert torch.equal(call(model)[..., :400], outputs)
        assert call(model, ids=NEW_IDS).shape == (2, N + 4, 410)
    assert torch.equal(call(base, "CAUSAL_LM", NEW_IDS), expected)
    assert torch.equal(input_embedding(base)(torch.arange(span.first, span.end)), rows)


def test_rows_without_a_prompt_read_new_tokens_after_growing() -> None:
    base = base_model()
    resized(base, 410)
    expected = call(base, "CAUSAL_LM", NEW_IDS)
    model = prompted()
    resized(model, 410)
    assert torch.equal(call(model, ids=NEW_IDS, adapter_names=[None, None]), expected)
    assert torch.equal(call(model.base_model, "CAUSAL_LM", NEW_IDS), expected)


def test_deleting_after_growing_leaves_no_hook() -> None:
    model = prompted()
    resized(model, 410)
    model.delete_adapter("default")
    assert hooks_of(model) == 0


def test_adapters_added_after_growing_stand_beside_the_old() -> None:
    model = prompted()
    resized(model, 410)
    model.add_adapter("second", config_for())
    first = call(model, ids=NEW_IDS)
    model.set_adapter("second")
    assert not torch.equal(call(model, ids=NEW_IDS), first)
    model.set_adapter("default")
    assert torch.equal(call(model, ids=NEW_IDS), first)


def test_a_text_of_no_tokens_is_the_prompt_alone_as_in_peft() -> None:
    model = prompted()
    none = IDS[:, :0]
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=8
    )
    theirs = peft.get_peft_model(base_model(), config).eval()
    theirs.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    torch.testing.assert_close(call(model, ids=none), call(theirs, "CAUSAL_LM", none))


def test_rows_with_different_trained_layers_have_the_numbers_of_each_alone() -> None:
    model = prompted(modules_to_save=["layers.1"])
    model.add_adapter("second", config_for(modules_to_save=["layers.1"]))
    change_head(model, "second", 0.1)
    names = ["default", "second", "second", "default"]
    ids, mask = IDS[[0, 1, 0, 1]], torch.ones(4, IDS.shape[1], dtype=torch.long)
    mask[1, :2] = 0
    options = {"use_cache": False, "adapter_names": names}
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask, **options).logits
        for row, name in enumerate(names):
            one = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
            alone = model(**one, use_cache=False, adapter_names=[name]).logits
            torch.testing.assert_close(got[row, -3:], alone[0, -3:])
        with pytest.raises(InputError, match="use_cache=False"):
            model(input_ids=ids, attention_mask=mask, adapter_names=names)


def test_rows_with_trained_layers_that_give_several_tensors_have_the_numbers_of_each_alone() -> (
    None
):
    attention = "layer.1.attention.self"  # gives a tuple, with the weights or None in it
    model = prompted("SEQ_CLS", "bert", modules_to_save=[attention])
    model.add_adapter("second", config_for("SEQ_CLS", modules_to_save=[attention]))
    change_head(model, "second", 0.1)
    names = ["second", "default", "second"]
    got = call(model, ids=IDS[[0, 1, 1]], adapter_names=names)
    for row, name in enumerate(names):
        alone = call(model, ids=IDS[[min(row, 1)]], adapter_names=[name])
        torch.testing.assert_close(got[row], alone[0])


def test_rows_with_heads_of_their_own_generate_with_beams() -> None:
    model = prompted(modules_to_save=["lm_head"])
    model.add_adapter("second", config_for(modules_to_save=["lm_head"]))
    change_head(model, "second")
    options = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "pad_token_id": 0}
    options |= {"eos_token_id": None, "do_sample": False}
    got = model.generate(input_ids=IDS, adapter_names=["default", "second"], **options)
    for row, name in enumerate(["default", "second"]):
        alone = model.generate(input_ids=IDS[row : row + 1], adapter_names=[name], **options)
        assert torch.equal(got[2 * row : 2 * row + 2], alone)


def test_an_adapter_that_a_folder_does_not_fit_keeps_its_vectors(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    options = {"template": "[P*3] {text}", "tokenizer": tokenizer}
    with_template = get_peft_model(base_model(), config_for(), **options)
    with_template.save_pretrained(tmp_path)
    model = prompted()
    before = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    with pytest.raises(InputError, match="has another template"):
        model.load_adapter(tmp_path, "default")
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_second_model_on_one_base_says_that_it_replaces_the_first_one_s_head() -> None:
    base = base_model("SEQ_CLS", "bert")
    get_peft_model(base, config_for("SEQ_CLS"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(base, config_for("SEQ_CLS"), "other")
    with pytest.warns(UserWarning, match="adapter 'default', which are replaced by new ones"):
        get_peft_model(base, config_for("SEQ_CLS"))
