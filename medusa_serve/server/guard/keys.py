"""Keys: once one is asked for, everything but GET /health and the page at / needs it, unknown paths included."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import InvalidConfig
from .error_replies import TooManyKeys, Unauthorized, reply_to
from .rates import MINUTE, Window

OPEN = frozenset({("GET", "/health"), ("GET", "/")})  # neither holds data; the page takes the key from its reader
SCHEMES = {  # as the OpenAPI page names the two ways to present a key
    "Bearer": {"type": "http", "scheme": "bearer"},
    "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


@dataclass(frozen=True)
class Tenant:
    """Whose request it is. name: a hash of the key, "" where none is asked for · guest: limits per key hold"""

    name: str = ""
    guest: bool = False


class Keys:
    """The owner's key and those of guests. Any thread may ask for one while the server runs."""

    def __init__(self, owner: str | None, guests: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self.owner = owner
        self._tenants: dict[bytes, Tenant] = {}  # by SHA-256 of the key
        if owner is not None:
            self._add(owner, guest=False)
        for guest in guests:
            self.add_guest(guest)

    @property
    def required(self) -> bool:
        return bool(self._tenants)

    def require(self, key: str | None = None) -> str:
        """Ask for the owner's key from now on, made here unless given; → the key. One that is set already stays, and
        another is refused (InvalidConfig)."""
        with self._lock:
            if self.owner is None:
                self.owner = secrets.token_urlsafe(32) if key is None else _checked(key)
                self._add(self.owner, guest=False)
            elif key not in (None, self.owner):
                raise InvalidConfig("The server has another key already.", param="api_key")
            return self.owner

    def release(self) -> None:
        """Ask for no key any more, for who required one in vain. Where guests have theirs it stays."""
        with self._lock:
            if not any(tenant.guest for tenant in self._tenants.values()):
                self.owner, self._tenants = None, {}

    def add_guest(self, key: str | None = None) -> str:
        """A further key to hand out, made here unless given; → the key. The owner then needs one too."""
        self.require()
        made = secrets.token_urlsafe(32) if key is None else _checked(key)
        with self._lock:
            if made == self.owner:
                raise InvalidConfig("A guest's key must not be the owner's.", param="guest_keys")
            self._add(made, guest=True)
        return made

    def tenant(self, presented: bytes | None) -> Tenant | None:
        """Who comes with this key; None: nobody we know."""
        tenants, digest, found = self._tenants, hashlib.sha256(presented or b"").digest(), None
        for known, tenant in tenants.items():
            # digests have one length and no alphabet: nothing to learn from the time, nothing to raise on
            if hmac.compare_digest(digest, known):
                found = tenant
        return found

    def _add(self, key: str, *, guest: bool) -> None:
        digest = hashlib.sha256(key.encode()).digest()
        self._tenants = self._tenants | {digest: Tenant(digest.hex()[:16], guest)}  # replaced: readers take no lock


def _checked(key: str) -> str:
    if not isinstance(key, str) or not key.strip():
        raise InvalidConfig("A key must be a non-empty string.", param="api_key")
    return key


class KeyGuard:
    """ASGI middleware. Decides on scope["path"], the path that is routed on, never on a URL made from the Host header.

    Sets scope["state"]["tenant"], a Tenant. An address that presents more than `tries_per_minute` wrong keys is 429
    for the rest of the minute; a missing key is no try.
    """

    def __init__(self, app: ASGIApp, keys: Keys, tries_per_minute: int) -> None:
        self.app, self.keys = app, keys
        self._tries = Window(tries_per_minute, MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        tenant: Tenant | None = Tenant()
        if self.keys.required and (scope["method"], scope["path"]) not in OPEN:
            address, presented = address_of(scope), presented_key(scope["headers"])
            wait = self._tries.wait(address)
            if wait:
                return await reply_to(TooManyKeys("Too many wrong keys from this address.", wait))(scope, receive, send)
            tenant = self.keys.tenant(presented)
            if tenant is None:
                if presented is not None:
                    self._tries.add(address)
                refusal = Unauthorized("Give the server's key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.")
                return await reply_to(refusal)(scope, receive, send)
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


def address_of(scope: Scope) -> str:
    """Where a request comes from. A tunnel's agent connects from this machine and appends the client's address to
    X-Forwarded-For: its last entry is the only one that the client cannot choose."""
    client = scope.get("client") or ("", 0)
    if client[0] in ("127.0.0.1", "::1"):
        for name, value in scope["headers"]:
            if name.lower() == b"x-forwarded-for":
                return str(value.rpartition(b",")[2].strip().decode("latin-1"))[:64]
    return str(client[0])


def secured(schema: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """An OpenAPI page that says which paths need a key now."""
    if not keys.required:
        return schema
    paths: Mapping[str, Any] = schema["paths"]
    guarded = {
        path: {
            method: about | ({} if (method.upper(), path) in OPEN else {"security": [{name: []} for name in SCHEMES]})
            for method, about in methods.items()
        }
        for path, methods in paths.items()
    }
    components = schema.get("components", {}) | {"securitySchemes": SCHEMES}
    return schema | {"paths": guarded, "components": components}
