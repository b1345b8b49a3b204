"""Virtual tokens in a tokenizer for good: added, freed and taken again; chat templates for them.

The names of a prompt that was removed become ``<|ptuning-free:ID|>``: other prompts keep their ids,
and the next prompt takes the free ones first.
"""

from __future__ import annotations

import atexit
import copy
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..backbone.tokens import first_free_id
from ..errors import InputError, PromptFileError
from ..formats import parse_json
from ..rendering.chat import in_jinja
from ..rendering.virtual_ids import add_virtual_tokens

_FREE = re.compile(r"<\|ptuning-free:[0-9]+\|>")
_BEGIN, _END = "{#- ptuning prompts #}", "{#- end of ptuning prompts +#}"
_NOT_IN_FILES = ("name_or_path", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
"""What a tokenizer's files do not say, or say as it was loaded."""
_TURNS = r"\{%- set ptuning_turns = (.*?) %\}\n.*?"
_BLOCK = re.compile(re.escape(_BEGIN) + _TURNS + re.escape(_END), re.DOTALL)


def with_names(tokenizer: Any, names: list[str]) -> tuple[Any, list[int]]:
    """A copy of a tokenizer in which `names` are tokens, and their ids.

    Raises:
        InputError: a name is a token already, or the tokenizer's ids have holes.
    """
    vocabulary = tokenizer.get_vocab()
    if known := [name for name in names if name in vocabulary]:
        raise InputError(
            f"{known[0]} is a token of this tokenizer already; give the prompt another name"
        )
    free = sorted((vocabulary[n], n) for n in free_names(tokenizer))[: len(names)]
    taken = {free_name: name for (_, free_name), name in zip(free, names, strict=False)}
    result = _renamed(tokenizer, taken) if taken else copy.deepcopy(tokenizer)
    first = first_free_id(result)
    add_virtual_tokens(result, names[len(taken) :])
    ids = list(result.convert_tokens_to_ids(names))
    expected = [i for i, _ in free] + list(range(first, first + len(names) - len(taken)))
    if ids != expected:
        raise InputError(
            "this tokenizer's ids have holes, so that new tokens would get ids that other tokens "
            "have; prompts cannot be merged into it, only attached"
        )
    return result, ids


def without_names(tokenizer: Any, names: Iterable[str]) -> Any:
    """A copy of a tokenizer in which the ids of `names` are free."""
    ids = tokenizer.get_vocab()
    return _renamed(tokenizer, {name: f"<|ptuning-free:{ids[name]}|>" for name in names})


def free_names(tokenizer: Any) -> list[str]:
    """Tokens of prompts that were removed."""
    return [token for token in tokenizer.get_vocab() if _FREE.fullmatch(token)]


def _renamed(tokenizer: Any, names: Mapping[str, str]) -> Any:
    """The same tokenizer with other names for some added tokens, by way of its files."""
    with ExitStack() as files:
        folder = files.enter_context(tempfile.TemporaryDirectory())
        tokenizer.save_pretrained(folder)
        for path in Path(folder).glob("*.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(_replaced(content, names)), encoding="utf-8")
        result = type(tokenizer).from_pretrained(folder)
        if not result.is_fast:  # copies of some read their files again (Marian's, M2M100's)
            atexit.register(files.pop_all().close)
    for name in _NOT_IN_FILES:
        setattr(result, name, getattr(tokenizer, name))
    return result


def _replaced(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(k, k): _replaced(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else value


def chat_turns(tokenizer: Any) -> dict[str, list[str]]:
    """What the user says in each merged chat prompt: text, field, text, … in turn."""
    for template in _templates(tokenizer).values():
        if block := _BLOCK.search(template):
            try:
                return dict(parse_json(block[1], "the chat template's list of merged prompts"))
            except PromptFileError as error:
                raise InputError(f"{error}; merge into the base model again") from error
    return {}


def set_chat_turns(tokenizer: Any, turns: Mapping[str, list[str]]) -> None:
    """Let the tokenizer's chat templates take ``prompt=NAME``.

    The last turn of the user goes into the prompt's fields; several fields are given as
    ``fields={"premise": …, "hypothesis": …}``. Without ``prompt`` a chat is what it was.
    """
    templates = {name: _BLOCK.sub("", text) for name, text in _templates(tokenizer).items()}
    if turns:
        told = json.dumps(turns, ensure_ascii=False)
        filling = _FILLING.replace("SAID", in_jinja(tokenizer, "ptuning.said"))
        block = f"{_BEGIN}{{%- set ptuning_turns = {told} %}}\n{filling}{_END}"
        templates = {name: block + text for name, text in templates.items()}
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = templates["default"]
    elif tokenizer.chat_template:
        tokenizer.chat_template = templates


def _templates(tokenizer: Any) -> dict[str, str]:
    template = getattr(tokenizer, "chat_template", None)
    return {"default": template} if isinstance(template, str) else dict(template or {})


_FILLING = """\
{%- if prompt is defined and prompt %}
{%- if prompt not in ptuning_turns %}
{%- set known = ptuning_turns.keys() | list | join(", ") %}
{{- raise_exception("no chat prompt is called " ~ prompt ~ "; there are: " ~ known) }}
{%- endif %}
{%- set ptuning = namespace(said="", field="", messages=[]) %}
{%- set last = messages[-1].content %}
{%- set last = last if last is string else last | map(attribute="text") | join %}
{%- for part in ptuning_turns[prompt] %}
{%- if loop.index0 % 2 == 0 %}
{%- set ptuning.said = ptuning.said ~ part %}
{%- elif fields is defined and fields %}
{%- if part not in fields %}
{{- raise_exception("the prompt " ~ prompt ~ " has the field " ~ part ~ ", and fields has not") }}
{%- endif %}
{%- set ptuning.said = ptuning.said ~ fields[part] %}
{%- else %}
{%- if ptuning.field and part != ptuning.field %}
{{- raise_exception("the prompt " ~ prompt ~ " has several fields; give them as fields") }}
{%- endif %}
{%- set ptuning.field = part %}
{%- set ptuning.said = ptuning.said ~ last %}
{%- endif %}
{%- endfor %}
{%- for message in messages[:-1] %}
{%- set ptuning.messages = ptuning.messages + [message] %}
{%- endfor %}
{%- set messages = ptuning.messages + [{"role": "user", "content": SAID}] %}
{%- endif %}
"""
