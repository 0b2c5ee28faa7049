"""Deltas that wait for delivery: each sink is called once per step with everything new of its sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..types import Delta, Sink
from .metrics import Metrics
from .quiet_log import QuietLogger
from .sequence import Sequence

log = QuietLogger(__name__)


class Deliveries:
    """Used by the engine thread only. is_open: whether a sequence may still get a delta that is not its last one ·
    drop: ends the sequences of a sink that raised."""

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        is_open: Callable[[str], bool],
        drop: Callable[[Sink], None],
    ) -> None:
        self._metrics, self._clock, self._is_open, self._drop = metrics, clock, is_open, drop
        self._waiting: dict[Sink, list[tuple[Sequence, Delta]]] = {}

    def put(self, seq: Sequence, delta: Delta) -> None:
        self._waiting.setdefault(seq.sink, []).append((seq, delta))

    def clear(self) -> None:
        self._waiting.clear()

    def deliver(self) -> None:
        """Call each sink that has something new, once. A sequence that was cancelled, or that another thread has ended
        meanwhile, gets nothing more."""
        while self._waiting:
            sink = next(iter(self._waiting))
            news = [
                (seq, delta)
                for seq, delta in self._waiting.pop(sink)
                if not seq.cancelled and (delta.is_last or self._is_open(seq.id))
            ]
            if not news:
                continue
            self._note([seq for seq, _ in news])
            try:
                sink([(seq.id, delta) for seq, delta in news])
            except Exception:
                log.exception("A sink failed; its sequences are cancelled.")
                self._drop(sink)

    def _note(self, seqs: list[Sequence]) -> None:
        now, gap = self._clock(), 0.0
        for seq in seqs:
            if seq.delivered is not None:
                gap = max(gap, now - seq.delivered)
            elif seq.token_ids:
                self._metrics.first_token(now - seq.submitted)
            seq.delivered = now
        self._metrics.gap(gap)


def deliver_last(seqs: Iterable[Sequence], last: Delta) -> None:
    """Give each sequence its last delta at once; cancelled ones get nothing. Any thread may call this."""
    by_sink: dict[Sink, list[tuple[str, Delta]]] = {}
    for seq in seqs:
        if not seq.cancelled:
            by_sink.setdefault(seq.sink, []).append((seq.id, last))
    for sink, pairs in by_sink.items():
        try:
            sink(pairs)
        except Exception:
            log.exception("A sink failed at the end.")
