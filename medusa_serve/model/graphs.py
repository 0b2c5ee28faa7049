"""CUDA graphs of the whole step, one per (rows, shape, width, kind of sampling), captured on first use.

A Hugging Face forward launches hundreds of small kernels; from Python that takes ten times as long as running them.
Captured once and replayed, a step costs what the device needs. Capture happens on the batch manager's thread, between
steps, in thread-local mode: a notebook's main thread may use CUDA meanwhile (as transformers' own batching does).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .splitk import MAX_DIM, available

if TYPE_CHECKING:
    from .plan import Shape
    from .runner import ModelRunner

MIN_WIDTH = 256  # columns of keys read; doubled until the longest row fits


class StepGraphs:
    """Replays of runner.step over rows 0 … B-1, B a power of two; rows that do not decode are inactive."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        device = runner.device
        self._slots = torch.arange(runner.num_slots, device=device)
        self._active = torch.zeros(runner.num_slots, dtype=torch.bool, device=device)
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None
        cache = runner.forward.cache  # type: ignore[union-attr]
        self._device_lengths = available(device) and max(cache.keys.shape[-1], cache.values.shape[-1]) <= MAX_DIM

    def run(self, host_slots: list[int], width: int, shape: Shape, sampled: bool, filtered: bool) -> list[list[int]]:
        """One step of these slots; → their lines of runner.step's facts."""
        rows = _power_of_two(max(host_slots) + 1, self._runner.num_slots)
        columns = self._runner.tables.history.shape[1]
        # split-K attention reads lengths on the device: no width to choose, and one graph for all lengths
        width = columns if self._device_lengths else min(_power_of_two(max(width, MIN_WIDTH)), columns)
        key = (rows, width, shape, sampled, filtered)
        if key not in self._graphs:
            self._capture(key)
        graph, facts = self._graphs[key]
        wanted = torch.zeros(self._runner.num_slots, dtype=torch.bool)
        wanted[host_slots] = True
        self._active.copy_(wanted)
        graph.replay()
        lines = facts.tolist()
        return [lines[slot] for slot in host_slots]

    def _capture(self, key: tuple[int, int, Shape, bool, bool]) -> None:
        """With every row inactive, so that neither the warm-up nor the capture changes a sequence."""
        rows, width, shape, sampled, filtered = key
        runner = self._runner
        runner.activity = f"capturing a step of {rows} rows × {shape.num_nodes} nodes"
        try:
            self._active.zero_()
            slots, active = self._slots[:rows], self._active[:rows]
            everywhere = (slots, active, list(range(rows)), [0] * rows, width, shape, sampled, filtered)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    runner.step(*everywhere)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                facts = runner.step(*everywhere)
            self._pool = self._pool or graph.pool()
            self._graphs[key] = (graph, facts)
        finally:
            runner.activity = None

    def close(self) -> None:
        self._graphs.clear()
        del self._runner


def _power_of_two(least: int, most: int | None = None) -> int:
    size = 1 << (least - 1).bit_length()
    return size if most is None else min(size, most)
