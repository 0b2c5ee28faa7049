"""The answer of one request: server-sent events, merged where the socket lags, or one JSON object."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Seq
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import MedusaServeError
from ..types import Completion, Delta
from .guard.error_replies import log_crash
from .router import OpenSequences

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
PACE_PER_ANSWER_S, MAX_PACE_S = 0.001, 0.1  # from one event of an answer to its next, by the number of open answers
LAG_S = 0.001  # a send that waited this long met a full socket: otherwise it does not wait at all


class AnswerFormat(Protocol):
    """How one API writes the deltas of a request's sequences. It returns the data of events, or of the one answer.
    Errors have one format everywhere, `MedusaServeError.to_dict`."""

    def first_events(self, num_choices: int) -> list[dict[str, Any]]:
        """Sent before any delta has come."""

    def events(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The text and the completion of a (merged) delta of sequence `index`; nothing of its error."""

    def last_events(self) -> list[dict[str, Any]]:
        """Sent after the last completion."""

    def full_answer(self, done: Seq[Completion]) -> Any:
        """The answer without a stream."""


async def answer(sequences: OpenSequences, receive: Receive) -> list[Completion] | None:
    """The completions; None when the client left first. Raises the first error of a sequence. Closes the sequences."""

    async def all_of_them() -> list[Completion]:
        done: dict[int, Completion] = {}
        while len(done) < len(sequences.all):
            for index, delta in await sequences.take():
                if delta.error is not None:
                    raise delta.error
                if delta.completion is not None:
                    done[index] = delta.completion
        return [done[index] for index in range(len(done))]

    try:
        return await unless_gone(receive, all_of_them())
    finally:
        sequences.close()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None, and `work` cancelled, when the client disconnects first.

    Plain handlers are not cancelled by starlette, and streaming ones only on some ASGI versions.
    """
    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """The server-sent events of one request's sequences, which it closes. It always ends with one completion of each,
    or with one error, and then [DONE]."""

    media_type = "text/event-stream"

    def __init__(
        self,
        sequences: OpenSequences,
        answer_format: AnswerFormat,
        *,
        merge_s: float,
        pace_s: float,
        num_open: Callable[[], int],
    ) -> None:
        """merge_s: how long to wait for a socket that lags · pace_s: from the beginning of one send to the next, at
        least; longer where many answers are open. Deltas that come in that time are merged: a GPU makes more steps a
        second than a loop can send events, or an eye can see."""
        self.status_code, self.background = 200, None
        self._sequences, self._format, self._merge_s, self._pace_s = sequences, answer_format, merge_s, pace_s
        self._num_open = num_open
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(OSError):  # newer ASGI servers: the client has left
                await unless_gone(receive, self._send_all(send))
        finally:
            self._sequences.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await self._send_events(send)
        except OSError:
            raise
        except Exception as error:  # the status line is sent already: the error becomes an event
            log_crash(error)
            failure = MedusaServeError("The server failed at this stream.")
            await send({"type": "http.response.body", "body": event(failure.to_dict()) + DONE})

    async def _send_events(self, send: Send) -> None:
        loop, running = asyncio.get_running_loop(), set(range(len(self._sequences.all)))
        events = self._format.first_events(len(running))
        while True:
            payload = b"".join(event(data) for data in events)
            began = loop.time()
            if payload or not running:
                await send(
                    {"type": "http.response.body", "body": payload + DONE * (not running), "more_body": bool(running)}
                )
            if not running:
                return
            took = loop.time() - began
            pace_s = max(self._pace_s, min(PACE_PER_ANSWER_S * self._num_open(), MAX_PACE_S))
            if took > LAG_S:
                await self._sequences.rest(max(self._merge_s, pace_s))  # fewer, larger ones where a socket lags
            elif payload and took < pace_s:
                await self._sequences.rest(pace_s - took)
            events = self._events_of(await self._sequences.take(), running)

    def _events_of(self, deltas: Seq[tuple[int, Delta]], running: set[int]) -> list[dict[str, Any]]:
        """The data of the next events; sequences that have ended leave `running`. An error ends the answer."""
        events = []
        for index, delta in deltas:
            events += self._format.events(index, delta)
            if delta.error is not None:
                running.clear()
                return [*events, delta.error.to_dict()]
            if delta.completion is not None:
                running.discard(index)
        return events if running else [*events, *self._format.last_events()]


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
