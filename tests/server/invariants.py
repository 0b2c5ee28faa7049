"""What must hold after every fault and every load, whatever happened: the invariants I1 to I8."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from medusa_serve.types import SamplingParams

from .standins import events, wait_for

CANARY = "canary: is anybody there?"
OUTCOMES = ("stop", "length", "error", "cancelled", "timeout", "shutdown")
SPARE_THREADS = 2  # of the tokenizers' pool, which come with the first requests


class Kept(logging.Handler):
    """Every line that is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@dataclass
class Told:
    """What one client was told: its HTTP status, and of a stream its events."""

    status: int
    text: str = ""
    code: str | None = None
    terminal: int = 0  # finish reasons and errors: exactly one where the server answered to the end


def told(reply: httpx.Response) -> Told:
    """I2: exactly one terminal event, then one [DONE]; or one body."""
    if not reply.headers.get("content-type", "").startswith("text/event-stream"):
        body = reply.json()
        code = body["error"]["code"] if "error" in body else None
        return Told(reply.status_code, body.get("text", ""), code, 1)
    got = events("".join(block + "\n\n" for block in reply.text.split("\n\n")[:-1] if not block.startswith(":")))
    ends = [event for event in got if "error" in event or "finish_reason" in event]
    assert ends == got[-1:], "not exactly one terminal event, at the end"
    code = ends[0]["error"]["code"] if "error" in ends[0] else None
    return Told(reply.status_code, "".join(event.get("text", "") for event in got), code, 1)


@dataclass
class Baseline:
    """Taken from a server at rest that has answered once; `check` compares."""

    llm: Any
    url: str
    secrets: tuple[str, ...] = (CANARY,)
    rss_mb: float = 20.0
    kept: Kept = field(default_factory=Kept)

    def __post_init__(self) -> None:
        ids = self.llm.codec.encode(CANARY)
        self.golden = self.llm.codec.decode(self.llm.runner.solo(ids, SamplingParams(), 8))
        for _ in range(3):
            assert self.canary() == self.golden
        gc.collect()
        self._process = psutil.Process(os.getpid())
        self._threads = threading.active_count()
        self._fds = self._process.num_fds()
        self._rss = self._process.memory_info().rss
        logging.getLogger().addHandler(self.kept)

    def canary(self) -> str:
        """I6: the golden text within 5 s."""
        reply = httpx.post(f"{self.url}/generate", json={"prompt": CANARY, "max_tokens": 8}, timeout=5)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["text"])

    def rest(self) -> None:
        """Wait until nothing runs and nothing waits."""
        wait_for(lambda: self.llm.manager.metrics.snapshot()["in_flight"] == 0, 10)
        wait_for(lambda: not self.llm.runner.slots, 10)
        wait_for(lambda: self.llm.manager.metrics.snapshot()["running"] == 0, 10)  # told at the end of a turn

    def check(self) -> None:
        self.rest()
        figures = self.llm.manager.metrics.snapshot()
        assert figures["accepted_requests"] == sum(figures["outcomes"][name] for name in OUTCOMES)  # I1
        self.llm.manager._scheduler.audit()  # I3
        assert (figures["running"], figures["waiting"]) == (0, 0)  # I5
        began = time.monotonic()
        assert self.canary() == self.golden  # I6
        assert time.monotonic() - began < 5
        assert httpx.get(f"{self.url}/health").status_code == 200  # I8: and the canary works
        wait_for(lambda: threading.active_count() <= self._threads + SPARE_THREADS, 6)  # I4
        wait_for(lambda: self._process.num_fds() <= self._fds + 2, 6)
        gc.collect()
        grown = (self._process.memory_info().rss - self._rss) / 2**20
        assert grown <= self.rss_mb, f"{grown:.0f} MB more than at the start"  # I5
        text = "\n".join(self.kept.lines)
        assert "never retrieved" not in text  # I7
        assert not [secret for secret in self.secrets if secret in text]

    def close(self) -> None:
        logging.getLogger().removeHandler(self.kept)
