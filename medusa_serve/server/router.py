"""From the engine's thread to the requests of an event loop: deltas by sequence, merged until they are read.

The engine calls one sink once a step; that is one call_soon_threadsafe a step, whatever the number of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Seq

from ..engine.batch_manager import BatchManager
from ..errors import MedusaServeError, ShuttingDown
from ..types import Delta, SamplingParams, Sink
from .guard.error_replies import log_crash
from .timeouts import Watch


class DeltaRouter:
    """Routes deltas to the requests of one event loop. All but `sink` belongs to that loop's thread.

    watch: ends requests that take too long · spent: gets a key's tokens when its request is over
    """

    def __init__(self, watch: Watch | None = None, spent: Callable[[str, int], None] | None = None) -> None:
        self._watch, self._spent = watch, spent
        self._open: dict[str, OpenSequence] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.sink: Sink = self._from_engine  # one object: the engine groups sequences by it

    @property
    def num_open(self) -> int:
        return len(self._open)

    def submit(
        self, manager: BatchManager, ids: Seq[int], params: SamplingParams, *, key: str, sequences: OpenSequences
    ) -> OpenSequence:
        """Submit one more sequence of a request: it joins `sequences`, which must be closed. Raises what the manager
        raises.

        The engine may answer before this returns, but its deltas pass through the loop, and the loop is ours until the
        sequence is in the table.
        """
        self._loop = asyncio.get_running_loop()
        sequence_id = manager.submit(ids, params, self.sink, key=key)
        sequence = self._open[sequence_id] = OpenSequence(self, manager, sequence_id, key, sequences)
        sequences.all.append(sequence)
        if self._watch is not None:
            self._watch.begin(self._all, manager)
        return sequence

    def _all(self) -> list[OpenSequence]:
        return list(self._open.values())

    def remove(self, sequence: OpenSequence) -> None:
        if self._open.pop(sequence.id, None) is not None and self._spent is not None:
            self._spent(sequence.key, sequence.num_tokens)

    def dismiss(self, error: MedusaServeError) -> None:
        """End every sequence that the engine has not ended."""
        for sequence in self._all():
            sequence.dismiss(error)

    def _from_engine(self, deltas: list[tuple[str, Delta]]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._deliver, deltas)

    def _deliver(self, deltas: list[tuple[str, Delta]]) -> None:
        for sequence_id, delta in deltas:
            sequence = self._open.get(sequence_id)
            if sequence is None:  # its client has left
                continue
            try:
                sequence.put(delta)
            except Exception as error:  # no request may wait for ever, whatever went wrong here
                log_crash(error)
                sequence.fail(MedusaServeError("The server failed at this answer."))


class OpenSequence:
    """One submitted sequence as its request sees it: at most one delta waits, later ones are merged into it."""

    def __init__(
        self, router: DeltaRouter, manager: BatchManager, sequence_id: str, key: str, sequences: OpenSequences
    ) -> None:
        self._router, self._manager, self.id, self.key = router, manager, sequence_id, key
        self.began, self.num_tokens = asyncio.get_running_loop().time(), 0
        self._waiting: Delta | None = None
        self._sequences = sequences
        self._finished = False

    @property
    def answered(self) -> bool:
        """Its first token has come, or its end."""
        return self.num_tokens > 0 or self._finished

    def put(self, delta: Delta) -> None:
        if self._finished:  # dismissed: its terminal event is out
            return
        self.num_tokens += sum(delta.tokens)
        self._waiting = delta if self._waiting is None else self._waiting.merged(delta)
        self._finished = delta.is_last
        self._sequences.wake(last=self._finished)

    def dismiss(self, error: MedusaServeError) -> None:
        if not self._finished:
            self._manager.cancel(self.id, "shutdown" if isinstance(error, ShuttingDown) else "timeout")
            self.put(Delta("", error=error))

    def fail(self, error: MedusaServeError) -> None:
        """As dismiss, and the waiting delta is lost: it may be what went wrong."""
        self._manager.cancel(self.id)
        self._waiting, self._finished = Delta("", error=error), True
        self._sequences.wake(last=True)

    def pop(self) -> Delta | None:
        """What has come since the last call, as one delta."""
        delta, self._waiting = self._waiting, None
        return delta

    def close(self) -> None:
        """The request is over; a sequence that is not is cancelled."""
        self._router.remove(self)
        if not self._finished:
            self._finished = True
            self._manager.cancel(self.id)


class OpenSequences:
    """The sequences of one request, in order."""

    def __init__(self) -> None:
        self.all: list[OpenSequence] = []
        self._ready, self._hurry = asyncio.Event(), asyncio.Event()

    def wake(self, *, last: bool) -> None:
        """Something has come. last: a sequence has ended"""
        self._ready.set()
        if last:
            self._hurry.set()

    async def rest(self, seconds: float) -> None:
        """Wait, so that more deltas come; return at once when a sequence ends."""
        timer = asyncio.get_running_loop().call_later(seconds, self._hurry.set)
        try:
            await self._hurry.wait()
        finally:
            timer.cancel()

    async def take(self) -> list[tuple[int, Delta]]:
        """What has come since the last call, at most one delta of each sequence by its index; waits for the first."""
        await self._ready.wait()
        self._ready.clear()
        self._hurry.clear()
        return [(index, delta) for index, sequence in enumerate(self.all) if (delta := sequence.pop()) is not None]

    def close(self) -> None:
        """The request is over; its sequences that are not are cancelled."""
        for sequence in self.all:
            sequence.close()
