"""Exported prompts, read back by who reads them, or as they do."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import peft
import pytest
import torch

import ptuning
from ptuning import InputError, Prompt, PromptFileError
from ptuning.backbone.base_model import BaseModel
from ptuning.inference.exports import export

from .. import tiny


def _base(bos: bool = False) -> BaseModel:
    tokenizer = tiny.tokenizer(bos=bos)
    return BaseModel.of(tiny.model("llama", vocab_size=len(tokenizer)), tokenizer)


def _prompt(base: BaseModel, template: str, **settings: Any) -> Prompt:
    prompt = Prompt(template, **settings)
    if prompt.num_virtual_tokens:  # else its words are to be tokens first
        prompt.vectors = torch.randn(prompt.num_virtual_tokens, 32)
    prompt.base_model = base.describe()
    return prompt


def test_peft_reads_its_folder_with_the_same_logits(tmp_path: Any) -> None:
    base = _base()
    prompt = _prompt(base, "[P*4] {country} [MASK]")
    for name, content in export(prompt, base, "peft").items():
        (tmp_path / name).write_bytes(content)
    ids = torch.tensor([base.tokenizer(" France")["input_ids"]])
    with torch.no_grad():
        with ptuning.attach(base.model, base.tokenizer, prompt) as attached:
            expected = base.model(**attached.prepend(prompt, ids)).logits
        got = peft.PeftModel.from_pretrained(base.model, tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("template", "bos"), [("{country} [P] [MASK]", False), ("[P]{x}", True)])
def test_a_placement_that_peft_has_not_is_refused(template: str, bos: bool) -> None:
    base = _base(bos)
    with pytest.raises(InputError, match="PEFT puts virtual tokens in front of everything"):
        export(_prompt(base, template), base, "peft")


def test_peft_gets_vectors_without_a_template_and_no_chat() -> None:
    base = _base(bos=True)
    prompt = Prompt(num_virtual_tokens=4)
    prompt.vectors, prompt.base_model = torch.randn(4, 32), base.describe()
    assert len(export(prompt, base, "peft")) == 2
    base = _base()
    base.tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InputError, match="PEFT puts virtual tokens in front of everything"):
        export(_prompt(base, "[P*2] {country}", chat=True), base, "peft")


def test_vllm_gets_vectors_among_texts() -> None:
    base = _base()
    prompt = _prompt(
        base, "[P*2] {{Say}} {country} [P:capital] [MASK]", verbalizer={"a": "A", "b": "B"}
    )
    count = ptuning.Renderer(base.tokenizer, prompt, "causal").count
    prompt.vectors = torch.randn(count, 32)
    about = json.loads(export(prompt, base, "vllm-embeds")["vllm_embeds.json"])
    kinds = [part["type"] for part in about["content"]]
    assert kinds == ["prompt_embeds", "text", "prompt_embeds"]
    assert about["content"][1]["text"] == " {{Say}} {country}"
    tensors = [
        torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True)
        for part in about["content"]
        if part["type"] == "prompt_embeds"
    ]
    assert torch.equal(torch.cat(tensors), prompt.vectors) and len(tensors[0]) == 2
    assert about["labels"] == {"a": " A", "b": " B"}


@pytest.mark.parametrize("chat", [False, True])
def test_vllms_parts_stand_behind_one_another_in_the_exported_chat_template(chat: bool) -> None:
    base = _base(bos=True)
    base.tokenizer.chat_template = (
        "<s>{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{% endfor %}"
    )
    prompt = _prompt(base, "[P*2] {country} [P]", chat=chat)
    about = json.loads(export(prompt, base, "vllm-embeds")["vllm_embeds.json"])
    parts = [{"type": "text", "text": part} for part in ("<v>", " France\n", "<v>")]
    talk = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": parts}]
    said = base.tokenizer.apply_chat_template(
        talk, chat_template=about["chat_template"], tokenize=False
    )
    whole = "<s><system>\nBe brief. <user>\n<v> France\n<v>"
    assert said == (whole if chat else "Be brief. <v> France\n<v>")
    assert about["add_special_tokens"] is not chat  # a chat template writes those that it wants


def test_vllm_gets_vectors_in_the_models_precision() -> None:
    base = _base()
    prompt = _prompt(base, "[P*2] {country} [MASK]")
    base.model.to(torch.bfloat16)
    (part, _) = json.loads(export(prompt, base, "vllm-embeds")["vllm_embeds.json"])["content"]
    vectors = torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True)
    assert torch.equal(vectors, prompt.trained_vectors().bfloat16())
    prompt.trained_vectors()[0, 0] = 1e6
    base.model.half()
    with pytest.raises(InputError, match="float16 cannot hold"):
        export(prompt, base, "vllm-embeds")


def test_a_prompt_table_has_ids_behind_the_vocabulary() -> None:
    base = _base()
    prompt = _prompt(base, "[P*2] {country} [P] [MASK]")
    files = export(prompt, base, "tensorrt-llm")
    table = np.load(io.BytesIO(files["prompt_table.npy"]))
    about = json.loads(files["prompt_table.json"])
    assert table.shape == (1, 3, 32) and np.array_equal(table[0], prompt.trained_vectors().numpy())
    assert about["virtual_ids"] == [400, 401, 402] and about["task_id"] == 0
    assert about["parts"] == [2, " {country}", 1]


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        ("[P*2] {country} is in [P] [MASK]", {}),
        ("[P*3] {country} is in [MASK]", {"special_tokens": "after"}),
        ("[P*2] {country} is in [P] [MASK]", {"chat": True}),
    ],
)
def test_the_parts_beside_a_prompt_table_give_the_ids_of_the_attached_prompt(
    template: str, settings: dict[str, Any]
) -> None:
    base = _base(bos=True)
    base.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    prompt = _prompt(base, template, **settings)
    about = json.loads(export(prompt, base, "tensorrt-llm")["prompt_table.json"])
    ids: list[int] = []
    for part in about["parts"]:
        if isinstance(part, int):
            ids += [-1 - i for i in range(sum(i < 0 for i in ids), sum(i < 0 for i in ids) + part)]
        else:
            text = part.replace("{country}", "France")
            ids += base.tokenizer(text, add_special_tokens=False)["input_ids"]
    begins = [base.tokenizer.bos_token_id] * about["add_special_tokens"]
    asked = ptuning.Renderer(base.tokenizer, prompt, "causal")(
        {"country": "France"}, answered=False
    )
    assert (*begins, *ids) == asked.sequences[0].ids


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_vllm_is_given_no_vectors_for_a_model_that_it_does_not_let_speak(family: str) -> None:
    tokenizer = tiny.tokenizer()
    base = BaseModel.of(tiny.model(family, vocab_size=len(tokenizer)), tokenizer)
    prompt = _prompt(base, "[P*2] {country} [MASK]")
    with pytest.raises(InputError, match=r"causal models alone.*merge"):
        export(prompt, base, "vllm-embeds")


def test_wrong_formats_and_models_are_refused() -> None:
    base = _base()
    with pytest.raises(InputError, match="expected one of peft, vllm-embeds, tensorrt-llm"):
        export(_prompt(base, "[P]{x}"), base, "onnx")
    narrow = BaseModel.of(tiny.model("gpt2", n_embd=16), base.tokenizer)
    with pytest.raises(PromptFileError, match="embedding width 32"):
        export(_prompt(base, "[P]{x}"), narrow, "peft")


@pytest.mark.parametrize("text", ["V", "\ue000", "\ue000V\ue000", "<|p", "p:0", "{{V}}"])
@pytest.mark.parametrize("to", ["vllm-embeds", "tensorrt-llm"])
def test_no_text_of_a_template_is_taken_for_a_virtual_token(text: str, to: str) -> None:
    base = _base()
    prompt = _prompt(base, f"[P]{text}[P*2] {{country}} [MASK]")
    (content,) = (c for n, c in export(prompt, base, to).items() if n.endswith(".json"))
    about = json.loads(content)
    parts = about.get("parts") or [part.get("text", "vectors") for part in about["content"]]
    assert parts[1::2] == [text, " {country}"]
    if to == "tensorrt-llm":
        assert parts[::2] == [1, 2]
