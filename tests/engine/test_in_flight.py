"""The times that passes in flight report. python -m pytest tests/engine/test_in_flight.py"""

import pytest

from tests.engine.turns import Engine
from tests.fakes import ManualClock


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_step_beside_a_prefill_pass_does_not_tell_what_the_host_needs(overlaps):
    """A pass that is started, or read, between one step and the next."""
    times = {(1, n): 1.0 for n in (1, 4, 8, 16)}
    engine = Engine(clock=ManualClock(), step_ms=times, expected=(1.0, 1.0, 1.0, 1.0), overlaps=overlaps)
    engine.submit([3, 4], max_tokens=12)
    engine.manager.step()
    noted, scheduler = [], engine.manager._scheduler
    scheduler._budget.note_time = lambda *_, no_prefill: noted.append(no_prefill)
    for turn in range(9):
        if turn == 4:
            engine.submit([3, 4, 5], max_tokens=12)
        engine.manager.step()
    want = [False] + [True] * 3 + [False] + [True] * 4
    if overlaps:  # read a turn later: one step while the second prompt's pass is started, one after that was read
        want = [False, True, True, False, False, True, True, True]
    assert noted == want
