"""The batch manager: one thread, one inbox, one `step()`. Sequences in, deltas out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

from ..config import EngineConfig
from ..errors import (
    EngineDead,
    EngineRestarting,
    GenerationFailed,
    InvalidRequest,
    MedusaServeError,
    QueueFull,
    ShuttingDown,
)
from ..types import Delta, EngineStatus, Runner, SamplingParams, Sink, StepOutput, TextCodec
from .deliveries import Deliveries, deliver_last
from .detokenizer import Detokenizer, Silent
from .health import Heartbeat, Restarts, refuse_unless_ok
from .in_flight import InFlight
from .metrics import Metrics, Outcome
from .quiet_log import QuietLogger
from .row_retry import RowFailed
from .scheduler import Scheduler
from .sequence import Sequence, Took, new_sequence, token_limit

log = QuietLogger(__name__)

IDLE_WAIT_S = 0.5  # the loop shows a heartbeat at least this often


class BatchManager:
    """Runs many sequences at a time through a runner. Promises:

    - `submit` raises at once in the caller's thread, or the sequence is accepted and gets exactly one last Delta
      (completion or error), unless it is cancelled: then nothing more.
    - Each sink is called once per step at most, on the engine thread, with everything new of its sequences.
    - A sequence that makes the runner fail ends alone; a sink that raises ends its own sequences.
    - After an error in the engine itself every open sequence gets EngineRestarting and the engine starts again; where
      that cannot help, every sequence gets EngineDead.

    Threads meet in `_open`, `_inbox` and the flags under `_lock`; all else belongs to the thread that runs `step()`.
    `start` makes that thread; without it, the caller's thread may run `step` itself (tests do).
    """

    def __init__(
        self,
        runner: Runner,
        codec: TextCodec | None,
        config: EngineConfig,
        *,
        model_name: str,
        clock: Callable[[], float] = time.monotonic,
        stall_s: float = 60.0,
        close_s: float = 10.0,
    ) -> None:
        """codec: None runs on ids only, without text and stop strings, and with one last Delta per sequence ·
        stall_s: no step counts as stalled before this age · close_s: `close` waits for a step at most this long"""
        self.metrics = Metrics(slots=runner.num_slots)
        self._runner, self._codec, self._config, self._model_name = runner, codec, config, model_name
        self._clock, self._close_s = clock, close_s
        self._heartbeat = Heartbeat(clock, stall_s)
        self._scheduler = Scheduler(runner, config.prefill_chunk)
        self._lock = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._open: dict[str, Sequence] = {}  # accepted, not ended; who pops a sequence must send its last delta
        self._in_flight = InFlight(runner, self._scheduler, self.metrics, clock, self._take)
        self._deliveries = Deliveries(self.metrics, clock, is_open=self._open.__contains__, drop=self._drop)
        self._thread: threading.Thread | None = None
        self._draining = self._closing = self._runner_closed = self._rested = False
        self._restarts = Restarts(clock)
        self._restarting = False
        self._failure: str | None = None

    # ---- any thread ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread. Raises RuntimeError the second time, and after `close`."""
        with self._lock:
            if self._thread is not None or self._closing:
                raise RuntimeError("The engine was started or closed before.")
            self._thread = threading.Thread(target=self._run, name="medusa-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt_ids: Seq[int], params: SamplingParams, sink: Sink, *, key: str = "") -> str:
        """Accept a sequence and return its id. KV prefixes are shared only between sequences of the same `key`.

        Raises InvalidRequest, ContextTooLong, QueueFull, ShuttingDown, EngineStalled, EngineRestarting or EngineDead.
        """
        if not isinstance(sink, Hashable):
            raise TypeError("The sink must be hashable: deltas are grouped by it.")
        if self._codec is None and params.stop:
            raise InvalidRequest("An engine that runs on ids only knows no stop strings.", param="stop")
        runner = self._runner
        limit = token_limit(prompt_ids, params, max_context=runner.max_context, vocab_size=runner.vocab_size)
        text = Silent() if self._codec is None else Detokenizer(self._codec, params.stop, runner.eos_ids)
        seq = new_sequence(tuple(prompt_ids), params, limit, sink, text, key, self._clock())
        with self._lock:
            refuse_unless_ok(self.status())
            # A sequence that gets a slot in the next step does not wait: the queue is full at slots + max_queue.
            if len(self._open) >= self._runner.num_slots + self._config.max_queue:
                raise QueueFull(f"{self._config.max_queue} sequences wait already; try again later.")
            self._open[seq.id] = seq
            self.metrics.submitted()
            self._set_gauges()
            self._post(lambda: self._scheduler.add(seq))
        return seq.id

    def is_waiting(self, id: str) -> bool:
        """Whether the sequence is accepted and has no slot yet."""
        seq = self._open.get(id)
        return seq is not None and seq.slot is None

    def limits(self) -> dict[str, Any]:
        """The limits of the engine, as plain data."""
        sizes = {"max_queue": self._config.max_queue, "prefill_chunk": self._config.prefill_chunk}
        return {"slots": self._runner.num_slots, **sizes, "stall_s": self._heartbeat.stall_s}

    def cancel(self, id: str, outcome: Outcome = "cancelled") -> None:
        """End a sequence without a last delta; its slot is free within two steps. Unknown and ended ids are ignored.
        No delta is delivered after this returns, except by a call of the sink that is running.
        outcome: how the metrics count it."""
        with self._lock:
            seq = self._open.get(id)
            if seq is not None and not seq.cancelled:
                seq.cancelled = outcome
                self._post(lambda: self._end(seq, outcome))

    def status(self) -> EngineStatus:
        """The state of the engine; cheap, never waits for a step."""
        activity, thread = self._runner.activity, self._thread
        gone = thread is not None and thread.ident is not None and not thread.is_alive()
        running, waiting = self._load()
        status = partial(EngineStatus, running=running, waiting=waiting, heartbeat_age_s=self._heartbeat.age_s())
        if self._closing:
            return status("closed", message=self._failure)
        if gone or self._failure is not None:
            return status("failed", message=self._failure or "The engine thread is gone.")
        if self._restarting:
            return status("restarting", message="The engine starts again after an error.")
        trouble = self._heartbeat.trouble(lambda: self.metrics.median_turn_s) if activity is None else None
        if trouble is not None:
            return status("stalled", message=trouble)
        return status("draining" if self._draining else "ok", message=activity)

    def drain(self, grace_s: float) -> bool:
        """Refuse new sequences and let the accepted ones finish; after `grace_s` the rest get ShuttingDown.

        Returns whether all finished by themselves.
        """
        with self._lock:
            self._draining = True
        if self._wait_until_empty(grace_s):
            return True
        with self._lock:
            self._post(lambda: self._end_all("The server shut down before this was finished."))
        self._wait_until_empty(self._close_s)
        return False

    def wait_until_rested(self, seconds: float) -> bool:
        """Wait until the engine is idle and has compiled and captured all that it can; → whether it has."""
        with self._lock:
            return self._lock.wait_for(lambda: self._rested and not self._open, seconds)

    def close(self) -> None:
        """End every open sequence with ShuttingDown, stop the thread, close the runner. Any thread, any number of
        times.

        This waits `close_s` at most for a step that hangs. Then it ends the sequences itself, and the engine thread
        closes the runner when it comes back.
        """
        with self._lock:
            self._closing = True
            self._lock.notify_all()
            thread = self._thread
        if thread is threading.current_thread():
            return  # called from a sink: the loop ends after this step
        if thread is not None:
            thread.join(self._close_s)
            if thread.is_alive():
                log.warning("The engine thread does not end; its sequences end without it.")
                self._abandon(ShuttingDown("The server is shutting down."), "shutdown")
                return
        self._shut()

    # ---- the engine thread -----------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One turn: inbox, admission, a prefill chunk, a decode step, delivery. False when there was nothing to do."""
        started = self._heartbeat.begin()
        try:
            busy = self._read_inbox()
            while (seq := self._scheduler.admit()) is not None:
                self._admit(seq)
            plan = self._scheduler.plan()
            before = len(self._in_flight)
            self._in_flight.prefill(plan.prefill)
            self._in_flight.decode(plan.decode, plan.nodes)
            if plan.decode:
                self.metrics.planned(plan.nodes)
            num_read = self._in_flight.read(before)  # the passes of the last turn, while the device runs the new ones
            self._deliveries.deliver()
            turned = bool(plan.prefill or plan.decode or num_read)
            if turned:
                self.metrics.turn(self._clock() - started)
            elif not busy:
                self._scheduler.audit()
            return busy or turned
        finally:
            with self._lock:
                self._heartbeat.end()
                self._set_gauges()
                self._lock.notify_all()

    def _run(self) -> None:
        again = True
        while again:
            try:
                self._turn_until_closed()
                return self._shut()
            except BaseException as error:  # SystemExit and KeyboardInterrupt too: nothing else would report them
                again = self.recover(error)

    def _turn_until_closed(self) -> None:
        resting, worked = False, self._clock()
        while not self._closing:
            if self.step():
                resting, self._rested, worked = False, False, self._clock()
                continue
            grace_s = worked + self._runner.grace_s - self._clock()
            if not resting and grace_s <= 0:
                self._heartbeat.begin()  # one piece of idle work may take longer than a heartbeat
                try:
                    resting = not self._runner.rest()
                finally:
                    self._heartbeat.end()
            with self._lock:
                self._rested = resting
                self._lock.notify_all()
                if (resting or grace_s > 0) and not self._inbox and not self._closing:
                    self._lock.wait(IDLE_WAIT_S if resting else min(grace_s, IDLE_WAIT_S))

    def _load(self) -> tuple[int, int]:
        """(running, waiting). Sequences in the inbox wait; what a failed engine left in its slots does not run."""
        running = min(len(self._scheduler.running), len(self._open))
        return running, len(self._open) - running

    def _set_gauges(self) -> None:
        running, waiting = self._load()
        self.metrics.gauges(running=running, waiting=waiting)

    def _post(self, message: Callable[[], None]) -> None:
        """Hand work to the engine thread. The caller holds the lock."""
        self._inbox.append(message)
        self._lock.notify_all()

    def _read_inbox(self) -> bool:
        with self._lock:
            messages = list(self._inbox)
            self._inbox.clear()
        for message in messages:
            message()
        return bool(messages)

    def _admit(self, seq: Sequence) -> None:
        assert seq.slot is not None
        seq.admitted = self._clock()
        self._runner.admit(seq.slot, seq.prompt_ids, seq.params, seq.limit, seq.num_reused)
        self.metrics.prefilled(reused=seq.num_reused)

    def _take(self, seq: Sequence, out: StepOutput | RowFailed, *, decoding: bool) -> Took | None:
        """Add what a pass emitted to its sequence. Returns None where the sequence failed."""
        if isinstance(out, RowFailed):
            self._fail(seq, out.error())
            return None
        if out.failed:
            self._fail(seq, GenerationFailed("The model gave no finite numbers for this sequence."))
            return None
        if not decoding:
            seq.first_token = self._clock()
        try:
            took = seq.take(out, self._runner.eos_ids, decoding=decoding)
        except Exception as error:  # the tokenizer failed or the runner's result is odd: only this sequence fails
            log.warning("Sequence %s failed.", seq.id, exc_info=True)
            text = error.message if isinstance(error, GenerationFailed) else f"({type(error).__name__})"
            self._fail(seq, GenerationFailed(f"This sequence could not be continued: {text}"))
            return None
        if took.reason is not None:
            seq.finished = self._clock()
            completion = seq.completion(self._model_name, took.reason)
            self.metrics.finished(completion)
            self._end(seq, took.reason, took.delta(completion))
        elif self._codec is not None:
            self._deliveries.put(seq, took.delta())
        return took

    def _fail(self, seq: Sequence, error: MedusaServeError) -> None:
        self._end(seq, "error", Delta("", error=error), failed=True)

    def _end(self, seq: Sequence, outcome: Outcome, last: Delta | None = None, *, failed: bool = False) -> None:
        """End a sequence once and free its slot. A cancelled one gets nothing more: `deliver` drops its delta."""
        with self._lock:
            if self._open.pop(seq.id, None) is None:
                return
        self.metrics.ended(seq.cancelled or outcome)
        if last is not None:
            self._deliveries.put(seq, last)
        if seq.slot is not None:
            self._runner.free(seq.slot)
        self._scheduler.release(seq, failed=failed)

    def _end_all(self, message: str) -> None:
        self._read_inbox()  # so that the scheduler knows all of them
        for seq in list(self._open.values()):
            self._end(seq, "shutdown", Delta("", error=ShuttingDown(message)))

    def _drop(self, sink: Sink) -> None:
        """Cancel the sequences of a sink that raised."""
        with self._lock:
            mine = [id for id, seq in self._open.items() if seq.sink == sink]
        for id in mine:
            self.cancel(id)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _shut(self) -> None:
        """End what is open, deliver, close the runner once. Runs on the engine thread, or when that has ended."""
        self._end_all("The server is shutting down.")
        self._deliveries.deliver()
        with self._lock:
            self._set_gauges()
            first, self._runner_closed = not self._runner_closed, True
        if first:
            self._runner.close()

    def recover(self, error: BaseException) -> bool:
        """After an error in the engine itself: end every open sequence and start again with free slots.

        Returns False where that cannot help: the engine has failed. Runs on the engine thread."""
        log.critical("The engine met an error.", exc_info=error)
        with self._lock:
            self._failure = self._restarts.refusal(error)
            self._restarting = self._failure is None
            self._inbox.clear()
        try:
            self._deliveries.deliver()  # the sequences that ended before the error
        except BaseException:
            log.exception("Deltas that waited for delivery are lost.")
        last = EngineRestarting("The engine met an error and starts again; send the request again.")
        self._abandon(last if self._failure is None else EngineDead(self._failure), "error")
        if self._restarting:
            try:
                self._renew()
            except BaseException as second:
                log.critical("The engine cannot start again.", exc_info=second)
                with self._lock:
                    self._failure = f"The engine could not start again after an error ({type(second).__name__})."
                    self._restarting = False
        return self._failure is None

    def _renew(self) -> None:
        """Start from nothing: no sequence runs or waits, all slots are free."""
        self._deliveries.clear()
        self._runner.reset()
        self._scheduler = Scheduler(self._runner, self._config.prefill_chunk)
        self._in_flight = InFlight(self._runner, self._scheduler, self.metrics, self._clock, self._take)
        with self._lock:
            self._restarting = False
            self._heartbeat.end()
            self._set_gauges()
        self.metrics.restarted()

    def _abandon(self, error: MedusaServeError, outcome: Outcome) -> None:
        """Give every open sequence its last delta without touching runner or scheduler."""
        with self._lock:
            seqs = list(self._open.values())
            self._open.clear()
            self._set_gauges()
            self._lock.notify_all()
        for seq in seqs:
            self.metrics.ended(seq.cancelled or outcome)
        deliver_last(seqs, Delta("", error=error))

    def _wait_until_empty(self, seconds: float) -> bool:
        """Wait until no sequence is open and all is delivered. Without an engine thread, run the steps here."""
        if self._thread is None:
            deadline = self._clock() + seconds
            while self._open and self._clock() < deadline:
                self.step()
            return not self._open
        with self._lock:
            return self._lock.wait_for(lambda: not (self._open or self._heartbeat.turning), seconds)
