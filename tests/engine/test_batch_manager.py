"""The batch manager over a scripted runner: texts, prefixes, time."""

from __future__ import annotations

import random

import pytest

from medusa_serve.engine.batch_manager import BatchManager
from medusa_serve.errors import GenerationFailed, InvalidRequest
from tests.engine.turns import CODEC, NAN, POISON, Engine, at_rest, overlaps
from tests.fakes import BOS, EOS, Collector, ManualClock

__all__ = ["overlaps"]


# ---- text ----------------------------------------------------------------------------------------------------------


def test_after_a_pass_that_drafted_little_the_larger_sizes_were_not_tried():
    times = {(rows, nodes): 10.0 for rows in (1, 4) for nodes in (1, 4, 8, 16)}
    for few, first in ((16, 16), (4, 4)):
        engine = Engine(accept=(3,), has_heads=True, step_ms=times, expected=(1.0, 1.8, 2.2, 2.6))
        engine.runner.first_draft = lambda prompts, few=few: few
        engine.submit("Hello", 40)
        told, scheduler = [], engine.manager._scheduler
        scheduler.note_gains = lambda rows, outputs, trees, told=told: told.append(trees)
        engine.run()
        assert told[0] == (first,)
        assert set(told[1:]) == {(16,)}


@pytest.mark.parametrize(("accept", "settled"), [((0,), 1), ((2,), 4), ((9, 11), 16)])
def test_the_node_budget_follows_what_is_accepted(accept, settled):
    """Steps that take 10, 12, 14 and 16 ms: 1, 3 or 11 tokens of them decide, and the text never changes."""
    clock, ms = ManualClock(), {1: 10.0, 4: 12.0, 8: 14.0, 16: 16.0}
    times = {(rows, nodes): each for rows in (1, 4) for nodes, each in ms.items()}
    expected = (1.0, 1.8, 2.2, 2.6)
    engine = Engine(accept=accept, clock=clock, has_heads=True, step_ms=times, device_ms=ms, expected=expected)
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


def test_a_submission_does_not_look_at_all_turns(monkeypatch):
    """Their median is asked for when a turn is old, and then it counts."""
    engine, asked = Engine(), []
    monkeypatch.setattr(type(engine.manager.metrics), "median_turn_s", property(lambda self: asked.append(0) or 10.0))
    engine.submit()
    assert engine.manager.status().state == "ok"
    engine.run()
    assert not asked
    engine.manager._heartbeat.begin()
    engine.clock.advance(61)
    assert engine.manager.status().state == "ok", "turns of 10 s are usual here"
    engine.clock.advance(140)
    assert engine.manager.status().state == "stalled"
    engine.manager._heartbeat.end()
