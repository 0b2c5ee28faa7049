"""What must hold whenever a server is at rest, whatever it went through.

I1  every accepted request was counted with one outcome, and none is open
I2  every answer had exactly one terminal event and one [DONE], and the engine accepted no other requests
I3  every slot is free: an idle engine audits them, and starts again where one is lost or has two owners
I4  tasks of the event loop, threads and open files are as before
I5  memory is as before, nothing runs and nothing waits
I6  a canary says within 5 s what it said before
I7  no log line holds its prompt or the key, or reports an exception that was never retrieved
I8  /health is 200, as it must be where the canary answers
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from .http_load import Sample

CANARY = "The canary of the mine says:"
CANARY_S = 5.0
REST_S, SETTLE_S = 60.0, 5.0
AUDIT_S = 0.6  # an idle engine turns at least every 0.5 s
SPARE_FILES, SPARE_THREADS = 2, 1  # tokenizers start a second thread when two are needed at once
SPARE_MB, SPARE_DEVICE_MB = 20.0, 1.0
REFUSED = frozenset({"429", "503"})


class Invariants:
    """Of a server over `llm` at `url`, in this process. What is compared is as it was at the last `begin`.

    loop: the server's · key: the owner's, which requests carry
    """

    def __init__(self, llm: Any, url: str, loop: asyncio.AbstractEventLoop, key: str | None = None) -> None:
        self._llm, self._url, self._loop, self._key = llm, url, loop, key
        self._process, self._lines = psutil.Process(), _Lines()
        self._golden = self._canary()
        logging.getLogger().addHandler(self._lines)
        self.begin()

    def begin(self) -> None:
        """The server is at rest and has done everything once: threads have started, memory was touched."""
        self._until(lambda: not self._figures()["in_flight"], REST_S)
        gc.collect()
        self._files, self._threads = self._process.num_fds(), threading.active_count()
        self._tasks = self._num_tasks()
        self._mb, self._device_mb = self._used_mb(), _device_mb(self._llm)
        self._accepted, self._restarts = (self._figures()[name] for name in ("accepted_requests", "restarts"))

    def close(self) -> None:
        logging.getLogger().removeHandler(self._lines)

    def check(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """After a load that gave `samples`: what was seen; `broken` holds the invariants that do not hold, with why."""
        began, broken = time.monotonic(), list[str]()

        def hold(name: str, holds: bool, why: str) -> None:
            if not holds:
                broken.append(f"{name}: {why}")

        rests = self._until(lambda: not self._figures()["in_flight"], REST_S)
        rest_s, accepted = time.monotonic() - began, self._figures()["accepted_requests"] - self._accepted
        asked = time.monotonic()
        said = self._canary()
        canary_s = time.monotonic() - asked
        rests = self._until(lambda: not self._figures()["in_flight"], REST_S) and rests
        time.sleep(AUDIT_S)
        figures, state = self._figures(), self._llm.manager.status()
        outcomes = sum(figures["outcomes"].values())
        hold("I1", rests and figures["accepted_requests"] == outcomes, f"{figures['in_flight']} requests are open")
        hold("I2", *_answers(samples, accepted))
        restarts = figures["restarts"] - self._restarts
        hold("I3", state.state == "ok" and not restarts, f"the engine is {state.state} after {restarts} restarts")
        for name, now, most in (
            ("tasks", self._num_tasks, self._tasks),
            ("threads", threading.active_count, self._threads + SPARE_THREADS),
            ("open files", self._process.num_fds, self._files + SPARE_FILES),
        ):
            hold("I4", self._settles(now, most), f"{now()} {name}, not {most}")
        gc.collect()
        grown_mb, device_mb = self._used_mb() - self._mb, abs(_device_mb(self._llm) - self._device_mb)
        hold("I5", not (state.running or state.waiting), f"{state.running} run, {state.waiting} wait")
        hold("I5", grown_mb <= SPARE_MB and device_mb <= SPARE_DEVICE_MB, f"{grown_mb:.0f} and {device_mb:.0f} MB more")
        hold("I6", said == self._golden, f"the canary said {said!r}, not {self._golden!r}")
        hold("I6", canary_s < CANARY_S, f"the canary took {canary_s:.1f} s")
        found = self._lines.with_words("never retrieved", CANARY, *filter(None, [self._key]))
        hold("I7", not found, f"{len(found)} log lines, the first at {found[:1]}")
        status = _health(self._url)
        hold("I8", (status == 200) == (said is not None), f"/health says {status}")
        self._accepted = figures["accepted_requests"]
        seen = {"rest_s": rest_s, "canary_s": canary_s, "grown_mb": grown_mb}
        return {"held": not broken, "broken": broken} | {name: round(value, 2) for name, value in seen.items()}

    def _canary(self) -> str | None:
        """Its answer; None where there is none. Refusals are waited out: clients that left in the last second may be in
        the queue still, until their absence is noticed."""
        body = json.dumps({"prompt": CANARY, "max_tokens": 8}).encode()
        headers = {"Content-Type": "application/json"} | ({"X-API-Key": self._key} if self._key else {})
        until = time.monotonic() + CANARY_S
        while True:
            try:
                asked = urllib.request.Request(f"{self._url}/generate", body, headers)
                with urllib.request.urlopen(asked, timeout=10 * CANARY_S) as reply:
                    return str(json.load(reply)["text"])
            except urllib.error.HTTPError as error:
                if str(error.code) not in REFUSED or time.monotonic() > until:
                    return None
            except OSError:
                return None
            time.sleep(0.05)

    def _figures(self) -> dict[str, Any]:
        return dict(self._llm.manager.metrics.snapshot())

    def _num_tasks(self) -> int:
        return len(asyncio.all_tasks(self._loop))

    def _used_mb(self) -> float:
        return float(self._process.memory_info().rss) / 2**20

    def _settles(self, now: Callable[[], int], most: int) -> bool:
        return self._until(lambda: now() <= most, SETTLE_S)

    @staticmethod
    def _until(holds: Callable[[], bool], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not (held := holds()) and time.monotonic() < until:
            time.sleep(0.02)
        return held


def _answers(samples: Sequence[Sample], accepted: int) -> tuple[bool, str]:
    """I2. A client that left has seen no end, and may have been accepted or not."""
    answered = [sample for sample in samples if sample.accepted and sample.status != "left"]
    odd = [sample.status for sample in answered if not sample.ended_once]
    left = sum(sample.status == "left" for sample in samples)
    if odd:
        return False, f"{len(odd)} answers without exactly one end, such as {odd[0]!r}"
    counted = len(answered) <= accepted <= len(answered) + left
    return counted, f"{len(answered)} of {len(samples)} clients were answered, {left} left, {accepted} were accepted"


def _device_mb(llm: Any) -> float:
    """Of tensors on a GPU."""
    if not str(llm.describe().get("device", "")).startswith("cuda"):
        return 0.0
    import torch

    return torch.cuda.memory_allocated(llm.device) / 2**20


def _health(url: str) -> int:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=CANARY_S) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


class _Lines(logging.Handler):
    """What is logged, where it was logged, as text."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._seen.append((record.name, self.format(record)))

    def with_words(self, *words: str) -> list[str]:
        """The loggers' names: what was found is not said again."""
        return [name for name, text in self._seen if any(word in text for word in words)]
