"""The body of a request: of bounded size, and JSON."""

from __future__ import annotations

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import BodyTooLarge, UnsupportedMediaType, reply_to


class BodyLimit:
    """ASGI middleware: reads the whole body before the app runs, and answers 413 as soon as it is too large.

    It counts what arrives, so chunked bodies and lying lengths are bounded too.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body, more, too_large = bytearray(), True, self._announced(scope) > self.max_bytes
        while more and not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_large = len(body) > self.max_bytes
        if too_large:
            refusal = BodyTooLarge(f"The body is larger than the {self.max_bytes} bytes this server takes.")
            return await reply_to(refusal)(scope, receive, send)
        waiting: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return await self.app(scope, replay, send)

    @staticmethod
    def _announced(scope: Scope) -> int:
        value = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
        return int(value) if value.isdigit() and len(value) < 20 else 0


async def json_only(request: Request) -> None:
    """Dependency: 415 unless the content type is JSON.

    A missing one is refused too: a page of another site may send such a request to a loopback server without asking.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType("Send JSON, and say so: with curl add -H 'Content-Type: application/json'.")
