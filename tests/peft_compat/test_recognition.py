"""What other libraries take these models for: PEFT's, to ``isinstance``, Trainer and trl."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate.utils
import datasets
import peft
import pytest
import torch
import transformers

from ptuning import peft_compat
from ptuning.peft_compat import PeftModel, PromptEncoderConfig, get_peft_model

from .. import tiny

TEMPLATE = "[P*2] {text} so [P*2]"
IDS = torch.tensor([[15, 16, 17, 18]])


def config_of(library: Any = peft_compat, task: str = "CAUSAL_LM", **more: Any) -> Any:
    sizes = {"num_virtual_tokens": 4, "encoder_hidden_size": 16, **more}
    return library.PromptEncoderConfig(task_type=task, **sizes)


def base_model() -> Any:
    return tiny.model("llama", initializer_range=0.3)


def prompted(library: Any = peft_compat, **options: Any) -> Any:
    torch.manual_seed(1)
    model = library.get_peft_model(base_model(), config_of(library), **options)
    return model.train()


# --- isinstance ---------------------------------------------------------------------------------


def test_models_and_configurations_are_pefts_too() -> None:
    model = prompted()
    assert isinstance(model, peft.PeftModel) and isinstance(model, peft.PeftModelForCausalLM)
    assert not isinstance(model, peft.PeftModelForSeq2SeqLM)
    assert isinstance(model, PeftModel) and type(model) is peft_compat.PeftModelForCausalLM
    config = model.peft_config["default"]
    assert isinstance(config, peft.PeftConfig) and isinstance(config, peft.PromptEncoderConfig)
    assert type(config) is PromptEncoderConfig and not isinstance(config, peft.LoraConfig)
    assert accelerate.utils.is_peft_model(model)
    any_task = get_peft_model(tiny.model("bert"), PromptEncoderConfig(num_virtual_tokens=3))
    assert isinstance(any_task, peft.PeftModel)


def test_nothing_of_pefts_is_inherited() -> None:
    model = prompted()
    assert peft.PeftModel not in type(model).__mro__
    with pytest.raises(AttributeError):
        model.merge_and_unload  # noqa: B018
    assert model.__class__.__name__ == type(model).__name__
    assert model.__class__.generate is type(model).generate


def test_peft_is_not_imported_and_may_come_later() -> None:
    script = """
import sys
from ptuning.peft_compat import PromptEncoderConfig
config = PromptEncoderConfig(num_virtual_tokens=2)
assert config.__class__ is PromptEncoderConfig and isinstance(config, PromptEncoderConfig)
assert "peft" not in sys.modules
import types
sys.modules["peft"] = types.ModuleType("peft")  # its import has begun, or it is another one
assert config.__class__ is PromptEncoderConfig
sys.modules["peft"].PromptEncoderConfig = Later = type("PromptEncoderConfig", (), {})
assert isinstance(config, Later) and isinstance(config, PromptEncoderConfig)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_copies_and_pickles_are_as_before() -> None:
    model = prompted().eval()
    config = model.peft_config["default"]
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace()):
        assert type(again) is PromptEncoderConfig and again == config
    with torch.no_grad():
        expected = model(IDS).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model) and isinstance(other, peft.PeftModel)
            assert torch.equal(other(IDS).logits, expected)


def test_a_class_can_be_set_as_fsdp_sets_it() -> None:
    model = prompted()
    changed = type("Sharded", (type(model),), {})
    model.__class__ = changed
    assert type(model) is changed and isinstance(model, peft.PeftModel)


def test_peft_makes_its_own_model_of_our_configuration() -> None:
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base_model(), config_of())
    torch.manual_seed(0)
    expected = peft.get_peft_model(base_model(), config_of(peft))
    assert type(theirs) is peft.PeftModelForCausalLM
    assert torch.equal(theirs(IDS).logits, expected(IDS).logits)


# --- transformers.Trainer -----------------------------------------------------------------------


def rows(count: int, seed: int = 0) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 60, (count, 8), generator=generator).tolist()
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * 8] * count, "labels": ids}
    )


def trainer_for(model: Any, folder: Path, **settings: Any) -> transformers.Trainer:
    values = {"report_to": [], "use_cpu": True, "num_train_epochs": 2, "disable_tqdm": True}
    values |= {"per_device_train_batch_size": 4, "learning_rate": 0.05, "logging_steps": 1}
    values |= {"save_strategy": "epoch", "eval_strategy": "epoch", **settings}
    arguments = transformers.TrainingArguments(str(folder), **values)
    return transformers.Trainer(model, arguments, train_dataset=rows(8), eval_dataset=rows(4, 1))


def losses(trainer: transformers.Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def vectors(model: Any) -> Any:
    return model.eval().get_prompt(1)[0].detach()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, transformers.Trainer]:
    """The same training with both libraries."""
    made = {}
    for name, library in (("ours", peft_compat), ("theirs", peft)):
        made[name] = trainer_for(prompted(library), tmp_path_factory.mktemp(name))
        made[name].train()
        made[name].save_model(f"{made[name].args.output_dir}/final")
    return made


def test_losses_are_those_of_pefts_run(trained: dict[str, transformers.Trainer]) -> None:
    for name in ("loss", "eval_loss"):
        ours, theirs = (losses(trained[key], name) for key in ("ours", "theirs"))
        assert ours == pytest.approx(theirs, abs=1e-3) and len(ours) > 1
    assert torch.allclose(
        vectors(trained["ours"].model), vectors(trained["theirs"].model), atol=1e-4
    )


def test_checkpoints_are_small_adapter_folders(trained: dict[str, transformers.Trainer]) -> None:
    folder = Path(str(trained["ours"].args.output_dir))
    for saved in (folder / "final", folder / "checkpoint-2", folder / "checkpoint-4"):
        names = {path.name for path in saved.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "prompt.json"} <= names
        assert not {"model.safetensors", "pytorch_model.bin"} & names


@pytest.mark.parametrize("maker", ["ours", "theirs"])
@pytest.mark.parametrize("reader", [peft_compat, peft], ids=["ours", "theirs"])
def test_both_libraries_load_and_resume_either_folder(
    maker: str, reader: Any, trained: dict[str, transformers.Trainer], tmp_path: Path
) -> None:
    folder = Path(str(trained[maker].args.output_dir))
    loaded = reader.PeftModel.from_pretrained(base_model(), folder / "final")
    assert torch.allclose(vectors(loaded), vectors(trained[maker].model), atol=1e-6)
    again = trainer_for(prompted(reader), tmp_path)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    if maker == "ours" and reader is peft_compat:  # the encoder is there: it goes on exactly
        assert torch.allclose(vectors(again.model), vectors(trained[maker].model), atol=1e-6)


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["in front", "template"])
def test_resume_and_the_best_model_work(template: str | None, tmp_path: Path) -> None:
    def model() -> Any:
        return prompted(template=template, tokenizer=tiny.tokenizer())

    # Whichever way it goes, the first evaluation is called the best.
    settings = {"load_best_model_at_end": True, "greater_is_better": template is None}
    best = trainer_for(model(), tmp_path / "best", **settings)
    best.train()
    shown = losses(best, "eval_loss")
    assert abs(shown[0] - shown[-1]) > 1e-3
    assert best.evaluate()["eval_loss"] == pytest.approx(shown[0], abs=1e-5)
    straight = trainer_for(model(), tmp_path / "straight")
    straight.train()
    again = trainer_for(model(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert torch.allclose(vectors(again.model), vectors(straight.model), atol=1e-6)


def test_peft_reads_nothing_of_a_templates_folder(tmp_path: Path) -> None:
    """The file that Trainer looks for holds nothing that PEFT could put in front."""
    prompted(template=TEMPLATE, tokenizer=tiny.tokenizer()).save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        peft.PeftModel.from_pretrained(base_model(), tmp_path)
    with pytest.raises(KeyError, match="prompt_embeddings"):
        prompted(peft).load_adapter(tmp_path, "default")


# --- trl ----------------------------------------------------------------------------------------


PROMPTS = ["The capital of France is", "Does it rain in Oslo?"] * 4
COLUMNS: dict[str, dict[str, list[Any]]] = {
    "SFT": {"completion": [" Paris.", " yes, it does."] * 4},
    "DPO": {"chosen": [" Paris.", " yes."] * 4, "rejected": [" not Rome.", " no, no."] * 4},
    "KTO": {"completion": [" Paris.", " no."] * 4, "label": [True, False] * 4},
    "Reward": {"chosen": [" Paris.", " yes."] * 4, "rejected": [" not Rome.", " no, no."] * 4},
    "GRPO": {},
    "RLOO": {},
}


def trained_by_trl(kind: str, folder: Path, model: Any, **options: Any) -> list[tuple[float, ...]]:
    """Loss, gradient norm and reward of each step."""
    trl = pytest.importorskip("trl")
    try:
        trainer, settings = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    except (RuntimeError, ImportError):
        pytest.skip("this release of trl wants packages that are not here")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    sizes: dict[str, Any] = {"max_length": 64}
    if kind in ("GRPO", "RLOO"):  # trained on what the model says
        sizes = {"max_completion_length": 6, "num_generations": 4}
        options["reward_funcs"] = lambda completions, **columns: [
            float(len(c)) for c in completions
        ]
    arguments = settings(
        str(folder),
        report_to=[],
        max_steps=3,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        bf16=False,
        learning_rate=0.05,
        per_device_train_batch_size=4,
        **sizes,
    )
    torch.manual_seed(1)
    made = trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS, **COLUMNS[kind]}),
        processing_class=tokenizer,
        **options,
    )
    made.train()
    steps = [entry for entry in made.state.log_history if "loss" in entry]
    return [(one["loss"], one["grad_norm"], one.get("reward", 0.0)) for one in steps]


@pytest.mark.parametrize("kind", COLUMNS)
def test_trl_trains_as_with_peft(kind: str, tmp_path: Path) -> None:
    found = []
    for library in (peft_compat, peft):
        model = prompted(library)
        if kind == "Reward":
            torch.manual_seed(1)
            config = transformers.LlamaConfig(**base_model().config.to_dict() | {"num_labels": 1})
            base = transformers.LlamaForSequenceClassification(config)
            # Texts are padded, and a score depends on that there.
            options = {"reference_layout": True} if library is peft_compat else {}
            model = library.get_peft_model(base, config_of(library, "SEQ_CLS"), **options)
        found.append(trained_by_trl(kind, tmp_path, model))
    assert len(found[0]) == 3
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_makes_a_model_of_a_configuration(kind: str, tmp_path: Path) -> None:
    found = [
        trained_by_trl(kind, tmp_path, base_model(), peft_config=config_of(library))
        for library in (peft_compat, peft)
    ]
    assert len(found[0]) == 3
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
