"""A Hypothesis state machine over the batch manager: submit, cancel, read, stall, fail, drain in any order. Each
accepted sequence gets exactly one last word, whole answers are what it says alone, and no slot is lost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from medusa_serve.config import EngineConfig
from medusa_serve.engine.batch_manager import BatchManager
from medusa_serve.errors import EngineRestarting, EngineStalled, GenerationFailed, OutOfMemory, QueueFull, ShuttingDown
from medusa_serve.types import SamplingParams

from ..fakes import BOS, Collector, FakeCodec, FakeRunner, ManualClock

CODEC, POISON, NAN = FakeCodec(), ord("!"), ord("?")


class OutOfMemoryError(RuntimeError):
    """By the name that torch gives it."""


class Machine(RuleBasedStateMachine):
    """The test is the engine thread."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.runner = FakeRunner(num_slots=3, accept=(0, 2, 1), poison=POISON, nan=NAN, clock=self.clock, decode_s=0.01)
        self.runner.before = self.before
        self.manager = BatchManager(
            self.runner, CODEC, EngineConfig(max_queue=3), model_name="fake", clock=self.clock, stall_s=60
        )
        self.sink = Collector()
        self.want: dict[str, list[int]] = {}
        self.bad: set[str] = set()
        self.cancelled: set[str] = set()
        self.next_call: str | None = None
        self.restarts = 0
        self.draining = False
        self.reads = 0

    def before(self, kind: str, slots: list[int]) -> None:
        fault, self.next_call = self.next_call, None
        if fault == "stall":
            self.clock.advance(61)
            assert self.manager.status().state == "stalled"
            with pytest.raises(ShuttingDown if self.draining else EngineStalled):
                self.submit_now([BOS, 97], 3)
        elif fault == "memory":
            raise OutOfMemoryError("CUDA out of memory")
        elif fault == "engine":
            raise SystemExit

    def submit_now(self, prompt: list[int], max_tokens: int, **params: Any) -> str:
        return self.manager.submit(prompt, SamplingParams(max_tokens=max_tokens, **params), self.sink)

    # ---- what may happen --------------------------------------------------------------------------------------------

    @rule(
        text=st.text("abc", max_size=40),
        max_tokens=st.integers(1, 20),
        mark=st.sampled_from([None, None, None, POISON, NAN]),
        speculation=st.booleans(),
    )
    def submit(self, text: str, max_tokens: int, mark: int | None, speculation: bool) -> None:
        self._submit(text, max_tokens, mark, speculation)

    def _submit(self, text: str, max_tokens: int, mark: int | None, speculation: bool) -> None:
        prompt = [BOS, *([] if mark is None else [mark]), *text.encode()]
        full = len(self.manager._open) >= 6
        try:
            id = self.submit_now(prompt, max_tokens, speculation=speculation)
        except QueueFull:
            assert full
        except ShuttingDown:
            assert self.draining
        else:
            assert not full
            assert not self.draining
            self.want[id] = self.runner.solo(prompt, SamplingParams(), max_tokens)
            if mark is not None:
                self.bad.add(id)

    @rule(texts=st.lists(st.text("abc", max_size=20), min_size=2, max_size=4), max_tokens=st.integers(4, 25))
    def submit_some(self, texts: list[str], max_tokens: int) -> None:
        for text in texts:
            self._submit(text, max_tokens, None, True)

    @precondition(lambda self: self.want)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        id = list(self.want)[data.draw(st.integers(0, len(self.want) - 1))]
        if id in self.manager._open:
            self.cancelled.add(id)
        self.manager.cancel(id, data.draw(st.sampled_from(["cancelled", "timeout"])))

    @rule(turns=st.integers(1, 8))
    def read(self, turns: int) -> None:
        """The engine turns, and its deltas arrive."""
        self.reads += 1
        for _ in range(turns):
            try:
                self.manager.step()
            except SystemExit as error:
                again = self.manager.recover(error)
                self.restarts += 1
                if not again:
                    raise RuntimeError("It did not start again.") from None

    @rule(fault=st.sampled_from(["stall", "memory"]))
    def fail(self, fault: str) -> None:
        self.next_call = fault

    @precondition(lambda self: self.restarts < 3)
    @rule()
    def fail_as_a_whole(self) -> None:
        self.next_call = "engine"

    @precondition(lambda self: self.reads >= 6)  # else most runs would be over before they began
    @rule()
    def drain(self) -> None:
        """The last act: what is not over in time is ended."""
        self.next_call, self.draining = None, True
        self.manager.drain(0.05)
        assert not self.manager._open

    # ---- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def every_accepted_sequence_is_open_or_has_ended_once(self) -> None:
        figures = self.manager.metrics.snapshot()
        assert (
            figures["accepted_requests"] == len(self.want) == sum(figures["outcomes"].values()) + figures["in_flight"]
        )
        assert figures["in_flight"] == len(self.manager._open)
        for id, ids in self.want.items():
            last = self.sink.last(id) if id in self.sink.deltas else None  # `last` refuses a second one
            if id in self.manager._open or id in self.cancelled:
                assert last is None
            else:
                self.check_last(id, last, ids)

    def check_last(self, id: str, last: Any, ids: list[int]) -> None:
        assert last is not None, "an accepted sequence was forgotten"
        if last.completion is not None:
            assert id not in self.bad
            assert list(last.completion.token_ids) == ids
            assert self.sink.text(id) == last.completion.text
        elif isinstance(last.error, GenerationFailed):
            assert id in self.bad
        else:
            assert isinstance(last.error, EngineRestarting | OutOfMemory | ShuttingDown)

    @invariant()
    def slots_have_one_owner(self) -> None:
        self.manager._scheduler.audit()
        owners = Counter(seq.id for seq in self.manager._scheduler.running.values())
        assert not owners or max(owners.values()) == 1
        assert set(self.runner.slots) <= set(self.manager._scheduler.running)

    def teardown(self) -> None:
        self.next_call = None
        for _ in range(500):
            if not self.manager.step():
                break
        assert not self.manager._open
        self.every_accepted_sequence_is_open_or_has_ended_once()
        assert self.runner.slots == {}
        self.manager.close()


def run(examples: int, steps: int, *, shrink: bool = True) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
    )
    run_state_machine_as_test(Machine, settings=chosen)


def test_any_order_of_events() -> None:
    run(40, 40)


@pytest.mark.server
def test_any_order_of_events_many_times() -> None:
    run(400, 60)


@pytest.mark.slow
def test_any_order_of_events_by_the_thousands() -> None:
    run(2000, 60)
