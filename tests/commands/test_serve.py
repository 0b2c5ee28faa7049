"""`medusa-serve serve`: real runs on a tiny folder, asked by the line that it prints."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.inprocess import main_while, stop
from tests.test_cli import ROOT, environment, run


def send(line: str) -> dict[str, Any]:
    """Run a curl line, or what it says where there is no curl."""
    words = shlex.split(line)
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    request = urllib.request.Request(words[2], words[words.index("-d") + 1].encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def test_serve_prints_a_line_that_works(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "medusa_serve", "--port", "0", "--device", "cpu", "--model", str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = []
        while not lines or not lines[-1].startswith("curl"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()
        assert "http://127.0.0.1:" in lines[0]
        assert lines[1] == "no key needed: loopback only\n"
        assert send(lines[-1])["usage"]["completion_tokens"] > 0
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == ""
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("given", [None, "from-the-environment"])
def test_another_host_needs_a_key(folder: Path, given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_SERVE_API_KEY", given or "")

    def act(lines: Iterator[str]) -> None:
        ready = json.loads(next(lines))
        assert ready["api_key"] == given if given else len(ready["api_key"]) >= 40
        assert send(ready["curl"])["model"] == "tiny-llama"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            send(ready["curl"].replace(ready["api_key"], "wrong"))
        stop(signal.SIGTERM)

    options = ["--model", str(folder), "--device", "cpu", "--port", "0", "--host", "0.0.0.0", "--json"]
    code, out = main_while(act, *options)
    assert code == 0
    assert out.count("\n") == 1


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--port", "0", "--device", "cpu", "--model", str(tmp_path)) == 1
    out, err = capsys.readouterr()
    reason = f"The folder {tmp_path} holds no model: there is no config.json in it."
    assert err.splitlines()[-1] == f"medusa_serve: {reason}"
    assert "Traceback" not in err
    assert "curl" not in out
