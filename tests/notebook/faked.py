"""The fake ngrok program as a test holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil

FAKE = Path(__file__).with_name("fake_ngrok.py")


class Fake:
    """What the test tells the fake, and what that did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tell(self, name: str, text: str | None) -> None:
        path = self.folder / name
        path.unlink(missing_ok=True) if text is None else path.write_text(text)

    @property
    def runs(self) -> list[list[Any]]:
        """[pid, argv…] of each start."""
        path = self.folder / "started.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def asked(self) -> list[dict[str, Any]]:
        path = self.folder / "asked.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def alive(self) -> list[int]:
        return [pid for pid, *_ in self.runs if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
