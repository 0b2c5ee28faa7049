"""A model without an engine: the test says what each sequence answers, and when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from medusa_serve.errors import InvalidRequest
from medusa_serve.server.app import create_app
from medusa_serve.server.config import ServerConfig
from medusa_serve.server.listen import WebServer, bind, url_of
from medusa_serve.types import Completion, Delta, EngineStatus, SamplingParams, TokenLogprob

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

Script = Callable[[str, list[int], SamplingParams], list[Delta]]


class WordCodec:
    """One id a character; a chat is its contents joined."""

    has_chat_template = True
    special_ids = frozenset({0})
    token_texts = None

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise InvalidRequest("The chat template refuses these messages.", param="messages")
        return self.encode("\n".join(m["content"] for m in messages))

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def token_text(self, id: int) -> str:
        return chr(id)


def completion(name: str, text: str, **changes: Any) -> Completion:
    fields: dict[str, Any] = {
        "id": name,
        "model": "stand-in",
        "text": text,
        "finish_reason": "stop",
        "seed": 7,
        "token_ids": tuple(map(ord, text)),
        "prompt_tokens": 3,
        "completion_tokens": len(text),
        "steps": 2,
        "drafted": 6,
        "accepted": len(text) - 3,
        "queue_ms": 1.0,
        "prefill_ms": 2.0,
        "decode_ms": 4.0,
    }
    return Completion(**(fields | changes))


def hello(name: str, ids: list[int], params: SamplingParams) -> list[Delta]:
    """Three steps that say Hello!, the last with its remaining text."""
    del ids
    told = () if params.logprobs is None else (TokenLogprob(-1.0, ((33, -2.0),) * params.logprobs),) * 6
    return [
        Delta("H", (1,), (0,), (72,), logprobs=told[:1]),
        Delta("ell", (3,), (2,), (101, 108, 108), logprobs=told[1:4]),
        Delta("o!", (2,), (1,), (111, 33), completion=completion(name, "Hello!", logprobs=told), logprobs=told[4:]),
    ]


class HandManager:
    """Plays `script` into the sink before submit has returned, as a fast engine may; None: the test pushes itself."""

    def __init__(self, script: Script | None = hello, error: Exception | None = None) -> None:
        self.script, self.error = script, error
        self.sinks: dict[str, Any] = {}
        self.calls: list[tuple[list[int], SamplingParams, str]] = []
        self.cancelled: list[str] = []
        self.outcomes: list[str] = []  # of the cancelled
        self.waiting: set[str] = set()
        self.state = EngineStatus("ok", 0, 0, 0.0)

    def submit(self, prompt_ids: list[int], params: SamplingParams, sink: Any, *, key: str = "") -> str:
        if self.error is not None:
            raise self.error
        name = f"seq-{len(self.calls)}"
        self.calls.append((prompt_ids, params, key))
        self.sinks[name] = sink
        if self.script is not None:
            deltas = self.script(name, prompt_ids, params)
            engine = threading.Thread(target=lambda: [sink([(name, delta)]) for delta in deltas])
            engine.start()
            engine.join()
        return name

    def wait_until_rested(self, seconds: float) -> bool:
        return True

    def push(self, name: str, delta: Delta) -> None:
        self.sinks[name]([(name, delta)])

    def cancel(self, name: str, outcome: str = "cancelled") -> None:
        self.cancelled.append(name)
        self.outcomes.append(outcome)

    def is_waiting(self, name: str) -> bool:
        return name in self.waiting

    def limits(self) -> dict[str, Any]:
        return {"slots": 4, "max_queue": 64, "stall_s": 60.0}

    def status(self) -> EngineStatus:
        return self.state

    def drain(self, grace_s: float) -> None:
        del grace_s


class HandLLM:
    model_name = "stand-in"

    def __init__(self, manager: Any = None, codec: Any = None) -> None:
        self.codec = codec or WordCodec()
        self.manager = manager or HandManager()
        self.closed = False

    def describe(self) -> dict[str, Any]:
        return {"model": self.model_name, "heads": "none", "max_context": 256}

    def close(self) -> None:
        self.closed = True


def ask(source: Any, *requests: dict[str, Any], config: ServerConfig | None = None) -> list[httpx.Response]:
    """Send httpx requests (as keyword dicts) one after another to an app in this process."""

    async def go() -> list[httpx.Response]:
        app = create_app(source, config or ServerConfig())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            out = [await client.request(**({"method": "POST", "url": "/generate"} | r)) for r in requests]
        assert app.state.shared.router.num_open == 0
        return out

    return asyncio.run(go())


def generate(source: Any, body: Any, *, config: ServerConfig | None = None) -> httpx.Response:
    return ask(source, {"json": body}, config=config)[0]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which must have exactly the one shape."""
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"].rstrip().endswith((".", "?")) or "curl" in body["error"]["message"]
    return body["error"]


def events(text: str) -> list[Any]:
    """The events of a stream, parsed; the text must hold nothing else, and end with [DONE]."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


_RUNNING: dict[str, WebServer] = {}  # by URL


def running(url: str) -> WebServer:
    """The WebServer of a URL that `serving` gave."""
    return _RUNNING[url]


@contextlib.contextmanager
def serving(source: Any, config: ServerConfig | None = None) -> Iterator[str]:
    """A real server on a free port of this machine; yields its URL."""
    config = config or ServerConfig(port=0)
    with bind(config) as sock:
        server, failures, url = WebServer(source, config), [], url_of(sock)

        def work() -> None:
            try:
                server.run(sockets=[sock])
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            wait_for(lambda: server.started or failures)
            _RUNNING[url] = server
            yield url
        finally:
            _RUNNING.pop(url, None)
            server.should_exit = True
            thread.join(15)
        assert not thread.is_alive()
        assert not failures


def open_post(url: str, body: dict[str, Any], *, receive_buffer: int | None = None) -> socket.socket:
    """A connection that has sent one POST /generate."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(10)
    sock.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


def unchunk(data: bytes) -> bytes:
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            break
        out += data[:length]
        data = data[length + 2 :]
    return out


def wait_for(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)
