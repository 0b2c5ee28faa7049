"""The scheduler alone: python -m pytest tests/engine/test_scheduler.py"""

from __future__ import annotations

from dataclasses import replace

import pytest

from medusa_serve.engine.detokenizer import Detokenizer
from medusa_serve.engine.scheduler import NOTED, Plan, Scheduler, choose_nodes, common_prefix, cost_of_prefill
from medusa_serve.engine.sequence import Sequence, State, token_limit
from medusa_serve.errors import ContextTooLong, InvalidRequest
from medusa_serve.types import PrefillChunk, SamplingParams, StepOutput
from tests.fakes import FakeCodec, FakeRunner


def sequence(prompt, *, key="", speculation=True, ready=0):
    prompt = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    params = SamplingParams(seed=1, speculation=speculation)
    seq = Sequence("x", prompt, params, len(prompt) + 9, lambda pairs: None, Detokenizer(FakeCodec()), key)
    seq.draft_ready = ready
    return seq


def admitted(scheduler, *seqs):
    for seq in seqs:
        scheduler.add(seq)
        assert scheduler.admit() is seq
    scheduler.audit()
    return seqs


def decode(seq, *token_ids):
    """As if it had been prefilled and had emitted these."""
    seq.num_prefilled = len(seq.prompt_ids)
    seq.token_ids.extend(token_ids)
    seq.state = State.DECODING


def test_first_come_first_served_into_the_lowest_slot():
    scheduler = Scheduler(FakeRunner(num_slots=2), 512)
    a, b, c = sequence(3), sequence(3), sequence(3)
    for seq in (a, b, c):
        scheduler.add(seq)
    assert [scheduler.admit() for _ in range(3)] == [a, b, None]
    assert (a.slot, b.slot, c.state) == (0, 1, State.WAITING)
    scheduler.release(a)
    assert scheduler.admit() is c
    assert c.slot == 0
    scheduler.audit()


def test_a_resting_prefix_of_the_same_key_is_reused():
    scheduler = Scheduler(FakeRunner(), 512)
    (a,) = admitted(scheduler, sequence(20, key="k"))
    decode(a, 100, 101, 102)
    scheduler.release(a)
    (other,) = admitted(scheduler, sequence([*range(20), 100, 101], key="other"))
    assert (other.slot, other.num_reused) == (1, 0)
    (b,) = admitted(scheduler, sequence([*range(20), 100, 101, 102, 5], key="k"))
    assert (b.slot, b.num_reused, b.num_prefilled) == (0, 22, 22)  # 102 was pending, not in the cache


@pytest.mark.parametrize(("prompt", "reused"), [(40, 30), (30, 29), (17, 16), (16, 0), (15, 0)])
def test_at_least_16_and_never_the_last_prompt_token(prompt, reused):
    scheduler = Scheduler(FakeRunner(num_slots=1), 512)
    (a,) = admitted(scheduler, sequence(30))
    decode(a, 7)
    scheduler.release(a)
    (b,) = admitted(scheduler, sequence(prompt))
    assert b.num_reused == reused


def test_what_a_failed_sequence_left_is_not_reused():
    scheduler = Scheduler(FakeRunner(), 512)
    (a,) = admitted(scheduler, sequence(30))
    decode(a, 7)
    scheduler.release(a, failed=True)
    assert admitted(scheduler, sequence(40))[0].num_reused == 0


def test_no_reuse_when_the_runner_cannot():
    scheduler = Scheduler(FakeRunner(can_reuse=False), 512)
    (a,) = admitted(scheduler, sequence(30))
    decode(a, 7)
    scheduler.release(a)
    assert admitted(scheduler, sequence(40))[0].num_reused == 0


def test_cancelled_in_prefill_rests_with_what_was_prefilled():
    scheduler = Scheduler(FakeRunner(), 512)
    (a,) = admitted(scheduler, sequence(60))
    a.num_prefilled = 25
    scheduler.release(a)
    assert admitted(scheduler, sequence(60))[0].num_reused == 25


def test_longest_prefix_then_empty_slot_then_least_recently_used():
    scheduler = Scheduler(FakeRunner(num_slots=3), 512)
    a, b = admitted(scheduler, sequence(20), sequence(50))
    decode(a, 7), decode(b, 7)
    scheduler.release(b)
    scheduler.release(a)
    (c,) = admitted(scheduler, sequence(60))
    assert (c.slot, c.num_reused) == (1, 50)
    (d,) = admitted(scheduler, sequence([9] * 20))
    assert d.slot == 2  # empty
    decode(c, 7), decode(d, 7)
    scheduler.release(c), scheduler.release(d)
    assert admitted(scheduler, sequence([8] * 20))[0].slot == 0  # rests longest


def test_a_shared_beginning_does_not_wipe_a_long_chat_while_a_slot_is_empty():
    scheduler = Scheduler(FakeRunner(num_slots=2), 512)
    (a,) = admitted(scheduler, sequence(200))
    decode(a, 7)
    scheduler.release(a)
    system = [*range(20), *range(100, 110)]
    assert (lambda seq: (seq.slot, seq.num_reused))(*admitted(scheduler, sequence(system))) == (1, 0)
    assert (lambda seq: (seq.slot, seq.num_reused))(*admitted(scheduler, sequence(system))) == (0, 20)


def test_plan_takes_whole_chunks_while_nobody_decodes():
    scheduler = Scheduler(FakeRunner(), 512)
    assert scheduler.plan() == Plan()
    a, b = admitted(scheduler, sequence(1000), sequence(30))
    assert scheduler.plan() == Plan((PrefillChunk(0, 512),))
    a.num_prefilled = 512
    assert scheduler.plan() == Plan((PrefillChunk(0, 488),))
    decode(a, 7)
    assert scheduler.plan() == Plan((PrefillChunk(1, 16),), (0,), 1)  # small: the cost is unknown
    decode(b, 7)
    assert scheduler.plan() == Plan((), (0, 1), 1)


@pytest.mark.parametrize(
    ("token_ms", "step_ms", "count"), [(1, 10, 80), (1, 100, 240), (0.01, 10, 400), (500, 10, 1), (0, 10, 400)]
)
def test_chunk_size_from_the_measured_cost(token_ms, step_ms, count):
    scheduler = Scheduler(FakeRunner(), 512)
    a, _ = admitted(scheduler, sequence(5), sequence(1000))
    decode(a, 7)
    scheduler.note_prefill(100, 0.1 * token_ms)
    scheduler.note_decode(1, 1, step_ms / 1000, step_ms / 1000)
    scheduler.note_decode(1, 16, 9.9, 9.9)  # not a plain step
    assert scheduler.plan().prefill == (PrefillChunk(1, count),)


def test_heads_draft_also_when_their_last_step_is_not_read_yet():
    for has_heads, nodes in ((False, 1), (True, 16)):
        scheduler = Scheduler(FakeRunner(has_heads=has_heads), 512)
        (seq,) = admitted(scheduler, sequence(5))
        decode(seq, 7)
        assert seq.draft_ready == 0
        assert scheduler.plan().nodes == nodes
    seq.params = replace(seq.params, speculation=False)
    assert scheduler.plan().nodes == 1


@pytest.mark.parametrize(
    ("passes", "cost"),
    [
        ([(10, 0.2)], (0.0, 0.02)),
        ([(10, 0.2), (10, 0.4)], (0.0, 0.03)),
        ([(10, 0.3), (20, 0.4), (40, 0.6)], (0.2, 0.01)),
        ([(10, 0.4), (20, 0.3)], (0.35, 0.0)),  # noise: a longer chunk is never cheaper
        ([(10, 0.01), (20, 0.4)], (0.0, 0.205 / 15)),  # nor does a pass of none give time back
    ],
)
def test_cost_of_prefill(passes, cost):
    assert cost_of_prefill(passes) == pytest.approx(cost)


def test_a_pass_that_costs_the_same_for_any_chunk_takes_whole_chunks():
    """As on a GPU: small chunks would make everybody wait as long, only more often."""
    scheduler = Scheduler(FakeRunner(), 512)
    a, _ = admitted(scheduler, sequence(5), sequence(1000))
    decode(a, 7)
    for count in (16, 64, 256):
        scheduler.note_prefill(count, 0.2)
    assert scheduler.plan().prefill == (PrefillChunk(1, 512),)


@pytest.mark.parametrize(
    ("choices", "ready", "budget", "nodes"),
    [
        ((1, 4, 8, 16), [], 16, 1),
        ((1, 4, 8, 16), [0, 0], 16, 1),
        ((1, 4, 8, 16), [3], 16, 4),
        ((1, 4, 8, 16), [4], 16, 8),
        ((1, 4, 8, 16), [63], 16, 16),
        ((1, 4, 8, 16), [15, 0], 16, 8),
        ((1, 4, 8, 16), [15] * 5, 16, 1),
        ((1, 4, 8, 16), [15] * 99, 16, 1),
        ((1, 4, 8, 16), [15] * 4, 64, 16),
        ((1,), [15], 16, 1),
        ((1, 26), [15] * 8, 16, 26),
        ((1, 26), [0] * 8, 16, 1),
    ],
)
def test_choose_nodes(choices, ready, budget, nodes):
    assert choose_nodes(choices, ready, budget) == nodes


def test_rows_without_speculation_do_not_count():
    scheduler = Scheduler(FakeRunner(), 512)
    a, b = admitted(scheduler, sequence(3, ready=7), sequence(3, ready=15, speculation=False))
    decode(a, 7), decode(b, 7)
    assert scheduler.plan().nodes == 8
    scheduler.release(a)
    assert scheduler.plan().nodes == 1


def test_common_prefix():
    ids = tuple(range(100))
    assert common_prefix(ids, ids[:40]) == 40
    assert common_prefix((*ids[:33], 0), ids) == 33
    assert common_prefix(ids[15:], ids) == 0
    assert common_prefix((), ()) == 0


def test_audit_catches_a_leaked_slot_and_a_second_owner():
    scheduler = Scheduler(FakeRunner(), 512)
    a, b = admitted(scheduler, sequence(3), sequence(3))
    del scheduler.running[0]
    with pytest.raises(RuntimeError, match="leaked"):
        scheduler.audit()
    scheduler.running[0] = b
    with pytest.raises(RuntimeError, match="one owner"):
        scheduler.audit()
    scheduler.running[0] = a
    scheduler.audit()
    scheduler._free.add(0)
    with pytest.raises(RuntimeError, match="leaked"):
        scheduler.audit()


def test_token_limit():
    def limit(num_prompt, max_tokens=None, ids=None):
        return token_limit(
            ids or [1] * num_prompt, SamplingParams(max_tokens=max_tokens), max_context=1000, vocab_size=10
        )

    assert limit(5) == 261
    assert limit(900) == 1000
    assert limit(999) == 1000
    assert limit(5, 995) == 1000
    for bad in ({"num_prompt": 0}, {"num_prompt": 1, "ids": [10]}, {"num_prompt": 1, "ids": [-1]}):
        with pytest.raises(InvalidRequest) as caught:
            limit(**bad)
        assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest):
        limit(1, ids=[1.5])
    with pytest.raises(ContextTooLong) as too_long:
        limit(1000)
    assert too_long.value.param == "prompt"
    with pytest.raises(ContextTooLong) as too_many:
        limit(5, 996)
    assert too_many.value.param == "max_tokens"


def test_where_passes_are_packed_newcomers_gather_for_a_few_turns():
    """64 decode: one newcomer waits for seven more, or eight turns; with few that decode it comes at once."""
    runner = FakeRunner(num_slots=80)
    runner.prefill_rows = 64
    scheduler = Scheduler(runner, 512)
    for _ in range(64):
        scheduler.add(sequence(3))
    for seq in [scheduler.admit() for _ in range(64)]:  # nobody decodes yet: all come at once
        decode(seq, 5)
    scheduler.plan()
    scheduler.add(sequence(3))
    turns = 0
    while scheduler.admit() is None:
        scheduler.plan()
        turns += 1
    assert turns == 8
    scheduler.plan()
    for _ in range(8):
        scheduler.add(sequence(3))
    assert all(scheduler.admit() is not None for _ in range(8))


@pytest.mark.parametrize(("rows", "apart"), [(3, 1), (NOTED, 1), (2 * NOTED + 3, 3)])
def test_with_many_rows_few_steps_tell_their_gains(rows, apart):
    runner = FakeRunner(num_slots=rows, step_ms={(1, n): 1.0 for n in (1, 4, 8, 16)}, expected=(1.0, 2.0, 3.0, 4.0))
    scheduler = Scheduler(runner, 512)
    seqs = admitted(scheduler, *(sequence(3, speculation=bool(n)) for n in range(rows)))
    told = []
    scheduler._budget.note = lambda slots, held_by, nodes: told.append((slots, held_by, nodes))
    outputs = [StepOutput(seq.slot, (5, 6), 3, held_by=(4,)) for seq in seqs]
    for _ in range(2 * apart):
        scheduler.note_gains(seqs, outputs, [4] * rows)
    speculating = tuple(range(1, rows))  # the first one decodes plainly
    assert told == [(speculating, ((4,),) * len(speculating), (4,) * len(speculating))] * 2
    told.clear()
    for nodes in (4, 8, 8, 4):  # a probe's second step, and what comes behind it
        scheduler.note_gains(seqs, outputs, [nodes] * rows)
    assert {nodes for *_, each in told for nodes in each} == {4, 8}, "the larger trees told in any case"
