"""Listening: the socket is bound before anything else, the server owns its event loop, and stopping drains first."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from ..errors import InvalidConfig, MedusaServeError, ShuttingDown
from .app import create_app
from .background_load import BackgroundLoad, ServedLLM, loaded
from .config import ServerConfig
from .guard.connection import Connection
from .submit import Shared

log = logging.getLogger(__name__)

CLOSE_S = 2  # after the drain: for clients to read their last event


def bind(config: ServerConfig) -> socket.socket:
    """The listening socket (port 0: any free one). Raises InvalidConfig here, where uvicorn would end the thread."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"Port {config.port} on {config.host} is in use; choose another, or 0 for any free one."
            raise InvalidConfig(message, param="port") from None
        message = f"Cannot listen on {config.host}, port {config.port}: {error.strerror}."
        raise InvalidConfig(message, param="host") from None


def url_of(sock: socket.socket) -> str:
    """The address as a client of this machine writes it."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class WebServer(uvicorn.Server):
    """uvicorn with our stop: each open request gets its terminal event, then the sockets close.

    `run(sockets=[sock])` is the one way to run it, in any thread; `should_exit`, set from any thread, stops it.
    It stops by itself when its model cannot be loaded.
    `require_key`, `release_key`, `add_guest` and `allow_host` may be called from any thread while it runs, as when a
    tunnel opens.
    """

    def __init__(
        self,
        source: ServedLLM | BackgroundLoad,
        config: ServerConfig,
        on_ready: Callable[[str], None] | None = None,
        *,
        gate: Callable[[ASGIApp], ASGIApp] | None = None,
        connections: ServerConfig | None = None,
    ) -> None:
        """gate: goes around the app · connections: their limits, where others than the app's hold"""
        self._source, self._drain_s, self._on_ready = source, config.drain_s, on_ready
        app, limits = create_app(source, config), connections or config
        self._loop: asyncio.AbstractEventLoop | None = None
        shared: Shared = app.state.shared
        self._router, self._keys, self._hosts = shared.router, shared.keys, shared.hosts
        self._tokenizers, self._traffic = shared.tokenizers, shared.traffic
        super().__init__(
            uvicorn.Config(
                gate(app) if gate else app,
                # on h11: httptools, uvicorn's choice where it is installed, takes headers of any size
                http=partial(Connection, limits=limits),  # type: ignore[arg-type]
                h11_max_incomplete_event_size=limits.max_header_bytes,
                timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                log_config=None,
                log_level="warning",
                timeout_graceful_shutdown=CLOSE_S,
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped. On a loop of our own: uvicorn's `run` fails where nest_asyncio has patched asyncio."""
        with asyncio.Runner() as runner:
            runner.run(self.serve(sockets=sockets))

    async def on_tick(self, counter: int) -> bool:
        failed = isinstance(self._source, BackgroundLoad) and self._source.state == "failed"
        return await super().on_tick(counter) or failed

    @property
    def api_key(self) -> str | None:
        """The owner's key; None while none is asked for."""
        return self._keys.owner

    def require_key(self, key: str | None = None) -> str:
        """Ask for a key from now on, made here unless given; → the key. One that is set already stays, and another is
        refused (InvalidConfig)."""
        return self._keys.require(key)

    def release_key(self) -> None:
        """Ask for no key any more, for who required one in vain; it stays where guests have theirs."""
        self._keys.release()

    def add_guest(self, key: str | None = None) -> str:
        """A further key to hand out, under the limits per key; made here unless given. → the key"""
        return self._keys.add_guest(key)

    def allow_host(self, host: str) -> None:
        """Answer to this name in Host headers too: a tunnel's name or URL; "*.example.com": all names below it."""
        self._traffic.names.add(self._hosts.allow(host))

    def traffic(self) -> tuple[int, int]:
        """(requests, bytes of answers) so far by the names that were allowed here."""
        return self._traffic.requests, self._traffic.sent

    def listen(self, sock: socket.socket) -> None:
        """Listen on a further socket of `bind` too, from any other thread while it runs."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self._listen(sock), self._loop).result(CLOSE_S)

    async def _listen(self, sock: socket.socket) -> None:
        listening = self.servers
        await super().startup(sockets=[sock])
        self.servers += listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self._on_ready is not None and sockets:
            self._on_ready(url_of(sockets[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # while it drains the server still answers: /health says draining, /generate 503
        await self._drain()
        await super().shutdown(sockets=sockets)
        self._tokenizers.shutdown(wait=False, cancel_futures=True)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # its client reads nothing: a loop that ends would leave the socket open

    async def _drain(self) -> None:
        try:
            manager = loaded(self._source).manager
        except MedusaServeError:
            return  # nothing is loaded, so nothing runs
        running = self._router.num_open
        if running:
            log.warning(
                "stopping: %d open requests may finish within %.0f s; Ctrl-C again ends them", running, self._drain_s
            )
        # a thread that nobody joins: draining an engine that hangs must not keep us
        draining = threading.Thread(target=manager.drain, args=(self._drain_s,), name="medusa-drain", daemon=True)
        try:
            draining.start()
        except RuntimeError:  # the interpreter exits, and from Python 3.12 on starts no more threads
            manager.drain(0.0)
        until = time.monotonic() + self._drain_s + CLOSE_S
        while draining.is_alive() and time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0)  # what the engine sent last is delivered first
        self._router.dismiss(ShuttingDown("The server shut down before this was finished."))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that stopped us is not raised again afterwards: the exit code is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def serve(
    source: ServedLLM | BackgroundLoad,
    config: ServerConfig,
    *,
    on_ready: Callable[[str], None] | None = None,
    sock: socket.socket | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then drain and return. The caller closes `source`.

    on_ready  called with the URL once the server listens (the model may still load)
    sock      a socket from `bind`; bound here when absent, which raises InvalidConfig
    """
    with sock or bind(config) as listening:
        WebServer(source, config, on_ready).run(sockets=[listening])
