"""A public https address for a port of this machine, through ngrok, kept open until it is closed."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import logging
import threading
import time
from collections.abc import Callable

from ...errors import TunnelError
from .. import env
from .agent import Agent, clean_up
from .ngrok_advice import PASSING
from .tokens import ngrok_token

log = logging.getLogger(__name__)

POLICY = {
    "colab": "Colab's rules do not allow runtimes to serve the web (free ones also not to be used mainly through a web"
    " UI), and it may end the session without warning: use the address for tests of your own, and close it then.",
    "kaggle": "Kaggle tolerates HTTP tunnels at best and has ended sessions over them: use the address for tests of"
    " your own, and close it then.",
}
ANYBODY = "Whoever has the address and the key can use this machine's model until the tunnel is closed."
START_S = 20.0  # for the agent to connect
PATIENCE_S = 25.0  # for an address that is still taken: ngrok needs up to a minute after a kernel was killed
CHECK_S = 3.0
BACK_OFF_S = (0.5, 2.0, 5.0, 10.0, 30.0, 60.0)


class Tunnel:
    """An open tunnel to http://127.0.0.1:port, reopened when it drops, until `close`.

    url: its public address · notice: what its user should know · problem: a sentence while it is down, else None
    """

    def __init__(
        self,
        port: int,
        *,
        token: str | None = None,
        domain: str | None = None,
        on_url: Callable[[str], None] | None = None,
        on_check: Callable[[], None] | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Raises TunnelError, also where the server at the port does not ask for a key.

        token       else from NGROK_AUTHTOKEN in the environment, Colab's or Kaggle's secrets
        domain      one of the account's; the free plan has one, which is taken when none is named
        on_url      called with the address, and again if a reopened tunnel has another (from its thread)
        on_check    called now and then while it is open, and at its end
        patience_s  for refusals that pass in time, such as an address that an earlier run still holds
        """
        require_key_at(port)
        self.port, self.url = port, ""
        self.problem: str | None = None
        self._domain = (domain or "").strip().removeprefix("https://").rstrip("/") or None
        self._token, self._on_url, self._on_check = ngrok_token(token), on_url, on_check
        self._closed = threading.Event()
        self._lock = threading.Lock()
        if clean_up(port):
            log.info("ended an ngrok agent that an earlier run had left")
        self._agent = self._start(patience_s)
        atexit.register(self.close)
        threading.Thread(target=self._watch, name="medusa-tunnel", daemon=True).start()

    @property
    def notice(self) -> str:
        return " ".join(filter(None, (POLICY.get(env.place()), ANYBODY)))

    def __repr__(self) -> str:
        if self._closed.is_set():
            return "<Tunnel, closed>"
        return f"<Tunnel {self.url} to port {self.port}{', down: ' + self.problem if self.problem else ''}>"

    def close(self) -> None:
        """May be called twice."""
        self._closed.set()
        self._check()
        if not self._lock.acquire(timeout=0.1):
            clean_up(self.port)  # another thread reopens it: that fails now
            self._lock.acquire()
        self._agent.close()
        self._lock.release()
        atexit.unregister(self.close)

    def _start(self, patience_s: float) -> Agent:
        until = time.monotonic() + patience_s
        for wait in (*BACK_OFF_S, *[BACK_OFF_S[-1]] * 1000):
            try:
                agent = Agent(self.port, self._token, self._domain, start_s=START_S)
                break
            except TunnelError as error:
                if error.ngrok not in PASSING or time.monotonic() + wait > until or self._closed.wait(wait):
                    raise
        if agent.url != self.url:
            self.url = agent.url
            if self._on_url is not None:
                self._on_url(agent.url)
        return agent

    def _check(self) -> None:
        if self._on_check is not None:
            self._on_check()

    def _watch(self) -> None:
        while not self._closed.wait(CHECK_S):
            self._check()
            if not self._agent.is_up() and not self._reopen():
                return

    def _reopen(self) -> bool:
        """Try until it is up; False where it was closed, replaced by another run, or refused for good."""
        for wait in (*BACK_OFF_S, *[BACK_OFF_S[-1]] * 100_000):
            with self._lock:
                if self._closed.is_set() or not self._agent.folder.exists():  # `clean_up` takes the folder
                    return False
                self.problem = self.problem or "The tunnel dropped and is being reopened."
                try:
                    fresh = self._start(0.0)
                except TunnelError as error:
                    self.problem = error.message
                    log.warning("the tunnel is down: %s", error.message)
                    if error.ngrok is not None and error.ngrok not in PASSING:
                        return False
                else:
                    self._agent.close()
                    self._agent, self.problem = fresh, None
                    log.warning("the tunnel dropped and is open again: %s", self.url)
                    return True
            if self._closed.wait(wait):
                return False
        return False


def require_key_at(port: int) -> None:
    """Raise TunnelError unless a server answers at this port of this machine, and refuses requests without a key."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/generate")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        raise TunnelError(f"Nothing answers at port {port} of this machine: start the server first.") from None
    finally:
        with contextlib.suppress(OSError):
            connection.close()
    if status != 401:
        raise TunnelError(f"The server at port {port} answers without a key: give it one before it goes public.")
