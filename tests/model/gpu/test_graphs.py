"""What an idle engine captures ahead, and what stands in for a missing step; capturing itself needs a GPU
(tests/test_gpu.py).

pytest tests/model/test_graphs.py
"""

import pytest
import torch

from medusa_serve.errors import CaptureFailed
from medusa_serve.model.forward.prefill_blocks import FEW, Run, pack
from medusa_serve.model.gpu import graphs
from medusa_serve.model.gpu.graphs import FIRST_GRAPHS, PREFILL_BLOCKS, TRIES, StepGraphs
from medusa_serve.model.shapes import Shape
from medusa_serve.model.tables import PLAIN, Needs

SHAPES = [Shape(1, 0, 0), Shape(8, 2, 4), Shape(64, 16, 16)]
HOT = Needs(sampled=True)
WIDTH, SLOTS = 256, 64


class Noted(StepGraphs):
    """Captures only take notes."""

    def __init__(self):
        super().__init__(
            None, None, device=torch.device("cpu"), num_slots=SLOTS, columns=WIDTH, prefill_rows=SLOTS,
            reads_lengths=True,
        )  # fmt: skip
        self._capture_ms = 100.0

    def _capture(self, key, body, what):
        self._graphs[key] = None


@pytest.fixture
def idle():
    return Noted()


def captured_ahead(idle):
    before = set(idle._graphs)
    while idle.prepare(SHAPES):
        pass
    return set(idle._graphs) - before


def test_rows_go_to_the_device_when_they_change(idle, monkeypatch):
    puts = []
    monkeypatch.setattr(Noted, "_put", lambda self, place, values: puts.append(place.copy_(values)))
    monkeypatch.setattr(Noted, "_play", lambda self, key: (self._slots[: key[0]].tolist(), self._active.tolist()))

    def step(slots, active=True):
        before = len(puts)
        order, on = idle.run(slots, WIDTH, SHAPES[0], PLAIN, {}, active)
        assert order[: len(slots)] == slots
        assert len(set(order)) == len(order)
        assert [slot for slot, yes in zip(order, on, strict=False) if yes] == (slots if active else [])
        return len(puts) > before

    assert step([3, 1, 2])
    assert not step([3, 1, 2])
    assert step([3, 2, 1])
    assert step([3, 2, 1], active=False)
    assert step([3, 2, 1])
    assert step([3, 2])
    idle._graphs.clear()
    assert step([3, 2]), "a capture took them away"


def test_before_any_request_one_row_and_all_rows_come_first(idle):
    found = captured_ahead(idle)
    assert len(found) == FIRST_GRAPHS
    assert {(1, WIDTH, shape, PLAIN) for shape in SHAPES} <= found
    assert {("prefill", blocks, FEW, PLAIN) for blocks in PREFILL_BLOCKS} <= found
    assert {key for key in found if key[0] == "prefill" and key[2] > FEW} == {
        ("prefill", blocks, SLOTS, PLAIN) for blocks in (32, 64)
    }
    assert {(SLOTS, WIDTH, shape, PLAIN) for shape in SHAPES[:2]} <= found, "64 rows of 64 nodes are too many"
    assert not captured_ahead(idle)


def test_every_size_for_each_number_of_rows_that_was_asked_for(idle):
    captured_ahead(idle)
    idle._seen = {(4, WIDTH, HOT), (64, WIDTH, HOT)}
    idle._graphs[4, WIDTH, SHAPES[0], HOT] = None
    assert captured_ahead(idle) == {(4, WIDTH, shape, HOT) for shape in SHAPES[1:]} | {
        (64, WIDTH, shape, HOT) for shape in SHAPES[:2]
    }


def test_there_is_an_end_to_it(idle):
    captured_ahead(idle)
    idle._most = FIRST_GRAPHS + 2
    idle._seen = {(rows, WIDTH, HOT) for rows in (1, 2, 4)}
    assert len(captured_ahead(idle)) == 2


def test_where_rows_lie_as_they_are_nothing_is_captured_before_it_is_asked_for(idle):
    idle._device_lengths = False
    assert not captured_ahead(idle)
    idle._seen = {(2, WIDTH, PLAIN)}
    assert captured_ahead(idle) == {(2, WIDTH, shape, PLAIN) for shape in SHAPES}


def test_no_memory_left_ends_it(idle, caplog):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("out of memory")

    idle._capture = full
    assert not captured_ahead(idle)
    assert "Nothing is captured ahead any more: out of memory" in caplog.text
    assert not idle.prepare(SHAPES)


def test_a_missing_step_is_made_by_one_of_more_rows_until_that_has_cost_a_capture(idle):
    shape = SHAPES[1]
    times = {(1, 8): 2.0, (64, 8): 128.0, (1, 1): 1.0}
    missing, there = (4, WIDTH, shape, PLAIN), (16, WIDTH, shape, PLAIN)
    assert idle._stand_in(missing, times) == missing, "no other is there"
    idle._graphs[64, WIDTH, shape, PLAIN] = idle._graphs[there] = idle._graphs[2, WIDTH, shape, PLAIN] = None
    # 32 - 8 = 24 ms more each time, of the 100 that a capture takes
    assert [idle._stand_in(missing, times) for _ in range(5)] == [there] * 4 + [missing]


def test_without_times_or_for_other_needs_nothing_stands_in(idle):
    missing, shape = (4, WIDTH, SHAPES[1], PLAIN), SHAPES[1]
    idle._graphs[16, WIDTH, shape, PLAIN] = None
    assert idle._stand_in(missing, {}) == missing
    times = {(1, 8): 2.0}
    assert idle._stand_in((4, WIDTH, shape, HOT), times) == (4, WIDTH, shape, HOT)
    assert idle._stand_in((4, WIDTH, SHAPES[0], PLAIN), times) == (4, WIDTH, SHAPES[0], PLAIN)


def test_after_a_change_of_the_passes_all_is_captured_anew(idle, monkeypatch):
    done = []
    monkeypatch.setattr(graphs, "settle", lambda device: done.append(("settled", len(idle._graphs))))
    monkeypatch.setattr(graphs, "give_back", lambda: done.append(("given back", len(idle._graphs), idle._pool)))
    idle._seen, idle._pool, idle._most = {(4, WIDTH, HOT)}, (0, 1), 0
    idle._graphs[4, WIDTH, SHAPES[0], HOT] = idle._graphs["prefill", 8, FEW, PLAIN] = None
    idle._failed[4, WIDTH, SHAPES[1], HOT] = TRIES
    idle.drop()
    assert done == [("settled", 2), ("given back", 0, None)]
    assert {(4, WIDTH, shape, HOT) for shape in SHAPES} <= captured_ahead(idle), "what was asked for comes again"


@pytest.mark.parametrize(
    ("least", "captured", "blocks"), [(5, (), 8), (9, (64,), 64), (9, (128,), 16), (17, (32,), 32)]
)
def test_a_prefill_pass_is_at_most_four_times_too_large(idle, least, captured, blocks):
    idle._graphs = {("prefill", size, FEW, PLAIN): None for size in captured} | {("prefill", 8, SLOTS, PLAIN): None}
    assert idle.blocks(least, FEW, PLAIN) == blocks


def test_without_memory_for_a_capture_the_step_runs_uncaptured_and_that_is_said_once(idle, caplog):
    def full(key, body, what):
        raise torch.OutOfMemoryError("out of memory")

    def step(slots, active, host_slots, host_length, width, shape, needs):
        asked.append((slots.tolist(), active.tolist(), shape))
        return torch.tensor(len(asked))

    asked, idle._capture, idle._step = [], full, step
    idle._put = lambda place, values: place.copy_(values)
    facts = [int(idle.run([7, 3, 9], WIDTH, SHAPES[1], PLAIN, {})) for _ in range(2)]
    assert facts == [1, 2]
    assert asked == [([7, 3, 9, 0], [True, True, True, False], SHAPES[1])] * 2
    assert caplog.text.count("A step of 4 rows × 8 nodes is not captured, and slower: out of memory") == 1
    with pytest.raises(torch.OutOfMemoryError):  # a measurement is of a captured step, or none
        idle.run([0], WIDTH, SHAPES[1], PLAIN, {}, active=False)


def test_a_prefill_pass_without_memory_for_a_capture_runs_uncaptured(idle, caplog):
    def full(key, body, what):
        raise torch.OutOfMemoryError("out of memory")

    idle._capture, idle._prefill = full, lambda packed, width, needs: packed.tokens[0, :3].clone()
    idle._put = lambda place, values: place.copy_(values)
    packed = pack([Run(3, 0, [5, 6, 7], True)], SLOTS, SLOTS)
    assert [idle.prefill(packed, PLAIN).tolist() for _ in range(2)] == [[5, 6, 7]] * 2
    assert caplog.text.count("A prefill of 8 blocks is not captured, and slower: out of memory") == 1


def test_a_capture_that_something_else_broke_is_tried_again(idle, caplog):
    def broken(key, body, what):
        idle._failed[key] = idle._failed.get(key, 0) + 1
        raise CaptureFailed("somebody waited for the device")

    steps = []
    idle._capture, idle._put = broken, lambda place, values: place.copy_(values)
    idle._step = lambda slots, active, *rest: steps.append(active.tolist()) or torch.tensor(len(steps))
    key = (1, WIDTH, SHAPES[1], PLAIN)
    idle._failed[key] = TRIES - 2
    assert int(idle.run([5], WIDTH, SHAPES[1], PLAIN, {})) == 1
    assert key not in idle._graphs, "the next step may be captured"
    assert not caplog.text
    assert int(idle.run([5], WIDTH, SHAPES[1], PLAIN, {})) == 2
    assert idle._graphs[key][0] is None
    assert "A step of 1 rows × 8 nodes is not captured, and slower: somebody waited" in caplog.text
    assert steps == [[True]] * 2


def test_an_idle_engine_gives_up_a_capture_that_breaks_again_and_again(idle):
    tried = []

    def broken(key, body, what):
        tried.append(key)
        idle._failed[key] = idle._failed.get(key, 0) + 1
        raise CaptureFailed("somebody waited for the device")

    idle._capture = broken
    assert not captured_ahead(idle)
    assert max(tried.count(key) for key in tried) == TRIES
    assert (1, WIDTH, SHAPES[0], PLAIN) in tried
