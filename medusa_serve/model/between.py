"""Times of steps that were not measured, from those that were. No tensors."""

from __future__ import annotations

from bisect import bisect_right


def between(known: list[tuple[int, float]], rows: int) -> float:
    """Milliseconds of `rows` rows, on the line between the two measured neighbours; past the last one, through it and
    the one before. known: (rows, ms), ascending, at least one."""
    at = bisect_right(known, (rows, float("inf")))
    if at == 0 or len(known) == 1:
        return known[0][1]
    (a, first), (b, second) = known[at - 1 : at + 1] if at < len(known) else known[-2:]
    return max(1e-6, first + (second - first) * (rows - a) / (b - a))
