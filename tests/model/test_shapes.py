"""Shapes of a step, and what is expected of them: python -m pytest tests/model/test_plan.py"""

from types import SimpleNamespace

import pytest
import torch

from medusa_serve.errors import CaptureFailed
from medusa_serve.model.drafting.tree import most_probable
from medusa_serve.model.shapes import Shape, expected_tokens, held_by
from medusa_serve.model.timing import TRIES, time_steps, try_largest, worth_timing
from tests.oracles import DEFAULT_RANKS


def test_which_tree_holds_a_node():
    """16 nodes: root, 11 of the heads, a chain of 4; the smaller ones hold the first of each."""
    shapes = {1: Shape(1, 0, 0), 4: Shape(4, 1, 4), 8: Shape(8, 2, 5), 16: Shape(16, 4, 6)}
    assert held_by(shapes, 16) == (1, 4, 4, 8, 8, 8, *[16] * 6, 4, 8, 16, 16)
    assert held_by(shapes, 4) == (1, 4, 4, 4)
    assert held_by(shapes, 1) == (1,)


def test_what_a_tree_is_expected_to_give():
    drafter = SimpleNamespace(ranks=DEFAULT_RANKS)
    choices = (1, 2, 4, 16)
    got = expected_tokens(choices, drafter)
    assert got[0] == 1.0
    assert got[1] == pytest.approx(1.56)
    assert list(got) == sorted(got)
    paths = most_probable(DEFAULT_RANKS, 4)
    assert len(paths) == 3
    assert got[2] == pytest.approx(1 + 0.56 + 0.56 * 0.45 + 0.56 * 0.20)
    assert expected_tokens(choices, None) == expected_tokens(choices, SimpleNamespace(ranks=None))
    assert list(expected_tokens(choices, None)) == sorted(expected_tokens(choices, None))


class Timed:
    """A runner whose steps take rows + nodes milliseconds; beside others that are not captured, twice that at first."""

    device, num_slots, max_context, node_choices = torch.device("cpu"), 6, 64, (1, 4, 16)

    def __init__(self):
        self.asked, self.overlaps = [], False

    def time_step(self, rows, nodes, repeats=3):
        self.asked.append((rows, nodes))
        return float(rows + nodes) * (2.0 if self.asked.count((rows, nodes)) == 1 and not self.overlaps else 1.0)


def test_steps_are_timed_once(tmp_path):
    first, again, other = Timed(), Timed(), Timed()
    timing, note = time_steps(first, "a model", tmp_path)
    assert "1: 2.0, 4: 5.0, 16: 17.0" in note
    assert timing.step_ms == {(b, n): b + n for b, n in first.asked}
    assert {(1, 1), (1, 4), (1, 16), (4, 1), (4, 4), (6, 1), (6, 4)} == set(first.asked)
    known, note = time_steps(again, "a model", tmp_path)
    assert "earlier" in note
    assert (again.asked, known) == ([], timing)
    time_steps(other, "another model", tmp_path)
    assert other.asked == first.asked


def test_where_steps_are_captured_all_but_the_largest_wait_until_the_engine_idles(tmp_path):
    runner = Timed()
    runner.overlaps = True
    timing, note = time_steps(runner, "a model", tmp_path)
    assert "while the engine idles" in note
    assert (runner.asked, timing.step_ms) == ([(6, 4)], {}), "24 of at most 32 nodes"
    turns = 1
    while timing.timer.turn():
        assert not timing.timer.times, "all of them or none: the budget compares"
        turns += 1
    assert turns == 6
    assert len(timing.timer.times) == 7
    again = Timed()
    again.overlaps = True
    known, note = time_steps(again, "a model", tmp_path)
    assert "earlier" in note
    assert (again.asked, known.step_ms, known.timer) == ([], timing.timer.times, None)


def test_a_step_that_was_disturbed_takes_no_longer_than_a_larger_one(tmp_path):
    """Else it would not be chosen any more, and so never be measured again."""
    runner, time_step = Timed(), Timed().time_step
    runner.time_step = lambda rows, nodes, repeats: 99.0 if (rows, nodes) == (4, 1) else time_step(rows, nodes)
    timing, _ = time_steps(runner, "a model", tmp_path)
    assert timing.step_ms[4, 1] == timing.step_ms[4, 4] == 8.0


def test_where_the_memory_was_proven_all_of_them_wait(tmp_path):
    runner = Timed()
    runner.overlaps = True
    try_largest(runner)
    assert runner.asked == [(6, 4)]
    timing, note = time_steps(runner, "a model", tmp_path, proven=True)
    assert "while the engine idles" in note
    assert runner.asked == [(6, 4)]
    while timing.timer.turn():
        pass
    assert len(timing.timer.times) == 7


def test_a_measurement_that_something_else_broke_is_made_again(tmp_path):
    runner, broken = Timed(), []
    runner.overlaps = True

    def broken_now_and_then(rows, nodes, repeats):
        if len(broken) < TRIES - 1:
            broken.append((rows, nodes))
            raise CaptureFailed("somebody waited for the device")
        return float(rows + nodes)

    runner.time_step = broken_now_and_then
    timer = time_steps(runner, "a model", tmp_path)[0].timer
    while timer.turn():
        pass
    assert len(timer.times) == 7
    assert broken == [(6, 4), *[(1, 1)] * (TRIES - 2)]
    broken.clear()
    again = Timed()
    again.overlaps, again.time_step = True, broken_now_and_then
    timer = time_steps(again, "another model", tmp_path)[0].timer
    again.time_step = lambda rows, nodes, repeats: (_ for _ in ()).throw(CaptureFailed("again"))
    assert all(timer.turn() for _ in range(TRIES - 2))
    with pytest.raises(CaptureFailed, match="again"):
        timer.turn()


def test_only_where_there_is_a_choice_that_matters():
    runner = Timed()
    assert worth_timing(runner, 10**9)
    assert not worth_timing(runner, 10**6)
    runner.node_choices = (1, 16)
    assert not worth_timing(runner, 10**9)
