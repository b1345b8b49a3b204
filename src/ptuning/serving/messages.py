"""The bodies of requests: ours, and OpenAI's as far as greedy decoding goes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError


def _only_cells(fields: dict[str, Any]) -> dict[str, Any]:
    """Told at the first fault: a list of them all takes seconds to make of a large body."""
    for name, value in fields.items():
        if isinstance(value, list | dict):
            raise PydanticCustomError("cell", "{name}", {"name": name})
    return fields


_CELL = {"anyOf": [{"type": kind} for kind in ("string", "number", "boolean", "null")]}
Fields = Annotated[
    dict[str, Any],
    AfterValidator(_only_cells),
    WithJsonSchema({"type": "object", "additionalProperties": _CELL}),
]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[int, Field(ge=1, le=1)]
Stop = StrictStr | Annotated[list[StrictStr], Field(fail_fast=True)] | None
MaxTokens = Annotated[StrictInt | None, Field(ge=1)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PredictRequest(_Message):
    """Rows for a prompt: one as ``fields``, or many as ``rows``."""

    fields: Fields | None = None
    rows: Annotated[list[Fields], Field(min_length=1, fail_fast=True)] | None = None
    virtual_tokens: StrictBool = True
    """False: the prompt's words alone, as one would write them by hand."""
    max_tokens: MaxTokens = None
    stop: Stop = None
    stream: StrictBool = False


class Prediction(BaseModel):
    """The answer to a row."""

    answer: str
    probability: float
    probabilities: dict[str, float]
    shortened: bool


class PredictResponse(BaseModel):
    """The answers to the rows, in their order."""

    prompt: str
    model: str
    predictions: list[Prediction]


class StreamOptions(_Message):
    """What a stream tells besides."""

    include_usage: StrictBool | None = None
    include_obfuscation: Literal[False] | None = None


class _OpenAI(_Message):
    """What greedy decoding takes, and neutral values of what it does not."""

    model: StrictStr
    fields: Fields | None = None
    max_tokens: MaxTokens = None
    stop: Stop = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    temperature: Zero | None = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    n: One | None = None
    seed: int | None = None
    user: str | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any] | None, Field(max_length=0)] = None


class CompletionRequest(_OpenAI):
    """OpenAI's completion; ``model`` is a prompt's name or the base model's."""

    prompt: StrictStr | Annotated[list[StrictStr], Field(min_length=1, fail_fast=True)] | None = (
        None
    )
    best_of: One | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class TextPart(_Message):
    """Text in a list of parts."""

    type: Literal["text"]
    text: StrictStr


class Turn(_Message):
    """One message of a chat."""

    role: Literal["user", "system", "assistant"]
    content: StrictStr | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(_OpenAI):
    """OpenAI's chat completion."""

    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: MaxTokens = None
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


def in_words(errors: list[Any]) -> str:
    """The first of pydantic's errors, in one line."""
    first = min(errors, key=lambda e: -len(e["loc"])) if len(errors) == 1 else errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    kind, message = first["type"], str(first["msg"])
    if kind == "cell":
        path.append(message)
    where = ".".join(path) or "the body"
    if kind == "extra_forbidden":
        return f"{where} is no field of this request; see /docs"
    if kind == "cell":
        return f"{where}: expected text, a number, true, false or null"
    if path and path[-1] in ("temperature", "frequency_penalty", "presence_penalty"):
        return f"{where}: answers are greedy here; send 0, or nothing"
    return f"{where}: {message}"
