"""How many nodes the next decode step verifies: as many as pay, by measured step times and live acceptance.

A step of B rows takes t(B, N) and emits Σ E_i(N) tokens. The N with the most tokens per second is taken, and N = 1
(plain decoding) is always a candidate (as in SmartSpec and Sequoia: Liu et al., 2406.14066; Chen et al., 2402.12374).
While many prompts are still being prefilled, their sequences wait for each step, so a step's time costs what they would
emit in it. t(B, N) is the device's time, or the host's where that is longer (many rows on a fast device, at any N).
E_i(N) is counted, not assumed: a tree's nodes are drafted best first, so one step shows what every smaller tree would
have accepted. For larger trees the calibrated curve is scaled to the live figure, until a probe measures them.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from itertools import chain
from typing import Any

import numpy as np

from ..model.timing import interpolated

KEEP = 1.03  # another N must promise this much more
RECHOOSE = 8  # steps between choices while the rows are about the same
CHANGED = 8  # the rows are not the same once one in this many is another
# steps until a probe: two steps with the next larger N, so that its figure stays live. The first of them still verifies
# the smaller tree and drafts the larger one
PROBE = 128
OWN_WEIGHT, ALL_WEIGHT = 16, 4  # steps after which live figures count as much as the expected ones
LIVE = 0.1  # share of a live step time in the next estimate of its N
SHARED_PACE, SHARED_LIVE = 0.2, 0.05  # on shared cores: of a live step time in all estimates, and in that of its own N
HOST_STEPS = 9  # the host's time is the median of this many steps: now and then it captures a step or collects garbage
HOST_BOUND = 0.25  # the device's time is not known from a step that waited for a smaller share of its time
OWN_DECAY, ALL_DECAY = 0.95, 0.999  # per step of a row, of what was counted before


class Gains:
    """Draft tokens that steps accepted, for each row and each of K tree sizes: decaying sums, all (rows, K).

    weight   steps in which a tree of that size was tried
    more     draft tokens that it accepted in them
    less     draft tokens that the next smaller tree would have accepted in the same steps: hard and easy text take
             turns, so only the same steps show what the larger tree gains"""

    __slots__ = ("decay", "less", "more", "weight")

    def __init__(self, rows: int, sizes: int, decay: float) -> None:
        self.more, self.less, self.weight = np.zeros((3, rows, sizes))
        self.decay = decay

    def forget(self, row: int) -> None:
        self.more[row] = self.less[row] = self.weight[row] = 0.0

    def note(self, rows: Any, more: np.ndarray, less: np.ndarray, steps: np.ndarray) -> None:
        """rows: B different row numbers · more, less, steps: (B, K), what these steps add"""
        kept = self.decay**steps
        for sums, new in ((self.more, more), (self.less, less), (self.weight, steps)):
            sums[rows] = sums[rows] * kept + new

    def curve(self, rows: Any, expected: np.ndarray, doubt: float) -> np.ndarray:
        """(B, K) tokens per step of these rows. expected (K): the prior, which counts as much as `doubt` steps. A size
        that was tried rarely takes its gain over the next smaller size from the prior."""
        more, less, weight = self.more[rows], self.less[rows], self.weight[rows]
        curve = np.ones_like(more)
        for size in range(1, len(expected)):
            known, smaller = doubt * (expected[size] - 1.0), doubt * (expected[size - 1] - 1.0)
            if smaller > 0.0:
                gain = (known + more[:, size]) / (smaller + less[:, size])
                curve[:, size] += (curve[:, size - 1] - 1.0) * gain
            else:
                curve[:, size] += (known + more[:, size]) / (doubt + weight[:, size])
        return curve


class NodeBudget:
    """Chooses among the runner's N for the rows of a step. Used by the engine thread."""

    def __init__(
        self,
        choices: Seq[int],
        step_ms: Mapping[tuple[int, int], float],
        expected: Seq[float],
        slots: int,
        *,
        shared: bool = False,
        step_rows: Callable[[int], int] = int,
    ) -> None:
        """choices: ascending, 1 first · step_ms: t(B, N) of some B for each N, B = 1 among them · expected: calibrated
        tokens per step of each N · slots: rows at most · shared: other programs use the same cores, and their load
        slows the steps of all N · step_rows: the number of rows that a step for B rows really runs"""
        self.choices, self._step_rows = tuple(choices), step_rows
        self._sizes = np.array(self.choices)
        self._expected = np.array([1.0, *expected[1:]])
        self._ms = _columns(step_ms, self.choices, slots)  # by N, then by B - 1
        self._pace = 1.0  # current times over those
        self._live = (SHARED_PACE, SHARED_LIVE) if shared else (0.0, LIVE)
        self._host_ms = [deque[float](maxlen=HOST_STEPS) for _ in range(_size(slots) + 1)]  # by _size(B)
        self._all, self._own = Gains(1, len(self.choices), ALL_DECAY), Gains(slots, len(self.choices), OWN_DECAY)
        self._now = 0  # index of the current choice
        self._rows: tuple[str, ...] = ()
        self._steps = self._since_probe = self._probing = 0

    def begin(self, slot: int) -> None:
        """Another sequence gets this slot."""
        self._own.forget(slot)

    def note(self, slots: Seq[int], held_by: Seq[Seq[int]], nodes: Seq[int]) -> None:
        """Count one step, for each row that speculates. held_by: for each accepted draft token, the smallest N with a
        tree that holds it · nodes: N of the tree that was drafted and verified"""
        if max(nodes, default=1) == 1:  # plain decoding shows nothing new
            return
        rows, sizes = len(slots), len(self.choices)
        row = np.repeat(np.arange(rows), [len(held) for held in held_by])
        first = np.searchsorted(self._sizes, np.fromiter(chain.from_iterable(held_by), np.int64))
        held = np.bincount(row * sizes + first, minlength=rows * sizes).reshape(rows, sizes)
        tried = (self._sizes <= np.array(nodes)[:, None]).astype(float)
        more, less = held.cumsum(axis=1) * tried, np.zeros((rows, sizes))
        less[:, 1:] = more[:, :-1] * tried[:, 1:]
        self._own.note(list(slots), more, less, tried)  # NumPy would read a tuple as one index
        self._all.note([0], *(part.sum(axis=0, keepdims=True) for part in (more, less, tried)))

    def note_time(self, rows: int, nodes: int, seconds: float, waited: float, *, no_prefill: bool = True) -> None:
        """Correct the times by a step that took `seconds`, of which the host waited `waited` for its outputs: other
        programs may have disturbed the measurement at the start, or may disturb all steps now.

        no_prefill: the host had no prefill pass to handle beside the step"""
        if no_prefill:
            self._host_ms[_size(rows)].append((seconds - waited) * 1000)
        if waited > HOST_BOUND * seconds:
            times, at = self._ms[self.choices.index(nodes)], self._at(rows)
            error = min(3.0, seconds * 1000 / (times[at] * self._pace)) - 1.0
            all_sizes, own_size = self._live
            self._pace *= 1.0 + all_sizes * error
            times[at] *= 1.0 + own_size * error

    def choose(self, rows: Iterable[tuple[str, int | None]], joining: int = 0) -> int:
        """N for these rows, (sequence id, slot) each; slot None: the row decodes plainly. joining: rows that will join
        once their prompts are prefilled"""
        rows = list(rows)
        ids = tuple(id for id, _ in rows)
        if self._probing:
            self._probing -= 1
            return self.choices[min(self._now + 1, len(self.choices) - 1)]
        if self._steps % RECHOOSE == 0 or self._changed(ids):
            self._rows, self._now = ids, self._best([slot for _, slot in rows], joining)
        self._steps += 1
        self._since_probe += 1
        if self._since_probe >= PROBE and any(slot is not None for _, slot in rows):
            self._since_probe, self._probing = 0, 2
        return self.choices[self._now]

    def _changed(self, ids: tuple[str, ...]) -> bool:
        """Whether the rows are no longer about those of the last choice."""
        before = self._rows
        return ids != before and CHANGED * len(set(ids).symmetric_difference(before)) >= len(ids)

    def _best(self, rows: list[int | None], joining: int) -> int:
        """The index of the N with the most tokens beyond what the same time is worth. Where rows join, time is worth
        the speed of all rows together, because all of them wait for this step."""
        tokens, times = self._tokens(rows), self._times(len(rows))
        together = len(rows) + joining
        worth = tokens - times * (tokens / self._times(together)).max() * together / len(rows)
        best = int(worth.argmax())
        enough = (1.0 - 1.0 / KEEP) * tokens[self._now]
        return best if worth[best] - worth[self._now] > enough else self._now

    def _tokens(self, rows: list[int | None]) -> np.ndarray:
        """(K) tokens of a step."""
        slots = [slot for slot in rows if slot is not None]
        everybody = self._all.curve([0], self._expected, ALL_WEIGHT)[0]
        return self._own.curve(slots, everybody, OWN_WEIGHT).sum(axis=0) + (len(rows) - len(slots))

    def _times(self, rows: int) -> np.ndarray:
        """(K) milliseconds of a step."""
        at, seen = self._at(rows), self._host_ms[_size(rows)]
        host_ms = statistics.median(seen) if len(seen) > HOST_STEPS // 2 else 0.0
        return np.array([max(times[at] * self._pace, host_ms) for times in self._ms])

    def _at(self, rows: int) -> int:
        return min(self._step_rows(rows), len(self._ms[0])) - 1


def _size(rows: int) -> int:
    """The power of two that holds this many rows; the host needs about the same time for all numbers up to it."""
    return (rows - 1).bit_length()


def _columns(step_ms: Mapping[tuple[int, int], float], choices: Seq[int], slots: int) -> list[list[float]]:
    """Milliseconds of 1 … slots rows, for each N, by linear interpolation and extrapolation of the measured times. An N
    that was measured for one row only grows with the rows as the next smaller N does."""
    columns: list[list[float]] = []
    for nodes in choices:
        known = sorted((rows, ms) for (rows, n), ms in step_ms.items() if n == nodes)
        found = [interpolated(known, rows) for rows in range(1, slots + 1)]
        if len(known) == 1 and columns:
            found = [known[0][1] * ms / columns[-1][0] for ms in columns[-1]]
        columns.append(found)
    return columns
