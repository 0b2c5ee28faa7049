"""Passes in passed: started in one turn, and read in the next one where the device runs beside the host."""

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
class StartedPass:
    """A pass that was started.

    rows      its sequences
    outputs   waits for the pass and returns its results, one per row
    as_one    False: the pass failed and its rows ran alone, one after the other
    nodes     N of a decode step (0: this is a prefill pass)
    trees     N of the tree that each row verifies; it was drafted a step earlier
    counts    prompt tokens of each row of a prefill pass"""

    rows: list[Sequence]
    outputs: Callable[[], list[Any]]  # StepOutput, RowFailed, or None where a prompt goes on
    as_one: bool
    started: float
    nodes: int = 0
    trees: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


class InFlight:
    """Starts passes and reads them in the same order; `take` gets what each one emitted. Used by the engine thread.

    Where the runner's calls return only when the device is done (`runner.overlaps` is false), each pass is read at
    once.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, metrics: Metrics, clock: Callable[[], float], take: Take
    ) -> None:
        self._runner, self._scheduler, self._metrics = runner, scheduler, metrics
        self._clock, self._take = clock, take
        self._passes: deque[StartedPass] = deque()
        self._last_end = -math.inf
        self._no_prefill = True  # no prefill pass was started or read since the last decode step

    def __len__(self) -> int:
        return len(self._passes)

    def prefill(self, chunks: tuple[PrefillChunk, ...]) -> None:
        if not chunks:
            return
        self._no_prefill = False
        started = self._clock()
        outputs, as_one = start_rows(self._runner.prefill, self._runner.prefill, chunks)
        rows = [self._scheduler.running[chunk.slot] for chunk in chunks]
        drafted_for = self._runner.first_draft(len(chunks))
        for seq, chunk in zip(rows, chunks, strict=True):
            seq.num_prefilled += chunk.count
            if not seq.num_to_prefill:
                seq.state = State.DECODING  # its first token is on the device, read or not
                seq.drafted_for = drafted_for
        self._add(StartedPass(rows, outputs, as_one, started, counts=tuple(chunk.count for chunk in chunks)))

    def decode(self, slots: tuple[int, ...], nodes: int) -> None:
        slots = tuple(slot for slot in slots if slot in self._scheduler.running)  # a row that ran alone may have ended
        if not slots:
            return
        started = self._clock()
        # A row that is retried alone decodes plainly: the same text with the least memory.
        outputs, as_one = start_rows(
            lambda rows: self._runner.decode(rows, nodes), lambda rows: self._runner.decode(rows, 1), slots
        )
        rows = [self._scheduler.running[slot] for slot in slots]
        trees = tuple(min(nodes, seq.drafted_for) for seq in rows)
        for seq in rows:
            seq.drafted_for = nodes
        self._add(StartedPass(rows, outputs, as_one, started, nodes=nodes, trees=trees))

    def _add(self, passed: StartedPass) -> None:
        self._passes.append(passed)
        if not (self._runner.overlaps and passed.as_one):  # rows that ran alone have ended already
            self.read(len(self._passes))

    def read(self, count: int) -> int:
        """Wait for the first `count` passes and read them. Returns how many there were."""
        count = min(count, len(self._passes))
        for _ in range(count):
            passed, asked = self._passes.popleft(), self._clock()
            outputs = passed.outputs()
            self._note_times(passed, asked)
            if passed.counts:
                pairs = zip(passed.counts, outputs, strict=True)
                self._metrics.prefilled(computed=sum(n for n, out in pairs if not isinstance(out, RowFailed)))
            elif passed.as_one:
                self._scheduler.note_gains(passed.rows, outputs, passed.trees)
            self._hand_out(passed, outputs)
        return count

    def _hand_out(self, passed: StartedPass, outputs: list[Any]) -> None:
        decoding, took = passed.nodes > 0, []
        for seq, out in zip(passed.rows, outputs, strict=True):
            if out is not None and seq.state is not State.FINISHED:  # it may have ended while the pass was in flight
                mine = self._take(seq, out, decoding=decoding)
                if mine is not None:
                    took.append((len(mine.ids), out.num_drafted, mine.accepted))
        self._metrics.emitted(took, decoding=decoding)

    def _note_times(self, passed: StartedPass, asked: float) -> None:
        """Note how long the device took: since the pass was started, or since the pass before it ended.

        asked: when we began to wait for the outputs"""
        now = self._clock()
        seconds, self._last_end = now - max(passed.started, self._last_end), now
        waited = min(seconds, now - asked) if self._runner.overlaps else seconds
        if not passed.as_one:
            self._metrics.retried()
        elif passed.nodes:
            self._scheduler.note_decode(len(passed.rows), passed.nodes, seconds, waited, no_prefill=self._no_prefill)
            self._no_prefill = True
        else:
            self._scheduler.note_prefill(sum(passed.counts), seconds)
            self._no_prefill = False
