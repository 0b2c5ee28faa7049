"""How much in how long: sliding windows, and what each guest's key may use of the server."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from ..config import ServerConfig
from .error_replies import RateLimited, reply_to

MINUTE = 60.0


class Window:
    """Amounts by name within the last `seconds`. One thread's.

    Not the package `limits`: its memory starts a thread at every hit, and drops a cost larger than what is left.
    """

    def __init__(self, limit: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._seconds, self._clock = limit, seconds, clock
        self._events: deque[tuple[float, str, int]] = deque()
        self._sums: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> None:
        self._forget()
        if amount:
            self._events.append((self._clock(), name, amount))
            self._sums[name] += amount

    def wait(self, name: str) -> int:
        """Whole seconds until `name` may use more; 0: now."""
        now = self._forget()
        if self._sums[name] < self._limit:
            return 0
        left = self._sums[name]
        for at, owner, amount in self._events:
            left -= amount if owner == name else 0
            if left < self._limit:
                return max(1, math.ceil(at + self._seconds - now))
        return math.ceil(self._seconds)

    def _forget(self) -> float:
        """What is older than the window; → now."""
        now = self._clock()
        while self._events and self._events[0][0] <= now - self._seconds:
            _, old, amount = self._events.popleft()
            self._sums[old] -= amount
            if not self._sums[old]:
                del self._sums[old]
        return now


class GuestLimits:
    """ASGI middleware: 429 for a guest's key that asks for too much. The owner, and all without keys, may do so.

    Needs scope["state"]["tenant"]; `spent` counts output tokens by tenant.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, spent: Window) -> None:
        self.app, self._most, self._tokens = app, config.guest_concurrent, spent
        self._requests = Window(config.guest_requests_per_minute, MINUTE)
        self._all = Window(config.guests_requests_per_minute, MINUTE)
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant = scope.get("state", {}).get("tenant")
        if tenant is None or not tenant.guest:
            return await self.app(scope, receive, send)
        name = tenant.name
        wait = max(self._requests.wait(name), self._all.wait(""), self._tokens.wait(name))
        if wait:
            refusal = RateLimited("This key has used what it may in a minute.", wait)
            return await reply_to(refusal)(scope, receive, send)
        if self._open[name] >= self._most:
            refusal = RateLimited(f"This key has {self._most} requests open already.", 1)
            return await reply_to(refusal)(scope, receive, send)
        self._requests.add(name)
        self._all.add("")
        self._open[name] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._open[name] -= 1
            self._open += Counter()  # drops zeros
