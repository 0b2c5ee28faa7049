"""One model and its app, as Ray Serve runs it: Ray gives permits, the port of this process answers."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ray.util import get_node_ip_address

from ..config import EngineConfig
from ..server.background_load import ServedLLM
from ..server.config import ServerConfig
from ..server.listen import CLOSE_S, WebServer, bind, url_of
from .permits import Permits, PermitsOnly

Load = Callable[[EngineConfig], ServedLLM]
WARM_S = 180.0
LOOPBACK = "127.0.0.1"
KEEP_S = 3600.0  # between requests of a connection: the Ingress closes it first
MANY = 1 << 20
START_S = 30.0


class Replica:
    """Ray asks `check_health`, and replaces a replica that raises there."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, load: Load | None = None) -> None:
        if load is None:
            from ..llm import LLM

            load = LLM
        self._llm = load(engine)
        self._llm.manager.wait_until_rested(WARM_S)  # a replica that gets requests has compiled and captured its passes
        self._permits, self._node = Permits(), get_node_ip_address()
        self._bound = replace(server, host=LOOPBACK, port=0, keep_alive_s=KEEP_S, max_connections=MANY)
        sock, started = bind(self._bound), threading.Event()
        self._inside = _address(sock)
        self._outside = self._inside if self._node == LOOPBACK else ""  # until another machine asks
        gate, self._stop_s = partial(PermitsOnly, permits=self._permits), server.drain_s + 4 * CLOSE_S
        self._server = WebServer(self._llm, server, lambda _: started.set(), gate=gate, connections=self._bound)
        # its own thread and loop: what Ray does in its loops delays no answer
        self._thread = threading.Thread(target=self._server.run, args=([sock],), name="medusa-http", daemon=True)
        self._thread.start()
        started.wait(START_S)  # where it does not, check_health says so

    def check_health(self) -> None:
        status = self._llm.manager.status()
        if not status.serves and status.state != "draining":
            raise RuntimeError(status.message or f"The engine is {status.state}.")
        if not self._thread.is_alive():
            raise RuntimeError("The HTTP server is gone.")

    def about(self) -> dict[str, Any]:
        """The model as LLM.describe() says, its notes, and this process."""
        llm: Any = self._llm
        notes = list(getattr(llm, "notes", []))
        chats = llm.codec.has_chat_template
        return {"model": llm.describe(), "notes": notes, "has_chat_template": chats, "pid": os.getpid()}

    async def permit(self, node: str) -> AsyncIterator[tuple[str, str]]:
        """Yield where to send one request from the machine `node`, and the name of its permit, and end when its answer
        is over: until then Ray counts the request here."""
        with self._permits.given() as permit:
            yield self._address_for(node), permit.name
            await permit.until_over()

    def _address_for(self, node: str) -> str:
        """host:port. Other machines are listened to from the first request that comes from one."""
        if node == self._node:
            return self._inside
        if not self._outside:
            sock = bind(replace(self._bound, host=self._node))
            self._server.listen(sock)
            self._outside = _address(sock)
        return self._outside

    def __del__(self) -> None:
        if hasattr(self, "_thread"):
            self._server.should_exit = True
            self._thread.join(self._stop_s)
        if hasattr(self, "_llm"):
            self._llm.close()


def _address(sock: Any) -> str:
    return url_of(sock).removeprefix("http://")
