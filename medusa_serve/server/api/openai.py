"""The OpenAI API: /v1/models, /v1/completions, /v1/chat/completions, as its clients know them.

Speculation shows in `usage.completion_tokens_details` and under `medusa`: in streams tokens and accepted draft tokens
of each event's steps, at the end the seed, the totals and the timings.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import Depends, FastAPI, Request, Response

from ...types import Completion, Delta, TextCodec, TokenLogprob
from ..background_load import ServedLLM
from ..guard.body import json_only
from ..guard.error_replies import NotFound
from ..submit import Prompt, Shared, ready, reply, submit
from .openai_schemas import (
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    Model,
    ModelList,
    OpenAIRequest,
    TextCompletion,
)
from .schemas import GENERATION, documented

EVENTS = (
    "Each is a chunk as OpenAI's, at most one a step and choice; `medusa` has tokens and accepted draft tokens of its"
    " steps, the last one of a choice also its seed, totals and timings."
)
ALIASES = frozenset({"default", "dummy", "tgi"})  # huggingface_hub's client sends dummy, and sent tgi


class NoSuchModel(NotFound):
    code = "model_not_found"


def add_openai(app: FastAPI, shared: Shared) -> None:
    loaded_at = int(time.time())

    @app.get("/v1/models", response_model=ModelList, responses=documented(401, 405, 503))
    async def models() -> Any:
        """The one model that is served."""
        return {"object": "list", "data": [model_of(ready(shared), loaded_at)]}

    @app.get("/v1/models/{model:path}", response_model=Model, responses=documented(401, 404, 405, 503))
    async def model(model: str) -> Any:
        """The model of that name."""
        llm = ready(shared)
        check_model(model, llm)
        return model_of(llm, loaded_at)

    @app.post(
        "/v1/completions",
        response_model=TextCompletion,
        responses=documented(*GENERATION, events=EVENTS),
        dependencies=[Depends(json_only)],
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts as they are, without a chat template."""
        llm, params = ready(shared), body.params()
        prompts = [Prompt(text, params, "prompt") for text in body.prompts()]
        return await _answer(shared, llm, body, prompts, TextFormat(llm, body), request)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=documented(*GENERATION, events=EVENTS),
        dependencies=[Depends(json_only)],
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        llm, params = ready(shared), body.params()
        prompts = [Prompt(body.chat(), params, "messages")]
        return await _answer(shared, llm, body, prompts, ChatFormat(llm, body), request)


async def _answer(
    shared: Shared,
    llm: ServedLLM,
    body: OpenAIRequest,
    prompts: Seq[Prompt],
    answer_format: OpenAIFormat,
    request: Request,
) -> Response:
    check_model(body.model, llm)
    sequences = await submit(shared, llm, prompts, request)
    return await reply(shared, sequences, answer_format, request, stream=bool(body.stream))


def check_model(name: str | None, llm: ServedLLM) -> None:
    """Raises NoSuchModel, which does not repeat the name."""
    if name not in (None, llm.model_name, *ALIASES):
        raise NoSuchModel(f"This server has one model: {llm.model_name}.")


def model_of(llm: ServedLLM, created: int) -> dict[str, Any]:
    context = llm.describe()["max_context"]
    return {
        "id": llm.model_name,
        "object": "model",
        "created": created,
        "owned_by": "medusa_serve",
        "max_model_len": context,
    }


class OpenAIFormat:
    """What both kinds of answers share. Choice index: n choices of the first prompt, then of the next."""

    prefix: str
    answer_object: str
    event_object: str

    def __init__(self, llm: ServedLLM, body: OpenAIRequest) -> None:
        self._codec, self._n, self._usage = llm.codec, body.n or 1, body.include_usage
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": llm.model_name}
        self._done: dict[int, Completion] = {}

    def first_events(self, num_choices: int) -> list[dict[str, Any]]:
        return []

    def events(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        if not (delta.text or delta.tokens or delta.completion):
            return []
        reason, medusa = None, {"tokens": list(delta.tokens), "accepted": list(delta.accepted)}
        if delta.completion is not None:
            self._done[index] = delta.completion
            reason, medusa = delta.completion.finish_reason, medusa | totals_of(delta.completion)
        choice = {"index": index, **self._delta_fields(index, delta), "finish_reason": reason}
        return [self._part([choice]) | {"medusa": medusa}]

    def last_events(self) -> list[dict[str, Any]]:
        done = [self._done[index] for index in sorted(self._done)]
        return [self._part([]) | {"usage": usage_of(done, self._n)}] if self._usage else []

    def full_answer(self, done: Seq[Completion]) -> dict[str, Any]:
        choices = [
            {"index": index, **self._answer_fields(one), "finish_reason": one.finish_reason, "medusa": totals_of(one)}
            for index, one in enumerate(done)
        ]
        return {**self._head, "object": self.answer_object, "choices": choices, "usage": usage_of(done, self._n)}

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.event_object, "choices": choices} | (
            {"usage": None} if self._usage else {}
        )

    def _delta_fields(self, index: int, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _answer_fields(self, done: Completion) -> dict[str, Any]:
        raise NotImplementedError


class ChatFormat(OpenAIFormat):
    prefix, answer_object, event_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_events(self, num_choices: int) -> list[dict[str, Any]]:
        first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._part([{"index": index, **first}]) for index in range(num_choices)]

    def _delta_fields(self, index: int, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta.token_ids, delta.logprobs)
        return {"delta": {"content": delta.text} if delta.text else {}, "logprobs": logprobs}

    def _answer_fields(self, done: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": done.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(done.token_ids, done.logprobs)}

    def _logprobs(self, ids: Seq[int], logprobs: Seq[TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        content = [
            _named(self._codec, token, one.logprob)
            | {"top_logprobs": [_named(self._codec, other, value) for other, value in one.top]}
            for token, one in zip(ids, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}


def _named(codec: TextCodec, token: int, logprob: float) -> dict[str, Any]:
    text = codec.token_text(token)
    data = None if "\ufffd" in text else list(text.encode())  # a part of a character is no text
    return {"token": text, "logprob": logprob, "bytes": data}


class TextFormat(OpenAIFormat):
    prefix, answer_object, event_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, llm: ServedLLM, body: CompletionRequest) -> None:
        super().__init__(llm, body)
        self._top = body.logprobs or 0
        self._offsets: dict[int, int] = {}

    def _delta_fields(self, index: int, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta.token_ids, delta.logprobs, self._offsets.get(index, 0))
        if logprobs is not None:
            self._offsets[index] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        return {"text": delta.text, "logprobs": logprobs}

    def _answer_fields(self, done: Completion) -> dict[str, Any]:
        return {"text": done.text, "logprobs": self._logprobs(done.token_ids, done.logprobs, 0)}

    def _logprobs(self, ids: Seq[int], logprobs: Seq[TokenLogprob], offset: int) -> dict[str, Any] | None:
        """As OpenAI's first API had it: lists side by side. offset: where the first token's text begins."""
        if not logprobs:
            return None
        tokens, offsets = [self._codec.token_text(token) for token in ids], []
        for text in tokens:
            offsets.append(offset)
            offset += len(text)
        tops: list[dict[str, float]] = []
        for chosen, one in zip(ids, logprobs, strict=True):
            tops.append({self._codec.token_text(chosen): one.logprob})
            for token, value in one.top:  # best first; parts of characters all read U+FFFD
                tops[-1].setdefault(self._codec.token_text(token), value)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": tops if self._top else None,
            "text_offset": offsets,
        }


def totals_of(done: Completion) -> dict[str, Any]:
    """What only this server says of a choice."""
    full = done.to_dict()
    return {"seed": done.seed, "total": full["medusa"], "timings": full["timings"]}


def usage_of(done: Seq[Completion], n: int) -> dict[str, Any]:
    """Of all choices. A prompt counts once, and drafts that were not accepted are not tokens of the answer."""
    prompt, answer = sum(one.prompt_tokens for one in done[::n]), sum(one.completion_tokens for one in done)
    accepted = sum(one.accepted for one in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(one.drafted for one in done) - accepted,
        },
    }
