"""Binding, and stopping by a signal as a process."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from medusa_serve.errors import InvalidConfig
from medusa_serve.server.config import ServerConfig
from medusa_serve.server.listen import bind, url_of

from .standins import HandLLM, HandManager, events, open_post, serving, unchunk

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

ROOT = Path(__file__).parents[2]


def test_bind() -> None:
    with bind(ServerConfig(port=0)) as sock:
        port = sock.getsockname()[1]
        assert url_of(sock) == f"http://127.0.0.1:{port}"
        with pytest.raises(InvalidConfig, match=f"Port {port} on 127.0.0.1 is in use") as caught:
            bind(ServerConfig(port=port))
        assert caught.value.param == "port"
    bind(ServerConfig(port=port)).close()  # at once, for the next run of a cell
    with pytest.raises(InvalidConfig, match="Cannot listen on 192.0.2.1"):
        bind(ServerConfig(host="192.0.2.1", port=0))
    with pytest.raises(InvalidConfig, match="Cannot listen on no.such.host.invalid"):
        bind(ServerConfig(host="no.such.host.invalid", port=0))


def test_headers_too_large_are_refused() -> None:
    with serving(HandLLM()) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 5) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000)
            assert b" 400 " in sock.recv(1000).partition(b"\r\n")[0]
        reply = httpx.get(f"{url}/health")
        assert reply.status_code == 200
        assert "server" not in reply.headers


def test_a_chunked_body_over_the_limit_is_refused_while_it_is_sent() -> None:
    def chunks() -> object:
        for _ in range(40):
            yield b"a" * 100_000

    manager = HandManager()
    with serving(HandLLM(manager)) as url:
        reply = httpx.post(f"{url}/generate", content=chunks(), headers={"content-type": "application/json"})
        assert reply.status_code == 413
        assert httpx.post(f"{url}/generate", json={"prompt": "a"}).status_code == 200


SCRIPT = """
    import sys, time
    from medusa_serve.server.config import ServerConfig
    from medusa_serve.server.background_load import BackgroundLoad
    from medusa_serve.server.listen import serve
    from tests.fakes import FakeRunner
    from tests.server.test_engine import FakeLLM

    source = FakeLLM(FakeRunner(sleep_s=0.01)) if {loaded} else BackgroundLoad(lambda: time.sleep(60))
    serve(source, ServerConfig(port=0, drain_s=0.3), on_ready=lambda url: print(url, flush=True))
    source.close()
    print("ended")
"""


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_signal_stops_within_seconds(sig: int, loaded: bool) -> None:
    script = textwrap.dedent(SCRIPT.format(loaded=loaded))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=env, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            url, raw = process.stdout.readline().strip(), b""
            assert httpx.get(f"{url}/health").status_code == (200 if loaded else 503)
            sock = open_post(url, {"prompt": "a", "max_tokens": 4000, "stream": True})
            raw = sock.recv(65536)
            began = time.monotonic()
            process.send_signal(sig)
            while loaded and (data := sock.recv(65536)):
                raw += data
            out, err = process.communicate(timeout=10)
            took = time.monotonic() - began
            sock.close()
        finally:
            process.kill()
    told = "stopping: 1 open requests may finish within" if loaded else ""
    assert (process.returncode, out) == (0, "ended\n")
    assert err.startswith(told)
    assert len(err.splitlines()) == int(loaded)
    assert took < 4
    if loaded:
        got = events(unchunk(raw.partition(b"\r\n\r\n")[2]).decode())
        assert got[-1]["error"]["code"] == "shutting_down"
    else:
        assert b" 503 " in raw
