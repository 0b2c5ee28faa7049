"""A batch manager over a scripted runner whose turns the test takes itself."""

from __future__ import annotations

import time

import pytest

from medusa_serve.config import EngineConfig
from medusa_serve.engine.batch_manager import BatchManager
from medusa_serve.types import SamplingParams
from tests.fakes import Collector, FakeCodec, FakeRunner, ManualClock

CODEC = FakeCodec()
POISON, NAN = 1, 2


class Engine:
    """A batch manager whose turns the test takes itself, with the figures checked at the end."""

    overlaps = False  # as a CPU does; on a GPU, steps are read one turn later

    def __init__(self, *, config=None, clock=None, **runner):
        self.runner = FakeRunner(clock=clock, **({"overlaps": self.overlaps} | runner))
        self.config = EngineConfig(**(config or {}))
        self.clock = clock or ManualClock()
        self.manager = BatchManager(
            self.runner, CODEC, self.config, model_name="fake", clock=self.clock, stall_s=60, close_s=5
        )
        self.sink = Collector()

    def submit(self, prompt="Hello", max_tokens=10, sink=None, key="", **params):
        ids = CODEC.encode(prompt) if isinstance(prompt, str) else prompt
        sink = self.sink if sink is None else sink
        return self.manager.submit(ids, SamplingParams(max_tokens=max_tokens, **params), sink, key=key)

    def run(self, turns=10_000):
        for _ in range(turns):
            if not self.manager.step():
                return
        raise AssertionError(f"still busy after {turns} turns")

    def solo(self, prompt, max_tokens=10, **params):
        ids = CODEC.encode(prompt) if isinstance(prompt, str) else prompt
        return self.runner.solo(ids, SamplingParams(max_tokens=max_tokens, **params), max_tokens)

    def completion(self, id):
        last = self.sink.last(id)
        assert last is not None
        assert last.completion is not None, last.error
        return last.completion

    def error(self, id):
        last = self.sink.last(id)
        assert last is not None
        return last.error

    def count(self):
        return self.manager.metrics.snapshot()


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "one step behind"])
def overlaps(request, monkeypatch):
    monkeypatch.setattr(Engine, "overlaps", request.param)
    return request.param


def at_rest(engine):
    """The invariants of a manager that has nothing to do."""
    engine.manager._scheduler.audit()
    figures = engine.count()
    assert figures["accepted_requests"] == sum(figures["outcomes"].values())
    assert (figures["in_flight"], figures["running"], figures["waiting"]) == (0, 0, 0)
    assert engine.runner.slots == {}


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)
