"""The names this server answers to. A page of another site that points its own name at 127.0.0.1 gets nothing."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import InvalidConfig, InvalidRequest
from .error_replies import NotFound, reply_to

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9])?")


class InvalidHost(InvalidRequest):
    code = "invalid_host"


class Hosts:
    """The Host headers that are answered: this machine's, `allowed`, and what is learned while the server runs.

    host: that the server listens on. On another than loopback, addresses are answered too: only names can be pointed
    elsewhere.
    """

    def __init__(self, host: str, allowed: Iterable[str] = ()) -> None:
        self._addresses = host not in LOCAL
        own = {host, socket.gethostname()} if self._addresses else set()
        self._names = LOCAL | {name.lower() for name in own if _address(name) is None}
        self._suffixes: frozenset[str] = frozenset()
        for name in allowed:
            self.allow(name)

    def allow(self, host: str) -> str:
        """Answer to this name too, given alone or as a URL; "*.example.com": to all names below it. Any thread. → the
        name. Raises InvalidConfig."""
        name = str(host).strip().lower().removesuffix("/").rpartition("://")[2].partition("/")[0]
        name = name if _address(name) is not None else name_of(name.encode()) or ""
        if _address(name) is None and not _NAME.fullmatch(name):
            raise InvalidConfig(f"{host!r} is no host name.", param="allowed_hosts")
        if name.startswith("*."):
            self._suffixes |= {name[1:]}
        else:
            self._names |= {name}
        return name

    def __contains__(self, name: str) -> bool:
        if name in self._names or any(name.endswith(suffix) for suffix in self._suffixes):
            return True
        return self._addresses and _address(name) is not None


class HostGuard:
    """ASGI middleware: 400 unless the one Host header names this server; the docs page is for this machine alone."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = [value for name, value in scope["headers"] if name.lower() == b"host"]
            name = name_of(given[0]) if len(given) == 1 else None
            if name is None or name not in self.hosts:
                refusal = InvalidHost("The Host header names another server; start this one with --allow-host NAME.")
                return await reply_to(refusal)(scope, receive, send)
            if scope["path"].startswith("/docs") and name not in LOCAL:
                return await reply_to(NotFound("The docs page is served to this machine alone."))(scope, receive, send)
        await self.app(scope, receive, send)


def name_of(host: bytes) -> str | None:
    """The name in a Host header, without its port; None when it is none."""
    found = re.fullmatch(rb"(?:\[([0-9a-f:.]+)\]|([^\[\]:/?#@\s\x00-\x20]+))(?::\d{1,5})?", host.strip().lower())
    if found is None:
        return None
    name = (found[1] or found[2]).decode("latin-1")
    return name.removesuffix(".") or None


def _address(name: str) -> str | None:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return None
