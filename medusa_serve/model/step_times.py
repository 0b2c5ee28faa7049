"""t(B, N): what a decode step of B rows with trees of N nodes takes on this machine, measured once and kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .formats import SMALL
from .measured import machine_key, recall, remember

if TYPE_CHECKING:
    from .runner import ModelRunner

ROWS = {"cpu": (1, 4, 8), "cuda": (1, 8, 64)}  # between and past them, times lie on lines
MOST = {"cpu": 32, "cuda": 2048}  # rows x nodes of a step that is measured


def worth_timing(runner: ModelRunner, weights: int) -> bool:
    """Whether there is a choice of N that a measurement could make better."""
    return len(runner.node_choices) > 2 and (runner.device.type == "cuda" or weights > SMALL)


def time_steps(runner: ModelRunner, what: str, cache: Path) -> str:
    """Fill `runner.step_ms`, from the cache where this machine measured `what` before; → a note. All slots must be
    free."""
    rows = sorted({min(count, runner.num_slots) for count in ROWS[runner.device.type]})
    cells = [(b, n) for b in rows for n in runner.node_choices if b == 1 or b * n <= MOST[runner.device.type]]
    key = f"steps of {what}, {runner.num_slots} slots of {runner.max_context}: {machine_key(str(runner.device))}"
    known = recall(cache, key)
    if isinstance(known, dict) and set(known) == {f"{b}x{n}" for b, n in cells}:
        runner.step_ms = {(b, n): float(known[f"{b}x{n}"]) for b, n in cells}
        return "steps were timed at an earlier start"
    runner.step_ms = {(b, n): runner.time_step(b, n) for b, n in cells}
    kept = remember(cache, key, {f"{b}x{n}": round(ms, 4) for (b, n), ms in runner.step_ms.items()})
    one = ", ".join(f"{n}: {runner.step_ms[1, n]:.1f}" for n in runner.node_choices)
    return f"steps timed (one row, ms by nodes: {one})" + (f"; {kept}" if kept else "")
