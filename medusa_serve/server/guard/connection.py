"""One connection, where uvicorn knows no limits: a head that does not come, a client that does not read, too many."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import Unavailable
from ..config import ServerConfig
from .error_replies import reply_to


class TooManyConnections(Unavailable):
    code = "too_many_connections"
    retry_after = 1


async def crowded(scope: Scope, receive: Receive, send: Send) -> None:
    """The app of a connection beyond the limit: also its requests are answered in our shape."""
    await reply_to(TooManyConnections("Too many connections are open."), {"Connection": "close"})(scope, receive, send)


class Connection(H11Protocol):
    """uvicorn's own, closed when a request's head takes longer than header_s, or when its client has taken nothing
    for client_stall_s. To the app both are a client that leaves."""

    def __init__(self, *args: Any, limits: ServerConfig, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self.app = crowded
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def _await_head(self) -> None:
        """Between requests uvicorn's keep-alive timer runs; once data has come, ours runs until the head is there."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            _stop(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None and self.timeout_keep_alive_task is None:
            self._head_timer = self.loop.call_later(self._limits.header_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._limits.client_stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._stall_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        _stop(self._head_timer)
        _stop(self._stall_timer)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
