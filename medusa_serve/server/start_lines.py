"""What a server prints about itself when it starts: its key, and a line that gets an answer from it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from .config import ServerConfig

EXAMPLE = "Explain photosynthesis to a child."


def print_lines(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def key_lines(config: ServerConfig, key_is_ours: bool) -> list[str]:
    """key_is_ours: the key was made for this run, not given"""
    if config.api_key is None:
        return ["no key needed: loopback only"]
    made = " (made for this run)" if key_is_ours else ""
    guests = [f"key of a guest: {key}" for key in config.guest_keys]
    return [f"key: {config.api_key}{made}, sent as `Authorization: Bearer …`", *guests]


def model_line(about: Mapping[str, Any]) -> str:
    """LLM.describe() as one line: "model smollm2-135m, heads sequential, …"."""
    return ", ".join(f"{name} {_words(value)}" for name, value in about.items())


def _words(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def curl_line(url: str, key: str | None, has_chat_template: bool) -> str:
    """A shell line that gets an answer from the server at `url`."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": EXAMPLE}]}
    if not has_chat_template:
        body = {"prompt": "Once upon a time"}
    words = ["curl", "-s", f"{url}/generate", "-H", "Content-Type: application/json"]
    if key is not None:
        words += ["-H", f"Authorization: Bearer {key}"]
    return shlex.join([*words, "-d", json.dumps({**body, "max_tokens": 64})])
