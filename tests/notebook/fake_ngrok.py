#!/usr/bin/env python3
"""Stands in for the ngrok program: its command line, its local API, and a real reverse proxy at its address.

The folder in MEDUSA_FAKE_NGROK holds what a test wants of it and what it did:
  fail          "start CODE": exit 1 with that error · "connect CODE": refuse the endpoint (502) · "silent": say nothing
  online/NAME   one file an endpoint that is online, as ngrok's cloud knows it, with the pid of its agent
  linger        the seconds that an endpoint stays online after its agent was killed; none: it does not
  started.log   one line a run: its pid and command line
  asked.log     one JSON line a request to the local API
The authtoken "wrong" is refused (ERR_NGROK_107), an empty one too (4018).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

STATE = Path(os.environ["MEDUSA_FAKE_NGROK"])
DOMAIN = "fake-dev-domain.test"
ERRORS = {
    4018: "authentication failed: Usage of ngrok requires a verified account and authtoken.",
    107: "authentication failed: The authtoken you specified is properly formed, but it is invalid.",
    334: "failed to start tunnel: The endpoint 'https://fake-dev-domain.test' is already online.",
}


def say(**fields: object) -> None:
    print(" ".join(f"{key}={json.dumps(str(value))}" for key, value in fields.items()), flush=True)


def wanted() -> tuple[str, int]:
    """(what is to fail, with which code)"""
    with contextlib.suppress(OSError):
        kind, _, code = (STATE / "fail").read_text().strip().partition(" ")
        return kind, int(code or 0)
    return "", 0


def refusal(code: int) -> str:
    return f"{ERRORS.get(code, 'something is wrong')}\\r\\n\\r\\nERR_NGROK_{code}\\r\\n"


class Cloud:
    """Which names are online, over all agents."""

    def __init__(self) -> None:
        self.folder = STATE / "online"
        self.folder.mkdir(exist_ok=True)

    def claim(self, name: str) -> bool:
        path, dead = self.folder / name, self.folder / f"{name}.dead"
        if path.exists():
            if self._runs(int(path.read_text())):
                return False
            if not dead.exists():
                dead.touch()
            with contextlib.suppress(OSError):
                if time.time() - dead.stat().st_mtime < float((STATE / "linger").read_text()):
                    return False
        dead.unlink(missing_ok=True)
        path.write_text(str(os.getpid()))
        return True

    @staticmethod
    def _runs(pid: int) -> bool:
        try:
            return "ngrok" in Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return False

    def release(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class PublicSide(BaseHTTPRequestHandler):
    """The reverse proxy: passes a request on with its Host, and the answer back piece by piece."""

    protocol_version = "HTTP/1.1"
    upstream = ""

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        target = urlsplit(self.upstream)
        connection = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "transfer-encoding")}
        headers |= {"X-Forwarded-For": self.client_address[0], "X-Forwarded-Proto": "https"}
        try:
            connection.request(self.command, self.path, body or None, headers)
            server = connection.sock
            threading.Thread(target=self.hang_up, args=(server,), daemon=True).start()
            answer = connection.getresponse()
        except OSError:
            self.send_response(502)
            self.send_header("Content-Length", "0")
            self.send_header("ngrok-error-code", "ERR_NGROK_8012")
            self.end_headers()
            return
        self.send_response(answer.status)
        length = None
        for name, value in answer.getheaders():
            if name.lower() in ("transfer-encoding", "connection", "server", "date"):
                continue
            length = value if name.lower() == "content-length" else length
            self.send_header(name, value)
        if length is None:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        with contextlib.suppress(OSError):  # the client is gone: then so is our connection to the server
            while piece := answer.read1(65536):
                self.wfile.write(piece)
                self.wfile.flush()
        connection.close()

    def hang_up(self, server: socket.socket) -> None:
        """When the client leaves, the server learns of it."""
        with contextlib.suppress(OSError, ValueError):
            while server.fileno() >= 0:
                if select.select([self.connection], [], [], 0.05)[0]:
                    if self.connection.recv(1, socket.MSG_PEEK) == b"":
                        server.shutdown(socket.SHUT_RDWR)
                    return

    do_GET = do_POST = do_HEAD = do_OPTIONS = do_PUT = do_DELETE = handle_any

    def log_message(self, *_: object) -> None:
        pass


class Agent:
    def __init__(self, config: dict) -> None:
        self.config, self.cloud = config, Cloud()
        self.endpoints: dict[str, tuple[dict, ThreadingHTTPServer, str]] = {}

    def open(self, asked: dict) -> tuple[int, dict]:
        kind, code = wanted()
        if kind == "connect":
            return 502, {"error_code": 103, "status_code": 502, "msg": "failed", "details": {"err": refusal(code)}}
        unknown = set(asked) - {"name", "addr", "proto", "inspect", "schemes", "domain"}
        if unknown or asked.get("inspect") is not False or asked.get("proto") != "http":
            return 400, {"error_code": 102, "status_code": 400, "msg": f"invalid: {sorted(unknown)}", "details": {}}
        domain = asked.get("domain", DOMAIN)
        if not self.cloud.claim(domain):
            return 502, {"error_code": 103, "status_code": 502, "msg": "failed", "details": {"err": refusal(334)}}
        handler = type("Public", (PublicSide,), {"upstream": asked["addr"]})
        public = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=public.serve_forever, daemon=True).start()
        # a test must be able to reach it, so the address is of this machine; the name only tells what was asked for
        url = f"http://127.0.0.1:{public.server_port}"
        answer = {"name": asked["name"], "uri": f"/api/tunnels/{asked['name']}", "public_url": url, "proto": "https"}
        answer |= {"config": {"addr": asked["addr"], "inspect": False}, "metrics": {}}
        self.endpoints[asked["name"]] = answer, public, domain
        return 201, answer

    def shut(self, name: str) -> int:
        if name not in self.endpoints:
            return 404
        _, public, domain = self.endpoints.pop(name)
        public.shutdown()
        public.server_close()
        self.cloud.release(domain)
        return 204


def local_api(agent: Agent) -> type[BaseHTTPRequestHandler]:
    class Api(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = json.loads(body) if body else None
            if self.command != "GET":
                with (STATE / "asked.log").open("a") as file:
                    file.write(json.dumps({"method": self.command, "path": self.path, "body": asked}) + "\n")
            status, answer = 404, {"error_code": 100, "status_code": 404, "msg": "Not Found", "details": {}}
            if self.path == "/api/tunnels" and self.command == "GET":
                answer = {"tunnels": [answer for answer, _, _ in agent.endpoints.values()], "uri": "/api/tunnels"}
                status = 200
            elif self.path == "/api/tunnels" and self.command == "POST":
                status, answer = agent.open(asked)
            elif self.path.startswith("/api/tunnels/") and self.command == "DELETE":
                status, answer = agent.shut(self.path.rpartition("/")[2]), {}
            data = b"" if status == 204 else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    return Api


def start(arguments: list[str]) -> int:
    with (STATE / "started.log").open("a") as file:
        file.write(json.dumps([os.getpid(), *sys.argv]) + "\n")
    config = json.loads(Path(arguments[arguments.index("--config") + 1]).read_text())
    kind, code = wanted()
    if kind == "silent":
        time.sleep(3600)
    token = config.get("agent", {}).get("authtoken", "")
    code = {"wrong": 107, "": 4018}.get(token, code if kind == "start" else 0)
    if code:
        say(t="2026-11-24T12:00:00+0000", lvl="eror", msg="failed to reconnect session", obj="csess", err=refusal(code))
        return 1
    agent = Agent(config)
    web = ThreadingHTTPServer(("127.0.0.1", 0), local_api(agent))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    stopping = threading.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: stopping.set())
    say(
        t="2026-11-24T12:00:00+0000",
        lvl="info",
        msg="starting web service",
        obj="web",
        addr=f"127.0.0.1:{web.server_port}",
    )
    say(t="2026-11-24T12:00:00+0000", lvl="info", msg="client session established", obj="tunnels.session")
    say(t="2026-11-24T12:00:00+0000", lvl="info", msg="tunnel session started", obj="tunnels.session")
    stopping.wait()
    for name in list(agent.endpoints):
        agent.shut(name)
    return 0


def main(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print("ngrok version 3.39.8")
        return 0
    if arguments[:4] == ["start", "--none", "--log", "stdout"]:
        return start(arguments[4:])
    print(f"ERROR: unknown command {arguments}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
