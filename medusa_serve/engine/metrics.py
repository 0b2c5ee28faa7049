"""Counters of the batch manager: plain numbers under one lock."""

from __future__ import annotations

import statistics
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from prometheus_client import Histogram
from prometheus_client.metrics_core import Metric

from ..types import Completion

Outcome = Literal["stop", "length", "error", "cancelled", "timeout", "shutdown"]
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
OUTCOMES: tuple[Outcome, ...] = ("stop", "length", "error", "cancelled", "timeout", "shutdown")


class Metrics:
    """What has happened so far. Invariant: accepted_requests = sum of the outcomes + in_flight.

    Medians are over the last `recent` values; counters only grow. Any thread may read and write.
    """

    def __init__(self, *, slots: int, recent: int = 256) -> None:
        self._lock = threading.Lock()
        self._slots = slots
        self._accepted_requests = 0
        self._outcomes: Counter[str] = Counter()
        self._running = self._waiting = 0
        self._emitted = self._drafted = self._accepted = self._steps = 0
        self._retried_calls = self._restarts = self._prefilled = self._reused = 0
        self._num_accepted: Counter[int] = Counter()
        self._turns: deque[float] = deque(maxlen=recent)
        self._first_tokens: deque[float] = deque(maxlen=recent)
        self._largest_gap = 0.0
        self._nodes = 1
        # in no registry: histograms() collects them
        self._first_token_s = Histogram(
            "medusa_serve_first_token_seconds", "From submission to the first token.", buckets=SECONDS, registry=None
        )
        self._token_s = Histogram(
            "medusa_serve_token_seconds",
            "Decode time of an answer over its tokens after the first.",
            buckets=SECONDS,
            registry=None,
        )

    def submitted(self) -> None:
        with self._lock:
            self._accepted_requests += 1

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            self._outcomes[outcome] += 1

    def gauges(self, *, running: int, waiting: int) -> None:
        with self._lock:
            self._running, self._waiting = running, waiting

    def turn(self, seconds: float) -> None:
        """One turn of the loop that ran something on the device."""
        with self._lock:
            self._turns.append(seconds)

    def planned(self, nodes: int) -> None:
        """A decode step with trees of `nodes`."""
        with self._lock:
            self._nodes = nodes

    def finished(self, completion: Completion) -> None:
        """A sequence ended with an answer."""
        if completion.tokens_per_second:
            self._token_s.observe(1 / completion.tokens_per_second)

    def retried(self) -> None:
        """A call of the runner failed and its rows ran one by one."""
        with self._lock:
            self._retried_calls += 1

    def restarted(self) -> None:
        """The engine met an error and started again."""
        with self._lock:
            self._restarts += 1

    def prefilled(self, *, computed: int = 0, reused: int = 0) -> None:
        """Prompt tokens: run through the model, or found in a slot's KV cache."""
        with self._lock:
            self._prefilled += computed
            self._reused += reused

    def emitted(self, rows: Sequence[tuple[int, int, int]], *, decoding: bool) -> None:
        """Of each sequence of a pass: tokens, verified draft tokens, accepted draft tokens. decoding: it was a decode
        step, not a prefill pass"""
        if not rows:
            return
        tokens, drafted, accepted = zip(*rows, strict=True)
        with self._lock:
            self._emitted += sum(tokens)
            if decoding:
                self._steps += len(rows)
                self._drafted += sum(drafted)
                self._accepted += sum(accepted)
                self._num_accepted.update(accepted)

    def first_token(self, seconds: float) -> None:
        """From submission to the delivery of the first token."""
        self._first_token_s.observe(seconds)
        with self._lock:
            self._first_tokens.append(seconds)

    def gap(self, seconds: float) -> None:
        """Between two deliveries of one decoding sequence."""
        with self._lock:
            self._largest_gap = max(self._largest_gap, seconds)

    @property
    def median_turn_s(self) -> float:
        """0.0 while nothing was measured."""
        with self._lock:
            return _median(self._turns)

    def histograms(self) -> Iterator[Metric]:
        """First-token time and time per token, for Prometheus."""
        for histogram in (self._first_token_s, self._token_s):
            yield from histogram.collect()

    def snapshot(self) -> dict[str, Any]:
        """All figures, as plain data; the caller owns the dict."""
        with self._lock:
            return {
                "accepted_requests": self._accepted_requests,
                "in_flight": self._accepted_requests - self._outcomes.total(),
                "outcomes": {name: self._outcomes[name] for name in OUTCOMES},
                "running": self._running,
                "waiting": self._waiting,
                "slots": self._slots,
                "nodes": self._nodes,
                "prefilled": self._prefilled,
                "reused": self._reused,
                "emitted": self._emitted,
                "steps": self._steps,
                "drafted": self._drafted,
                "accepted": self._accepted,
                "num_accepted": dict(sorted(self._num_accepted.items())),
                "retried_calls": self._retried_calls,
                "restarts": self._restarts,
                "median_step_ms": _median(self._turns) * 1000,
                "median_first_token_ms": _median(self._first_tokens) * 1000,
                "largest_gap_ms": self._largest_gap * 1000,
            }


def _median(values: deque[float]) -> float:
    return statistics.median(values) if values else 0.0
