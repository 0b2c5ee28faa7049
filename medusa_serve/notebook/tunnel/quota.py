"""How much of a month of ngrok's free plan was used, as far as this machine knows."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .ngrok_advice import SITE

log = logging.getLogger(__name__)

REQUESTS, BYTES = 20_000, 10**9  # a month (ngrok.com/docs/pricing-limits, August 2026)
WARN_AT = 0.8


class Quota:
    """A file in `folder` keeps the month's sums from one run to the next; other machines of the same account are not
    seen, and other plans have other limits: it only warns.

    used: (requests, bytes) of this run so far · warning: a sentence from 80 % on, else None
    """

    def __init__(
        self,
        folder: Path,
        used: Callable[[], tuple[int, int]],
        month: Callable[[], str] = lambda: time.strftime("%Y-%m"),
    ) -> None:
        self._folder, self._used, self._month = folder, used, month
        self._seen, self._unwritten, self._lock = (0, 0), (0, 0), threading.Lock()
        self.warning: str | None = None

    def note(self) -> None:
        """Add what was used since the last call; any thread, as often as one likes."""
        with self._lock:
            used = self._used()
            new = used[0] - self._seen[0] + self._unwritten[0], used[1] - self._seen[1] + self._unwritten[1]
            self._seen = used
            path = self._folder / f"ngrok-{self._month()}.json"
            before = _read(path)
            total = before[0] + new[0], before[1] + new[1]
            self._unwritten = (0, 0)
            if new != (0, 0) and not _write(path, total):
                self._unwritten = new  # a folder that cannot be written: this run's alone
            told = _sentence(*total)
            if told is not None and self.warning is None:
                log.warning("%s", told)
            self.warning = told


def _sentence(requests: int, sent: int) -> str | None:
    if requests < WARN_AT * REQUESTS and sent < WARN_AT * BYTES:
        return None
    return (
        f"This machine has used {requests:,} requests and {sent / 1e9:.2f} GB of ngrok this month; its free plan ends"
        f" at {REQUESTS:,} and {BYTES / 1e9:.0f} GB ({SITE} shows the account's own count)."
    )


def _read(path: Path) -> tuple[int, int]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return int(told["requests"]), int(told["bytes"])
    except (OSError, ValueError, LookupError, TypeError):  # none so far, or half of one
        return 0, 0


def _write(path: Path, total: tuple[int, int]) -> bool:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"requests": total[0], "bytes": total[1]}), encoding="utf-8")
        os.replace(part, path)
    except OSError:
        return False
    return True
