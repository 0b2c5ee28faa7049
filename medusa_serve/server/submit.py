"""What every API does behind its own shapes: tokenise, submit, answer as events or in one piece."""

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
from .api.limits import CHARS_PER_TOKEN
from .background_load import ServedLLM
from .config import ServerConfig
from .guard.hosts import Hosts
from .guard.keys import Keys
from .guard.traffic import Traffic
from .streaming import EventStream, Switchboard, Tickets, Voice, answer

LEFT = 499  # nobody reads it: the client is gone
SHORT = 1024  # characters that are tokenised at once: in a millisecond at most, and another thread is as long in coming


@dataclass(frozen=True)
class Desk:
    """What the requests of one app share. `llm` raises while there is none."""

    llm: Callable[[], ServedLLM]
    config: ServerConfig
    keys: Keys
    hosts: Hosts
    traffic: Traffic
    switchboard: Switchboard
    tokenizers: ThreadPoolExecutor  # two threads: tokenising may take long, the event loop must not, nor all the cores


class Order(NamedTuple):
    """A prompt, what to sample for it (a sequence each), and what the request calls it."""

    source: str | list[dict[str, str]]
    params: tuple[SamplingParams, ...]
    field: str


def ready(desk: Desk) -> ServedLLM:
    """The model, or an error that HTTP calls 503: that loading failed is no fault of this request."""
    try:
        return desk.llm()
    except Unavailable:
        raise
    except MedusaServeError as error:
        raise EngineDead(error.message) from None


async def admit(desk: Desk, llm: ServedLLM, orders: Seq[Order], request: Request) -> Tickets:
    """Tokenise, off the event loop if that may take long, and submit all, in order. Raises what either refuses; the
    tickets must be closed."""
    context, loop = llm.describe()["max_context"], asyncio.get_running_loop()
    encoded = []
    for source, _, field in orders:
        num_chars = len(source) if isinstance(source, str) else sum(len(message["content"]) for message in source)
        if num_chars > CHARS_PER_TOKEN * context:
            raise ContextTooLong(f"{field} has {num_chars} characters, which cannot fit {context} tokens.", param=field)
        encode: Any = llm.codec.encode if isinstance(source, str) else llm.codec.encode_chat
        short = num_chars <= SHORT
        encoded.append(encode(source) if short else await loop.run_in_executor(desk.tokenizers, encode, source))
    tickets = Tickets()
    try:
        for ids, order in zip(encoded, orders, strict=True):
            for params in order.params:
                desk.switchboard.submit(llm.manager, ids, params, key=request.state.tenant.name, tickets=tickets)
    except BaseException:
        tickets.close()
        raise
    return tickets


async def reply(desk: Desk, tickets: Tickets, voice: Voice, request: Request, *, stream: bool) -> Response:
    """The answer of a request's sequences, as events or in one piece. Closes the tickets."""
    if stream:
        merge_s, pace_s = desk.config.merge_ms / 1000, desk.config.pace_ms / 1000
        board = desk.switchboard
        return EventStream(tickets, voice, merge_s=merge_s, pace_s=pace_s, num_open=lambda: board.num_open)
    done = await answer(tickets, request.receive)
    return Response(status_code=LEFT) if done is None else JSONResponse(voice.whole(done))
