"""The bodies of /v1/completions and /v1/chat/completions. Fields that the API does not know are ignored, as its clients
send many; fields that would change the answer are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from ...errors import InvalidRequest, Unsupported
from ...types import MAX_SEED, SamplingParams
from .refused_fields import MESSAGE_NEUTRAL, NEUTRAL, refuse, shown
from .schemas import MAX_MESSAGES, Sampled, Speculation, Text, Timings, Whole, number_of, shown_as

MAX_CHOICES = 4  # of one prompt
MAX_PROMPTS = 8
MAX_PARTS = 64


class _Tolerant(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


def _joined(content: Any) -> Any:
    """Text parts as one text."""
    if not isinstance(content, list):
        return content
    if not 1 <= len(content) <= MAX_PARTS:
        raise InvalidRequest(f"content must have 1 to {MAX_PARTS} parts.", param="messages")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InvalidRequest("Each part of content must be an object with a type.", param="messages")
        if part["type"] != "text":
            raise Unsupported("Parts of content must be text; other kinds are not supported.", param="messages")
        if not isinstance(part.get("text"), str):
            raise InvalidRequest("Each part of content must have a text.", param="messages")
    return "".join(part["text"] for part in content)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1, "maxItems": MAX_PARTS}]}


class Message(_Tolerant):
    model_config = ConfigDict(json_schema_extra=lambda schema: shown(schema, MESSAGE_NEUTRAL))

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined), WithJsonSchema(_CONTENT)]

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, body: Any) -> Any:
        refuse(body, MESSAGE_NEUTRAL)
        return body

    def plain(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(_Tolerant):
    include_usage: bool | None = None


class OpenAIRequest(Sampled):
    """What both endpoints take."""

    model_config = ConfigDict(extra="ignore")

    model: Text | None = Field(None, description="As /v1/models names it; absent: the one model that is served.")
    temperature: float | None = number_of("temperature", default=1.0)
    n: Whole | None = shown_as(1, minimum=1, maximum=MAX_CHOICES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, body: Any) -> Any:
        refuse(body, NEUTRAL)
        return body

    @model_validator(mode="after")
    def _few(self) -> OpenAIRequest:
        if self.n is not None and not 1 <= self.n <= MAX_CHOICES:
            raise InvalidRequest(f"n must be an integer from 1 to {MAX_CHOICES}.", param="n")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream and self.stream_options and self.stream_options.include_usage)

    def choices(self, names: Mapping[str, str], **more: Any) -> tuple[SamplingParams, ...]:
        """One for each of n, with `more` fields. A seed is that of the first choice; the next ones count on from it."""
        params = self.sampling_params(names, temperature=1.0 if self.temperature is None else self.temperature, **more)
        seeds = [None if params.seed is None else (params.seed + i) % (MAX_SEED + 1) for i in range(self.n or 1)]
        return tuple(replace(params, seed=seed) for seed in seeds)


def _not_offered(schema: dict[str, Any]) -> None:
    shown(schema, NEUTRAL)


class CompletionRequest(OpenAIRequest):
    model_config = ConfigDict(json_schema_extra=_not_offered)

    prompt: Annotated[
        Text | list[Text],
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {
                        "type": "array",
                        "items": {"type": "string", "minLength": 1},
                        "minItems": 1,
                        "maxItems": MAX_PROMPTS,
                    },
                ]
            }
        ),
    ]
    logprobs: Whole | None = number_of("logprobs")

    @model_validator(mode="after")
    def _some(self) -> CompletionRequest:
        if not 1 <= len(self.prompts()) <= MAX_PROMPTS or not all(self.prompts()):
            raise InvalidRequest(f"prompt must be 1 to {MAX_PROMPTS} strings that are not empty.", param="prompt")
        return self

    def params(self) -> tuple[SamplingParams, ...]:
        return self.choices({}, logprobs=self.logprobs)

    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


_TOP_NEEDS = [  # top_logprobs is for answers with logprobs
    {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    {"properties": {"top_logprobs": {"type": "null"}}},
]


def _chat_shown(schema: dict[str, Any]) -> None:
    shown(schema, NEUTRAL)
    schema["anyOf"] = _TOP_NEEDS


class ChatRequest(OpenAIRequest):
    model_config = ConfigDict(json_schema_extra=_chat_shown)

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Whole | None = number_of("max_tokens")
    logprobs: bool | None = False
    top_logprobs: Whole | None = number_of("logprobs")

    @model_validator(mode="after")
    def _whole(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
        return self

    def params(self) -> tuple[SamplingParams, ...]:
        names, limit = {"logprobs": "top_logprobs"}, self.max_tokens
        if self.max_completion_tokens is not None:
            names["max_tokens"], limit = "max_completion_tokens", self.max_completion_tokens
        return self.choices(names, max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)

    def chat(self) -> list[dict[str, str]]:
        return [message.plain() for message in self.messages]


# ---- answers -----------------------------------------------------------------------------------------------------


class OpenAIUsage(BaseModel):
    """accepted and rejected: draft tokens. Rejected ones are no part of completion_tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: PredictionTokens


class PredictionTokens(BaseModel):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class ChoiceFacts(BaseModel):
    """Under `medusa`: the seed that gives this text again, and what /generate says of its steps."""

    seed: int
    total: Speculation
    timings: Timings


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None


class ChatAnswer(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    medusa: ChoiceFacts


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: OpenAIUsage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    medusa: ChoiceFacts


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: OpenAIUsage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]
