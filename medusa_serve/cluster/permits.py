"""Permits of a replica: Ray gives one to each request that it sends there, and the port refuses all others."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import MedusaServeError
from ..server.guard.error_replies import reply_to

# headers from the ingress to a replica; what a client sends under these names is dropped
PERMIT, CLIENT = b"medusa-permit", b"medusa-client"
USE_S = 10.0  # a permit that is not used for so long is taken back: the ingress that asked for it has died


class Misdirected(MedusaServeError):
    status, type, code = 421, "invalid_request_error", "misdirected_request"


class Permit:
    """For one request. All but `end` belongs to the event loop that it was given in."""

    def __init__(self) -> None:
        self.name = secrets.token_urlsafe(16)
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()

    async def until_over(self) -> None:
        await self._over.wait()

    def end(self) -> None:
        """The answer is over. Any thread."""
        self._loop.call_soon_threadsafe(self._over.set)


class Permits:
    """The permits that were given and are not used yet."""

    def __init__(self) -> None:
        self._unused: dict[str, Permit] = {}

    @contextmanager
    def given(self) -> Iterator[Permit]:
        """A permit for the request that brings its name within USE_S; within a running loop."""
        permit = Permit()
        self._unused[permit.name] = permit
        late = asyncio.get_running_loop().call_later(USE_S, self._take_back, permit)
        try:
            yield permit
        finally:
            late.cancel()
            self._unused.pop(permit.name, None)

    def use(self, name: str) -> Permit | None:
        """The permit of that name, once; the caller must end it. None: there is none. Any thread."""
        return self._unused.pop(name, None)

    def _take_back(self, permit: Permit) -> None:
        if self.use(permit.name) is not None:
            permit.end()


class PermitsOnly:
    """ASGI middleware around a replica's app: 421 without a permit. The app sees the client that the ingress saw."""

    def __init__(self, app: ASGIApp, permits: Permits) -> None:
        self.app, self._permits = app, permits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        ours = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (PERMIT, CLIENT)}
        permit = self._permits.use(ours.get(PERMIT, ""))
        if permit is None:
            return await reply_to(Misdirected("This port takes no requests of its own."))(scope, receive, send)
        headers = [pair for pair in scope["headers"] if pair[0] not in (PERMIT, CLIENT)]
        try:
            await self.app({**scope, "headers": headers, "client": (ours.get(CLIENT, ""), 0)}, receive, send)
        finally:
            permit.end()
