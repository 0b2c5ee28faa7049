"""What a month of ngrok's free plan has left, counted by the real server and kept between runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from medusa_serve.notebook.tunnel.quota import BYTES, REQUESTS, Quota
from medusa_serve.server.config import ServerConfig
from tests.server.standins import HandLLM, httpx, running, serving


def test_it_warns_once_from_eighty_per_cent_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    used, month = [(0, 0)], ["2026-11"]
    quota = Quota(tmp_path / "cache", lambda: used[0], lambda: month[0])
    with caplog.at_level(logging.WARNING, "medusa_serve.notebook.tunnel.quota"):
        for used[0] in ((0, 0), (15_999, 0), (15_999, 0)):
            quota.note()
            assert quota.warning is None
        for used[0] in ((16_000, 10_000_000), (16_500, 20_000_000)):
            quota.note()
    assert len(caplog.records) == 1
    assert quota.warning is not None
    assert "16,500 requests and 0.02 GB" in quota.warning
    assert f"{REQUESTS:,} and 1 GB" in quota.warning
    month[0] = "2026-12"  # a new month begins while it runs: what was used before is not of it
    used[0] = (16_600, 20_000_000)
    quota.note()
    assert quota.warning is None
    files = {path.name: json.loads(path.read_text()) for path in (tmp_path / "cache").iterdir()}
    assert files["ngrok-2026-11.json"] == {"requests": 16_500, "bytes": 20_000_000}
    assert files["ngrok-2026-12.json"] == {"requests": 100, "bytes": 0}


def test_runs_add_up_and_bytes_count_too(tmp_path: Path) -> None:
    for run in range(4):
        quota = Quota(tmp_path, lambda: (1, BYTES // 5), lambda: "2026-11")
        quota.note()
        quota.note()  # nothing new
        assert (quota.warning is not None) == (run == 3)
    (tmp_path / "ngrok-2026-11.json").write_text("{")  # half a file
    quota = Quota(tmp_path, lambda: (1, 5), lambda: "2026-11")
    quota.note()
    assert json.loads((tmp_path / "ngrok-2026-11.json").read_text()) == {"requests": 1, "bytes": 5}


def test_a_folder_that_cannot_be_written_still_warns(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    used = [(REQUESTS // 2, 0)]
    quota = Quota(tmp_path / "file", lambda: used[0])
    quota.note()
    used[0] = (REQUESTS, 0)
    quota.note()
    assert quota.warning is not None
    assert f"{REQUESTS:,} requests" in quota.warning


def test_the_server_counts_what_comes_by_a_learned_name() -> None:
    with serving(HandLLM(), ServerConfig(port=0, api_key="key")) as url:
        web, head = running(url), {"x-api-key": "key", "host": "abc.ngrok.app"}
        web.allow_host("https://abc.ngrok.app")
        ours = httpx.post(f"{url}/generate", json={"prompt": "a"}, headers={"x-api-key": "key"})
        assert (ours.status_code, web.traffic()) == (200, (0, 0))
        replies = [
            httpx.post(f"{url}/generate", json={"prompt": "a"}, headers=head),
            httpx.post(f"{url}/generate", json={"prompt": "a", "stream": True}, headers=head),
            httpx.post(f"{url}/generate", json={"prompt": "a"}, headers={"host": "abc.ngrok.app"}),
            httpx.get(f"{url}/health", headers={"host": "other.ngrok.app"}),
        ]
        assert [reply.status_code for reply in replies] == [200, 200, 401, 400]
        requests, sent = web.traffic()
        assert requests == 3  # a name that is not ours is refused before
        bodies = sum(len(reply.content) for reply in replies[:3])
        assert bodies < sent < bodies + 3 * 600
