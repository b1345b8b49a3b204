"""What a call has beside the ids: placed with the prompt, given to the encoder, or refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor

from ptuning.errors import InputError
from ptuning.peft_compat import PromptEncoderConfig, get_peft_model

from .. import tiny
from ..multimodal import DECODERS, ENCODER_DECODERS, IMAGE

N = 4
START = {"decoder_input_ids": torch.tensor([[2]])}
decoders = pytest.mark.parametrize("family", DECODERS)
encoder_decoders = pytest.mark.parametrize("family", ENCODER_DECODERS)
# What Florence-2's configuration does not tell.
SIZES = {"num_layers": 2, "num_attention_heads": 4, "token_dim": 32}


def ours(base: Any, task: str | None = "CAUSAL_LM", **options: Any) -> Any:
    sizes = SIZES if task == "SEQ_2_SEQ_LM" else {}
    config = PromptEncoderConfig(
        task_type=task, num_virtual_tokens=N, encoder_hidden_size=16, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(base, config, **options).eval()


def in_front(values: Tensor, fill: float = 0) -> Tensor:
    """Values of the text with N of the prompt in front, by hand."""
    return torch.cat([values.new_full((len(values), N, *values.shape[2:]), fill), values], 1)


def generated(model: Any, **inputs: Any) -> Any:
    given = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**inputs, **given, output_logits=True)


def left_padded(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """The row with padding in front, wherever it has a value per token."""
    length, per_token = row["input_ids"].shape[1], dict(row)  # eight, as one family has channels
    for name, value in row.items():
        if not name.startswith(("pixel", "input_features")) and value.shape[1:2] == (length,):
            per_token[name] = torch.cat([value.new_zeros(1, 3, *value.shape[2:]), value], 1)
    return per_token


def longer(row: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The row after generation went on to `ids`, as transformers goes on with its arguments."""
    new = ids.shape[1] - row["input_ids"].shape[1]
    result = {**row, "input_ids": ids}
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask"):
        if name in row:
            last = row[name][:, -1:].expand(-1, new, *row[name].shape[2:])
            result[name] = torch.cat([row[name], last], 1)
    return result


@decoders
def test_generate_goes_on_from_forwards_numbers(family: str) -> None:
    base, row = DECODERS[family]()
    model = ours(base)
    said = generated(model, **row)
    with torch.no_grad():
        for step in (0, 2):
            text = longer(row, said.sequences[:, : row["input_ids"].shape[1] + step])
            torch.testing.assert_close(
                said.logits[step], model(**text).logits[:, -1], atol=1e-4, rtol=1e-4
            )


@decoders
def test_padding_in_front_changes_neither_forward_nor_generate(family: str) -> None:
    base, row = DECODERS[family]()
    model = ours(base)
    with torch.no_grad():
        expected = model(**row).logits[:, -1]
        padded = model(**left_padded(row)).logits[:, -1]
    torch.testing.assert_close(padded, expected, atol=1e-4, rtol=1e-4)
    first = generated(model, **left_padded(row)).logits[0]
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "gpt2 with token types", "mllama"])
def test_values_per_token_are_placed_with_the_ids(family: str) -> None:
    """Each reaches the base model with zeros for the prompt, the rest as it was."""
    base, row = DECODERS[family]()
    model = ours(base)
    seen: dict[str, Any] = {}
    base.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**row)
    for name in {"token_type_ids", "cross_attention_mask"} & set(row):
        assert torch.equal(seen[name], in_front(row[name]))
    if "pixel_values" in row:
        assert seen["pixel_values"] is row["pixel_values"]


def test_token_types_add_what_the_base_model_adds() -> None:
    base, row = DECODERS["gpt2 with token types"]()
    model = ours(base)
    text = torch.cat([model.get_prompt(1), base.get_input_embeddings()(row["input_ids"])], 1)
    with torch.no_grad():
        got = model(**row).logits
        expected = base(inputs_embeds=text, token_type_ids=in_front(row["token_type_ids"])).logits
        without = model(input_ids=row["input_ids"]).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert float((got - without).abs().max()) > 0.1


def test_the_reference_layout_drops_a_decoders_token_types_as_peft_does() -> None:
    base, row = DECODERS["gpt2 with token types"]()
    model = ours(base, reference_layout=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="token_type_ids are dropped"):
        got = model(**row).logits
    with torch.no_grad():
        torch.testing.assert_close(got, model(input_ids=row["input_ids"]).logits)


@pytest.mark.parametrize("given", ["mm_token_type_ids", "position_ids"])
def test_positions_of_several_axes_come_from_the_placed_ids(given: str) -> None:
    base, row = DECODERS["qwen2_vl"]()
    kinds = row.pop("mm_token_type_ids")
    grid = row["image_grid_thw"]
    places, _ = base.model.get_rope_index(
        row["input_ids"],
        mm_token_type_ids=kinds,
        image_grid_thw=grid,
        attention_mask=row["attention_mask"],
    )
    model = ours(base)
    extra = {"mm_token_type_ids": kinds} if given == "mm_token_type_ids" else {given: places}
    with torch.no_grad():
        text = base.get_input_embeddings()(row["input_ids"])
        image = base.model.get_image_features(row["pixel_values"], grid)
        text[kinds > 0] = torch.cat(list(getattr(image, "pooler_output", image)))
        expected = base(
            inputs_embeds=torch.cat([model.get_prompt(1), text], 1),
            attention_mask=in_front(row["attention_mask"], 1),
            position_ids=torch.cat([torch.arange(N).expand(3, 1, N), places + N], -1),
        ).logits
        got = model(**row, **extra).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    first = generated(model, **row, mm_token_type_ids=kinds).logits[0]
    torch.testing.assert_close(first, expected[:, -1], atol=1e-4, rtol=1e-4)


def test_positions_given_to_generate_are_used() -> None:
    model = ours(tiny.model("llama", initializer_range=0.3))
    ids, apart = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 9, 10]])
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=apart).logits[:, -1]
        plain = model(input_ids=ids).logits[:, -1]
    first = generated(model, input_ids=ids, position_ids=apart).logits[0]
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-4)
    assert float((expected - plain).abs().max()) > 1e-2


def test_tokens_behind_the_text_have_positions_behind_it() -> None:
    """Anchors that a template has behind a text whose positions end high."""
    base, tokenizer = tiny.model("llama", initializer_range=0.3), tiny.tokenizer()
    model = ours(base, template="[P*2] {text} so [P*2]", tokenizer=tokenizer)
    seen: list[Tensor] = []
    base.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    behind = model.adapter("default").insertion.after
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]), position_ids=torch.tensor([[0, 5, 9]]))
    assert seen[0].tolist() == [[0, 1, 2, 7, 11, *range(12, 12 + len(behind))]]


@encoder_decoders
def test_the_encoder_reads_all_that_generate_is_given(family: str) -> None:
    base, row = ENCODER_DECODERS[family]()
    model = ours(base, "SEQ_2_SEQ_LM")
    said = generated(model, **row)
    with torch.no_grad():
        for step in (1, 3):
            ids = said.sequences[:, :step]
            expected = model(**row, decoder_input_ids=ids).logits[:, -1]
            torch.testing.assert_close(said.logits[step - 1], expected, atol=1e-4, rtol=1e-4)
        other = "pixel_values" if "pixel_values" in row else "global_attention_mask"
        changed = {**row, other: row[other].roll(1, dims=-1)}
        assert float((generated(model, **changed).logits[0] - said.logits[0]).abs().max()) > 1e-2


def test_an_encoder_of_its_own_gets_its_token_types() -> None:
    small = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "initializer_range": 0.3}
    encoder = transformers.BertConfig(**small)
    decoder = transformers.BertConfig(**small, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.EncoderDecoderModel(config=config).eval()
    model = ours(base, "SEQ_2_SEQ_LM")
    row = {"input_ids": torch.tensor([[11, 12, 13, 14]])}
    types = {"token_type_ids": torch.tensor([[0, 0, 1, 1]])}
    text = base.get_input_embeddings()(row["input_ids"])
    embeds = torch.cat([model.get_prompt(1)[:, :N], text], 1)  # PEFT's table has N more, unused
    start = {"decoder_input_ids": torch.tensor([[1]])}
    with torch.no_grad():
        placed = {"inputs_embeds": embeds, "token_type_ids": in_front(types["token_type_ids"])}
        expected = base(**placed, **start).logits
        got, without = model(**row, **types, **start).logits, model(**row, **start).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert float((got - without).abs().max()) > 1e-2
    first = generated(model, **row, **types).logits[0]
    torch.testing.assert_close(first, expected[:, -1], atol=1e-4, rtol=1e-4)


@encoder_decoders
def test_beams_and_samples_have_the_same_encoder(family: str) -> None:
    base, row = ENCODER_DECODERS[family]()
    model = ours(base, "SEQ_2_SEQ_LM")
    greedy = model.generate(**row, max_new_tokens=4, do_sample=False)
    several = model.generate(
        **row, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=3
    )
    assert several.tolist() == greedy.expand(3, -1).tolist()


def test_global_attention_of_longformer_and_boxes_of_layoutlm_are_placed() -> None:
    small = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.3}
    longformer = transformers.LongformerConfig(**small, attention_window=4, pad_token_id=1)
    layoutlm = transformers.LayoutLMConfig(**small, max_2d_position_embeddings=64)
    ids = torch.tensor([[11, 12, 13, 14]])  # four tokens: a box's length too
    box = torch.tensor([[[1, 2, 3, 4], [2, 3, 9, 9], [0, 0, 5, 5], [7, 8, 9, 10]]])
    for kind, config, name, value in (
        (
            transformers.LongformerForTokenClassification,
            longformer,
            "global_attention_mask",
            ids % 2,
        ),
        (transformers.LayoutLMForTokenClassification, layoutlm, "bbox", box),
    ):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = kind(config).eval()
        model = ours(base, "TOKEN_CLS")
        embeds = torch.cat([model.get_prompt(1), base.get_input_embeddings()(ids)], 1)
        with torch.no_grad():
            mask = torch.ones(1, N + 4, dtype=torch.long)
            placed = {name: in_front(value), "inputs_embeds": embeds, "attention_mask": mask}
            expected = base(**placed).logits
            got = model(input_ids=ids, attention_mask=mask[:, N:], **{name: value}).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["original_full", "block_sparse"])
def test_sparse_attention_pads_behind_the_prompt(kind: str) -> None:
    config = transformers.BigBirdConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_type=kind,
        block_size=4,
        num_random_blocks=1,
        initializer_range=0.3,
    )
    base = transformers.BigBirdForSequenceClassification(config).eval()
    model = ours(base, "SEQ_CLS")
    ids = torch.arange(5, 64).unsqueeze(0)
    embeds = torch.cat([model.get_prompt(1), base.get_input_embeddings()(ids)], 1)
    with torch.no_grad():
        got, expected = model(input_ids=ids).logits, base(inputs_embeds=embeds).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# --- what is refused ----------------------------------------------------------------------------

LLAMA_IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", torch.zeros(2, 1, 6, 6)),
        ("attention_mask", {"full_attention": torch.ones(2, 6)}),
        ("token_mask", torch.zeros(2, 6, 6)),
        ("cu_seq_lens_q", torch.tensor([0, 3, 6])),
        ("cache_position", torch.arange(6)),
        ("perm_mask", torch.zeros(2, 6, 6)),
        ("entity_position_ids", torch.zeros(2, 1, 3)),
        ("per_layer_inputs", torch.zeros(2, 6, 2, 4)),
        ("features_of_unknown_kind", torch.zeros(2, 6, 32)),
        ("global_attention_mask", torch.zeros(2, 7)),
        ("position_ids", torch.arange(7).unsqueeze(0)),
        ("encoder_outputs", (torch.zeros(2, 6, 32),)),
    ],
)
def test_what_has_no_room_for_a_prompt_is_refused_by_name(name: str, value: Any) -> None:
    model = ours(tiny.model("llama"))
    with pytest.raises(InputError, match=name):
        model(input_ids=LLAMA_IDS, **{name: value})
    if name in ("cache_position", "per_layer_inputs", "cu_seq_lens_q", "global_attention_mask"):
        with pytest.raises(InputError, match=name):
            model.generate(input_ids=LLAMA_IDS, **{name: value})


def test_rows_that_are_not_rows_of_tokens_are_refused() -> None:
    model = ours(tiny.model("bert"), None)
    with pytest.raises(InputError, match=r"input_ids have shape \(1, 2, 6\)"):
        model(input_ids=LLAMA_IDS.unsqueeze(0))


def test_a_model_that_reads_sounds_alone_is_refused_by_what_it_reads() -> None:
    config = transformers.WhisperConfig(
        vocab_size=100,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    model = ours(transformers.WhisperForConditionalGeneration(config), "SEQ_2_SEQ_LM")
    with pytest.raises(InputError, match="input_features"):
        model(input_features=torch.zeros(1, 8, 20), **START)


def test_a_generate_that_goes_past_the_prompt_is_refused() -> None:
    """Kosmos-2 hands its inputs to an inner model's generate."""
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Kosmos2Config(
        text_config={"vocab_size": 160, "embed_dim": 32, "layers": 1, "attention_heads": 4}
        | {"ffn_dim": 64, "max_position_embeddings": 64},
        vision_config={**tower, "intermediate_size": 32, "image_size": 8, "patch_size": 4},
        latent_query_num=3,
    )
    model = ours(transformers.Kosmos2ForConditionalGeneration(config).eval())
    ids = torch.tensor([[3, 4, 4, 4, 5, 6]])
    marks = (ids == 4).long()
    with pytest.raises(InputError, match="left the prompt out"):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.zeros(1, 3, 8, 8),
            image_embeds_position_mask=marks,
            max_new_tokens=2,
        )


def test_positions_whose_logits_are_kept_are_the_texts() -> None:
    model = ours(tiny.model("llama"))
    with torch.no_grad():
        whole = model(input_ids=LLAMA_IDS).logits
        kept = model(input_ids=LLAMA_IDS, logits_to_keep=torch.tensor([0, 5])).logits
        last = model(input_ids=LLAMA_IDS, logits_to_keep=2).logits
    torch.testing.assert_close(kept, whole[:, [N, N + 5]])
    torch.testing.assert_close(last, whole[:, -2:])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with pytest.raises(InputError, match="logits_to_keep"):
        model(input_ids=LLAMA_IDS, attention_mask=mask, logits_to_keep=torch.tensor([0, 5]))


# --- what transformers.Trainer sees -------------------------------------------------------------


class _NoKeywords(transformers.LlamaForCausalLM):
    """A base model whose forward takes no further arguments, as models of the hub do."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        return_dict: Any = None,
        a_column_of_its_own: Any = None,
    ) -> Any:
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
        )


def _trainer(model: Any, folder: Path, columns: dict[str, Any]) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True
    )
    rows = datasets.Dataset.from_dict(columns)
    return transformers.Trainer(model, arguments, train_dataset=rows)


def test_trainer_keeps_the_base_models_columns(tmp_path: Path) -> None:
    base, row = DECODERS["llava"]()
    model = ours(base)
    ids, pixels = row["input_ids"].tolist() * 8, _numbers(row["pixel_values"], 8)
    trainer = _trainer(
        model, tmp_path, {"input_ids": ids, "labels": ids, "pixel_values": pixels, "other": ids}
    )
    assert set(next(iter(trainer.get_train_dataloader()))) == {
        "input_ids",
        "labels",
        "pixel_values",
    }
    trainer.train()


def _numbers(pixels: Tensor, count: int) -> list[Any]:
    return pixels.expand(count, -1, -1, -1).tolist()


def test_forward_shows_the_base_models_arguments() -> None:
    model = ours(_NoKeywords(tiny.model("llama").config))
    shown = list(inspect.signature(model.forward).parameters)
    assert shown[:3] == ["input_ids", "attention_mask", "inputs_embeds"]
    assert "a_column_of_its_own" in shown and shown[-1] == "kwargs"
    compiled = ours(torch.compile(_NoKeywords(tiny.model("llama").config), backend="eager"))
    assert list(inspect.signature(compiled.forward).parameters) == shown
    assert "pixel_values" not in shown
    other = inspect.signature(ours(DECODERS["llava"]()[0]).forward).parameters
    assert "pixel_values" in other and "a_column_of_its_own" not in other


def test_trainers_count_of_items_never_reaches_a_base_without_keywords(tmp_path: Path) -> None:
    model = ours(_NoKeywords(tiny.model("llama").config))
    assert model.accepts_loss_kwargs is False
    assert ours(tiny.model("llama")).accepts_loss_kwargs is True
    base = tiny.model("llama")
    base.accepts_loss_kwargs = False  # as some models say that take keywords
    assert ours(base).accepts_loss_kwargs is False
    rows = [[5, 6, 7]] * 8
    _trainer(model, tmp_path, {"input_ids": rows, "labels": rows}).train()
    with torch.no_grad():  # and another trainer may give it all the same
        assert model(input_ids=LLAMA_IDS, labels=LLAMA_IDS, num_items_in_batch=4).loss > 0
        with model.disable_adapter():
            assert model(input_ids=LLAMA_IDS, labels=LLAMA_IDS, num_items_in_batch=4).loss > 0


def test_the_image_is_seen() -> None:
    """A check of the families above: their inputs matter."""
    for family, make in DECODERS.items():
        base, row = make()
        model = ours(base)
        name = next((n for n in ("pixel_values", "input_features") if n in row), "token_type_ids")
        with torch.no_grad():
            changed = {**row, name: row[name].roll(1, dims=-1)}
            far = (model(**row).logits - model(**changed).logits)[:, -1].abs().max()
        assert float(far) > 1e-3, family
    assert IMAGE == 150
