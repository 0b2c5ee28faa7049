"""What every API does with a request once its body is read: tokenise, submit, answer as events or as one object."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from ..errors import ContextTooLong, EngineDead, MedusaServeError, Unavailable
from ..types import SamplingParams
from .background_load import ServedLLM
from .config import ServerConfig
from .events import AnswerFormat, EventStream, answer
from .guard.hosts import Hosts
from .guard.keys import Keys
from .guard.traffic import Traffic
from .router import DeltaRouter, OpenSequences

CHARS_PER_TOKEN = 8  # more characters than this per token of context cannot fit: refused before the tokenizer sees them
LEFT = 499  # nobody reads it: the client is gone
SHORT = 1024  # characters that are tokenised on the loop: a millisecond at most, as long as a thread takes to start


@dataclass(frozen=True)
class Shared:
    """What the requests of one app share. `llm` raises while there is none."""

    llm: Callable[[], ServedLLM]
    config: ServerConfig
    keys: Keys
    hosts: Hosts
    traffic: Traffic
    router: DeltaRouter
    tokenizers: ThreadPoolExecutor  # two threads: tokenising may take long; it must not hold the loop, or all cores


class Prompt(NamedTuple):
    """Raw text or messages, the params of each sequence to sample for it, and the name of the body's field."""

    source: str | list[dict[str, str]]
    params: tuple[SamplingParams, ...]
    field: str


def ready(shared: Shared) -> ServedLLM:
    """The model. Raises Unavailable (503): a model that could not be loaded is no fault of this request."""
    try:
        return shared.llm()
    except Unavailable:
        raise
    except MedusaServeError as error:
        raise EngineDead(error.message) from None


async def submit(shared: Shared, llm: ServedLLM, prompts: Seq[Prompt], request: Request) -> OpenSequences:
    """Tokenise, off the event loop if that may take long, and submit all, in order. Raises what the tokenizer or the
    engine refuses; the sequences must be closed."""
    context, loop = llm.describe()["max_context"], asyncio.get_running_loop()
    encoded = []
    for source, _, field in prompts:
        num_chars = len(source) if isinstance(source, str) else sum(len(message["content"]) for message in source)
        if num_chars > CHARS_PER_TOKEN * context:
            raise ContextTooLong(f"{field} has {num_chars} characters, which cannot fit {context} tokens.", param=field)
        encode: Any = llm.codec.encode if isinstance(source, str) else llm.codec.encode_chat
        short = num_chars <= SHORT
        encoded.append(encode(source) if short else await loop.run_in_executor(shared.tokenizers, encode, source))
    sequences = OpenSequences()
    try:
        for ids, prompt in zip(encoded, prompts, strict=True):
            for params in prompt.params:
                key = request.state.tenant.name
                shared.router.submit(llm.manager, ids, params, key=key, sequences=sequences)
    except BaseException:
        sequences.close()
        raise
    return sequences


async def reply(
    shared: Shared, sequences: OpenSequences, answer_format: AnswerFormat, request: Request, *, stream: bool
) -> Response:
    """The answer of a request's sequences, as events or as one object. Closes the sequences."""
    if stream:
        merge_s, pace_s = shared.config.merge_ms / 1000, shared.config.pace_ms / 1000
        router = shared.router
        return EventStream(sequences, answer_format, merge_s=merge_s, pace_s=pace_s, num_open=lambda: router.num_open)
    done = await answer(sequences, request.receive)
    return Response(status_code=LEFT) if done is None else JSONResponse(answer_format.full_answer(done))
