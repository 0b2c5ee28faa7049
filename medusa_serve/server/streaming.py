"""From the engine thread to the socket: deltas, merged where the socket lags, as server-sent events or as one answer.

The engine calls one sink a step; that is one call_soon_threadsafe a step, whatever the number of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import MedusaServeError, ShuttingDown
from ..types import Completion, Delta, SamplingParams, Sink
from .failures import log_crash
from .watch import Watch

if TYPE_CHECKING:
    from ..engine.batch_manager import BatchManager

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
LAG_S = 0.001  # a send that waited this long met a full socket: otherwise it does not wait at all


class Switchboard:
    """Routes deltas to the requests of one event loop. All but `sink` belongs to that loop's thread.

    watch: ends requests that take too long · spent: gets a key's tokens when its request is over
    """

    def __init__(self, watch: Watch | None = None, spent: Callable[[str, int], None] | None = None) -> None:
        self._watch, self._spent = watch, spent
        self._tickets: dict[str, Ticket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.sink: Sink = self._from_engine  # one object: the engine groups sequences by it

    @property
    def num_open(self) -> int:
        return len(self._tickets)

    def submit(self, manager: BatchManager, ids: Seq[int], params: SamplingParams, *, key: str) -> Ticket:
        """Raises what the manager raises. The ticket must be closed.

        The engine may answer before this returns, but its deltas pass through the loop, and we hold the loop until
        the ticket is in the table.
        """
        self._loop = asyncio.get_running_loop()
        sequence_id = manager.submit(ids, params, self.sink, key=key)
        ticket = self._tickets[sequence_id] = Ticket(self, manager, sequence_id, key)
        if self._watch is not None:
            self._watch.begin(self._all, manager)
        return ticket

    def _all(self) -> list[Ticket]:
        return list(self._tickets.values())

    def leave(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.id, None) is not None and self._spent is not None:
            self._spent(ticket.key, ticket.num_tokens)

    def dismiss(self, error: MedusaServeError) -> None:
        """End what the engine has not ended, as far as the clients are concerned."""
        for ticket in self._all():
            ticket.dismiss(error)

    def _from_engine(self, deltas: list[tuple[str, Delta]]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._deliver, deltas)

    def _deliver(self, deltas: list[tuple[str, Delta]]) -> None:
        for sequence_id, delta in deltas:
            ticket = self._tickets.get(sequence_id)
            if ticket is not None:  # else its client has left
                ticket.put(delta)


class Ticket:
    """One submitted sequence as its request sees it: at most one delta waits, later ones are merged into it."""

    def __init__(self, board: Switchboard, manager: BatchManager, sequence_id: str, key: str) -> None:
        self._board, self._manager, self.id, self.key = board, manager, sequence_id, key
        self.began, self.num_tokens = asyncio.get_running_loop().time(), 0
        self._waiting: Delta | None = None
        self._ready = asyncio.Event()
        self._finished = False

    @property
    def answered(self) -> bool:
        """Its first token has come, or its end."""
        return self.num_tokens > 0 or self._finished

    def put(self, delta: Delta) -> None:
        if self._finished:  # dismissed: it has had its last word
            return
        self.num_tokens += sum(delta.tokens)
        self._waiting = delta if self._waiting is None else self._waiting.merged(delta)
        self._finished = delta.is_last
        self._ready.set()

    def dismiss(self, error: MedusaServeError) -> None:
        if not self._finished:
            self._manager.cancel(self.id, "shutdown" if isinstance(error, ShuttingDown) else "timeout")
            self.put(Delta("", error=error))

    async def take(self) -> Delta:
        """What has come since the last call, as one delta; waits for the first."""
        await self._ready.wait()
        self._ready.clear()
        delta, self._waiting = self._waiting, None
        assert delta is not None  # _ready is set only with a delta
        return delta

    def close(self) -> None:
        """The request is over; a sequence that is not is cancelled."""
        self._board.leave(self)
        if not self._finished:
            self._finished = True
            self._manager.cancel(self.id)


async def answer(ticket: Ticket, receive: Receive) -> Completion | None:
    """The completion; None when the client left first. Raises the sequence's error. Closes the ticket."""

    async def last() -> Delta:
        while not (delta := await ticket.take()).is_last:
            pass
        return delta

    try:
        delta = await unless_gone(receive, last())
    finally:
        ticket.close()
    if delta is not None and delta.error is not None:
        raise delta.error
    return None if delta is None else delta.completion


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
    """The server-sent events of one ticket, which it closes. It always ends with one terminal event and [DONE]."""

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, *, token_ids: bool, merge_s: float) -> None:
        self.status_code, self.background = 200, None
        self._ticket, self._token_ids, self._merge_s = ticket, token_ids, merge_s
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(OSError):  # newer ASGI servers: the client has left
                await unless_gone(receive, self._send_all(send))
        finally:
            self._ticket.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await self._send_events(send)
        except OSError:
            raise
        except Exception as error:  # the status line is out: say it in band
            log_crash(error)
            failure = MedusaServeError("The server failed at this stream.")
            await send({"type": "http.response.body", "body": event(failure.to_dict()) + DONE})

    async def _send_events(self, send: Send) -> None:
        loop, last = asyncio.get_running_loop(), False
        while not last:
            delta = await self._ticket.take()
            last = delta.is_last
            payload = b"".join(event(data) for data in events_of(delta, token_ids=self._token_ids))
            began = loop.time()
            if payload:
                await send({"type": "http.response.body", "body": payload + DONE * last, "more_body": not last})
            if not last and loop.time() - began > LAG_S:
                await asyncio.sleep(self._merge_s)  # fewer, larger events for a socket that cannot keep up


def events_of(delta: Delta, *, token_ids: bool = False) -> list[dict[str, Any]]:
    """The events one (merged) delta makes: one, or none when it is empty; text before an error goes out first."""
    step = {"text": delta.text, "tokens": list(delta.tokens), "accepted": list(delta.accepted)}
    if delta.completion is not None:
        return [delta.completion.to_dict(token_ids=token_ids) | step]
    out: list[dict[str, Any]] = [step] if delta.text or delta.tokens else []
    if delta.error is not None:
        out.append(delta.error.to_dict())
    return out


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
