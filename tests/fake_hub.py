"""A model hub on this machine, by the hub's own protocol: repositories, files, a list to search, and its refusals."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

COMMIT = "0" * 40
GATED = "meta-llama/Gated"
TOKEN = "hf_known"


class _Hub(BaseHTTPRequestHandler):
    folders: dict[str, Path]
    listed: list[str]

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if url.path == "/api/models":
            return self._json(self._found(parse_qs(url.query)))
        if (call := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+)(/.*)?)?", url.path)) is not None:
            if (folder := self._folder(call[1])) is None:
                return None
            if call[2] == "tree":
                return self._refuse(404, "EntryNotFound", "no such folder") if call[4] else self._json(_tree(folder))
            return self._json(
                {"id": call[1], "sha": COMMIT, "siblings": [{"rfilename": f["path"]} for f in _tree(folder)]}
            )
        called = re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", url.path)
        if called is None or (folder := self._folder(called[1])) is None:
            return None if called else self._refuse(404, "", "nothing here")
        if not (folder / called[2]).is_file():
            return self._refuse(404, "EntryNotFound", "no such file")
        return self._send(200, (folder / called[2]).read_bytes())

    def _folder(self, repo: str) -> Path | None:
        """Of a repository; else it is refused as the hub does, which tells nobody what is private."""
        if repo == GATED:
            self._refuse(401, "GatedRepo", "Access to it is restricted.")
        elif repo not in self.folders:
            self._refuse(401, "RepoNotFound", "Repository not found")
        return self.folders.get(repo)

    def _found(self, query: dict[str, list[str]]) -> list[dict[str, str]]:
        author, search = query.get("author", [""])[0], query.get("search", [""])[0]
        names = [name for name in self.listed if name.startswith(f"{author}/" if author else "") and search in name]
        return [{"id": name, "modelId": name} for name in names]

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _tree(folder: Path) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": COMMIT}
        for path in sorted(folder.iterdir())
    ]


@contextmanager
def fake_hub(
    patch: pytest.MonkeyPatch, cache: Path, folders: dict[str, Path], *, listed: tuple[str, ...] = ()
) -> Iterator[str]:
    """Stands in the hub's place; → its address. folders: what its repositories hold · listed: what it finds too."""
    handler = type("Hub", (_Hub,), {"folders": folders, "listed": [*folders, *listed]})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        stand_in(patch, cache, address)
        yield address
        server.shutdown()


def stand_in(patch: pytest.MonkeyPatch, cache: Path, address: str) -> None:
    """The hub's client asks `address`, and keeps what it gets in `cache`."""
    from huggingface_hub import constants, hf_api

    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(hf_api.api, "endpoint", address)
    patch.delenv("HF_TOKEN", raising=False)
