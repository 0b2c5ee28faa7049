"""The batch manager over a scripted runner: what it refuses, what is cancelled, what fails alone."""

from __future__ import annotations

import pytest

from medusa_serve.errors import ContextTooLong, GenerationFailed, InvalidRequest, QueueFull
from tests.engine.turns import CODEC, NAN, POISON, Engine, at_rest, overlaps
from tests.fakes import BOS, FIRST_WORD, FakeCodec

__all__ = ["overlaps"]


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
