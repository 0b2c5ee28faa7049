"""The batch manager: one thread, one inbox, one `step()`. Sequences in, deltas out."""

from __future__ import annotations

import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from dataclasses import replace
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
from .deliveries import Outbox, tell_all
from .detokenizer import Detokenizer, Silent
from .in_flight import Flights
from .metrics import Metrics, Outcome
from .pulse import Pulse, refuse_unless_ok
from .quiet_log import QuietLogger
from .restarts import Restarts
from .row_retry import RowFailed
from .scheduler import Scheduler
from .sequence import Sequence, Took, token_limit

log = QuietLogger(__name__)

IDLE_WAIT_S = 0.5  # the loop shows a heartbeat at least this often


class BatchManager:
    """Runs sequences through a runner, many at a time.

    Promises:
    - `submit` raises at once in the caller's thread, or the sequence is accepted and gets exactly one last Delta
      (completion or error), unless it is cancelled: then nothing more.
    - Each sink is called once per step at most, on the engine thread, with everything new of its sequences.
    - A sequence that makes the runner fail ends alone; a sink that raises ends its own sequences.
    - When the engine itself meets an error, every open sequence gets EngineRestarting and it starts again; where that
      cannot help, EngineDead.

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
        """codec: None runs on ids alone: no text, no stop strings, and only last Deltas (for many answers at once) ·
        stall_s: no step is called stalled before this age. close_s: `close` waits for a step at most this long."""
        self.metrics = Metrics(slots=runner.num_slots)
        self._runner, self._codec, self._config, self._model_name = runner, codec, config, model_name
        self._clock, self._close_s = clock, close_s
        self._pulse = Pulse(clock, stall_s)
        self._scheduler = Scheduler(runner, config.prefill_chunk)
        self._lock = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._open: dict[str, Sequence] = {}  # accepted, not ended; whoever pops a sequence owes its last delta
        self._flights = Flights(runner, self._scheduler, self.metrics, clock, self._take)
        self._outbox = Outbox(self.metrics, clock, is_open=self._open.__contains__, drop=self._drop)
        self._thread: threading.Thread | None = None
        self._draining = self._closing = self._runner_closed = self._rested = False
        self._restarts = Restarts(clock)
        self._restarting = False
        self._death: str | None = None

    # ---- any thread ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread. Raises RuntimeError the second time, and after `close`."""
        with self._lock:
            if self._thread is not None or self._closing:
                raise RuntimeError("The engine was started or closed before.")
            self._thread = threading.Thread(target=self._run, name="medusa-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt_ids: Seq[int], params: SamplingParams, sink: Sink, *, key: str = "") -> str:
        """Accept a sequence and return its id. `key` says whose it is: KV prefixes are shared only within one key.

        Raises InvalidRequest, ContextTooLong, QueueFull, ShuttingDown, EngineStalled, EngineRestarting or EngineDead.
        """
        if not isinstance(sink, Hashable):
            raise TypeError("The sink must be hashable: deltas are grouped by it.")
        if self._codec is None and params.stop:
            raise InvalidRequest("An engine that runs on ids alone knows no stop strings.", param="stop")
        prompt = tuple(prompt_ids)
        limit = token_limit(prompt, params, max_context=self._runner.max_context, vocab_size=self._runner.vocab_size)
        if params.seed is None:
            params = replace(params, seed=secrets.randbelow(2**53))  # a JSON number holds it exactly
        text = Silent() if self._codec is None else Detokenizer(self._codec, params.stop, self._runner.eos_ids)
        seq = Sequence(f"gen-{uuid.uuid4().hex}", prompt, params, limit, sink, text, key)
        seq.submitted = self._clock()
        with self._lock:
            refuse_unless_ok(self.status())
            # Those that find a slot in the next step do not wait, so this many are open before the queue is full.
            if len(self._open) >= self._runner.num_slots + self._config.max_queue:
                raise QueueFull(f"{self._config.max_queue} sequences wait already; try again later.")
            self._open[seq.id] = seq
            self.metrics.submitted()
            self._set_gauges()
            self._post(lambda: self._scheduler.add(seq))
        return seq.id

    def is_waiting(self, id: str) -> bool:
        """Accepted, and without a slot so far."""
        seq = self._open.get(id)
        return seq is not None and seq.slot is None

    def limits(self) -> dict[str, Any]:
        """Those of the engine, as plain data."""
        slots, config = self._runner.num_slots, self._config
        sizes = {"slots": slots, "max_queue": config.max_queue, "prefill_chunk": config.prefill_chunk}
        return {**sizes, "stall_s": self._pulse.stall_s}

    def cancel(self, id: str, outcome: Outcome = "cancelled") -> None:
        """End a sequence without a last delta; its slot is free within two steps. Unknown and ended ids are fine.
        outcome: as it is counted.

        No delta is delivered after this returns, except by a call of the sink that is under way.
        """
        with self._lock:
            seq = self._open.get(id)
            if seq is not None and not seq.cancelled:
                seq.cancelled = outcome
                self._post(lambda: self._end(seq, outcome))

    def status(self) -> EngineStatus:
        """Where the engine stands; cheap, never waits for a step."""
        activity, thread = self._runner.activity, self._thread
        gone = thread is not None and thread.ident is not None and not thread.is_alive()
        running, waiting = self._load()
        told = partial(EngineStatus, running=running, waiting=waiting, heartbeat_age_s=self._pulse.age_s())
        if self._closing:
            return told("closed", message=self._death)
        if gone or self._death is not None:
            return told("failed", message=self._death or "The engine thread is gone.")
        if self._restarting:
            return told("restarting", message="The engine starts again after an error.")
        trouble = self._pulse.trouble(lambda: self.metrics.median_turn_s) if activity is None else None
        if trouble is not None:
            return told("stalled", message=trouble)
        return told("draining" if self._draining else "ok", message=activity)

    def drain(self, grace_s: float) -> bool:
        """Refuse new sequences and let the accepted ones finish; after `grace_s` those left get ShuttingDown.

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
        """Wait until the engine idles and has done ahead what it can (a GPU's compiled layers, captures); → whether it
        has."""
        with self._lock:
            return self._lock.wait_for(lambda: self._rested and not self._open, seconds)

    def close(self) -> None:
        """End every open sequence with ShuttingDown, stop the thread, close the runner. Any thread, any number of
        times.

        A step that hangs is waited for `close_s` at most; then the sequences are ended from here, and the runner
        is closed by the engine thread when it comes back.
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
                log.warning("The engine thread does not end; its sequences are ended without it.")
                self._abandon(ShuttingDown("The server is shutting down."), "shutdown")
                return
        self._shut()

    # ---- the engine thread -----------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One turn: inbox, admission, a prefill chunk, a decode step, delivery. False when there was nothing to do."""
        started = self._pulse.begin()
        try:
            busy = self._read_inbox()
            while (seq := self._scheduler.admit()) is not None:
                self._admit(seq)
            plan = self._scheduler.plan()
            before = len(self._flights)
            self._flights.prefill(plan.prefill)
            self._flights.decode(plan.decode, plan.nodes)
            if plan.decode:
                self.metrics.planned(plan.nodes)
            landed = self._flights.land(before)  # the turn before this one, while the device is busy
            self._outbox.deliver()
            turned = bool(plan.prefill or plan.decode or landed)
            if turned:
                self.metrics.turn(self._clock() - started)
            elif not busy:
                self._scheduler.audit()
            return busy or turned
        finally:
            with self._lock:
                self._pulse.end()
                self._set_gauges()
                self._lock.notify_all()

    def _run(self) -> None:
        again = True
        while again:
            try:
                self._turn_until_closed()
                return self._shut()
            except BaseException as error:  # SystemExit and KeyboardInterrupt too: nobody else would hear of them
                again = self.recover(error)

    def _turn_until_closed(self) -> None:
        resting, worked = False, self._clock()
        while not self._closing:
            if self.step():
                resting, self._rested, worked = False, False, self._clock()
                continue
            grace_s = worked + self._runner.grace_s - self._clock()
            if not resting and grace_s <= 0:
                self._pulse.begin()  # a part of what is done then may take longer than a heartbeat
                try:
                    resting = not self._runner.rest()
                finally:
                    self._pulse.end()
            with self._lock:
                self._rested = resting
                self._lock.notify_all()
                if (resting or grace_s > 0) and not self._inbox and not self._closing:
                    self._lock.wait(IDLE_WAIT_S if resting else min(grace_s, IDLE_WAIT_S))

    def _load(self) -> tuple[int, int]:
        """(running, waiting). Sequences still in the inbox wait; what a dead engine left in its slots does not run."""
        num_open = len(self._open)
        running = min(len(self._scheduler.running), num_open)
        return running, num_open - running

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
        """What a pass emitted for one sequence: text, the end; None where it failed."""
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
        except Exception as error:  # the tokenizer failed on these ids, or the runner's word is odd: this sequence only
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
            self._outbox.put(seq, took.delta())
        return took

    def _fail(self, seq: Sequence, error: MedusaServeError) -> None:
        self._end(seq, "error", Delta("", error=error), failed=True)

    def _end(self, seq: Sequence, outcome: Outcome, last: Delta | None = None, *, failed: bool = False) -> None:
        """End a sequence once and give its slot back. A cancelled one gets nothing more: `_deliver` drops its delta."""
        with self._lock:
            if self._open.pop(seq.id, None) is None:
                return
        self.metrics.ended(seq.cancelled or outcome)
        if last is not None:
            self._outbox.put(seq, last)
        if seq.slot is not None:
            self._runner.free(seq.slot)
        self._scheduler.release(seq, failed=failed)

    def _end_all(self, message: str) -> None:
        self._read_inbox()  # so that the scheduler knows all of them
        for seq in list(self._open.values()):
            self._end(seq, "shutdown", Delta("", error=ShuttingDown(message)))

    def _drop(self, sink: Sink) -> None:
        """A sink that raises loses its sequences."""
        with self._lock:
            mine = [id for id, seq in self._open.items() if seq.sink == sink]
        for id in mine:
            self.cancel(id)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _shut(self) -> None:
        """End what is open, deliver, close the runner once. On the engine thread, or when there is none any more."""
        self._end_all("The server is shutting down.")
        self._outbox.deliver()
        with self._lock:
            self._set_gauges()
            first, self._runner_closed = not self._runner_closed, True
        if first:
            self._runner.close()

    def recover(self, error: BaseException) -> bool:
        """After an error in the engine itself: every open sequence is told, and the engine starts again with free
        slots; → False where that cannot help: it is dead. The engine thread's."""
        log.critical("The engine met an error.", exc_info=error)
        with self._lock:
            self._death = self._restarts.refusal(error)
            self._restarting = self._death is None
            self._inbox.clear()
        try:
            self._outbox.deliver()  # what ended before
        except BaseException:
            log.exception("What was there to deliver is lost.")
        last = EngineRestarting("The engine met an error and starts again; send the request again.")
        self._abandon(last if self._death is None else EngineDead(self._death), "error")
        if self._restarting:
            try:
                self._renew()
            except BaseException as second:
                log.critical("The engine cannot start again.", exc_info=second)
                with self._lock:
                    self._death = f"The engine could not start again after an error ({type(second).__name__})."
                    self._restarting = False
        return self._death is None

    def _renew(self) -> None:
        """Nothing runs, nothing waits, all slots are free."""
        self._outbox.clear()
        self._runner.reset()
        self._scheduler = Scheduler(self._runner, self._config.prefill_chunk)
        self._flights = Flights(self._runner, self._scheduler, self.metrics, self._clock, self._take)
        with self._lock:
            self._restarting = False
            self._pulse.end()
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
        tell_all(seqs, Delta("", error=error))

    def _wait_until_empty(self, seconds: float) -> bool:
        """Wait until no sequence is open and all was delivered; without a thread, take the turns here."""
        if self._thread is None:
            deadline = self._clock() + seconds
            while self._open and self._clock() < deadline:
                self.step()
            return not self._open
        with self._lock:
            return self._lock.wait_for(lambda: not (self._open or self._pulse.turning), seconds)
