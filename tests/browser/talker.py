"""A model that says a known text in runs of known lengths, at a pace that an eye could follow; and a bad proxy."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from medusa_serve.types import Delta, SamplingParams
from tests.server.standins import HandLLM, HandManager, WordCodec, completion

TEXT = (
    "Plants make food from light. Inside their leaves is a green substance, <b>chlorophyll</b>, and it catches the"
    " light of the sun.\n\nThey breathe in carbon dioxide and drink water from the soil; the sun's energy joins the two"
    " into sugar, and what is left over is oxygen, which you & I breathe in."
)
WORDS = TEXT.split(" ")
RUNS = (1, 3, 1, 2, 6, 1, 4, 1)  # words of successive steps, over and over


class Talker(HandManager):
    """One word is one token here. `failure`: raised in band after some steps."""

    def __init__(self, pause_s: float = 0.02) -> None:
        super().__init__(script=None)
        self.pause_s = pause_s
        self.failure: Exception | None = None

    def submit(self, prompt_ids: list[int], params: SamplingParams, sink: Any, *, key: str = "") -> str:
        name = super().submit(prompt_ids, params, sink, key=key)
        threading.Thread(target=self._talk, args=(name, params), daemon=True).start()
        return name

    def _talk(self, name: str, params: SamplingParams) -> None:
        words = [word if not index else f" {word}" for index, word in enumerate(WORDS)][: params.max_tokens]
        runs, done, steps = itertools.cycle(RUNS if params.speculation else (1,)), 0, 0
        while done < len(words) and name not in self.cancelled:
            if self.failure is not None and done > 10:
                return self.push(name, Delta("", error=self.failure))  # type: ignore[arg-type]
            run = words[done : done + next(runs)]
            done, steps = done + len(run), steps + 1
            last = None
            if done == len(words):
                counted = {
                    "completion_tokens": done,
                    "steps": steps - 1,
                    "accepted": done - steps,
                    "decode_ms": 1000 * self.pause_s * steps,
                }
                reason = "stop" if done == len(WORDS) else "length"
                last = completion(name, "".join(words), finish_reason=reason, seed=params.seed or 4, **counted)
            self.push(name, Delta("".join(run), (len(run),), (len(run) - 1,), tuple(range(len(run))), completion=last))
            time.sleep(self.pause_s)


class TalkLLM(HandLLM):
    def __init__(self, manager: Talker | None = None, *, max_context: int = 100_000, codec: Any = None) -> None:
        super().__init__(manager or Talker(), codec or WordCodec())
        self.max_context = max_context

    def describe(self) -> dict[str, Any]:
        return {"model": "talker", "heads": "none", "device": "cpu", "max_context": self.max_context}


@contextlib.contextmanager
def proxied(upstream: str, *, prefix: str = "", buffers: bool = False) -> Iterator[str]:
    """A reverse proxy: below a path, as JupyterLab's is, or one that holds an answer back until its end."""

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def any(self) -> None:
            target = urlsplit(upstream)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=30)
            path = self.path.removeprefix(prefix)
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")
            }
            connection.request(self.command, path, body or None, headers)
            answer = connection.getresponse()
            data = answer.read() if buffers else None
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date"):
                    self.send_header(name, value)
            if data is not None:
                self.send_header("Content-Length", str(len(data)))
            else:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            with contextlib.suppress(OSError):
                if data is not None:
                    self.wfile.write(data)
                else:
                    while piece := answer.read1(65536):
                        self.wfile.write(piece)
                        self.wfile.flush()
            connection.close()

        do_GET = do_POST = any

        def log_message(self, *_: object) -> None:
            pass

    with listening(Proxy) as port:
        yield f"http://127.0.0.1:{port}{prefix}"


@contextlib.contextmanager
def framing(address: str) -> Iterator[int]:
    """A site, at the port it yields, whose page shows `address` in a frame."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            html = f'<iframe src="{address}" width="700" height="600"></iframe>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(html)))
            self.end_headers()
            self.wfile.write(html)

        def log_message(self, *_: object) -> None:
            pass

    with listening(Site) as port:
        yield port


@contextlib.contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def sent(manager: HandManager, index: int = -1) -> str:
    """The messages of a request, as WordCodec joins them."""
    return WordCodec().decode(manager.calls[index][0])


def body_of(request: Any) -> dict[str, Any]:
    return json.loads(request.post_data)
