"""uvicorn in a thread with a loop of its own, on a socket bound first. What goes wrong is raised in the cell.

The thread is also where a later run of the cell finds the server: unlike a module's variable it survives
`importlib.reload`, `%autoreload` and a package that was imported anew.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import InvalidConfig, MedusaServeError
from ..server.background_load import BackgroundLoad, ServedLLM
from ..server.config import ServerConfig
from ..server.listen import WebServer, bind, url_of

THREAD = "medusa-server"
LOADERS = "medusa-load"
START_S = 15.0
TELL_S = 15.0


class Background(threading.Thread):
    """An HTTP server for a model that loads. owner: what `running` gives back for as long as the thread lives."""

    def __init__(self, factory: Callable[[], ServedLLM], config: ServerConfig, sock: socket.socket, owner: Any) -> None:
        super().__init__(name=THREAD, daemon=True)
        self.owner, self.config, self.url, self._sock = owner, config, url_of(sock), sock
        self.failure: BaseException | None = None
        self.source = BackgroundLoad(factory)
        self.web = WebServer(self.source, config)

    def run(self) -> None:
        try:
            with self._sock:
                self.web.run(sockets=[self._sock])
        except BaseException as error:  # SystemExit too, which threads swallow; `wait` raises it in the cell
            self.failure = error
        finally:
            self.source.close()  # no engine without its server

    def wait_until_ready(self) -> ServedLLM:
        """The loaded model, once the server listens; says now and then that it still loads. Raises what loading or
        listening raised."""
        began, told = time.monotonic(), 0.0
        while not self.source.wait(0.2):  # short waits: Ctrl-C, the kernel's Interrupt, gets through between them
            if (waited := time.monotonic() - began) - told >= TELL_S:
                told = waited
                print(f"… still loading after {waited:.0f} s", flush=True)
        llm = self.source.get()
        until = time.monotonic() + START_S
        while not self.web.started:
            if self.failure is not None or not self.is_alive() or time.monotonic() > until:
                raise MedusaServeError(f"The web server did not start ({self.failure}); run the cell again.")
            time.sleep(0.01)
        return llm

    def stop(self, seconds: float) -> bool:
        """Stop accepting, end what is open, close the socket and the engine; whether it all ended in time."""
        self.web.should_exit = True
        self.join(seconds)
        self.source.close()
        return not self.is_alive()


def listen(config: ServerConfig, *, any_port: bool) -> socket.socket:
    """The bound socket; with `any_port` a free one where the wanted one is taken. Raises InvalidConfig."""
    try:
        return bind(config)
    except InvalidConfig as error:
        if error.param != "port" or not any_port:
            raise
        sock = bind(replace(config, port=0))
        print(f"port {config.port} is taken; this server has port {sock.getsockname()[1]}")
        return sock


def running() -> Any:
    """The owner of the server that runs in this process, or None."""
    for thread in threading.enumerate():
        if thread.name == THREAD and getattr(thread, "owner", None) is not None:
            return thread.owner  # type: ignore[attr-defined]
    return None


def wait_for_loads() -> None:
    """Loading cannot be interrupted: a load that nobody waits for any more ends first, or two models would meet in
    memory."""
    me = threading.current_thread()
    left = [thread for thread in threading.enumerate() if thread.name == LOADERS and thread is not me]
    if left:
        print("waiting for the end of a load that was interrupted …", flush=True)
    for thread in left:
        while thread.is_alive():
            thread.join(0.2)
