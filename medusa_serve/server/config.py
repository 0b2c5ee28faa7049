"""The server's options, as frozen dataclasses that refuse nonsense by field name (InvalidConfig)."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import check_int
from ..errors import InvalidConfig


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, what it refuses, and how long it waits. Seconds end in _s; `/info` shows the limits.

    api_key         the owner's; None: no key on loopback until a tunnel opens; the CLI makes one for any other host
    guest_keys      further keys to hand out, for which the guest limits hold
    allowed_hosts   names in Host headers to answer, beside this machine's own; "*.example.com": all below it
    max_connections one more is answered 503 · max_headers, max_header_bytes, max_body_bytes  of a request
    header_s, body_s   for a request's head and body to arrive · keep_alive_s  between requests of a connection
    queue_s         for a slot (503) · first_token_s, total_s  from arrival to the first token, to the end (504)
    client_stall_s  a client that takes nothing for this long is cut off
    heartbeat_s     of silence, then a comment in a stream
    merge_ms        a streamed event waits at most this long for a lagging socket before it is merged with later ones
    pace_ms         between two events of an answer at least, and more where many are open; what comes meanwhile is
                    merged
    drain_s         for running requests to finish when the server stops
    guest_concurrent, guest_requests_per_minute, guest_tokens_per_minute   of one guest's key; tokens are output
    guests_requests_per_minute  of all guests together · wrong_keys_per_minute  of one address
    access_log      one line a request in the log `medusa_serve.access`: no query, no key, no text
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    guest_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_connections: int = 256
    max_headers: int = 100
    max_header_bytes: int = 1 << 16
    max_body_bytes: int = 1 << 20
    header_s: float = 10.0
    body_s: float = 30.0
    keep_alive_s: float = 5.0
    queue_s: float = 60.0
    first_token_s: float = 120.0
    total_s: float = 300.0
    client_stall_s: float = 30.0
    heartbeat_s: float = 15.0
    merge_ms: int = 20
    pace_ms: int = 10
    drain_s: float = 10.0
    guest_concurrent: int = 4
    guest_requests_per_minute: int = 60
    guest_tokens_per_minute: int = 20_000
    guests_requests_per_minute: int = 1000
    wrong_keys_per_minute: int = 10
    access_log: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host.strip():
            raise InvalidConfig("host must be a non-empty string.", param="host")
        check_int(self, "port", 0, 65535)
        check_int(self, "max_body_bytes", 1024, 1 << 30)
        check_int(self, "max_header_bytes", 1024, 1 << 24)
        check_int(self, "merge_ms", 0, 1000)
        check_int(self, "pace_ms", 0, 1000)
        for name in self.__dataclass_fields__:
            if name.startswith(("guest_", "guests_", "wrong_", "max_")) and name != "guest_keys":
                check_int(self, name, 1, 1 << 30)
            elif name.endswith("_s"):
                self._check_seconds(name, 0.0 if name == "drain_s" else 0.001, 86_400.0)
        for name in ("guest_keys", "allowed_hosts"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(value, str) and value.strip() for value in values):
                raise InvalidConfig(f"{name} must be a tuple of non-empty strings.", param=name)
        if self.api_key is not None and (not isinstance(self.api_key, str) or not self.api_key.strip()):
            raise InvalidConfig("api_key must be a non-empty string.", param="api_key")
        if not isinstance(self.access_log, bool):
            raise InvalidConfig("access_log must be true or false.", param="access_log")

    @property
    def is_loopback(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1")

    def _check_seconds(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise InvalidConfig(f"{name} must be a number from {low:g} to {high:g}, not {value!r}.", param=name)
