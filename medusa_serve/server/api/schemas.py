"""The bodies of /generate and /health, for validation and for an honest OpenAPI page.

Types are checked here, strictly. The bounds of the sampling parameters are read from SamplingParams, which checks them;
here they are only shown on the OpenAPI page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ...errors import InvalidRequest
from ...types import MAX_BIAS, MAX_BIASES, MAX_SEED, MAX_STOP_CHARS, MAX_STOPS, SamplingParams, sampling_numbers

MAX_MESSAGES = 128
TOKEN_ID = re.compile("(0|[1-9][0-9]{0,8})")


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        # tokenizers raise TypeError on a lone surrogate, and no JSON answer could hold one
        raise PydanticCustomError("string_unicode", "not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 1.0 is an integer, as the OpenAPI page's schemas understand it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _seed(value: int) -> int:
    return value % (MAX_SEED + 1) if 0 <= value <= MOST_SEED else value


Whole = Annotated[int, BeforeValidator(_whole)]
# 2^63 as programs write it that hold numbers as doubles (as does OpenAI's page): what is past 2^63 - 1 wraps around
MOST_SEED = 9_223_372_036_854_776_000
Seed = Annotated[int, BeforeValidator(_whole), AfterValidator(_seed)]


def shown_as(default: Any, /, *, description: str | None = None, **bounds: Any) -> Any:
    """A field that shows its bounds on the OpenAPI page and does not check them."""

    def add(schema: dict[str, Any]) -> None:
        for branch in schema.get("anyOf", [schema]):
            if branch.get("type") != "null":
                branch.update(bounds)

    return Field(default, description=description, json_schema_extra=add)


def number_of(name: str, /, **changes: Any) -> Any:
    """SamplingParams' number `name` as a field: its default, its help, and the bounds that SamplingParams checks.
    changes: another default or bound, where this API has one"""
    number = sampling_numbers()[name]
    low = "exclusiveMinimum" if number.open_low else "minimum"
    return shown_as(
        changes.pop("default", number.default),
        description=number.help,
        **{low: number.low, "maximum": number.high} | changes,
    )


_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOPS = {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}


def stop_shown(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [_STOP, _STOPS, {"type": "null"}]


def stops_shown(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [_STOPS, {"type": "null"}]


def _biases_shown(schema: dict[str, Any]) -> None:
    biases = {
        "type": "object",
        "propertyNames": {"pattern": f"^{TOKEN_ID.pattern}$"},
        "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
        "maxProperties": MAX_BIASES,
    }
    schema["anyOf"] = [biases, {"type": "null"}]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class ChatMessage(Strict):
    role: Literal["system", "user", "assistant"]
    content: Text


_ONE_OF: list[Any] = [
    {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
    {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
]


def params_of(fields: Mapping[str, Any], names: Mapping[str, str]) -> SamplingParams:
    """SamplingParams of the fields that are not None. Raises InvalidRequest that names the field as the client did.
    names: a field of ours → the client's"""
    try:
        return SamplingParams(**{name: value for name, value in fields.items() if value is not None})
    except InvalidRequest as error:
        theirs = names.get(error.param or "", error.param)
        message = error.message.replace(error.param, theirs, 1) if error.param and theirs else error.message
        raise InvalidRequest(message, param=theirs) from None


class Sampled(Strict):
    """The sampling parameters, as our own form and the OpenAI API have them. null means absent."""

    max_tokens: Whole | None = number_of("max_tokens")
    temperature: float | None = number_of("temperature")
    top_p: float | None = number_of("top_p")
    top_k: Whole | None = number_of("top_k")
    min_p: float | None = number_of("min_p")
    seed: Seed | None = number_of("seed", maximum=MOST_SEED)
    stop: Text | list[Text] | None = Field(None, json_schema_extra=stop_shown)
    repetition_penalty: float | None = number_of("repetition_penalty")
    presence_penalty: float | None = number_of("presence_penalty")
    frequency_penalty: float | None = number_of("frequency_penalty")
    logit_bias: dict[str, Any] | None = Field(None, json_schema_extra=_biases_shown)
    speculation: bool | None = True

    def sampling_params(self, names: Mapping[str, str] = MappingProxyType({}), **more: Any) -> SamplingParams:
        """With `more` fields, in the place of these. Raises as `params_of`."""
        given = {name: getattr(self, name) for name in Sampled.model_fields} | more
        if given["logit_bias"] is not None:
            given["logit_bias"] = {_token_id(key): value for key, value in given["logit_bias"].items()}
        return params_of(given, names)


def _token_id(key: str) -> int:
    if not TOKEN_ID.fullmatch(key):
        raise InvalidRequest("The keys of logit_bias must be token ids in decimal.", param="logit_bias")
    return int(key)


class GenerateRequest(Sampled):
    """Exactly one of `prompt` (raw text) and `messages` (chat template). null means absent."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _ONE_OF})

    prompt: Text | None = shown_as(None, minLength=1)
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    logprobs: Whole | None = number_of("logprobs")
    stream: bool | None = False
    return_token_ids: bool | None = False

    @model_validator(mode="after")
    def _one_source(self) -> GenerateRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Give exactly one of prompt (raw text) and messages (a chat).", param="prompt")
        if self.prompt == "":
            raise InvalidRequest("prompt must not be empty.", param="prompt")
        return self

    def source(self) -> str | list[dict[str, str]]:
        """The prompt, or the messages as plain data."""
        return self.prompt if self.messages is None else [m.model_dump() for m in self.messages]  # type: ignore[return-value]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class Speculation(BaseModel):
    steps: int
    drafted: int
    accepted: int
    acceptance: float | None


class Timings(BaseModel):
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    tokens_per_second: float | None


class TopToken(BaseModel):
    id: int
    logprob: float


class TokenLogprobs(TopToken):
    """The model's own log-probabilities, before bias, penalties and temperature."""

    top: list[TopToken]


class GenerateResponse(BaseModel):
    id: str
    model: str
    text: str
    finish_reason: Literal["stop", "length"]
    seed: int
    token_ids: list[int] | None = Field(None, description="Only with return_token_ids.")
    logprobs: list[TokenLogprobs] | None = Field(None, description="Only with logprobs: one for each token.")
    usage: Usage
    medusa: Speculation
    timings: Timings


HealthState = Literal["ok", "loading", "stalled", "restarting", "draining", "failed"]


class Health(BaseModel):
    """200: status is ok, with LLM.describe(). 503: any other status, with a message."""

    model_config = ConfigDict(extra="allow")

    status: HealthState
    message: str | None = None
    running: Whole | None = None
    waiting: Whole | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorBody


_STREAM = "With `stream`: server-sent events, then `[DONE]`. {} A late error is an event like any error, then `[DONE]`."
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
GENERATION = (400, 401, 404, 405, 408, 413, 415, 429, 431, 500, 503, 504)  # what a request for text may meet
_REFUSALS = {
    400: "The request is wrong; `param` names the field.",
    401: "The key is missing or wrong.",
    404: "No such path.",
    405: "The path does not take this method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many sequences wait, or a guest's key has used what it may; see Retry-After.",
    431: "There are too many headers.",
    500: "This sequence made the model fail.",
    503: "Loading, draining, out of time or memory in the queue, restarting, or failed.",
    504: "The answer took too long.",
}


def documented(*statuses: int, events: str = "") -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: what it may refuse with; "default" keeps FastAPI's own 422, never sent, off the page.
    events: of a route that can stream, what they hold"""
    out: dict[int | str, dict[str, Any]] = {s: {"model": ErrorReply, "description": _REFUSALS[s]} for s in statuses}
    out["default"] = {"model": ErrorReply, "description": "Any other error, in the same shape."}
    if events:
        stream = {"text/event-stream": {"itemSchema": _EVENT}}
        out[200] = {"description": _STREAM.format(events), "content": stream}
    return out
