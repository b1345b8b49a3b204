"""Chat templates that know a turn only as a list of its parts, as LLaVA's does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import ptuning
from ptuning.backbone.base_model import BaseModel
from ptuning.inference.exports import export
from ptuning.rendering.chat import as_chat, takes_parts_alone
from ptuning.rendering.merged_text import fill

from .. import tiny

IN_PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% for part in m.content if part.type == 'image' %}IMAGE{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %};"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }};"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOTH = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}",
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "user"},  # a word of the template's own
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Where?"},
]


def _tokenizer(template: str) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _prompt(tokenizer: Any) -> tuple[ptuning.Prompt, Any]:
    model = tiny.model(vocab_size=len(tokenizer))
    prompt = ptuning.Prompt("[P*2] {country} [P] where?", chat=True)
    prompt.vectors = torch.randn(3, 32)
    prompt.base_model = BaseModel.of(model, tokenizer).describe()
    return prompt, model


@pytest.mark.parametrize(
    ("template", "alone"),
    [(IN_PARTS, True), (PLAIN, False), (BOTH, False), ("{{ raise_exception('never') }}", False)],
)
def test_what_a_template_takes_is_found_out(template: str, alone: bool) -> None:
    assert takes_parts_alone(_tokenizer(template)) is alone


@pytest.mark.parametrize("template", [IN_PARTS, BOTH])
def test_a_talk_is_written_as_by_a_template_for_plain_texts(template: str) -> None:
    assert as_chat(_tokenizer(template), TALK) == as_chat(_tokenizer(PLAIN), TALK)


@pytest.mark.parametrize("template", [IN_PARTS, PLAIN, BOTH])
def test_the_chat_template_of_a_merged_model_writes_the_prompt_in_parts_too(template: str) -> None:
    tokenizer = _tokenizer(template)
    prompt, model = _prompt(tokenizer)
    merged = ptuning.merge(model, tokenizer, {"cap": prompt})
    whole = fill(merged.prompts["cap"]["text"], {"country": "France"})
    assert whole == ("<|user|><|cap:0|><|cap:1|> France<|cap:2|> where?;<|assistant|>")
    for content in ("France", [{"type": "text", "text": "France"}]):
        said = merged.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            prompt="cap",
            tokenize=False,
            add_generation_prompt=True,
        )
        assert said == whole


@pytest.mark.parametrize("template", [IN_PARTS, PLAIN])
def test_an_exported_chat_template_joins_parts_for_either(template: str) -> None:
    tokenizer = _tokenizer(template)
    prompt, model = _prompt(tokenizer)
    files = export(prompt, BaseModel.of(model, tokenizer), "vllm-embeds")
    own = json.loads(files["vllm_embeds.json"])["chat_template"]
    parts = [{"type": "text", "text": part} for part in ("<v>", " France", "<v>")]
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], chat_template=own, tokenize=False
    )
    assert said == "<|user|><v> France<v>;"
