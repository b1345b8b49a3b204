"""The bodies of requests: checked to their first fault, however many they have."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ptuning.serving.messages import ChatRequest, CompletionRequest, PredictRequest, in_words

_MANY = 1000
_MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (PredictRequest, {"rows": [{"a": []}] * _MANY}, "rows.0.a: expected text, a number"),
        (PredictRequest, {"fields": {str(i): {} for i in range(_MANY)}}, "fields.0: expected text"),
        (PredictRequest, {str(i): 1 for i in range(_MANY)}, "0 is no field of this request"),
        (PredictRequest, {"fields": {}, "stop": [1] * _MANY}, "stop: "),
        (CompletionRequest, {"model": "m", "prompt": [1] * _MANY}, "prompt: "),
        (ChatRequest, {"model": "m", "messages": [{"role": "cook"}] * _MANY}, "messages.0.role: "),
        (
            ChatRequest,
            {"model": "m", "messages": [{"role": "user", "content": [{"type": "x"}] * _MANY}]},
            "messages.0.content: ",
        ),
        (
            ChatRequest,
            {
                "model": "m",
                "messages": _MESSAGES,
                "response_format": {str(i): 1 for i in range(_MANY)},
            },
            "response_format.0 is no field",
        ),
    ],
    ids=["cells", "fields", "names", "stops", "prompts", "turns", "parts", "format"],
)
def test_of_many_faults_the_first_is_told_and_no_other_looked_for(
    kind: Any, body: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(body)
    errors = raised.value.errors()
    assert len(errors) <= 5  # of one value: the kinds that it could be of
    assert in_words(errors).startswith(message)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"model": "m", "prompt": "a"}),
        (ChatRequest, {"model": "m", "messages": _MESSAGES}),
    ],
)
def test_optional_fields_of_openais_may_be_null(kind: Any, body: dict[str, Any]) -> None:
    optional = [name for name in kind.model_fields if name not in body]
    assert {"stream", "n", "stop"} <= set(optional)
    others = ["tools", "top_logprobs", "metadata"]
    made = kind.model_validate({**body, **dict.fromkeys([*optional, *others])})
    assert not made.stream


def test_a_turn_of_openais_own_may_be_said_again() -> None:
    openai = pytest.importorskip("openai.types.chat")
    turn = openai.ChatCompletionMessage(role="assistant", content="Oslo").model_dump()
    assert None in turn.values()
    made = ChatRequest.model_validate({"model": "m", "messages": [turn]})
    assert made.messages[0].text == "Oslo"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("temperature", 0.5),
        ("frequency_penalty", 1),
        ("presence_penalty", -1),
        ("top_p", 0),
        ("best_of", 2),
        ("echo", True),
        ("suffix", "x"),
        ("logprobs", 5),
        ("logit_bias", {"5": 1}),
        ("max_tokens", 0),
        ("max_completion_tokens", 0),
        ("response_format", {"type": "json_object"}),
        ("messages", [{"role": "tool", "content": "a"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]),
    ],
)
def test_what_answers_here_do_not_heed_is_refused_and_not_passed_over(
    field: str, value: Any
) -> None:
    taken = 0
    for kind, body in (
        (CompletionRequest, {"model": "m", "prompt": "a"}),
        (ChatRequest, {"model": "m", "messages": _MESSAGES}),
    ):
        if field in kind.model_fields:
            taken += 1
            with pytest.raises(ValidationError):
                kind.model_validate({**body, field: value})
    assert taken
