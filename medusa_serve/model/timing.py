"""How long a decode step of B rows with trees of N nodes takes on this machine, measured once and kept."""

from __future__ import annotations

import contextlib
import logging
from bisect import bisect_right
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import CaptureFailed
from .weights.machine_cache import machine_key, recall, remember

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
SMALL = 30_000_000  # weights up to which a CPU model is fast enough without timed steps
TRIES = 5  # failed captures, until the step times are given up
ROWS = {"cpu": (1, 4, 8), "cuda": (1, 8, 64, 256)}  # for other B, see `interpolated`
REPEATS = 3  # of each cell
MOST = {"cpu": 32, "cuda": 2048}  # the most rows x nodes of a step that is measured
Times = Mapping[tuple[int, int], float]  # milliseconds by (B, N)


class Timed(Protocol):
    """The runner of the measured steps; its slots are free."""

    device: torch.device
    num_slots: int
    max_context: int
    node_choices: tuple[int, ...]
    overlaps: bool

    def time_step(self, rows: int, nodes: int, repeats: int = 3) -> float: ...


@dataclass(frozen=True)
class Timing:
    """The known step times of a runner, and the work on them that its idle engine still has to do. Never changed, only
    replaced.

    step_ms: step times now; empty: not measured · later_ms: step times after `faster`, if an earlier start measured
    them · faster: work of seconds, in parts, that makes steps faster; it returns the next Timing · timer: measures the
    steps, one by one, after that
    """

    step_ms: Times = field(default_factory=dict)
    later_ms: Times = field(default_factory=dict)
    faster: Generator[None, None, Timing] | None = None
    timer: StepTimer | None = None


def worth_timing(runner: Timed, weights: int) -> bool:
    """Whether step times would improve the choice of N."""
    return len(runner.node_choices) > 2 and (runner.device.type == "cuda" or weights > SMALL)


def time_steps(runner: Timed, what: str, cache: Path, *, proven: bool = False) -> tuple[Timing, str]:
    """The step times, and a note. They come from the cache if this machine measured `what` before. All slots must be
    free. Captured steps are measured later, while the engine idles (a new machine compiles their kernels for a minute),
    except the largest: it shows whether the memory is enough, unless that is `proven`."""
    known = known_times(runner, what, cache)
    if known:
        return Timing(known), "steps were timed at an earlier start"
    timer = StepTimer(runner, _cells(runner), cache, _key(runner, what))
    if runner.overlaps:
        if not proven:
            timer.tried(_largest(runner))
        return Timing(timer=timer), "steps are timed while the engine idles"
    for _ in range(REPEATS):  # in rounds: a second of another busy process then spoils one repeat of a cell
        for cell in _cells(runner):
            timer.tried(cell, repeats=1)
    timer.turn()  # no cell is missing
    one = ", ".join(f"{n}: {timer.times[1, n]:.1f}" for n in runner.node_choices)
    return Timing(timer.times), f"steps timed (one row, ms by nodes: {one})"


def known_times(runner: Timed, what: str, cache: Path) -> dict[tuple[int, int], float]:
    """The step times that this machine measured before; empty if it did not."""
    known, cells = recall(cache, _key(runner, what)), _cells(runner)
    if not isinstance(known, dict) or set(known) != {f"{b}x{n}" for b, n in cells}:
        return {}
    return {(b, n): float(known[f"{b}x{n}"]) for b, n in cells}


def try_largest(runner: Timed) -> None:
    """Raises torch.OutOfMemoryError if the memory is not enough for the largest step."""
    with contextlib.suppress(CaptureFailed):
        runner.time_step(*_largest(runner), repeats=1)


def _cells(runner: Timed) -> list[tuple[int, int]]:
    kind = runner.device.type
    rows = sorted({min(count, runner.num_slots) for count in ROWS[kind]})
    return [(b, n) for b in rows for n in runner.node_choices if b == 1 or b * n <= MOST[kind]]


def _largest(runner: Timed) -> tuple[int, int]:
    return max(_cells(runner), key=lambda cell: cell[0] * cell[1])


def _key(runner: Timed, what: str) -> str:
    return f"steps of {what}, {runner.num_slots} slots of {runner.max_context}: {machine_key(str(runner.device))}"


class StepTimer:
    """Measures cells (B, N) one by one. times: empty until all are measured"""

    def __init__(self, runner: Timed, cells: list[tuple[int, int]], cache: Path, key: str) -> None:
        self.times: Times = {}
        self._runner, self._cells, self._cache, self._key = runner, cells, cache, key
        self._ms: dict[tuple[int, int], float] = {}
        self._failed = 0

    def tried(self, cell: tuple[int, int], repeats: int = REPEATS) -> bool:
        """Measure a cell and keep its shortest time; → whether the capture succeeded. Raises CaptureFailed at the last
        try."""
        try:
            ms = self._runner.time_step(*cell, repeats=repeats)
            self._ms[cell] = min(ms, self._ms.get(cell, ms))
        except CaptureFailed:
            self._failed += 1
            if self._failed == TRIES:
                raise
            return False
        return True

    def turn(self) -> bool:
        """Measure the next cell; → whether there are more. All slots must be free."""
        missing = [cell for cell in self._cells if cell not in self._ms]
        if missing and (not self.tried(missing[0]) or len(missing) > 1):
            return True
        self.times = {cell: self._undisturbed(cell) for cell in self._cells}
        rounded = {f"{b}x{n}": round(ms, 4) for (b, n), ms in self.times.items()}
        problem = remember(self._cache, self._key, rounded)
        if problem:
            log.warning("Step times are measured again at the next start: %s.", problem)
        return False

    def _undisturbed(self, cell: tuple[int, int]) -> float:
        """The least time of all cells with these rows and at least these nodes: a longer time was disturbed."""
        rows, nodes = cell
        return min(ms for (b, n), ms in self._ms.items() if b == rows and n >= nodes)


def interpolated(known: list[tuple[int, float]], rows: int) -> float:
    """Milliseconds for `rows` rows, on the line through the two measured neighbours; past the last one, on the line
    through the last two. known: (rows, ms), ascending, at least one."""
    at = bisect_right(known, (rows, float("inf")))
    if at == 0 or len(known) == 1:
        return known[0][1]
    (a, first), (b, second) = known[at - 1 : at + 1] if at < len(known) else known[-2:]
    return max(1e-6, first + (second - first) * (rows - a) / (b - a))
