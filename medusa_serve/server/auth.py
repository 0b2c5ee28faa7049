"""The key: with one set, everything but GET /health needs it, unknown paths included."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from .failures import Unauthorized, reply_to


class KeyGuard:
    """ASGI middleware. Decides on scope["path"], the path that is routed on, never on a URL made from the Host header.

    Sets scope["state"]["tenant"]: a hash of the presented key, "" where no key is asked for.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app = app
        self._digest = hashlib.sha256(key.encode()).digest() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            tenant = ""
            if self._digest is not None and not (scope["path"] == "/health" and scope["method"] == "GET"):
                digest = hashlib.sha256(presented_key(scope["headers"]) or b"").digest()
                # digests have one length and no alphabet: nothing to learn from the time, nothing to raise on
                if not hmac.compare_digest(digest, self._digest):
                    refusal = Unauthorized("Give the server's key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.")
                    return await reply_to(refusal)(scope, receive, send)
                tenant = digest.hex()[:16]
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The one key in the headers; None where there is none, or more than one (which of them would others believe?)."""
    found = []
    for name, value in headers:
        if name.lower() == b"x-api-key":
            found.append(value.strip())
        elif name.lower() == b"authorization":
            scheme, _, rest = value.strip().partition(b" ")
            found.append(rest.strip() if scheme.lower() == b"bearer" else b"")
    return found[0] or None if len(found) == 1 else None
