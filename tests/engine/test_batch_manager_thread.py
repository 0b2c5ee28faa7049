"""The batch manager in its own thread: errors of the engine itself, hangs, the end, rests."""

from __future__ import annotations

import threading
import time

import pytest

from medusa_serve.engine import health
from medusa_serve.engine.batch_manager import BatchManager
from medusa_serve.errors import EngineDead, EngineRestarting, EngineStalled, ShuttingDown
from tests.engine.turns import CODEC, Engine, at_rest, overlaps, until
from tests.fakes import ManualClock

__all__ = ["overlaps"]


# ---- the thread ----------------------------------------------------------------------------------------------------


@pytest.fixture
def threaded():
    """Makes started engines with the real clock; closes them."""
    engines = []
    gate = threading.Event()

    def make(*, stall_s=60.0, close_s=5.0, config=None, **runner):
        engine = Engine(config=config, **runner)
        engine.manager = BatchManager(
            engine.runner, CODEC, engine.config, model_name="fake", stall_s=stall_s, close_s=close_s
        )
        engine.gate = gate
        engine.manager.start()
        engines.append(engine)
        return engine

    yield make
    gate.set()
    for engine in engines:
        engine.manager.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "medusa-engine"]


def test_many_threads_submit(threaded):
    engine = threaded(accept=(0, 3), config={"max_queue": 200})
    ids = {}

    def client(number):
        for n in range(10):
            prompt = f"client {number} asks {n}"
            ids[engine.submit(prompt, 12)] = prompt

    clients = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    engine.sink.wait(ids)
    for id, prompt in ids.items():
        assert list(engine.completion(id).token_ids) == engine.solo(prompt, 12)
    until(lambda: engine.count()["running"] == 0)
    at_rest(engine)
    assert engine.manager.status().state == "ok"


def test_cancel_storm(threaded):
    engine = threaded(config={"max_queue": 500}, sleep_s=0.002)
    ids = [engine.submit(f"{n}", 2000) for n in range(100)]
    for id in ids:
        engine.manager.cancel(id)
    canary = engine.submit("canary")
    engine.sink.wait([canary], 5)
    assert list(engine.completion(canary).token_ids) == engine.solo("canary")
    until(lambda: engine.count()["outcomes"]["cancelled"] == 100)
    at_rest(engine)


def test_start_twice_is_refused(threaded):
    engine = threaded()
    with pytest.raises(RuntimeError):
        engine.manager.start()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_engine_that_meets_an_error_tells_everybody_and_starts_again(threaded, error):
    def before(kind, slots):
        if kind == "decode" and not engine.runner.resets:
            engine.gate.wait(5)
            raise error

    engine = threaded(num_slots=2, before=before)
    ids = [engine.submit(f"{n}") for n in range(5)]
    cancelled = engine.submit("6")
    engine.manager.cancel(cancelled)
    engine.gate.set()
    engine.sink.wait(ids, 2)
    assert all(isinstance(engine.error(id), EngineRestarting) for id in ids)
    assert cancelled not in engine.sink.deltas
    until(lambda: engine.manager.status().state == "ok")
    figures = engine.count()
    assert (figures["outcomes"]["error"], figures["outcomes"]["cancelled"], figures["in_flight"]) == (5, 1, 0)
    assert (figures["restarts"], engine.runner.resets, engine.runner.closed) == (1, 1, 0)
    canary = engine.submit("canary")
    engine.sink.wait([canary])
    assert list(engine.completion(canary).token_ids) == engine.solo("canary")
    until(lambda: not engine.runner.slots)
    at_rest(engine)


def failed(engine):
    """The engine is gone for good, and says so to whoever comes."""
    until(lambda: engine.manager.status().state == "failed")
    with pytest.raises(EngineDead):
        engine.submit()
    assert engine.count()["in_flight"] == 0
    assert engine.runner.closed == 0
    engine.manager.close()
    assert engine.runner.closed == 1
    assert engine.manager.status().state == "closed"


@pytest.mark.parametrize("method", ["admit", "free"])
def test_an_engine_that_fails_again_and_again_is_the_end(threaded, method):
    engine = threaded()

    def broken(*args):
        assert engine.gate.wait(5)
        raise RuntimeError("bug")

    setattr(engine.runner, method, broken)
    engine.gate.set()
    for n in range(4):
        id = engine.submit()
        engine.sink.wait([id], 2)  # exactly one last delta, which Collector checks
        if method == "admit":  # else it was over already
            assert isinstance(engine.error(id), EngineDead if n == 3 else EngineRestarting)
        until(lambda n=n: engine.manager.status().state == ("failed" if n == 3 else "ok"))
    assert "RuntimeError" in engine.manager.status().message
    assert engine.runner.resets == 3
    failed(engine)


def test_an_engine_that_cannot_start_again_is_the_end(threaded):
    engine = threaded()

    def broken(*args):
        raise RuntimeError("bug")

    engine.runner.admit = engine.runner.reset = broken
    id = engine.submit()
    engine.sink.wait([id], 2)
    failed(engine)


@pytest.mark.parametrize("where", ["call", "alone"])
def test_a_device_error_that_lasts_is_the_end_at_once(threaded, where):
    """No row is tried alone, nothing starts again: every later call would fail too."""
    calls = []

    def before(kind, slots):
        if kind == "decode":
            engine.gate.wait(5)
            calls.append(slots)
            sticky = where == "call" or len(calls) > 1
            raise RuntimeError("CUDA error: device-side assert triggered" if sticky else "once")

    engine = threaded(num_slots=4, before=before)
    ids = [engine.submit(f"{n}") for n in range(6)]
    engine.gate.set()
    engine.sink.wait(ids, 2)
    assert all(isinstance(engine.error(id), EngineDead) for id in ids)
    assert "restart the runtime" in engine.error(ids[0]).message
    assert (len(calls), engine.runner.resets) == (1 if where == "call" else 2, 0)
    failed(engine)


def test_a_hang_is_stalled_until_it_ends(threaded):
    engine = threaded(stall_s=0.1)
    engine.runner.before = lambda kind, slots: engine.gate.wait(10)
    id = engine.submit()
    assert engine.manager.status().state == "ok"
    until(lambda: engine.manager.status().state == "stalled")
    assert "running for" in engine.manager.status().message
    assert not engine.manager.is_waiting(id)
    with pytest.raises(EngineStalled, match="Try again later"):
        engine.submit()
    engine.runner.activity = "compiling the step for 8 nodes"
    assert engine.manager.status().state == "ok"
    assert engine.manager.status().message == "compiling the step for 8 nodes"
    engine.runner.activity = None
    engine.gate.set()
    engine.sink.wait([id])
    until(lambda: engine.manager.status().state == "ok")


def test_a_slow_step_is_not_stalled(threaded):
    engine = threaded(stall_s=0.05, sleep_s=0.1)
    id = engine.submit(max_tokens=3)
    engine.sink.wait([id])
    engine.runner.sleep_s = 0.5
    id = engine.submit(max_tokens=2)
    while engine.sink.last(id) is None:
        assert engine.manager.status().state == "ok"  # older than stall_s, but not than 20 median steps
        time.sleep(0.02)


def test_no_heartbeat_is_stalled():
    engine = Engine()
    assert engine.manager.status().state == "ok"
    engine.clock.advance(11)
    assert engine.manager.status().state == "stalled"
    engine.manager.step()
    assert engine.manager.status().state == "ok"


def test_drain_lets_the_running_finish(threaded):
    engine = threaded(num_slots=1, sleep_s=0.005)
    ids = [engine.submit("a"), engine.submit("b")]
    assert engine.manager.drain(10) is True
    assert all(engine.completion(id) for id in ids)
    assert engine.manager.status().state == "draining"
    with pytest.raises(ShuttingDown):
        engine.submit()


@pytest.mark.parametrize("start", [True, False])
def test_drain_ends_what_is_left_after_the_grace(threaded, start):
    clock = ManualClock()
    engine = threaded(num_slots=1, sleep_s=0.005) if start else Engine(num_slots=1, clock=clock, decode_s=0.1)
    ids = [engine.submit("a", 2000), engine.submit("b", 2000)]
    assert engine.manager.drain(0.2) is False
    assert all(isinstance(engine.error(id), ShuttingDown) for id in ids)
    assert engine.count()["outcomes"]["shutdown"] == 2
    at_rest(engine)


def test_close_ends_everything_once(threaded):
    engine = threaded(num_slots=1, sleep_s=0.005)
    ids = [engine.submit(f"{n}", 2000) for n in range(4)]
    closers = [threading.Thread(target=engine.manager.close) for _ in range(3)]
    for thread in closers:
        thread.start()
    for thread in closers:
        thread.join()
    engine.manager.close()
    assert all(isinstance(engine.error(id), ShuttingDown) for id in ids)
    assert engine.runner.closed == 1
    assert engine.manager.status().state == "closed"
    with pytest.raises(ShuttingDown):
        engine.submit()
    at_rest(engine)


def test_close_from_a_sink(threaded):
    engine = threaded()
    got = []

    def sink(pairs):
        got.extend(pairs)
        engine.manager.close()

    engine.submit("a", 2000, sink=sink)
    until(lambda: engine.runner.closed == 1)
    assert [delta.is_last for _, delta in got] == [False, True]


def test_close_without_start():
    engine = Engine()
    id = engine.submit()
    engine.manager.close()
    assert isinstance(engine.error(id), ShuttingDown)
    assert engine.runner.closed == 1
    with pytest.raises(RuntimeError):
        engine.manager.start()


def test_close_does_not_wait_for_a_hang(threaded):
    engine = threaded(overlaps=False, close_s=0.1, before=lambda kind, slots: kind == "decode" and engine.gate.wait(10))
    id = engine.submit()
    until(lambda: engine.sink.deltas)
    engine.manager.close()
    assert isinstance(engine.error(id), ShuttingDown)
    assert engine.runner.closed == 0  # not under the hands of a running step
    engine.gate.set()
    until(lambda: engine.runner.closed == 1)
    assert isinstance(engine.error(id), ShuttingDown)  # nothing came after it


def test_the_runner_rests_once_when_nothing_is_left(threaded):
    engine = threaded()
    until(lambda: engine.runner.rests == 1)  # at the start
    for count in (2, 3):
        engine.submit()
        until(lambda count=count: engine.runner.rests == count)
    time.sleep(0.2)  # idle turns of the loop
    assert engine.runner.rests == 3


def test_a_runner_with_more_to_do_rests_again_until_there_is_work(threaded):
    engine = threaded(rests_wanted=5)
    assert engine.manager.wait_until_rested(10)
    assert engine.runner.rests == 5
    time.sleep(0.2)
    assert engine.runner.rests == 5
    engine.submit()
    assert engine.manager.wait_until_rested(10)
    assert engine.runner.rests == 6


def test_a_runner_that_never_has_rested_enough_is_not_waited_for(threaded):
    engine = threaded(rests_wanted=10**9)
    assert not engine.manager.wait_until_rested(0.05)
    id = engine.submit(max_tokens=3)
    until(lambda: engine.sink.last(id) is not None)


def test_the_runner_rests_only_when_nothing_has_come_for_a_while(threaded):
    """What it then does may keep the next request of the same person waiting."""
    engine = threaded(grace_s=0.4, rests_wanted=3)
    assert not engine.manager.wait_until_rested(0.1)
    for _ in range(4):
        id = engine.submit(max_tokens=3)
        until(lambda id=id: engine.sink.last(id) is not None)
        time.sleep(0.15)
        assert engine.runner.rests == 0
    assert engine.manager.wait_until_rested(10)
    assert engine.runner.rests == 3
    engine.submit(max_tokens=3)
    assert engine.manager.wait_until_rested(10), "and it is waited for again"
    assert engine.runner.rests == 4


def test_who_comes_during_a_long_part_of_a_rest_waits_and_is_not_refused(threaded, monkeypatch):
    monkeypatch.setattr(health, "HEARTBEAT_S", 0.1)
    engine, ids = threaded(grace_s=0.05), []
    rest = engine.runner.rest

    def slow():
        engine.runner.activity = "compiling"
        time.sleep(0.4)
        engine.runner.activity = None
        return rest()

    engine.runner.rest = slow
    for _ in range(3):
        ids.append(engine.submit(max_tokens=3))
        until(lambda: engine.runner.activity is not None)
        while engine.runner.activity is not None:
            ids.append(engine.submit(max_tokens=1))
            time.sleep(0.02)
        ids += [engine.submit(max_tokens=1) for _ in range(20)]  # just after it
    assert len(ids) > 3 * 30
    engine.sink.wait(ids)


def test_who_comes_between_two_parts_of_a_rest_is_answered_before_the_next(threaded):
    engine, seen = threaded(rests_wanted=10**9), []
    rest = engine.runner.rest

    def slow():
        seen.append(len(engine.runner.calls))
        time.sleep(0.05)
        return rest()

    engine.runner.rest = slow
    until(lambda: len(seen) > 1)
    id, before = engine.submit(max_tokens=30), len(seen)
    until(lambda: engine.sink.last(id) is not None)
    assert len(seen) - before <= 1, "the part under way, and no more until it was answered"


def test_times_that_come_while_idle_are_used():
    engine = Engine(accept=(0,), has_heads=True, expected=(1.0, 1.8, 2.2, 2.6))
    engine.submit("Hello", 200)
    engine.run()
    assert {call[2] for call in engine.runner.calls if call[0] == "decode"} == {engine.runner.node_choices[-1]}
    engine.runner.step_ms = {(1, nodes): float(nodes) for nodes in engine.runner.node_choices}
    engine.runner.calls.clear()
    engine.submit("World", 200)
    engine.run()
    sizes = [call[2] for call in engine.runner.calls if call[0] == "decode"]
    assert sizes.count(1) > 0.8 * len(sizes), "nothing is accepted, and every node costs"
    at_rest(engine)
