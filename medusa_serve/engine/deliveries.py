"""What sequences are to be told, until each sink is called once for all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..types import Delta, Sink
from .metrics import Metrics
from .quiet_log import QuietLogger
from .sequence import Sequence

log = QuietLogger(__name__)


class Outbox:
    """The engine thread's, but for `tell_all`. is_open: whether a sequence may still be told that it goes on ·
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
        self._news: dict[Sink, list[tuple[Sequence, Delta]]] = {}

    def put(self, seq: Sequence, delta: Delta) -> None:
        self._news.setdefault(seq.sink, []).append((seq, delta))

    def clear(self) -> None:
        self._news.clear()

    def deliver(self) -> None:
        """One call of each sink that has something new. A sequence that was cancelled, or ended by another thread
        meanwhile, gets nothing more."""
        while self._news:
            sink = next(iter(self._news))
            news = [
                (seq, delta)
                for seq, delta in self._news.pop(sink)
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


def tell_all(seqs: Iterable[Sequence], last: Delta) -> None:
    """Give each its last delta at once, but for cancelled ones. Any thread."""
    by_sink: dict[Sink, list[tuple[str, Delta]]] = {}
    for seq in seqs:
        if not seq.cancelled:
            by_sink.setdefault(seq.sink, []).append((seq.id, last))
    for sink, pairs in by_sink.items():
        try:
            sink(pairs)
        except Exception:
            log.exception("A sink failed at the end.")
