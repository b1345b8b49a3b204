"""Training a `ptuning.peft_compat` model with what people train with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import datasets
import huggingface_hub
import pytest
import torch
import transformers
from torch import Tensor, nn

from ptuning.peft_compat import PeftModel, PromptEncoderConfig, get_peft_model
from ptuning.peft_compat.modules_to_save import Remembering

from .. import tiny

N = 3
IDS = torch.tensor([[15, 16, 17, 18, 19, 20], [30, 31, 32, 33, 34, 35]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
CASES = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
}
every_kind = pytest.mark.parametrize("family", CASES)
some_kinds = pytest.mark.parametrize("family", ["llama", "bert", "t5"])


def base_model(family: str, **changes: Any) -> Any:
    """A random model without dropout, with a head for its task."""
    if family == "gpt2":
        changes = {"pad_token_id": 0, **changes}
    if family not in ("t5", "bart"):
        changes = {"initializer_range": 0.1, **changes}
    model = tiny.model(family, **changes)
    if family == "bert":
        model.config.num_labels = 3
        torch.manual_seed(1)
        model = transformers.BertForSequenceClassification(model.config).eval()
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def prompted(base: Any, family: str, seed: int = 3, **options: Any) -> Any:
    config = PromptEncoderConfig(
        task_type=CASES[family], num_virtual_tokens=N, encoder_hidden_size=16
    )
    torch.manual_seed(seed)
    return get_peft_model(base, config, **options)


def batch_for(family: str, padded: bool = True) -> dict[str, Tensor]:
    batch = {"input_ids": IDS, "labels": IDS}
    if padded:
        batch["attention_mask"] = LEFT
    if family == "bert":
        batch["labels"] = torch.tensor([0, 2])
    return batch


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: Any, run: Callable[..., Any] | None = None, **batch: Any) -> Any:
    """The loss, and the gradient of every trained parameter."""
    model.zero_grad()
    loss = (model if run is None else run)(**batch).loss
    loss.backward()
    result = {name: p.grad for name, p in trained(model).items()}
    assert result and all(g is not None for g in result.values())
    model.zero_grad(set_to_none=True)
    return loss.detach(), result


def assert_same(got: Any, expected: Any, atol: float = 1e-6, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)


def base_state(model: Any) -> dict[str, Tensor]:
    """The base model's own tensors, whether their modules are wrapped or not."""
    state = nn.Module.state_dict(model.base_model)
    return {k: v.clone() for k, v in state.items() if ".modules_to_save." not in k}


# --- memory and precision -----------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@every_kind
def test_gradient_checkpointing_gives_the_same_gradient(family: str, reentrant: bool) -> None:
    model = prompted(base_model(family), family).train()
    batch = batch_for(family)
    expected = gradients(model, **batch)
    runs = []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    forward = torch.utils.checkpoint.checkpoint
    layers = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    for layer in layers:
        func = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *a, _f=func, **k: runs.append(1) or _f(*a, **k)
    assert forward and layers
    assert_same(gradients(model, **batch), expected)
    assert runs  # layers were checkpointed indeed


def test_preparing_for_gradient_checkpointing_gives_the_same_gradient() -> None:
    model = prompted(base_model("llama"), "llama").train()
    expected = gradients(model, **batch_for("llama"))
    model.prepare_model_for_gradient_checkpointing()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert_same(gradients(model, **batch_for("llama")), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointed_layers_are_recomputed_with_the_rows_own_modules(reentrant: bool) -> None:
    """The recomputation runs after the call, when the rows' names are no longer set."""

    def config() -> PromptEncoderConfig:
        return PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=2, modules_to_save=["mlp"]
        )

    torch.manual_seed(0)
    model = get_peft_model(base_model("llama"), config())
    model.add_adapter("other", config())
    for name, parameter in model.named_parameters():
        if ".modules_to_save.other." in name:
            parameter.data.normal_(std=0.3)
            parameter.requires_grad_(True)
    model.train()

    def gradient() -> dict[str, Tensor | None]:
        model.zero_grad(set_to_none=True)
        model(input_ids=IDS, labels=IDS, adapter_names=["other", "other"]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradient()
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            assert_same(got[name], value)


def test_checkpointed_layers_know_the_modules_of_an_adapter_that_came_later() -> None:
    def config(*names: str) -> PromptEncoderConfig:
        values: dict[str, Any] = {"num_virtual_tokens": 2, "modules_to_save": list(names)}
        return PromptEncoderConfig(task_type="CAUSAL_LM", **values)

    def gradient() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        model(input_ids=IDS, labels=IDS, adapter_names=["other", "other"]).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model = get_peft_model(base_model("llama"), config("mlp")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
    layer = model.base_model.model.layers[0]
    assert not isinstance(layer._gradient_checkpointing_func.checkpoint, Remembering)
    model.add_adapter("other", config("mlp", "self_attn"))
    for name, parameter in model.named_parameters():
        if ".modules_to_save.other." in name:
            parameter.data.normal_(std=0.3)
            parameter.requires_grad_(True)
    got = gradient()
    model.gradient_checkpointing_disable()
    assert_same(got, gradient())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointed_layers_of_several_calls_each_use_their_own_modules(reentrant: bool) -> None:
    """Losses of two adapters are added up before the one backward pass."""
    settings: dict[str, Any] = {"num_virtual_tokens": 2, "modules_to_save": ["mlp"]}
    model = get_peft_model(
        base_model("llama"), PromptEncoderConfig(task_type="CAUSAL_LM", **settings)
    )
    model.add_adapter("other", PromptEncoderConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if ".modules_to_save.other." in name:
            parameter.data.normal_(std=0.3)
            parameter.requires_grad_(True)
    model.train()

    def gradient() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        losses = [model(IDS, labels=IDS, adapter_names=[n] * 2).loss for n in ("default", "other")]
        (losses[0] + 2 * losses[1]).backward()
        return {n: p.grad for n, p in trained(model).items() if p.grad is not None}

    expected = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradient()
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert_same(got[name], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@some_kinds
def test_the_encoder_of_a_half_precision_base_is_float32(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base_model(family).save_pretrained(tmp_path)
    kind = type(base_model(family))
    base = kind.from_pretrained(tmp_path, dtype=dtype)
    kept = {name: p.dtype for name, p in base.named_parameters()}  # T5 keeps some in float32
    model = prompted(base, family)
    assert {p.dtype for p in model.prompt_encoder.parameters()} == {torch.float32}
    assert dtype in kept.values()
    own = {n.replace(".original_module", ""): p.dtype for n, p in base.named_parameters()}
    assert {name: own[name] for name in kept} == kept
    assert model.dtype == dtype and model.base_model_torch_dtype == dtype
    loss, got = gradients(model, **batch_for(family))
    assert loss.isfinite()
    whole = prompted(base_model(family), family)
    expected_loss, expected = gradients(whole, **batch_for(family))
    assert_same(loss.float(), expected_loss, atol=0.05, rtol=0.05)
    for name, gradient in got.items():
        if "prompt_encoder" in name:
            assert gradient.dtype == torch.float32
            cosine = nn.functional.cosine_similarity(
                gradient.flatten(), expected[name].flatten(), dim=0
            )
            assert cosine > 0.97 or expected[name].norm() < 1e-4, name


@some_kinds
def test_autocast_trains_in_bfloat16(family: str) -> None:
    model = prompted(base_model(family), family)
    expected_loss, expected = gradients(model, **batch_for(family))

    def run(**batch: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**batch)
        assert output.logits.dtype in (torch.bfloat16, torch.float32)
        return output

    loss, got = gradients(model, run, **batch_for(family))
    assert_same(loss.float(), expected_loss, atol=0.05, rtol=0.05)
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in got.values())
    whole, exact = (torch.cat([g.flatten() for g in part.values()]) for part in (got, expected))
    assert nn.functional.cosine_similarity(whole, exact, dim=0) > 0.9
    with torch.no_grad():  # what is kept without gradients was made under no autocast
        plain = model(**batch_for(family)).loss
    assert_same(plain, expected_loss, atol=1e-5)


def test_vectors_made_under_autocast_are_not_kept_for_calls_without() -> None:
    model = prompted(base_model("llama"), "llama").eval()
    with torch.no_grad():
        expected = model(IDS).logits
        for parameter in model.prompt_encoder.parameters():
            parameter.add_(0)  # a new version: the vectors are computed anew
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(IDS)
        assert_same(model(IDS).logits, expected)


# --- torch.compile ------------------------------------------------------------------------------


ONE_LAYER: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 1},
    "bert": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1},
}


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("llama", "aot_eager"),
        pytest.param("llama", "eager", marks=pytest.mark.slow),
        pytest.param("bert", "aot_eager", marks=pytest.mark.slow),
        pytest.param("t5", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_gives_the_same_loss_and_gradient(family: str, backend: str) -> None:
    model = prompted(base_model(family, **ONE_LAYER[family]), family)
    batch = batch_for(family)
    expected = gradients(model, **batch)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        assert_same(gradients(model, compiled, **batch), expected)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.mul_(0.5)
    changed = gradients(model, compiled, **batch)
    assert_same(changed, gradients(model, **batch))
    assert abs(changed[0] - expected[0]) > 1e-5
    with torch.no_grad():
        assert_same(compiled(**batch).loss, model(**batch).loss)


@pytest.mark.usefixtures("_fresh_dynamo")
@some_kinds
def test_a_compiled_base_model_gives_the_same_loss_and_gradient(family: str) -> None:
    model = prompted(base_model(family, **ONE_LAYER[family]), family)
    batch = batch_for(family)
    expected = gradients(model, **batch)
    model.base_model.compile(backend="aot_eager")
    for _ in range(2):
        assert_same(gradients(model, **batch), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
def test_inductor_gives_the_same_loss_and_gradient() -> None:
    model = prompted(base_model("llama", **ONE_LAYER["llama"]), "llama")
    batch = batch_for("llama")
    expected = gradients(model, **batch)
    assert_same(gradients(model, torch.compile(model), **batch), expected, atol=1e-5, rtol=1e-3)


# --- accelerate and distributed training --------------------------------------------------------


@some_kinds
def test_accelerate_prepares_and_trains(family: str) -> None:
    model = prompted(base_model(family), family)
    before = base_state(model)
    expected = gradients(model, **batch_for(family))
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(5):
        loss = prepared(**batch_for(family)).loss
        accelerator.backward(loss)
        if step == 0:
            got = {name: p.grad.clone() for name, p in trained(model).items()}
            assert_same(got, expected[1])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert accelerator.unwrap_model(prepared) is model
    assert_same(base_state(model), before, atol=0, rtol=0)


@some_kinds
def test_a_state_dict_goes_back_in_strictly(family: str) -> None:
    model, other = prompted(base_model(family), family), prompted(base_model(family), family, 9)
    result = other.load_state_dict(model.state_dict())
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert_same(encoder_state(other), encoder_state(model), atol=0, rtol=0)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_accelerate_saves_its_state_and_loads_it(tmp_path: Path) -> None:
    model = prompted(base_model("bert"), "bert")
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    saved = encoder_state(model)
    accelerator.save_state(str(tmp_path))
    accelerator.backward(prepared(**batch_for("bert")).loss)
    optimizer.step()
    assert any(not torch.equal(p, saved[name]) for name, p in encoder_state(model).items())
    accelerator.load_state(str(tmp_path))
    assert_same(encoder_state(model), saved, atol=0, rtol=0)


def test_accelerate_mixed_precision_gives_float32_outputs() -> None:
    model = prompted(base_model("llama"), "llama")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    output = prepared(**batch_for("llama"))
    accelerator.backward(output.loss)
    assert output.logits.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(model).values())


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@some_kinds
def test_distributed_data_parallel_gives_the_same_gradient(family: str) -> None:
    model = prompted(base_model(family), family)
    batch = batch_for(family)
    expected = gradients(model, **batch)
    if family == "t5":  # half of its rows are the reference's, which it never uses either
        expected[1].clear()
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        loss, got = gradients(model, parallel, **batch)
        assert_same(loss, expected[0])
        assert_same({name: got[name] for name in expected[1]}, expected[1])
    assert set(parallel.state_dict()) == {f"module.{name}" for name in model.state_dict()}


# --- transformers.Trainer -----------------------------------------------------------------------


def rows_for(family: str, count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        ids = torch.randint(10, 60, (6,), generator=generator).tolist()
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * 6}
        if family == "bert":
            row |= {"token_type_ids": [0, 0, 0, 1, 1, 1], "labels": int(ids[0] > 35)}
        else:
            row["labels"] = [7, 8, 9, 7, 8, 9]
        rows.append({**row, "a_column_of_no_use": "x"})
    return rows


def trainer_for(model: Any, family: str, folder: Path, **settings: Any) -> transformers.Trainer:
    kind = settings.pop("trainer", transformers.Trainer)
    arguments = settings.pop("arguments", transformers.TrainingArguments)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 5e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    rows = datasets.Dataset.from_list(rows_for(family))
    return kind(
        model=model,
        args=arguments(**{**values, **settings}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=transformers.default_data_collator,
    )


def encoder_state(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained(model).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_trainer_lowers_the_loss_and_changes_no_base_parameter(family: str, tmp_path: Path) -> None:
    model = prompted(base_model(family), family)
    before, start = base_state(model), encoder_state(model)
    trainer = trainer_for(model, family, tmp_path)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first - 0.02
    assert_same(base_state(model), before, atol=0, rtol=0)
    assert all(not torch.equal(p, start[name]) for name, p in encoder_state(model).items())


def test_trainer_gives_the_model_its_token_types(tmp_path: Path) -> None:
    model = prompted(base_model("bert"), "bert")
    seen: list[set[str]] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    trainer_for(model, "bert", tmp_path, max_steps=1).train()
    assert seen and "token_type_ids" in seen[0] and "a_column_of_no_use" not in seen[0]


def test_trainer_finds_the_labels_of_question_answering(tmp_path: Path) -> None:
    config = tiny.model("bert").config
    config.num_labels = 2
    base = transformers.BertForQuestionAnswering(config)
    settings = PromptEncoderConfig(task_type="QUESTION_ANS", num_virtual_tokens=N)
    model = get_peft_model(base, settings)
    trainer = trainer_for(model, "bert", tmp_path, max_steps=2)
    assert set(trainer.label_names) == {"start_positions", "end_positions"}
    rows = [
        {**row, "start_positions": 4, "end_positions": 5}
        for row in rows_for("bert")
        if row.pop("labels") is not None
    ]
    trainer.train_dataset = trainer.eval_dataset = datasets.Dataset.from_list(rows)
    trainer.train()
    predicted = trainer.predict(trainer.eval_dataset)
    start, end = predicted.predictions
    assert start.shape == end.shape == (16, N + 6)
    assert len(predicted.label_ids) == 2 and predicted.metrics["test_loss"] > 0


def test_trainer_predicts_the_texts_positions_where_virtual_ones_are_dropped(
    tmp_path: Path,
) -> None:
    model = prompted(base_model("llama"), "llama", drop_virtual_positions=True)
    predicted = trainer_for(model, "llama", tmp_path).predict(
        datasets.Dataset.from_list(rows_for("llama"))
    )
    assert predicted.predictions.shape == (16, 6, 400)


def test_loading_a_checkpoint_does_not_warn_of_the_base_models_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer_for(prompted(base_model("bert"), "bert"), "bert", tmp_path, **settings).train()
    caplog.clear()
    model = prompted(base_model("bert"), "bert")
    trainer_for(model, "bert", tmp_path, **settings).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    assert not [r.message for r in caplog.records if "missing keys" in r.message]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_trainer_resumes_from_a_checkpoint_to_the_same_state(
    family: str, tied: bool, tmp_path: Path
) -> None:
    changes = {"tie_word_embeddings": tied} if family != "bert" else {}

    def fresh() -> Any:
        return prompted(base_model(family, **changes), family)

    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    straight = fresh()
    trainer_for(straight, family, tmp_path, **settings).train()
    checkpoint = tmp_path / "checkpoint-3"
    size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    weights = sum(p.numel() * 4 for p in trained(straight).values())
    assert weights <= size < weights + 10_000  # what is trained, and not the base model
    resumed = fresh()
    with torch.no_grad():
        for parameter in trained(resumed).values():
            parameter.zero_()
    trainer_for(resumed, family, tmp_path, **settings).train(resume_from_checkpoint=str(checkpoint))
    assert_same(encoder_state(resumed), encoder_state(straight), atol=0, rtol=0)


def test_trainer_loads_the_best_model_at_the_end(tmp_path: Path) -> None:
    model = prompted(base_model("llama"), "llama")
    trainer = trainer_for(
        model,
        "llama",
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        max_steps=8,
        load_best_model_at_end=True,
        greater_is_better=True,  # the largest loss is the best: that of the first evaluation
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] == max(losses) > losses[-1] + 0.1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing": True}, {"bf16": True}, {"gradient_accumulation_steps": 2}],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_trainers_options_work(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = prompted(base_model(family), family)
    trainer = trainer_for(model, family, tmp_path, **settings)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first


def test_a_model_trained_by_trainer_is_saved_and_loaded(tmp_path: Path) -> None:
    model = prompted(base_model("bert"), "bert")
    trainer = trainer_for(model, "bert", tmp_path / "run", max_steps=3)
    trainer.train()
    expected = trainer.predict(trainer.eval_dataset).predictions
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path / "adapter")
    got = trainer_for(loaded, "bert", tmp_path / "again").predict(trainer.eval_dataset).predictions
    assert_same(torch.tensor(got), torch.tensor(expected), atol=1e-5)


def test_trainers_card_of_a_saved_model_says_what_it_is(tmp_path: Path) -> None:
    trainer = trainer_for(prompted(base_model("t5"), "t5"), "t5", tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags="mine")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and {"mine", "p-tuning"} <= set(card.data.tags)
    trainer.model.create_or_update_model_card(tmp_path / "new")
    made = huggingface_hub.ModelCard.load(tmp_path / "new" / "README.md")
    assert made.data.library_name == "peft"


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_seq2seq_trainer_predicts_by_generating(family: str, tmp_path: Path) -> None:
    model = prompted(base_model(family), family)
    trainer = trainer_for(
        model,
        family,
        tmp_path,
        trainer=transformers.Seq2SeqTrainer,
        arguments=transformers.Seq2SeqTrainingArguments,
        predict_with_generate=True,
        generation_max_length=8,
        max_steps=1,
    )
    trainer.train()
    predicted = trainer.predict(datasets.Dataset.from_list(rows_for(family)))
    batch = torch.tensor([row["input_ids"] for row in rows_for(family)])
    expected = model.generate(
        input_ids=batch, attention_mask=torch.ones_like(batch), max_length=8, do_sample=False
    )
    width = expected.shape[1]
    assert predicted.predictions[:, :width].tolist() == expected.tolist()


# --- where the base model's weights lie ---------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_a_base_model_with_offloaded_weights_trains_and_generates(family: str) -> None:
    model = prompted(base_model(family), family)
    expected = gradients(model, **batch_for(family))
    tokens = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    base = accelerate.cpu_offload(base_model(family), execution_device=torch.device("cpu"))
    offloaded = prompted(base, family)
    offloaded.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    assert_same(gradients(offloaded, **batch_for(family)), expected)
    got = offloaded.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert got.tolist() == tokens.tolist()


def test_a_classifier_with_offloaded_weights_trains_its_head() -> None:
    model = prompted(base_model("bert"), "bert")
    expected = gradients(model, **batch_for("bert"))
    base = accelerate.cpu_offload(base_model("bert"), execution_device=torch.device("cpu"))
    offloaded = prompted(base, "bert")
    offloaded.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    assert not any(p.is_meta for p in trained(offloaded).values())
    assert_same(gradients(offloaded, **batch_for("bert")), expected)
    optimizer = torch.optim.SGD(trained(offloaded).values(), lr=0.1)
    before = offloaded(**batch_for("bert")).loss
    before.backward()
    optimizer.step()
    assert offloaded(**batch_for("bert")).loss < before


def test_a_head_of_several_offloaded_layers_is_trained() -> None:
    def base() -> Any:
        config = tiny.model("roberta").config
        config.num_labels = 3
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        torch.manual_seed(1)
        return transformers.RobertaForSequenceClassification(config).eval()

    model = prompted(base(), "bert")
    expected = gradients(model, **batch_for("bert"))
    offloaded = prompted(
        accelerate.cpu_offload(base(), execution_device=torch.device("cpu")), "bert"
    )
    offloaded.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    assert not any(p.is_meta for p in trained(offloaded).values())
    assert_same(gradients(offloaded, **batch_for("bert")), expected)


@pytest.mark.parametrize("whole", [True, False])
def test_a_head_that_lies_on_a_disk_is_trained(whole: bool, tmp_path: Path) -> None:
    config = tiny.model("roberta").config
    config.num_labels = 3
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    auto, batch = transformers.AutoModelForSequenceClassification, batch_for("bert")
    parts = ["classifier"] if whole else ["classifier.dense", "classifier.out_proj"]
    places = {"roberta": "cpu", **dict.fromkeys(parts, "disk")}
    options = {"device_map": places, "offload_folder": tmp_path / "off"}
    model = prompted(auto.from_pretrained(tmp_path / "base"), "bert")
    offloaded = prompted(auto.from_pretrained(tmp_path / "base", **options), "bert")
    offloaded.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    assert not any(p.is_meta for p in trained(offloaded).values())
    assert_same(gradients(offloaded, **batch), gradients(model, **batch))
    with model.disable_adapter(), offloaded.disable_adapter():
        assert_same(offloaded(**batch).logits, model(**batch).logits)


def test_a_copied_head_does_not_copy_the_offloaded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    base = accelerate.cpu_offload(base_model("bert"), execution_device=torch.device("cpu"))
    copied: list[Any] = []
    for kind in (Tensor, nn.Parameter):

        def counted(tensor: Any, memo: Any, own: Any = kind.__deepcopy__) -> Any:
            copied.append(tensor)
            return own(tensor, memo)

        monkeypatch.setattr(kind, "__deepcopy__", counted)
    prompted(base, "bert")
    assert len(copied) == 2


@some_kinds
def test_a_base_model_loaded_with_a_device_map_trains(family: str, tmp_path: Path) -> None:
    plain = base_model(family)
    plain.save_pretrained(tmp_path)
    base = type(plain).from_pretrained(tmp_path, device_map={"": "cpu"})
    model, other = prompted(base, family), prompted(plain, family)
    assert_same(gradients(model, **batch_for(family)), gradients(other, **batch_for(family)))


# --- quantized weights --------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A stand-in for weight-only quantization: packed integers, no parameter, differentiable."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight / scale).round().to(torch.int8).detach())
        self.register_buffer("scale", scale.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.packed * self.scale, self.bias)


def with_packed_weights(model: Any) -> Any:
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in path and "classifier" not in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Int8Linear(module))
    return model


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_base_model_with_packed_weights_trains(family: str) -> None:
    model = prompted(with_packed_weights(base_model(family)), family)
    loss, got = gradients(model, **batch_for(family))
    expected_loss, _ = gradients(prompted(base_model(family), family), **batch_for(family))
    assert_same(loss, expected_loss, atol=0.05, rtol=0.05)
    optimizer = torch.optim.Adam(trained(model).values(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch_for(family)).loss.backward()
        optimizer.step()
    assert model(**batch_for(family)).loss < loss
    assert got


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*")
def test_a_dynamically_quantized_base_model_reads_the_prompt() -> None:
    ao = pytest.importorskip("torch.ao.quantization")
    if torch.backends.quantized.engine == "none":
        pytest.skip("this build of torch has no quantized kernels")
    quantized = ao.quantize_dynamic(base_model("llama"), {nn.Linear}, dtype=torch.qint8)
    plain = copy.deepcopy(quantized)
    model = prompted(quantized, "llama").eval()
    with torch.no_grad():
        got = model(IDS).logits
        embeds = torch.cat([model.get_prompt(2), plain.get_input_embeddings()(IDS)], dim=1)
        assert_same(got, plain(inputs_embeds=embeds).logits, atol=1e-4)
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 10)


def test_a_base_model_quantized_by_torchao_trains() -> None:
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = base_model("llama")
    quantize_(base, Int8WeightOnlyConfig())
    model = prompted(base, "llama")
    loss, _ = gradients(model, **batch_for("llama"))
    expected, _ = gradients(prompted(base_model("llama"), "llama"), **batch_for("llama"))
    assert torchao and abs(loss - expected) < 0.1


def test_a_base_model_quantized_by_bitsandbytes_trains(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base_model("llama").save_pretrained(tmp_path)
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
        device_map={"": "cpu"},
    )
    loss, _ = gradients(prompted(base, "llama"), **batch_for("llama"))
    expected, _ = gradients(prompted(base_model("llama"), "llama"), **batch_for("llama"))
    assert abs(loss - expected) < 0.3
