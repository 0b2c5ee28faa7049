"""The batch manager over a scripted runner: python -m pytest tests/engine/test_batch_manager.py"""

from __future__ import annotations

import random
import threading
import time

import pytest

from medusa_serve.config import EngineConfig
from medusa_serve.engine.batch_manager import BatchManager
from medusa_serve.errors import (
    ContextTooLong,
    EngineDead,
    EngineRestarting,
    EngineStalled,
    GenerationFailed,
    InvalidRequest,
    QueueFull,
    ShuttingDown,
)
from medusa_serve.types import SamplingParams
from tests.fakes import BOS, EOS, FIRST_WORD, Collector, FakeCodec, FakeRunner, ManualClock

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


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accept", "settled"), [((0,), 1), ((2,), 4), ((9, 11), 16)])
def test_the_node_budget_follows_what_is_accepted(accept, settled):
    """Steps that take 10, 12, 14 and 16 ms: 1, 3 or 11 tokens of them decide, and the text never changes."""
    clock, ms = ManualClock(), {1: 10.0, 4: 12.0, 8: 14.0, 16: 16.0}
    times = {(rows, nodes): each for rows in (1, 4) for nodes, each in ms.items()}
    engine = Engine(accept=accept, clock=clock, has_heads=True, step_ms=times, expected=(1.0, 1.8, 2.2, 2.6))
    engine.runner.before = lambda kind, slots: clock.advance(
        ms[engine.runner.calls[-1][2]] / 1000 if kind == "decode" else 0.0
    )
    id = engine.submit("Hello", 3000)
    plain = engine.submit("World", 3000, speculation=False)
    engine.run()
    assert list(engine.completion(id).token_ids) == engine.solo("Hello", 3000)
    assert list(engine.completion(plain).token_ids) == engine.solo("World", 3000)
    together = [call[2] for call in engine.runner.calls if call[0] == "decode" and len(call[1]) == 2]
    late = together[len(together) // 2 :]
    assert late.count(settled) > 0.8 * len(late)
    at_rest(engine)


@pytest.mark.parametrize("accept", [(0,), (3,), (15,), (0, 2, 1, 7)])
def test_alone(accept):
    engine = Engine(accept=accept)
    id = engine.submit("Hello", 20)
    engine.run()
    done = engine.completion(id)
    assert list(done.token_ids) == engine.solo("Hello", 20) == engine.sink.token_ids(id)
    assert done.text == CODEC.decode(done.token_ids) == engine.sink.text(id)
    assert (done.id, done.model, done.finish_reason) == (id, "fake", "length")
    assert (done.prompt_tokens, done.completion_tokens) == (6, 20)
    deltas = engine.sink.deltas[id]
    assert sum(n for d in deltas for n in d.tokens) == 20
    assert (deltas[0].tokens, deltas[0].accepted) == ((1,), (0,))
    assert done.steps == len(deltas) - 1
    assert done.accepted == sum(n for d in deltas for n in d.accepted) == 19 - done.steps
    at_rest(engine)


def test_joining_and_leaving_equals_solo():
    rng = random.Random(7)
    for _ in range(15):
        engine = Engine(num_slots=rng.randint(1, 4), accept=[rng.randint(0, 5) for _ in range(7)], row_budget=32)
        engine.runner.can_reuse = rng.random() < 0.7
        want = {}
        while len(want) < 12 or engine.manager.step():
            if len(want) < 12:
                prompt = "System prompt, shared. " * rng.randint(0, 2) + "x" * rng.randint(1, 60)
                params = {"temperature": rng.choice([0.0, 1.0]), "seed": 5, "speculation": rng.random() < 0.7}
                id = engine.submit(prompt, rng.randint(1, 30), key=rng.choice("ab"), **params)
                want[id] = engine.solo(prompt, engine.manager._open[id].params.max_tokens, **params)
                for _ in range(rng.randint(0, 9)):
                    engine.manager.step()
        for id, ids in want.items():
            assert list(engine.completion(id).token_ids) == ids
            assert engine.sink.text(id) == engine.completion(id).text == CODEC.decode(ids)
        at_rest(engine)


def test_on_ids_alone():
    """Without a codec: the same ids, and nothing but last deltas."""
    engine = Engine(accept=(3,))
    engine.manager = BatchManager(engine.runner, None, engine.config, model_name="fake", clock=engine.clock)
    ids = [engine.submit("Hello", 20), engine.submit("You", 7)]
    with pytest.raises(InvalidRequest, match="stop strings"):
        engine.submit("Hello", stop=("x",))
    engine.run()
    for id, (prompt, tokens) in zip(ids, (("Hello", 20), ("You", 7)), strict=True):
        assert len(engine.sink.deltas[id]) == 1
        assert list(engine.completion(id).token_ids) == engine.solo(prompt, tokens)
        assert engine.completion(id).text == ""
    at_rest(engine)


def test_each_sink_is_called_once_a_step():
    engine = Engine()
    other = Collector()
    ids = [engine.submit("a"), engine.submit("b"), engine.submit("c", sink=other)]
    while len(engine.sink.deltas) < 2 or not other.deltas:
        engine.manager.step()
    before = engine.sink.calls, other.calls
    engine.manager.step()
    assert (engine.sink.calls, other.calls) == (before[0] + 1, before[1] + 1)
    engine.run()
    assert all((engine.sink.last(id) or other.last(id)).completion for id in ids)


def test_seed_is_drawn_and_reported():
    engine = Engine()
    a, b, c = engine.submit(temperature=1.0), engine.submit(temperature=1.0), engine.submit(seed=9)
    engine.run()
    seeds = [engine.completion(id).seed for id in (a, b, c)]
    assert seeds[2] == 9
    assert 0 <= seeds[0] < 2**53
    assert seeds[0] != seeds[1]
    again = engine.submit(temperature=1.0, seed=seeds[0])
    engine.run()
    assert engine.completion(again).token_ids == engine.completion(a).token_ids


def test_eos_as_the_first_token():
    engine = Engine(reply=[])
    id = engine.submit()
    engine.run()
    done = engine.completion(id)
    assert (done.text, done.token_ids, done.finish_reason, done.steps) == ("", (EOS,), "stop", 0)
    assert done.acceptance is None
    assert done.tokens_per_second is None


def test_eos_inside_a_path_and_ignored():
    engine = Engine(reply=[97, 98, EOS, 99], accept=(15,))
    stopping, ignoring = engine.submit(), engine.submit(max_tokens=4, ignore_eos=True)
    engine.run()
    assert engine.completion(stopping).token_ids == (97, 98, EOS)
    assert engine.completion(stopping).text == "ab"
    assert engine.completion(stopping).finish_reason == "stop"
    assert engine.completion(ignoring).token_ids == (97, 98, EOS, 99)
    assert engine.completion(ignoring).text == "abc"
    assert engine.completion(ignoring).finish_reason == "length"


def test_max_tokens_of_one():
    engine = Engine(accept=(15,), overlaps=False)
    id = engine.submit(max_tokens=1)
    engine.run()
    assert engine.completion(id).completion_tokens == 1
    assert engine.completion(id).finish_reason == "length"
    assert not any(call[0] == "decode" for call in engine.runner.calls)


def test_limit_inside_a_path_and_at_the_context():
    engine = Engine(accept=(7,), max_context=30)
    inside, default = engine.submit("abc", 6), engine.submit("abc", None)
    engine.run()
    assert list(engine.completion(inside).token_ids) == engine.solo("abc", 6)
    assert engine.completion(default).completion_tokens == 26
    assert engine.completion(default).finish_reason == "length"
    at_rest(engine)


def test_stop_string_inside_a_path():
    reply = list(b"one END two three")
    engine = Engine(reply=reply, accept=(15,), row_budget=64)
    plain, stopping = engine.submit(max_tokens=17), engine.submit(max_tokens=17, stop=("END",))
    engine.run()
    done = engine.completion(stopping)
    assert (done.text, bytes(done.token_ids), done.finish_reason) == ("one ", b"one END", "stop")
    assert engine.sink.text(stopping) == "one "
    assert (done.completion_tokens, done.steps, done.accepted) == (7, 1, 6)  # delivered draft tokens only
    assert engine.completion(plain).text == "one END two three"
    assert engine.count()["accepted"] == 6 + engine.completion(plain).accepted


def test_a_slot_cut_by_a_stop_string_is_reused_safely():
    engine = Engine(num_slots=1, accept=(7,))
    prompt = "p" * 20
    first = engine.solo(prompt, 12)
    word = CODEC.decode(first[3:4])
    id = engine.submit(prompt, 12, stop=(word,))
    engine.run()
    again = [*CODEC.encode(prompt), *engine.completion(id).token_ids, 65, 66]
    id = engine.submit(again, 12)
    engine.run()
    assert list(engine.completion(id).token_ids) == engine.solo(again, 12)
    assert engine.runner.admitted[-1][2] >= 21


def test_third_turn_of_a_chat_prefills_little():
    engine = Engine(accept=(2,))
    history = CODEC.encode("You are helpful. " * 20)
    sizes = []
    for turn in range(3):
        history += CODEC.encode(f"turn {turn}?")
        before = sum(count for call in engine.runner.calls if call[0] == "prefill" for _, count in call[1])
        id = engine.submit(history, 12, key="me")
        want = engine.solo(history, 12)
        engine.run()
        after = sum(count for call in engine.runner.calls if call[0] == "prefill" for _, count in call[1])
        sizes.append(after - before)
        assert list(engine.completion(id).token_ids) == want
        history += engine.completion(id).token_ids
    assert sizes[0] > 300
    assert sizes[1:] == [9, 9]  # the pending token of the last turn, BOS and 7 characters
    assert engine.count()["reused"] > 600


def test_another_key_reuses_nothing():
    engine = Engine()
    for key in ("a", "b", ""):
        engine.submit("x" * 50, key=key)
        engine.run()
    assert [reused for _, _, reused in engine.runner.admitted] == [0, 0, 0]


def test_speculation_off_is_plain():
    engine = Engine(accept=(5,))
    id = engine.submit(speculation=False)
    engine.run()
    assert {call[2] for call in engine.runner.calls if call[0] == "decode"} == {1}
    assert engine.completion(id).steps == 9
    assert engine.completion(id).acceptance == 1.0


# ---- refusals and cancels ------------------------------------------------------------------------------------------


def test_bad_requests_are_refused_at_once():
    engine = Engine(max_context=50)
    with pytest.raises(InvalidRequest):
        engine.submit([])
    with pytest.raises(InvalidRequest):
        engine.submit([10_000])
    with pytest.raises(ContextTooLong):
        engine.submit("x" * 30, 30)
    with pytest.raises(TypeError):
        engine.submit(sink=[])
    assert engine.count()["accepted_requests"] == 0


@pytest.mark.parametrize("max_queue", [0, 3])
def test_queue_full(max_queue):
    engine = Engine(num_slots=2, config={"max_queue": max_queue})
    ids = [engine.submit() for _ in range(2 + max_queue)]
    with pytest.raises(QueueFull) as caught:
        engine.submit()
    assert caught.value.retry_after == 1
    engine.manager.step()
    assert engine.manager.status().waiting == max_queue
    with pytest.raises(QueueFull):
        engine.submit()
    engine.run()
    assert all(engine.completion(id) for id in ids)
    engine.submit()
    engine.run()
    at_rest(engine)


def test_cancel_in_every_state():
    engine = Engine(num_slots=2, config={"prefill_chunk": 8})
    decoding, prefilling, waiting, new = (engine.submit(p, 50) for p in ("a", "x" * 200, "c", "d"))
    engine.manager.step()
    engine.manager.step()
    states = [engine.manager._open[id].state.value for id in (decoding, prefilling, waiting)]
    assert states == ["decoding", "prefilling", "waiting"]
    engine.submit("e")
    seen = {id: len(deltas) for id, deltas in engine.sink.deltas.items()}
    for id in (decoding, prefilling, waiting, waiting, "unknown"):
        engine.manager.cancel(id)
    engine.manager.step()
    assert not {decoding, prefilling, waiting} & {seq.id for seq in engine.manager._scheduler.running.values()}
    engine.run()
    assert len(engine.sink.deltas[decoding]) == seen[decoding]
    assert not {prefilling, waiting} & engine.sink.deltas.keys()
    assert list(engine.completion(new).token_ids) == engine.solo("d", 50)
    assert engine.count()["outcomes"] == {
        "stop": 0,
        "length": 2,
        "error": 0,
        "cancelled": 3,
        "timeout": 0,
        "shutdown": 0,
    }
    at_rest(engine)


def test_cancel_before_the_first_step_and_after_the_end():
    engine = Engine()
    id = engine.submit()
    engine.manager.cancel(id)
    engine.run()
    assert engine.sink.deltas == {}
    done = engine.submit()
    engine.run()
    engine.manager.cancel(done)
    engine.run()
    assert engine.count()["outcomes"]["cancelled"] == 1
    at_rest(engine)


@pytest.mark.parametrize("max_tokens", [2, 20])
def test_cancel_during_a_step_stops_its_delta(max_tokens):
    engine = Engine(overlaps=False)
    id = engine.submit(max_tokens=max_tokens)
    engine.manager.step()
    engine.runner.before = lambda kind, slots: engine.manager.cancel(id)
    engine.manager.step()  # with max_tokens = 2 it would have finished
    assert len(engine.sink.deltas[id]) == 1
    engine.run()
    assert engine.count()["outcomes"]["cancelled"] == 1
    at_rest(engine)


def test_a_sink_that_raises_loses_its_sequences_only():
    engine = Engine(num_slots=3)

    def bad(pairs):
        raise ValueError("gone")

    mine = [engine.submit("a", 30, sink=bad), engine.submit("b", 30, sink=bad)]
    good = engine.submit("c", 30)
    for _ in range(3):
        engine.manager.step()
    assert engine.manager._open.keys() == {good}
    engine.run()
    assert list(engine.completion(good).token_ids) == engine.solo("c", 30)
    assert engine.count()["outcomes"]["cancelled"] == len(mine)
    at_rest(engine)


# ---- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_poison_ends_alone(when):
    engine = Engine(num_slots=8, accept=(2,), row_budget=64)
    bad_slots = set()

    def before(kind, slots):
        if kind == when and bad_slots & set(slots):
            raise RuntimeError("poison")

    engine.runner.before = before
    prompts = [f"prompt {n}" for n in range(8)]
    ids = [engine.submit(prompt, 20) for prompt in prompts]
    bad_slots.add(3)
    engine.run()
    error = engine.error(ids.pop(3))
    assert isinstance(error, GenerationFailed)
    assert "RuntimeError" in error.message
    prompts.pop(3)
    for id, prompt in zip(ids, prompts, strict=True):
        assert list(engine.completion(id).token_ids) == engine.solo(prompt, 20)
    assert engine.count()["outcomes"]["error"] == 1
    at_rest(engine)
    bad_slots.clear()
    id = engine.submit("prompt 3, again and longer", 20)  # the slot serves again, with nothing of the failed one
    engine.run()
    assert list(engine.completion(id).token_ids) == engine.solo("prompt 3, again and longer", 20)


@pytest.mark.parametrize("marker", [POISON, NAN])
def test_marked_prompts_fail_alone(marker):
    engine = Engine(poison=POISON, nan=NAN)
    bad, good = engine.submit([BOS, marker]), engine.submit("fine")
    engine.run()
    assert isinstance(engine.error(bad), GenerationFailed)
    assert engine.completion(good)
    at_rest(engine)


def test_a_call_that_fails_once_is_not_noticed():
    engine = Engine(accept=(2,))
    failures = iter([True, False] * 3)

    def before(kind, slots):
        if next(failures, False):
            raise MemoryError

    engine.runner.before = before
    ids = {engine.submit(p, 9): p for p in ("a", "b", "c")}
    engine.run()
    for id, prompt in ids.items():
        assert list(engine.completion(id).token_ids) == engine.solo(prompt, 9)
    assert engine.count()["retried_calls"] == 3


def test_a_tokenizer_that_fails_ends_that_sequence():
    engine = Engine(reply=[97, 98, 99])
    broken = type("Broken", (FakeCodec,), {"decode": lambda self, ids: 1 / 0 if 98 in ids else "ok"})()
    engine.manager._codec = broken
    bad = engine.submit()
    engine.manager._codec = CODEC
    good = engine.submit()
    engine.run()
    assert isinstance(engine.error(bad), GenerationFailed)
    assert engine.completion(good).text == "abc"
    at_rest(engine)


def test_a_leaked_slot_is_noticed_when_idle():
    engine = Engine()
    engine.submit()
    release = engine.manager._scheduler.release
    engine.manager._scheduler.release = lambda seq, failed: engine.manager._scheduler.running.pop(seq.slot)
    with pytest.raises(RuntimeError, match="leaked"):
        engine.run()
    engine.manager._scheduler.release = release


def test_a_prefix_that_is_not_there_changes_the_text():
    """The fake's own control: it would notice a wrong prefix."""
    engine = Engine(num_slots=1)
    prompt = "x" * 40
    engine.submit(prompt)
    engine.run()
    engine.runner.kv[0][5] = FIRST_WORD
    id = engine.submit(prompt)
    engine.run()
    assert list(engine.completion(id).token_ids) != engine.solo(prompt)


# ---- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("token_ms", "step_ms", "accept"), [(1, 12, 0), (0.1, 12, 3), (8, 80, 0), (30, 12, 0)])
def test_prompts_do_not_hold_up_the_others(token_ms, step_ms, accept):
    clock = ManualClock()
    costs = {"prefill_s": (step_ms / 1000, token_ms / 1000), "decode_s": step_ms / 1000}
    engine = Engine(clock=clock, accept=(accept,), overlaps=False, **costs)
    times = []
    engine.submit("a", 400, sink=lambda pairs: times.append(clock()))
    for _ in range(5):
        engine.manager.step()
    for _ in range(3):
        engine.submit([97] * 2000, 5)
    while engine.manager._open and len(times) < 300:
        engine.manager.step()
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    waits = [gap - step_ms / 1000 for gap in gaps]
    allowed = max(0.1, 3 * step_ms / 1000)
    assert max(waits) <= allowed + 1e-9
    assert engine.count()["largest_gap_ms"] >= max(gaps) * 1000 - 1e-6
    if token_ms < 30:  # and the chunks are not needlessly small
        assert max(waits) >= allowed / 2


def test_timings():
    clock = ManualClock()
    engine = Engine(num_slots=1, clock=clock, prefill_s=(0.0, 0.01), decode_s=0.02, overlaps=False)
    a, b = engine.submit("abc", 5), engine.submit("abc", 5)
    engine.run()
    done = engine.completion(b)
    assert done.queue_ms == pytest.approx(40 + 4 * 20)
    assert done.prefill_ms == pytest.approx(40)
    assert done.decode_ms == pytest.approx(80)
    assert done.tokens_per_second == pytest.approx(50)
    assert engine.completion(a).queue_ms == 0


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


def test_random_company_random_ends():
    """Submit, cancel, fail, stop and turn at random: one last delta each, no slot lost, survivors as alone."""
    for seed in range(60):
        rng = random.Random(seed)
        engine = Engine(num_slots=rng.randint(1, 3), accept=[rng.randint(0, 4) for _ in range(5)], nan=NAN)
        engine.runner.poison = POISON
        want, cancelled, failing = {}, set(), set()
        for _ in range(rng.randint(5, 60)):
            action = rng.random()
            if action < 0.3:
                prompt = [BOS, *rng.choices(range(97, 100), k=rng.randint(1, 50))]
                if rng.random() < 0.2:
                    prompt.insert(1, rng.choice([POISON, NAN]))
                id = engine.submit(prompt, rng.randint(1, 25))
                want[id] = engine.solo(prompt, engine.manager._open[id].params.max_tokens)
                if prompt[1] in (POISON, NAN):
                    failing.add(id)
            elif action < 0.4 and want:
                id = rng.choice(list(want))
                if id in engine.manager._open:
                    cancelled.add(id)
                engine.manager.cancel(id)
            else:
                engine.manager.step()
        engine.run()
        for id, ids in want.items():
            if id in cancelled:
                assert engine.sink.deltas.get(id) is None or engine.sink.last(id) is None
            elif id in failing:
                assert isinstance(engine.error(id), GenerationFailed)
            else:
                assert list(engine.completion(id).token_ids) == ids
        at_rest(engine)
