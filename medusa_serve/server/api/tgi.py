"""The API of Hugging Face's text-generation-inference, so that huggingface_hub.InferenceClient(model=url) works: POST
/, /generate with `inputs`, /generate_stream. Errors keep the one shape of this server."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from ...engine.detokenizer import Detokenizer
from ...errors import InvalidRequest
from ...types import Completion, Delta, SamplingParams, TextCodec, TokenLogprob
from ..guard.body import json_only
from ..submit import Prompt, Shared, ready, reply, submit
from .refused_fields import refuse, shown
from .schemas import (
    GENERATION,
    MOST_SEED,
    GenerateRequest,
    Seed,
    Strict,
    Text,
    Whole,
    documented,
    number_of,
    params_of,
    shown_as,
    stops_shown,
)

TGI_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "typical_p": (1,),
    "watermark": (False,),
    "truncate": (),
    "grammar": (),
    "adapter_id": (),
    "decoder_input_details": (False,),
}


EVENTS = (
    'Each is a token, `{"index", "token", "generated_text", "details"}`; the text and the details come with the last.'
)


class TgiParameters(Strict):
    model_config = ConfigDict(json_schema_extra=lambda schema: shown(schema, TGI_NEUTRAL))

    max_new_tokens: Whole | None = number_of("max_tokens")
    do_sample: bool | None = False
    temperature: float | None = number_of("temperature", default=None)
    top_p: float | None = number_of("top_p", default=None)
    top_k: Whole | None = number_of("top_k", default=None)
    seed: Seed | None = number_of("seed", maximum=MOST_SEED)
    stop: list[Text] | None = Field(default=None, json_schema_extra=stops_shown)
    repetition_penalty: float | None = number_of("repetition_penalty", default=None)
    frequency_penalty: float | None = number_of("frequency_penalty", default=None)
    return_full_text: bool | None = False
    details: bool | None = True
    top_n_tokens: Whole | None = number_of("logprobs")

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, body: Any) -> Any:
        refuse(body, TGI_NEUTRAL)
        return {k: v for k, v in body.items() if k not in TGI_NEUTRAL} if isinstance(body, Mapping) else body

    def sampling_params(self) -> SamplingParams:
        """As TGI reads them: greedy, unless something asks for sampling. Raises InvalidRequest."""
        warps = self.temperature not in (None, 1) or self.top_k or self.top_p not in (None, 1)
        hot = bool(self.do_sample or warps)
        given = {
            "max_tokens": self.max_new_tokens,
            "temperature": (1.0 if self.temperature is None else self.temperature) if hot else 0.0,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "stop": self.stop,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logprobs": self.top_n_tokens or 0,
        }
        return params_of(given, {"max_tokens": "max_new_tokens", "logprobs": "top_n_tokens"})


class TgiRequest(Strict):
    """`inputs` as it is, without a chat template."""

    inputs: Text = shown_as(..., minLength=1)
    parameters: TgiParameters | None = None
    stream: bool | None = False

    @model_validator(mode="before")
    @classmethod
    def _unmixed(cls, body: Any) -> Any:
        if isinstance(body, Mapping) and not {"prompt", "messages"}.isdisjoint(body):
            raise InvalidRequest("inputs (with parameters) cannot be mixed with prompt or messages.", param="inputs")
        return body

    @model_validator(mode="after")
    def _not_empty(self) -> TgiRequest:
        if not self.inputs:
            raise InvalidRequest("inputs must not be empty.", param="inputs")
        return self


def _form(body: Any) -> str:
    return "TgiRequest" if isinstance(body, Mapping) and "inputs" in body else "GenerateRequest"


GenerateBody = Annotated[
    Annotated[GenerateRequest, Tag("GenerateRequest")] | Annotated[TgiRequest, Tag("TgiRequest")],
    Discriminator(_form),
]


class TgiToken(BaseModel):
    id: int
    text: str
    logprob: float
    special: bool


class TgiDetails(BaseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int
    prefill: list[TgiToken]
    tokens: list[TgiToken]
    top_tokens: list[list[TgiToken]] | None = None
    medusa: dict[str, Any]


class TgiResponse(BaseModel):
    generated_text: str
    details: TgiDetails | None = None


def add_tgi(app: FastAPI, shared: Shared) -> None:
    options: dict[str, Any] = {
        "dependencies": [Depends(json_only)],
        "responses": documented(*GENERATION, events=EVENTS),
    }

    @app.post("/", response_model=list[TgiResponse], **options)
    async def compatible(body: TgiRequest, request: Request) -> Response:
        """Complete `inputs`, in a list of one, or with `stream` as events."""
        return await answer_tgi(shared, body, request, stream=bool(body.stream), listed=True)

    @app.post("/generate_stream", response_class=Response, **options)
    async def generate_stream(body: TgiRequest, request: Request) -> Response:
        """Complete `inputs` as events, one a token."""
        return await answer_tgi(shared, body, request, stream=True)


async def answer_tgi(
    shared: Shared, body: TgiRequest, request: Request, *, stream: bool, listed: bool = False
) -> Response:
    llm, parameters = ready(shared), body.parameters or TgiParameters()
    prompt = Prompt(body.inputs, (parameters.sampling_params(),), "inputs")
    sequences = await submit(shared, llm, [prompt], request)
    return await reply(shared, sequences, TgiFormat(llm.codec, body.inputs, parameters, listed), request, stream=stream)


class TgiFormat:
    """One event a token, of one sequence; the texts of the tokens join to the generated text."""

    def __init__(self, codec: TextCodec, inputs: str, parameters: TgiParameters, listed: bool) -> None:
        self._codec, self._parameters, self._listed = codec, parameters, listed
        self._before = inputs if parameters.return_full_text else ""
        self._texts = TokenTexts(codec, parameters.stop or ())
        self._index = 0

    def first_events(self, num_choices: int) -> list[dict[str, Any]]:
        return []

    def events(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        texts = self._texts.feed(delta.token_ids, delta.completion)
        out = []
        for token, text, one in zip(delta.token_ids, texts, delta.logprobs, strict=True):
            self._index += 1
            answer = {"index": self._index, "token": self._token(token, text, one.logprob)}
            if self._parameters.top_n_tokens:
                answer["top_tokens"] = self._top(one)
            out.append({**answer, "generated_text": None, "details": None})
        if out:  # these are of the step, not of one token: its first event has them
            out[0]["medusa"] = {"tokens": list(delta.tokens), "accepted": list(delta.accepted)}
        if out and delta.completion is not None:
            done = delta.completion
            details = {name: value for name, value in self._details(done).items() if name not in ("prefill", "tokens")}
            details["input_length"] = done.prompt_tokens
            out[-1] |= {"generated_text": self._before + done.text, "details": details}
        return out

    def last_events(self) -> list[dict[str, Any]]:
        return []

    def full_answer(self, done: Seq[Completion]) -> Any:
        answer: dict[str, Any] = {"generated_text": self._before + done[0].text}
        if self._parameters.details is not False:
            texts = self._texts.feed(done[0].token_ids, done[0])
            triples = zip(done[0].token_ids, texts, done[0].logprobs, strict=True)
            answer["details"] = self._details(done[0])
            answer["details"]["tokens"] = [self._token(token, text, one.logprob) for token, text, one in triples]
            if self._parameters.top_n_tokens:
                answer["details"]["top_tokens"] = [self._top(one) for one in done[0].logprobs]
        return [answer] if self._listed else answer

    def _details(self, done: Completion) -> dict[str, Any]:
        reason = "length"
        if done.finish_reason == "stop":
            reason = "eos_token" if done.token_ids[-1] in self._codec.special_ids else "stop_sequence"
        details = {"finish_reason": reason, "generated_tokens": done.completion_tokens, "seed": done.seed}
        return details | {"prefill": [], "tokens": [], "medusa": done.to_dict()["medusa"]}

    def _token(self, token: int, text: str, logprob: float) -> dict[str, Any]:
        return {"id": token, "text": text, "logprob": logprob, "special": token in self._codec.special_ids}

    def _top(self, one: TokenLogprob) -> list[dict[str, Any]]:
        return [self._token(token, self._codec.token_text(token), value) for token, value in one.top]


class TokenTexts:
    """A sequence's text, token by token: what each made certain. The last one's is all the rest."""

    def __init__(self, codec: TextCodec, stop: Seq[str]) -> None:
        self._detokenizer = Detokenizer(codec, stop)
        self._length = 0

    def feed(self, ids: Seq[int], completion: Completion | None) -> list[str]:
        texts = []
        for number, token in enumerate(ids, 1):
            if completion is not None and number == len(ids):
                texts.append(completion.text[self._length :])
            else:
                texts.append(self._detokenizer.feed([token])[0])
            self._length += len(texts[-1])
        return texts
