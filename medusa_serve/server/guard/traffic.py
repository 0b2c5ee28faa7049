"""Requests and bytes under names that are not this machine's own: a tunnel's plan counts both."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .hosts import name_of


class Traffic:
    """Requests, and bytes of answers with their heads, by `names` in Host headers. The loop's thread counts, any may
    read."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.requests = self.sent = 0


class CountTraffic:
    """ASGI middleware; runs after the one that checks the Host header."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self.app, self.traffic = app, traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        host = next((value for name, value in scope["headers"] if name.lower() == b"host"), b"")
        if name_of(host) not in self.traffic.names:
            return await self.app(scope, receive, send)
        self.traffic.requests += 1

        async def counted(message: Message) -> None:
            head = sum(len(key) + len(value) + 4 for key, value in message.get("headers", ()))
            self.traffic.sent += head + len(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, counted)
