"""The bodies of requests: ours, and OpenAI's as far as greedy decoding goes.

Every check ends at its first fault: a body with a hundred thousand of them would hold up the
server while pydantic tells them all, and only the first is told to the client.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _cells(fields: Any) -> Any:
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if not isinstance(value, str | int | float | None):
            told = {"field": name}
            raise PydanticCustomError(
                _INNER, "{field}: expected text, a number, true, false or null", told
            )
    return fields


_INNER = "of_an_inner_part"
"""The type of errors whose words begin with what has no place of its own in pydantic's path."""
Cell = StrictStr | StrictInt | StrictFloat | StrictBool | None
Fields = Annotated[dict[str, Cell], BeforeValidator(_cells)]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[int, Field(ge=1, le=1)]
Texts = Annotated[list[StrictStr], Field(fail_fast=True)]
Stop = StrictStr | Texts | None
MaxTokens = Annotated[StrictInt | None, Field(ge=1)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Clients write null for what they do not say, also in fields that are not taken here."""
        if not isinstance(value, dict):
            return value
        said = {k: v for k, v in value.items() if v is not None or k in cls.model_fields}
        for name in said:
            if name not in cls.model_fields:
                told = {"field": name}
                raise PydanticCustomError(
                    _INNER, "{field} is no field of this request; see /docs", told
                )
        return said


class PredictRequest(_Message):
    """Rows for a prompt: one as ``fields``, or many as ``rows``."""

    fields: Fields | None = None
    rows: Annotated[list[Fields] | None, Field(min_length=1, fail_fast=True)] = None
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
    stream: StrictBool | None = False
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


class ResponseFormat(_Message):
    """The one that there is."""

    type: Literal["text"]


class ChatRequest(_OpenAI):
    """OpenAI's chat completion."""

    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: MaxTokens = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None


def in_words(errors: list[Any]) -> str:
    """The first of pydantic's errors, in one line."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    union = [i for i, part in enumerate(path) if part in ("str", "list[str]", "list[TextPart]")]
    where = ".".join(path[: union[0]] if union else path) or "the body"
    kind, message = first["type"], str(first["msg"])
    if kind == _INNER:
        return ".".join([*path, message])
    if path and path[-1] in ("temperature", "frequency_penalty", "presence_penalty"):
        return f"{where}: answers are greedy here; send 0, or nothing"
    return f"{where}: {message}"
