"""From the engine thread to the socket: deltas, merged where the socket lags, as server-sent events or as one answer.

The engine calls one sink a step; that is one call_soon_threadsafe a step, whatever the number of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import MedusaServeError, ShuttingDown
from ..types import Completion, Delta, SamplingParams, Sink
from .guard.error_replies import log_crash
from .timeouts import Watch

if TYPE_CHECKING:
    from ..engine.batch_manager import BatchManager

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
PACE_PER_ANSWER_S, MAX_PACE_S = 0.001, 0.1  # between two events of one answer, by how many are open
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

    def submit(
        self, manager: BatchManager, ids: Seq[int], params: SamplingParams, *, key: str, tickets: Tickets
    ) -> Ticket:
        """Submit one more sequence of a request: its ticket joins `tickets`, which must be closed. Raises what the
        manager raises.

        The engine may answer before this returns, but its deltas pass through the loop, and we hold the loop until
        the ticket is in the table.
        """
        self._loop = asyncio.get_running_loop()
        sequence_id = manager.submit(ids, params, self.sink, key=key)
        ticket = self._tickets[sequence_id] = Ticket(self, manager, sequence_id, key, tickets)
        tickets.all.append(ticket)
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
            if ticket is None:  # its client has left
                continue
            try:
                ticket.put(delta)
            except Exception as error:  # nobody may wait for ever, whatever went wrong here
                log_crash(error)
                ticket.fail(MedusaServeError("The server failed at this answer."))


class Ticket:
    """One submitted sequence as its request sees it: at most one delta waits, later ones are merged into it."""

    def __init__(self, board: Switchboard, manager: BatchManager, sequence_id: str, key: str, tickets: Tickets) -> None:
        self._board, self._manager, self.id, self.key = board, manager, sequence_id, key
        self.began, self.num_tokens = asyncio.get_running_loop().time(), 0
        self._waiting: Delta | None = None
        self._tickets = tickets
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
        self._tickets.wake(last=self._finished)

    def dismiss(self, error: MedusaServeError) -> None:
        if not self._finished:
            self._manager.cancel(self.id, "shutdown" if isinstance(error, ShuttingDown) else "timeout")
            self.put(Delta("", error=error))

    def fail(self, error: MedusaServeError) -> None:
        """As dismiss, and what waits is lost: it may be what went wrong."""
        self._manager.cancel(self.id)
        self._waiting, self._finished = Delta("", error=error), True
        self._tickets.wake(last=True)

    def pop(self) -> Delta | None:
        """What has come since the last call, as one delta."""
        delta, self._waiting = self._waiting, None
        return delta

    def close(self) -> None:
        """The request is over; a sequence that is not is cancelled."""
        self._board.leave(self)
        if not self._finished:
            self._finished = True
            self._manager.cancel(self.id)


class Tickets:
    """The sequences of one request, in order."""

    def __init__(self) -> None:
        self.all: list[Ticket] = []
        self._ready, self._hurry = asyncio.Event(), asyncio.Event()

    def wake(self, *, last: bool) -> None:
        """Something has come. last: a sequence has ended"""
        self._ready.set()
        if last:
            self._hurry.set()

    async def rest(self, seconds: float) -> None:
        """Let more come, but let no end wait."""
        timer = asyncio.get_running_loop().call_later(seconds, self._hurry.set)
        try:
            await self._hurry.wait()
        finally:
            timer.cancel()

    async def take(self) -> list[tuple[int, Delta]]:
        """What has come since the last call, at most one delta of each sequence by its index; waits for the first."""
        await self._ready.wait()
        self._ready.clear()
        self._hurry.clear()
        return [(index, delta) for index, ticket in enumerate(self.all) if (delta := ticket.pop()) is not None]

    def close(self) -> None:
        """The request is over; sequences that are not are cancelled."""
        for ticket in self.all:
            ticket.close()


class Voice(Protocol):
    """How one API says what its sequences do, as data of events (or of the one answer). An error has its own shape."""

    def begin(self, num_choices: int) -> list[dict[str, Any]]:
        """Before anything has come."""

    def say(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The text and the completion of a (merged) delta; nothing of its error."""

    def end(self) -> list[dict[str, Any]]:
        """After the last completion."""

    def whole(self, done: Seq[Completion]) -> Any:
        """The answer without a stream."""


async def answer(tickets: Tickets, receive: Receive) -> list[Completion] | None:
    """The completions; None when the client left first. Raises the first error of a sequence. Closes the tickets."""

    async def all_of_them() -> list[Completion]:
        done: dict[int, Completion] = {}
        while len(done) < len(tickets.all):
            for index, delta in await tickets.take():
                if delta.error is not None:
                    raise delta.error
                if delta.completion is not None:
                    done[index] = delta.completion
        return [done[index] for index in range(len(done))]

    try:
        return await unless_gone(receive, all_of_them())
    finally:
        tickets.close()


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
    """The server-sent events of one request's tickets, which it closes. It always ends with one completion of each, or
    with one error, and then [DONE]."""

    media_type = "text/event-stream"

    def __init__(
        self, tickets: Tickets, voice: Voice, *, merge_s: float, pace_s: float, num_open: Callable[[], int]
    ) -> None:
        """merge_s: how long to wait for a socket that lags · pace_s: between the beginnings of two sends, or more where
        many answers are open. What comes meanwhile is merged: a GPU makes more steps a second than a loop can send
        events, or an eye can see."""
        self.status_code, self.background = 200, None
        self._tickets, self._voice, self._merge_s, self._pace_s = tickets, voice, merge_s, pace_s
        self._num_open = num_open
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(OSError):  # newer ASGI servers: the client has left
                await unless_gone(receive, self._send_all(send))
        finally:
            self._tickets.close()

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
        loop, running = asyncio.get_running_loop(), set(range(len(self._tickets.all)))
        said = self._voice.begin(len(running))
        while True:
            payload = b"".join(event(data) for data in said)
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
                await self._tickets.rest(max(self._merge_s, pace_s))  # fewer, larger ones where a socket lags
            elif payload and took < pace_s:
                await self._tickets.rest(pace_s - took)
            said = self._hear(await self._tickets.take(), running)

    def _hear(self, news: Seq[tuple[int, Delta]], running: set[int]) -> list[dict[str, Any]]:
        """The data of the next events; sequences that have ended leave `running`. An error ends the whole answer."""
        said = []
        for index, delta in news:
            said += self._voice.say(index, delta)
            if delta.error is not None:
                running.clear()
                return [*said, delta.error.to_dict()]
            if delta.completion is not None:
                running.discard(index)
        return said if running else [*said, *self._voice.end()]


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
