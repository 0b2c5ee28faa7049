"""A request passed on over HTTP to a replica's port, and its answer back: all that has come is passed on at once."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import aiohttp
from starlette.types import Message, Scope, Send
from yarl import URL

from ..errors import MedusaServeError
from ..server.events import DONE, event
from ..server.guard.error_replies import reply_to
from .permits import CLIENT, PERMIT, Misdirected

HOP = frozenset(  # of one connection, not of the message (RFC 9110, 7.6.1)
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
NOT_ASKED = HOP | {b"host", b"content-length", b"expect", PERMIT, CLIENT}  # written anew, or not at all
NOT_ANSWERED = HOP | {b"date", b"server"}  # the server that the client is connected to writes its own
CONNECT_S = 5.0
IDLE_S = 30.0  # that a connection is kept; the replicas keep it for longer
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a machine that is gone closes no connection


class Upstream:
    """Connections to the replicas, kept between requests. Belongs to one event loop."""

    def __init__(self, silence_s: float) -> None:
        """silence_s: an answer that is silent for so long is given up"""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S, socket_factory=_probed),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=silence_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    async def ask(self, address: str, permit: str, scope: Scope, body: bytes) -> aiohttp.ClientResponse:
        """The head of the answer from `address` (host:port), which has to be closed. Raises aiohttp.ClientError,
        Misdirected."""
        path, query = _path(scope), scope["query_string"].decode("latin-1")
        response = await self._session.request(
            scope["method"],
            URL.build(scheme="http", authority=address, path=path, query_string=query, encoded=True),
            headers=_asked(scope, permit),
            data=body or None,
            allow_redirects=False,
        )
        if response.status == Misdirected.status:
            response.release()
            raise Misdirected("The replica does not know of this request.")
        return response

    async def close(self) -> None:
        await self._session.close()


def _probed(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock


def _path(scope: Scope) -> str:
    """As the client wrote it, below where we are mounted; never anything but a path."""
    raw = scope.get("raw_path") or quote(scope["path"]).encode()
    path: str = raw.decode("latin-1").removeprefix(scope.get("root_path", ""))
    return path if path.startswith("/") else f"/{path}"


def _asked(scope: Scope, permit: str) -> list[tuple[str, str]]:
    headers = [("Host", _host(scope)), (PERMIT.decode(), permit), (CLIENT.decode(), (scope.get("client") or ("",))[0])]
    gone = NOT_ASKED | _named(scope["headers"])
    headers += [(name.decode("latin-1"), _text(value)) for name, value in scope["headers"] if name not in gone]
    return headers


def _host(scope: Scope) -> str:
    """The client's own. More than one are none that a replica answers to, and so they stay."""
    return ", ".join(_text(value) for name, value in scope["headers"] if name == b"host")


def _named(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Further headers of this connection alone, by its Connection header."""
    names = b",".join(value for name, value in headers if name == b"connection")
    return frozenset(name.strip().lower() for name in names.split(b","))


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")  # as it is encoded again


class RelayedAnswer:
    """What a client has got of one answer. Nothing is sent before the first event has come, or all of an answer that is
    no stream: until then another replica may answer. Of a stream only complete events are sent.

    started: something was sent · ended: so was the terminal event
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.ended = self._closed = False

    async def pass_on(self, response: aiohttp.ClientResponse) -> None:
        """Raises aiohttp.ClientError where the replica is lost."""
        headers = [(name.lower(), value) for name, value in response.raw_headers]
        gone = NOT_ANSWERED | _named(headers)
        head = {
            "type": "http.response.start",
            "status": response.status,
            "headers": [(name, value) for name, value in headers if name not in gone],
        }
        if response.content_type != "text/event-stream":
            return await self._pass(head, await response.read(), last=True)
        content, rest = response.content, b""
        async for chunk in content.iter_any():
            events, end, rest = (rest + chunk).rpartition(b"\n\n")
            if end:
                self.ended = (events + end).endswith(DONE)
                await self._pass(head, events + end, last=content.at_eof())
        if not self._closed:
            await self._pass(head, rest, last=True)

    async def _pass(self, head: Message, body: bytes, *, last: bool) -> None:
        if not self.started:
            self.started = True
            await self._send(head)
        self._closed = last
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def end(self, error: MedusaServeError) -> None:
        """The terminal event of a stream that has none yet, or an error reply where no answer has begun."""
        reply = reply_to(error)
        head = {"type": "http.response.start", "status": reply.status_code, "headers": reply.raw_headers}
        body = bytes(reply.body)
        if self.started:
            body = b"" if self.ended else event(error.to_dict()) + DONE
        if not self._closed:
            await self._pass(head, body, last=True)
