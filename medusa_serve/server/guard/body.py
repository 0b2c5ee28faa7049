"""The size of a request: few headers, and a body of bounded size that comes in time, and is JSON."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import MedusaServeError
from ..config import ServerConfig
from .error_replies import BodyTooLarge, BodyTooSlow, TooManyHeaders, UnsupportedMediaType, reply_to


class BodyLimit:
    """ASGI middleware: 431 for too many headers; reads all of the body before the app runs, 413 as soon as it is too
    large, 408 when it takes too long.

    It counts what arrives, so chunked bodies and lying lengths are bounded too.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app = app
        self.max_headers, self.max_bytes, self.seconds = config.max_headers, config.max_body_bytes, config.body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            if len(scope["headers"]) > self.max_headers:
                raise TooManyHeaders(f"There are more than the {self.max_headers} headers this server takes.")
            async with asyncio.timeout(self.seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            refusal: MedusaServeError = BodyTooSlow(f"The body did not arrive within {self.seconds:g} s.")
            return await reply_to(refusal, {"Connection": "close"})(scope, receive, send)
        except MedusaServeError as refusal:
            return await reply_to(refusal)(scope, receive, send)
        if body is None:
            return None
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None: the client left. Raises BodyTooLarge."""
        body, more, too_large = bytearray(), True, self._announced(scope) > self.max_bytes
        while more and not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_large = len(body) > self.max_bytes
        if too_large:
            raise BodyTooLarge(f"The body is larger than the {self.max_bytes} bytes this server takes.")
        return bytes(body)

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
