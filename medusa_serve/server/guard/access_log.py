"""One line a request in the log `medusa_serve.access`: no query, no header, no text, so no secret."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...engine.quiet_log import QuietLogger

log = QuietLogger("medusa_serve.access")


class AccessLog:
    """ASGI middleware. A line has: method, path, status, milliseconds, bytes sent, tenant, request id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, size, request_id = time.monotonic(), "-", 0, "-"

        async def watched(message: Message) -> None:
            nonlocal status, size, request_id
            if message["type"] == "http.response.start":
                status = str(message["status"])
                request_id = next((v.decode("latin-1") for k, v in message["headers"] if k == b"x-request-id"), "-")
            size += len(message.get("body", b""))
            await send(message)

        scope.setdefault("state", {})
        try:
            await self.app(scope, receive, watched)
        finally:
            took, tenant = (time.monotonic() - began) * 1000, scope["state"].get("tenant")
            name = (tenant.name if tenant else "") or "-"
            path = tame(scope["path"])
            log.info("%s %s %s %.0f ms %d bytes %s %s", scope["method"], path, status, took, size, name, request_id)


def tame(path: str) -> str:
    """A path that cannot forge a line or fill the log: paths are the client's words."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in path[:200])
