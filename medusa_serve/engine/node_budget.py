"""How many nodes the next decode step verifies: as many as pay, by measured step times and live acceptance.

A step of B rows takes t(B, N) and emits Σ E_i(N) tokens: the N with the most tokens per second is taken, N = 1 (plain
decoding) always among them (as in SmartSpec and Sequoia: Liu et al., 2406.14066; Chen et al., 2402.12374). Where many
prompts are still being read, a step's time is time in which all of them wait: it costs what they will emit. t(B, N) is
what the device needs, or the host where that needs more: with many rows on a fast device, whatever N is. E_i(N) is
counted, not assumed: a tree's nodes are drafted best first, so one step tells what every smaller tree would have
accepted. What a larger one would is the calibrated curve through the live figure, until a probe looks.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from itertools import chain
from typing import Any

import numpy as np

from ..model.between import between

KEEP = 1.03  # another N must promise so much more
RECHOOSE = 8  # steps: as long as the rows are about the same, the choice stands
CHANGED = 8  # they are not once every so many-th is another
PROBE = 128  # steps: then two with more nodes than pay are made, so that their figure stays a live one; the first one
# has a smaller tree to verify and drafts the larger one
OWN_WEIGHT, ALL_WEIGHT = 16, 4  # steps after which live figures count as much as what was expected without them
LIVE = 0.1  # share of a live step time in the next estimate of its N
SHARED_PACE, SHARED_LIVE = 0.2, 0.05  # on cores that others use: in all estimates, and in that of its N beside
HOST_STEPS = 9  # the last ones, whose median is what the host needs: now and then it captures a step, or tidies up
HOST_BOUND = 0.25  # a step whose outputs took less than this part of its time does not tell the device's
OWN_DECAY, ALL_DECAY = 0.95, 0.999  # of what was counted, each step of a row


class Gains:
    """Draft tokens that steps accepted, by size of tree (K sizes), of each of some rows: sums that forget. weight:
    steps in which a tree of that size was tried · more: what it accepted then · less: what one of the next smaller size
    would have, in the same steps: hard tokens and easy ones come in turns, so that no others tell what a larger tree
    gains. All (rows, K)."""

    __slots__ = ("decay", "less", "more", "weight")

    def __init__(self, rows: int, sizes: int, decay: float) -> None:
        self.more, self.less, self.weight = np.zeros((3, rows, sizes))
        self.decay = decay

    def forget(self, row: int) -> None:
        self.more[row] = self.less[row] = self.weight[row] = 0.0

    def note(self, rows: Any, more: np.ndarray, less: np.ndarray, steps: np.ndarray) -> None:
        """rows: which, B different ones · the others (B, K): what these steps add"""
        kept = self.decay**steps
        for sums, new in ((self.more, more), (self.less, less), (self.weight, steps)):
            sums[rows] = sums[rows] * kept + new

    def curve(self, rows: Any, among: np.ndarray, doubt: float) -> np.ndarray:
        """(B, K) tokens per step. among (K): what is expected without them, which counts as much as `doubt` steps.
        Sizes that were tried little follow the curve behind them."""
        more, less, weight = self.more[rows], self.less[rows], self.weight[rows]
        curve = np.ones_like(more)
        for size in range(1, len(among)):
            known, behind = doubt * (among[size] - 1.0), doubt * (among[size - 1] - 1.0)
            if behind > 0.0:
                gain = (known + more[:, size]) / (behind + less[:, size])
                curve[:, size] += (curve[:, size - 1] - 1.0) * gain
            else:
                curve[:, size] += (known + more[:, size]) / (doubt + weight[:, size])
        return curve


class NodeBudget:
    """Chooses among the runner's N for the rows of a step. The engine thread's."""

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
        """choices: ascending, 1 first · step_ms: t(B, N) of some B for each N, B = 1 among them · expected: tokens per
        step of each N, as calibrated · slots: rows at most · shared: steps run on cores that others use too, whose load
        slows those of all N · step_rows: rows of the step that is made for so many"""
        self.choices, self._step_rows = tuple(choices), step_rows
        self._sizes = np.array(self.choices)
        self._expected = np.array([1.0, *expected[1:]])
        self._ms = _columns(step_ms, self.choices, slots)  # by N, then by B - 1
        self._pace = 1.0  # times now over those
        self._live = (SHARED_PACE, SHARED_LIVE) if shared else (0.0, LIVE)
        self._host_ms = [deque[float](maxlen=HOST_STEPS) for _ in range(_size(slots) + 1)]  # by _size(B)
        self._all, self._own = Gains(1, len(self.choices), ALL_DECAY), Gains(slots, len(self.choices), OWN_DECAY)
        self._now = 0  # which choice
        self._rows: tuple[str, ...] = ()
        self._steps = self._since_probe = self._probing = 0

    def begin(self, slot: int) -> None:
        """Another sequence has it now."""
        self._own.forget(slot)

    def note(self, slots: Seq[int], held_by: Seq[Seq[int]], nodes: Seq[int]) -> None:
        """One step, a line for each row that speculates. held_by: for each accepted draft token, the smallest N whose
        tree holds it · nodes: of the tree that was drafted and verified"""
        if max(nodes, default=1) == 1:  # nothing that was not known
            return
        rows, sizes = len(slots), len(self.choices)
        row = np.repeat(np.arange(rows), [len(held) for held in held_by])
        first = np.searchsorted(self._sizes, np.fromiter(chain.from_iterable(held_by), np.int64))
        held = np.bincount(row * sizes + first, minlength=rows * sizes).reshape(rows, sizes)
        tried = (self._sizes <= np.array(nodes)[:, None]).astype(float)
        more, less = held.cumsum(axis=1) * tried, np.zeros((rows, sizes))
        less[:, 1:] = more[:, :-1] * tried[:, 1:]
        self._own.note(list(slots), more, less, tried)  # a tuple would be one place of several dimensions
        self._all.note([0], *(part.sum(axis=0, keepdims=True) for part in (more, less, tried)))

    def note_time(self, rows: int, nodes: int, seconds: float, waited: float, *, alone: bool = True) -> None:
        """What a step really took, and how much of it went by until its outputs were there: a busy neighbour may have
        disturbed the measurement at the start, or may disturb all steps now. alone: the host had no prefill pass to see
        to beside it"""
        if alone:
            self._host_ms[_size(rows)].append((seconds - waited) * 1000)
        if waited > HOST_BOUND * seconds:
            times, at = self._ms[self.choices.index(nodes)], self._at(rows)
            error = min(3.0, seconds * 1000 / (times[at] * self._pace)) - 1.0
            of_all, of_its_own = self._live
            self._pace *= 1.0 + of_all * error
            times[at] *= 1.0 + of_its_own * error

    def choose(self, rows: Iterable[tuple[str, int | None]], joining: int = 0) -> int:
        """N for the rows (whose, and its slot; None: a row that decodes plainly). joining: rows that will decode with
        them as soon as their prompts are read"""
        rows = list(rows)
        whose = tuple(name for name, _ in rows)
        if self._probing:
            self._probing -= 1
            return self.choices[min(self._now + 1, len(self.choices) - 1)]
        if self._steps % RECHOOSE == 0 or self._others(whose):
            self._rows, self._now = whose, self._best([slot for _, slot in rows], joining)
        self._steps += 1
        self._since_probe += 1
        if self._since_probe >= PROBE and any(slot is not None for _, slot in rows):
            self._since_probe, self._probing = 0, 2
        return self.choices[self._now]

    def _others(self, whose: tuple[str, ...]) -> bool:
        """Whether these are not the rows of the last choice any more."""
        before = self._rows
        return whose != before and CHANGED * len(set(whose).symmetric_difference(before)) >= len(whose)

    def _best(self, rows: list[int | None], joining: int) -> int:
        """The most tokens beyond what the same time is worth: where others join, at the speed of all of them, as all
        wait for this step."""
        tokens, times = self._tokens(rows), self._times(len(rows))
        together = len(rows) + joining
        worth = tokens - times * (tokens / self._times(together)).max() * together / len(rows)
        best = int(worth.argmax())
        enough = (1.0 - 1.0 / KEEP) * tokens[self._now]
        return best if worth[best] - worth[self._now] > enough else self._now

    def _tokens(self, rows: list[int | None]) -> np.ndarray:
        """(K) of a step."""
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
    """Which of the numbers of rows between powers of two: what the host needs for one tells of the others."""
    return (rows - 1).bit_length()


def _columns(step_ms: Mapping[tuple[int, int], float], choices: Seq[int], slots: int) -> list[list[float]]:
    """Milliseconds of 1 … slots rows, of each N: on lines between and past what was measured. Where that is one row
    alone, more of them cost as with the next smaller N."""
    columns: list[list[float]] = []
    for nodes in choices:
        known = sorted((rows, ms) for (rows, n), ms in step_ms.items() if n == nodes)
        found = [between(known, rows) for rows in range(1, slots + 1)]
        if len(known) == 1 and columns:
            found = [known[0][1] * ms / columns[-1][0] for ms in columns[-1]]
        columns.append(found)
    return columns
