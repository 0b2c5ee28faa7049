"""uvicorn in a thread with its own event loop, on a socket that is bound first. The cell gets every error.

A later run of the cell finds the server through this thread: unlike a module's variable, it survives
`importlib.reload`, `%autoreload` and a second import of the package.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic

from ..errors import InvalidConfig, MedusaServeError
from ..server.background_load import BackgroundLoad, Model
from ..server.config import ServerConfig
from ..server.listen import WebServer, bind, url_of

THREAD = "medusa-server"
LOADERS = "medusa-load"
START_S = 15.0
PROGRESS_S = 15.0


class Background(threading.Thread, Generic[Model]):
    """An HTTP server for a model that loads. owner: what `running` returns as long as the thread lives"""

    def __init__(self, factory: Callable[[], Model], config: ServerConfig, sock: socket.socket, owner: Any) -> None:
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

    def wait_until_ready(self) -> Model:
        """The loaded model, once the server listens; prints now and then that it still loads. Raises what loading or
        listening raised."""
        began, printed = time.monotonic(), 0.0
        while not self.source.wait(0.2):  # short waits, so that Ctrl-C (the kernel's Interrupt) gets through
            if (waited := time.monotonic() - began) - printed >= PROGRESS_S:
                printed = waited
                print(f"… still loading after {waited:.0f} s", flush=True)
        llm = self.source.get()
        until = time.monotonic() + START_S
        while not self.web.started:
            if self.failure is not None or not self.is_alive() or time.monotonic() > until:
                raise MedusaServeError(f"The web server did not start ({self.failure}); run the cell again.")
            time.sleep(0.01)
        return llm

    def stop(self, seconds: float) -> bool:
        """Refuse new requests, end the open ones, close the socket and the engine; → whether all ended in time."""
        self.web.should_exit = True
        self.join(seconds)
        self.source.close()
        return not self.is_alive()


def listen(config: ServerConfig, *, any_port: bool) -> socket.socket:
    """The bound socket. any_port: take a free port where the wanted one is in use. Raises InvalidConfig."""
    try:
        return bind(config)
    except InvalidConfig as error:
        if error.param != "port" or not any_port:
            raise
        sock = bind(replace(config, port=0))
        print(f"port {config.port} is taken; this server has port {sock.getsockname()[1]}")
        return sock


def running() -> Any:
    """The owner of the server that runs in this process, or None. Its class may come from an earlier import."""
    for thread in threading.enumerate():
        if thread.name == THREAD and getattr(thread, "owner", None) is not None:
            return thread.owner  # type: ignore[attr-defined]
    return None


def stop_running() -> None:
    """Stop the server of this process, if there is one: it would share the device with a training or a benchmark."""
    server = running()
    if server is not None:
        server.stop()


def wait_for_loads() -> None:
    """Wait for a load that was interrupted. It cannot be stopped, and two models at a time may not fit in memory."""
    me = threading.current_thread()
    left = [thread for thread in threading.enumerate() if thread.name == LOADERS and thread is not me]
    if left:
        print("waiting for the end of a load that was interrupted …", flush=True)
    for thread in left:
        while thread.is_alive():
            thread.join(0.2)
