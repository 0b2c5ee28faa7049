"""POST /generate: this server's own form, or text-generation-inference's where the body has `inputs`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from fastapi import Depends, FastAPI, Request, Response

from ...types import Completion, Delta
from ..guard.body import json_only
from ..submit import Prompt, Shared, ready, reply, submit
from .schemas import GENERATION, GenerateResponse, documented
from .tgi import GenerateBody, TgiRequest, TgiResponse, answer_tgi

EVENTS = (
    'Each is `{"text", "tokens", "accepted"}`, at most one a step; the last is the full object with the remaining text.'
    " With `inputs` they are those of /generate_stream."
)


def add_generate(app: FastAPI, shared: Shared) -> None:
    @app.post(
        "/generate",
        response_model=GenerateResponse | TgiResponse,
        responses=documented(*GENERATION, events=EVENTS),
        dependencies=[Depends(json_only)],
    )
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Complete a prompt or answer a chat."""
        if isinstance(body, TgiRequest):
            return await answer_tgi(shared, body, request, stream=bool(body.stream))
        params, llm = body.sampling_params(logprobs=body.logprobs), ready(shared)
        prompt = Prompt(body.source(), (params,), "prompt" if body.messages is None else "messages")
        sequences = await submit(shared, llm, [prompt], request)
        return await reply(
            shared, sequences, GenerateFormat(bool(body.return_token_ids)), request, stream=bool(body.stream)
        )


class GenerateFormat:
    """The events and the object of /generate. There is one sequence."""

    def __init__(self, token_ids: bool) -> None:
        self._token_ids = token_ids

    def first_events(self, num_choices: int) -> list[dict[str, Any]]:
        return []

    def events(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """One event, or none when the delta is empty."""
        step = {"text": delta.text, "tokens": list(delta.tokens), "accepted": list(delta.accepted)}
        if delta.completion is not None:
            return [delta.completion.to_dict(token_ids=self._token_ids) | step]
        return [step] if delta.text or delta.tokens else []

    def last_events(self) -> list[dict[str, Any]]:
        return []

    def full_answer(self, done: Seq[Completion]) -> dict[str, Any]:
        return done[0].to_dict(token_ids=self._token_ids)
