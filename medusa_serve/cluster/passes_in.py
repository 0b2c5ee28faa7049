"""Places at a replica: Ray gives one to each request that it sends there, and the port lets in nobody else."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import MedusaServeError
from ..server.guard.error_replies import reply_to

PLACE, CLIENT = b"medusa-place", b"medusa-client"  # headers between us alone: a client's own of these names are dropped
TAKE_S = 10.0  # a place that nobody comes with is taken back: who asked for it has died


class Misdirected(MedusaServeError):
    status, type, code = 421, "invalid_request_error", "misdirected_request"


class Place:
    """One request's. All but `leave` belongs to the event loop that it was given in."""

    def __init__(self) -> None:
        self.name = secrets.token_urlsafe(16)
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()

    async def until_left(self) -> None:
        await self._over.wait()

    def leave(self) -> None:
        """The answer is over. Any thread."""
        self._loop.call_soon_threadsafe(self._over.set)


class Places:
    """Those given and not yet taken."""

    def __init__(self) -> None:
        self._free: dict[str, Place] = {}

    @contextmanager
    def given(self) -> Iterator[Place]:
        """A place for who comes with its name within TAKE_S; within a running loop."""
        place = Place()
        self._free[place.name] = place
        late = asyncio.get_running_loop().call_later(TAKE_S, self._take_back, place)
        try:
            yield place
        finally:
            late.cancel()
            self._free.pop(place.name, None)

    def take(self, name: str) -> Place | None:
        """Who takes a place has to leave it; it can be taken once. Any thread."""
        return self._free.pop(name, None)

    def _take_back(self, place: Place) -> None:
        if self.take(place.name) is not None:
            place.leave()


class PlacesOnly:
    """ASGI middleware around a replica's app: 421 without a place. The app sees the client that the Door has seen."""

    def __init__(self, app: ASGIApp, places: Places) -> None:
        self.app, self._places = app, places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        ours = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (PLACE, CLIENT)}
        place = self._places.take(ours.get(PLACE, ""))
        if place is None:
            return await reply_to(Misdirected("This port takes no requests of its own."))(scope, receive, send)
        headers = [pair for pair in scope["headers"] if pair[0] not in (PLACE, CLIENT)]
        try:
            await self.app({**scope, "headers": headers, "client": (ours.get(CLIENT, ""), 0)}, receive, send)
        finally:
            place.leave()
