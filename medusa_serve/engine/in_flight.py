"""Passes under way: started in one turn, read in the next where the device works by itself meanwhile."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..types import PrefillChunk, Runner, StepOutput
from .metrics import Metrics
from .row_retry import RowFailed, start_rows
from .scheduler import Scheduler
from .sequence import Sequence, State, Took


class Take(Protocol):
    def __call__(self, seq: Sequence, out: StepOutput | RowFailed, *, decoding: bool) -> Took | None:
        """None where it failed."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A pass that was started: its sequences, what gives their outputs, and whether it runs as one pass. `nodes` of a
    decode step and of each row's `trees`, which were drafted a step before; or `counts` of prompt tokens (a row each)
    of a prefill."""

    rows: list[Sequence]
    outputs: Callable[[], list[Any]]  # StepOutput, RowFailed, or None where a prompt goes on
    whole: bool
    started: float
    nodes: int = 0
    trees: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


class Flights:
    """Starts passes and reads them in the same order; `take` gets what each emitted. The engine thread's.

    Where calls return only when the device is done (`runner.overlaps` is false), each flight is read at once.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, metrics: Metrics, clock: Callable[[], float], take: Take
    ) -> None:
        self._runner, self._scheduler, self._metrics = runner, scheduler, metrics
        self._clock, self._take = clock, take
        self._flights: deque[Flight] = deque()
        self._landed = -math.inf
        self._alone = True  # no prefill pass was started or read since the last step was

    def __len__(self) -> int:
        return len(self._flights)

    def prefill(self, chunks: tuple[PrefillChunk, ...]) -> None:
        if not chunks:
            return
        self._alone = False
        started = self._clock()
        outputs, whole = start_rows(self._runner.prefill, self._runner.prefill, chunks)
        rows = [self._scheduler.running[chunk.slot] for chunk in chunks]
        drafted_for = self._runner.first_draft(len(chunks))
        for seq, chunk in zip(rows, chunks, strict=True):
            seq.num_prefilled += chunk.count
            if not seq.num_to_prefill:
                seq.state = State.DECODING  # the device has its first token, whether we have read it or not
                seq.drafted_for = drafted_for
        self._add(Flight(rows, outputs, whole, started, counts=tuple(chunk.count for chunk in chunks)))

    def decode(self, slots: tuple[int, ...], nodes: int) -> None:
        slots = tuple(slot for slot in slots if slot in self._scheduler.running)  # a row that ran alone may have ended
        if not slots:
            return
        started = self._clock()
        # A row alone decodes plainly: the same text with the least memory.
        outputs, whole = start_rows(
            lambda rows: self._runner.decode(rows, nodes), lambda rows: self._runner.decode(rows, 1), slots
        )
        rows = [self._scheduler.running[slot] for slot in slots]
        trees = tuple(min(nodes, seq.drafted_for) for seq in rows)
        for seq in rows:
            seq.drafted_for = nodes
        self._add(Flight(rows, outputs, whole, started, nodes=nodes, trees=trees))

    def _add(self, flight: Flight) -> None:
        self._flights.append(flight)
        if not (self._runner.overlaps and flight.whole):  # rows that ran alone are over
            self.land(len(self._flights))

    def land(self, count: int) -> int:
        """Wait for the first `count` flights and read them; → how many there were."""
        count = min(count, len(self._flights))
        for _ in range(count):
            flight, asked = self._flights.popleft(), self._clock()
            outputs = flight.outputs()
            self._note_times(flight, asked)
            if flight.counts:
                pairs = zip(flight.counts, outputs, strict=True)
                self._metrics.prefilled(computed=sum(n for n, out in pairs if not isinstance(out, RowFailed)))
            elif flight.whole:
                self._scheduler.note_gains(flight.rows, outputs, flight.trees)
            self._hand_out(flight, outputs)
        return count

    def _hand_out(self, flight: Flight, outputs: list[Any]) -> None:
        decoding, took = flight.nodes > 0, []
        for seq, out in zip(flight.rows, outputs, strict=True):
            if out is not None and seq.state is not State.FINISHED:  # it may have ended while this was under way
                mine = self._take(seq, out, decoding=decoding)
                if mine is not None:
                    took.append((len(mine.ids), out.num_drafted, mine.accepted))
        self._metrics.emitted(took, decoding=decoding)

    def _note_times(self, flight: Flight, asked: float) -> None:
        """How long the device was at it: since the start, or since the flight before was over. asked: when we began to
        wait for its outputs"""
        now = self._clock()
        seconds, self._landed = now - max(flight.started, self._landed), now
        waited = min(seconds, now - asked) if self._runner.overlaps else seconds
        if not flight.whole:
            self._metrics.retried()
        elif flight.nodes:
            self._scheduler.note_decode(len(flight.rows), flight.nodes, seconds, waited, alone=self._alone)
            self._alone = True
        else:
            self._scheduler.note_prefill(sum(flight.counts), seconds)
            self._alone = False
