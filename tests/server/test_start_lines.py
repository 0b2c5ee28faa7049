"""The shell line that a server prints when it is ready."""

from __future__ import annotations

import json
import shlex

import pytest

from medusa_serve.server.start_lines import curl_line


@pytest.mark.parametrize("key", [None, "k'ey $x"])
def test_the_curl_line_is_quoted(key: str | None) -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", key, True))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/generate"]
    assert json.loads(words[words.index("-d") + 1])["messages"][0]["role"] == "user"
    assert (f"Authorization: Bearer {key}" in words) == (key is not None)
    assert "prompt" in json.loads(shlex.split(curl_line("http://x", key, False))[-1])
