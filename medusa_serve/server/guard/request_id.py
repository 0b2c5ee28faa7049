"""X-Request-Id: the client's own where it sends a tame one, else one made here; in every answer."""

from __future__ import annotations

import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
_TAME = re.compile(rb"[\w.:/+=@-]{1,128}", re.ASCII)  # no spaces, no line ends: it goes into headers and logs


class RequestId:
    """ASGI middleware. Sets scope["state"]["request_id"]."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name.lower() == HEADER), b"")
        request_id = given if _TAME.fullmatch(given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id)]
            await send(message)

        await self.app(scope, receive, marked)
