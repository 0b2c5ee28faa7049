"""The app over an LLM on a free loopback port, in another thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from medusa_serve.server.config import ServerConfig


@contextmanager
def served(llm: Any, key: str | None = None, begin: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Its address while it serves. key: the owner's · begin: called once in the server's event loop"""
    from medusa_serve.server.listen import WebServer, bind

    config = ServerConfig(port=0, api_key=key)
    ready: list[str] = []

    def listening(url: str) -> None:
        ready.append(url)
        begin()

    with bind(config) as sock:
        server = WebServer(llm, config, listening)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="bench-server")
        thread.start()
        try:
            while not ready:
                if not thread.is_alive():
                    raise RuntimeError("The server did not start.")
                time.sleep(0.01)
            yield ready[0]
        finally:
            server.should_exit = True
            thread.join()
