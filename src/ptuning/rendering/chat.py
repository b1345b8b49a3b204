"""A chat's turns as a tokenizer's chat template writes them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..errors import InputError, in_one_line

_PROBE = "ptuning probe"
_known: dict[str, bool] = {}  # chat template -> it takes parts alone


def as_chat(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """A chat's turns, up to the answer.

    Args:
        tokenizer: with a chat template.
        turns: ``role`` and ``content`` of each.

    Raises:
        InputError: the template does not take them.
    """
    given: list[Mapping[str, Any]] = list(turns)
    if takes_parts_alone(tokenizer):
        given = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    try:
        return _written(tokenizer, given)
    except Exception as error:  # what the chat template raises, or its engine
        reason = in_one_line(error)
        who = " and ".join(turn["role"] for turn in turns)
        raise InputError(
            f"this model's chat template takes no turns of {who} ({reason})"
        ) from error


def takes_parts_alone(tokenizer: Any) -> bool:
    """Whether the chat template knows a turn only as a list of its parts, as some of models that
    read images do (LLaVA's, SmolVLM's), and would lose or refuse a plain text."""
    template = str(tokenizer.chat_template)
    if template not in _known:
        plain = _probed(tokenizer, _PROBE)
        parts = "" if _PROBE in plain else _probed(tokenizer, [{"type": "text", "text": _PROBE}])
        # A template for plain text writes the list as Python does.
        _known[template] = _PROBE in parts and "'type'" not in parts
    return _known[template]


def in_jinja(tokenizer: Any, said: str) -> str:
    """The content of a turn as the tokenizer's chat template takes it.

    Args:
        tokenizer: with a chat template.
        said: a Jinja expression of the text.
    """
    in_parts = takes_parts_alone(tokenizer)
    return f'[{{"type": "text", "text": {said}}}]' if in_parts else said


def _probed(tokenizer: Any, content: Any) -> str:
    with suppress(Exception):
        return _written(tokenizer, [{"role": "user", "content": content}])
    return ""


def _written(tokenizer: Any, turns: list[Mapping[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
