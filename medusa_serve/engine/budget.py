"""How many nodes the next decode step verifies: as many as pay, by measured step times and live acceptance.

A step of B rows takes t(B, N) and emits Σ E_i(N) tokens: the N with the most tokens per second is taken, N = 1 (plain
decoding) always among them (as in SmartSpec and Sequoia: Liu et al., 2406.14066; Chen et al., 2402.12374). t(B, N) is
what the device needs, or the host where that needs more: with many rows on a fast device, whatever N is. E_i(N) is
counted, not assumed: a tree's nodes are drafted best first, so one step tells what every smaller tree would have
accepted. What a larger one would is the calibrated curve through the live figure, until a probe looks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from ..model.between import between

KEEP = 1.03  # another N must promise so much more
RECHOOSE = 8  # steps: as long as the rows are the same, the choice stands
PROBE = 128  # steps: then two with more nodes than pay are made, so that their figure stays a live one; the first one
# has a smaller tree to verify and drafts the larger one
OWN_WEIGHT, ALL_WEIGHT = 16, 4  # steps after which live figures count as much as what was expected without them
LIVE = 0.1  # share of a live step time in the next estimate
HOST_BOUND = 0.25  # a step whose outputs took less than this part of its time does not tell the device's
OWN_DECAY, ALL_DECAY = 0.95, 0.999  # of what was counted, each step of a row


class Gains:
    """Tokens per step by size of tree, of one sequence or of all: sums that forget."""

    __slots__ = ("decay", "tokens", "weight")

    def __init__(self, sizes: int, decay: float) -> None:
        self.tokens, self.weight, self.decay = [0.0] * sizes, [0.0] * sizes, decay

    def note(self, counts: Seq[int]) -> None:
        """counts[k]: tokens that a tree of the k-th size would have emitted in one step; larger ones were not tried."""
        tried, decay = len(counts), self.decay
        self.tokens[:tried] = [old * decay + count for old, count in zip(self.tokens, counts, strict=False)]
        self.weight[:tried] = [old * decay + 1.0 for old in self.weight[:tried]]


class NodeBudget:
    """Chooses among the runner's N for the rows of a step. The engine thread's."""

    def __init__(
        self, choices: Seq[int], step_ms: Mapping[tuple[int, int], float], expected: Seq[float], slots: int
    ) -> None:
        """choices: ascending, 1 first · step_ms: t(B, N) of some B for each N, B = 1 among them · expected: tokens per
        step of each N, as calibrated · slots: rows at most"""
        self.choices = tuple(choices)
        self._expected = [1.0, *expected[1:]]
        times = [sorted((rows, ms) for (rows, n), ms in step_ms.items() if n == nodes) for nodes in self.choices]
        self._ms = [[between(known, rows) for rows in range(1, slots + 1)] for known in times]  # by N, then by B - 1
        self._host_ms = [0.0] * (slots.bit_length() + 1)  # of a step, by the binary digits of B; 0.0 while unknown
        self._all = Gains(len(self.choices), ALL_DECAY)
        self._now = 0  # which choice
        self._rows: tuple[str, ...] = ()
        self._steps = self._since_probe = self._probing = 0

    def own(self) -> Gains:
        """For a new sequence."""
        return Gains(len(self.choices), OWN_DECAY)

    def note(self, own: Gains, accepted_by: Seq[int], nodes: int) -> None:
        """One step of a row. accepted_by: for each accepted draft token, the smallest N whose tree holds it · nodes: of
        the tree that was drafted and verified"""
        counts = [1] * bisect_right(self.choices, nodes)
        for smallest in accepted_by:
            for size in range(self.choices.index(smallest), len(counts)):
                counts[size] += 1
        own.note(counts)
        self._all.note(counts)

    def note_time(self, rows: int, nodes: int, seconds: float, waited: float) -> None:
        """What a step really took, and how much of it went by until its outputs were there: a busy neighbour may have
        disturbed the measurement at the start."""
        at, size = min(rows, len(self._ms[0])) - 1, rows.bit_length()
        host, before = (seconds - waited) * 1000, self._host_ms[size]
        self._host_ms[size] += (LIVE if before else 1.0) * (min(host, 3 * before or host) - before)
        if waited > HOST_BOUND * seconds:
            times = self._ms[self.choices.index(nodes)]
            times[at] += LIVE * (min(seconds * 1000, 3 * times[at]) - times[at])

    def choose(self, rows: Iterable[tuple[str, Gains | None]]) -> int:
        """N for the rows (whose, and its gains; None: a row that decodes plainly)."""
        rows = list(rows)
        whose = tuple(name for name, _ in rows)
        if self._probing:
            self._probing -= 1
            return self.choices[min(self._now + 1, len(self.choices) - 1)]
        if whose != self._rows or self._steps % RECHOOSE == 0:
            self._rows, self._now = whose, self._best([gains for _, gains in rows])
        self._steps += 1
        self._since_probe += 1
        if self._since_probe >= PROBE and any(gains is not None for _, gains in rows):
            self._since_probe, self._probing = 0, 2
        return self.choices[self._now]

    def _best(self, rows: list[Gains | None]) -> int:
        speeds = self.speeds(rows)
        best = max(range(len(speeds)), key=speeds.__getitem__)
        return best if speeds[best] > KEEP * speeds[self._now] else self._now

    def speeds(self, rows: list[Gains | None]) -> list[float]:
        """Tokens per millisecond of these rows at each N."""
        plain = sum(gains is None for gains in rows)
        curve = self._curve(self._all, [])
        totals = [float(plain)] * len(self.choices)
        for gains in rows:
            if gains is not None:
                for size, expected in enumerate(self._curve(gains, curve)):
                    totals[size] += expected
        at, host_ms = min(len(rows), len(self._ms[0])) - 1, self._host_ms[len(rows).bit_length()]
        return [total / max(self._ms[size][at], host_ms) for size, total in enumerate(totals)]

    def _curve(self, gains: Gains, among: list[float]) -> list[float]:
        """Tokens per step at each N: of one sequence among all (`among`, all of theirs), or of all among what was
        calibrated. Sizes that were tried little follow the curve behind them."""
        prior, doubt, curve = (among, OWN_WEIGHT, [1.0]) if among else (self._expected, ALL_WEIGHT, [1.0])
        for size in range(1, len(self.choices)):
            step = (curve[-1] - 1.0) / (prior[size - 1] - 1.0) if prior[size - 1] > 1.0 else 1.0
            guess = 1.0 + (prior[size] - 1.0) * step
            curve.append((guess * doubt + gains.tokens[size]) / (doubt + gains.weight[size]))
        return curve
