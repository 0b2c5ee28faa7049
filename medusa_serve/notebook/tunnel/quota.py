"""How much of ngrok's free plan this machine has used in this month."""

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
    """A file in `folder` keeps the month's sums from one run to the next. It only warns: other machines of the same
    account are not counted, and other plans have other limits.

    used: (requests, bytes) of this run so far · warning: a sentence from 80 % on, else None
    """

    def __init__(
        self,
        folder: Path,
        used: Callable[[], tuple[int, int]],
        month: Callable[[], str] = lambda: time.strftime("%Y-%m"),
    ) -> None:
        self._folder, self._used, self._month = folder, used, month
        self._counted, self._lock = (0, 0), threading.Lock()
        self.warning: str | None = None

    def note(self) -> None:
        """Add what was used since the last call. From any thread, any number of times."""
        with self._lock:
            used = self._used()
            path = self._folder / f"ngrok-{self._month()}.json"
            before = _read(path)
            total = before[0] + used[0] - self._counted[0], before[1] + used[1] - self._counted[1]
            if total != before and _write(path, total):
                self._counted = used  # else the folder cannot be written: this run alone is counted
            warned, self.warning = self.warning is not None, _sentence(*total)
            if self.warning is not None and not warned:
                log.warning("%s", self.warning)


def _sentence(requests: int, sent: int) -> str | None:
    if requests < WARN_AT * REQUESTS and sent < WARN_AT * BYTES:
        return None
    return (
        f"This machine has used {requests:,} requests and {sent / 1e9:.2f} GB of ngrok this month; its free plan ends"
        f" at {REQUESTS:,} and {BYTES / 1e9:.0f} GB ({SITE} shows the account's own count)."
    )


def _read(path: Path) -> tuple[int, int]:
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
        return int(sums["requests"]), int(sums["bytes"])
    except (OSError, ValueError, LookupError, TypeError):  # no file so far, or half of one
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
