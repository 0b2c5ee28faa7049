"""CUDA graphs of complete steps, one per (rows, shape, width, kind of sampling), captured on first use.

A Hugging Face forward launches hundreds of small kernels; from Python that takes ten times as long as running them.
A step that is captured once and replayed takes only the device's time. Capture happens on the batch manager's thread,
between steps, in thread-local mode: a notebook's main thread may use CUDA meanwhile (as transformers' own batching
does). If it breaks a capture by waiting for the entire device, that pass is captured later.

A capture pauses every sequence. So an idle engine captures ahead, and a step with more rows replaces a missing step
until its extra time has cost as much as the capture (the ski-rental rule).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch

from ...errors import CaptureFailed
from ..forward.prefill_blocks import MIN_BLOCKS, Packed, flat_size, pack, rows_for, views
from ..loading.process_lock import give_back, settle
from ..shapes import Shape
from ..tables import PLAIN, Needs
from ..timing import interpolated
from .capture import capture

log = logging.getLogger(__name__)
TRIES = 3  # captures of a pass that something else may break; then the pass runs without one
PREPARED, MOST_GRAPHS = 2048, 96  # limits of an idle engine's captures: rows x nodes of a step, and all graphs
FIRST_GRAPHS = 24  # of these graphs, how many without a request for them
PREFILL_BLOCKS = (8, 16, 32, 64)  # sizes of the prefill passes among these
MANY_BLOCKS = 32  # the least blocks of a prefill pass for many prompts
MIN_WIDTH = 256  # columns of keys read; doubled until the longest row fits


class StepGraphs:
    """Replays of a step over B rows, a power of two; rows that do not decode are inactive.

    A row can be any slot, so that a few sequences cost a few rows, whatever their slots are. Only where attention reads
    adjacent slots in place (no split-K kernel), row i is slot i."""

    def __init__(
        self,
        step: Callable[..., torch.Tensor],
        prefill: Callable[[Packed, int, Needs], torch.Tensor],
        *,
        device: torch.device,
        num_slots: int,
        columns: int,
        prefill_rows: int,
        reads_lengths: bool,
    ) -> None:
        """step, prefill: the functions to capture, as in step.Step · columns: of a slot · prefill_rows: most prompts
        of a pass · reads_lengths: whether attention reads lengths on the device (Kernels.reads_lengths)"""
        self._step, self._prefill = step, prefill
        self._device, self._num_slots, self._columns, self._prefill_rows = device, num_slots, columns, prefill_rows
        self._device_lengths = reads_lengths
        self.activity: str | None = None  # "capturing …" during a capture
        self._slots = torch.arange(num_slots, device=device)
        self._active = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self._there: Any = None  # the rows that those two hold now
        # a graph and the results that it writes; or, where capture failed, None and the function that computes them
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph | None, torch.Tensor | Callable[[], torch.Tensor]]] = {}
        self._inputs: dict[tuple[int, int], torch.Tensor] = {}  # of prefill passes, by blocks and rows
        self._seen: set[tuple[int, int, Needs]] = set()  # rows, width and needs of the steps that were requested
        self._failed: dict[Any, int] = {}  # how many captures of a pass something else broke
        self._owed: dict[Any, float] = {}  # extra ms of the steps that replaced a missing one
        self._capture_ms = 0.0  # of the last capture
        self._most = MOST_GRAPHS  # graphs that an idle engine captures; 0 after the memory was full
        self._pool: Any = None

    @property
    def packs(self) -> bool:
        """Whether prefill passes can be captured: their attention must read lengths on the device."""
        return self._device_lengths

    def rows(self, needed: int) -> int:
        """The rows of the captured step for this many."""
        return _power_of_two(needed, self._num_slots)

    def _key(self, rows: int, width: int, shape: Shape, needs: Needs) -> tuple[Any, ...]:
        """The key of a captured step, with rows and width rounded up."""
        rows, columns = self.rows(rows), self._columns
        # split-K attention reads lengths on the device: no width to choose, and one graph for all lengths
        width = columns if self._device_lengths else min(_power_of_two(max(width, MIN_WIDTH)), columns)
        return rows, width, shape, needs

    def run(
        self,
        host_slots: list[int],
        width: int,
        shape: Shape,
        needs: Needs,
        step_ms: Mapping[tuple[int, int], float],
        active: bool = True,
    ) -> torch.Tensor:
        """One step of these slots; → its results: a line for each slot, and others. The next step overwrites them.

        step_ms: known times by (B, N) · active False: a step that changes nothing"""
        needed = len(host_slots) if self._device_lengths else max(host_slots) + 1
        key = self._key(needed, width, shape, needs)
        self._seen.add((key[0], key[1], needs))
        if active and key not in self._graphs:
            key = self._stand_in(key, step_ms)
        rows = key[0]
        made: Callable[[], torch.Tensor] = partial(self._play, key)
        if active:
            made = self._had(key, partial(self._have, key), self._body(key), _step_name(key))
        else:
            self._have(key)
        self._put_rows(host_slots, rows, active)
        return made()

    def _put_rows(self, host_slots: list[int], rows: int, active: bool) -> None:
        """Copy the step's rows to the device, unless the last step had the same."""
        wanted = rows, active, host_slots
        if self._there == wanted:
            return
        self._there, order, chosen = None, self._order(host_slots, rows), set(host_slots)
        self._put(self._slots[:rows], torch.tensor(order))
        self._put(self._active[:rows], torch.tensor([active and slot in chosen for slot in order]))
        self._there = wanted

    def _body(self, key: tuple[int, int, Shape, Needs]) -> Callable[[], torch.Tensor]:
        rows, width, shape, needs = key
        slots, on = self._slots[:rows], self._active[:rows]
        return lambda: self._step(slots, on, list(range(rows)), [0] * rows, width, shape, needs)

    def _have(self, key: tuple[int, int, Shape, Needs]) -> None:
        """Capture the step unless that is done."""
        if key not in self._graphs:  # with every row inactive, neither warm-up nor capture changes a sequence
            self._active.zero_()
            self._there = None
            self._capture(key, self._body(key), _step_name(key))

    def _had(
        self, key: Any, have: Callable[[], None], body: Callable[[], torch.Tensor], what: str
    ) -> Callable[[], torch.Tensor]:
        """The function that computes a pass's results: its replay, or the pass kernel by kernel if its capture failed:
        always from now on if memory was too small or after TRIES failures, else this once."""
        try:
            have()
        except (torch.OutOfMemoryError, CaptureFailed) as error:
            if isinstance(error, CaptureFailed) and self._failed[key] < TRIES:
                return body
            log.warning("%s is not captured, and slower: %s", what.capitalize(), error)
            self._graphs[key] = (None, body)
        return partial(self._play, key)

    def _play(self, key: Any) -> torch.Tensor:
        graph, results = self._graphs[key]
        if graph is None:
            return results()  # type: ignore[operator]
        graph.replay()
        return results  # type: ignore[return-value]

    def _put(self, place: torch.Tensor, values: torch.Tensor) -> None:
        place.copy_(values.pin_memory(), non_blocking=True)

    def _stand_in(
        self, key: tuple[int, int, Shape, Needs], step_ms: Mapping[tuple[int, int], float]
    ) -> tuple[int, int, Shape, Needs]:
        """The captured step with the fewest more rows, until that has cost as much as a capture; else the step."""
        rows, *rest = key
        larger = [count for count, *others in self._graphs if others == rest and count > rows]
        if not larger or not step_ms:
            return key
        known = sorted((count, ms) for (count, n), ms in step_ms.items() if n == key[2].num_nodes)
        more = max(0.0, interpolated(known, min(larger)) - interpolated(known, rows))
        self._owed[key] = self._owed.get(key, 0.0) + more
        return key if self._owed[key] > self._capture_ms else (min(larger), *rest)

    def prepare(self, shapes: Iterable[Shape]) -> bool:
        """Capture one pass that may be needed; → whether there are more of them. All slots must be free: a capture
        would pause an answer that is being made."""
        ahead = self._ahead(list(shapes))
        make = next(ahead, None)
        if make is not None:
            try:
                make()
            except CaptureFailed as error:
                log.info("A capture is tried again later: %s", error)
            except torch.cuda.OutOfMemoryError as error:  # then each is captured when it is needed, and may fail there
                log.warning("Nothing is captured ahead any more: %s", error)
                self._most = 0
        return next(ahead, None) is not None

    def _ahead(self, shapes: list[Shape]) -> Iterator[Callable[[], None]]:
        """The captures to make: all shapes for rows that were seen; then for one row, all, powers of two between."""
        for rows, width, needs in sorted(self._seen):
            for shape in shapes:
                if self._is_due((rows, width, shape, needs), MOST_GRAPHS):
                    yield partial(self._have, (rows, width, shape, needs))
        if not self._device_lengths:
            return
        width, all_rows = self._columns, self._num_slots
        others = [1 << power for power in range(1, (all_rows - 1).bit_length())]
        for rows in dict.fromkeys([1, all_rows, *others]):
            for shape in shapes:
                if self._is_due((rows, width, shape, PLAIN), FIRST_GRAPHS):
                    yield partial(self._have, (rows, width, shape, PLAIN))
            for blocks in PREFILL_BLOCKS:
                most = self._prefill_rows
                counts = (1, most) if blocks >= MANY_BLOCKS else (1,)
                for rows in dict.fromkeys(rows_for(count, most) for count in counts):
                    if self._is_due(("prefill", blocks, rows, PLAIN), FIRST_GRAPHS):
                        yield partial(self._have_prefill, blocks, rows, PLAIN)

    def _is_due(self, key: tuple[Any, ...], most: int) -> bool:
        small = key[0] == "prefill" or key[0] * key[2].num_nodes <= PREPARED
        small = small and self._failed.get(key, 0) < TRIES
        return small and key not in self._graphs and len(self._graphs) < min(most, self._most)

    def time(self, rows: int, shape: Shape, repeats: int) -> float:
        """Milliseconds of a step of `rows` inactive slots."""
        self.run(list(range(rows)), self._columns, shape, PLAIN, {}, active=False)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph = self._graphs[self._key(rows, self._columns, shape, PLAIN)][0]
        assert graph is not None  # else `run` has raised
        times = []
        for _ in range(repeats):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return min(times)

    def _order(self, host_slots: list[int], rows: int) -> list[int]:
        """The slots of a step's rows, all different: these, then others that only fill the batch."""
        if not self._device_lengths:
            return list(range(rows))
        taken = set(host_slots)
        others = (slot for slot in range(self._num_slots) if slot not in taken)
        return [*host_slots, *islice(others, rows - len(host_slots))]

    def lines(self, host_slots: list[int]) -> list[int]:
        """Which lines of the results belong to these slots."""
        return list(range(len(host_slots))) if self._device_lengths else host_slots

    def prefill(self, packed: Packed, needs: Needs) -> torch.Tensor:
        """One packed prefill pass; → the results of its R rows, which the next pass overwrites."""
        blocks, rows = len(packed.slots), len(packed.rows)
        key, inputs = ("prefill", blocks, rows, needs), self._inputs_of(blocks, rows)
        have, body = partial(self._have_prefill, blocks, rows, needs), self._prefill_body(inputs, needs)
        made = self._had(key, have, body, f"a prefill of {blocks} blocks")
        self._put(inputs.flat, packed.flat)
        return made()

    def _inputs_of(self, blocks: int, rows: int) -> Packed:
        if (blocks, rows) not in self._inputs:
            empty = torch.empty(flat_size(blocks, rows), dtype=torch.int64, device=self._device)
            self._inputs[blocks, rows] = empty
        return views(self._inputs[blocks, rows], blocks, rows)

    def _prefill_body(self, inputs: Packed, needs: Needs) -> Callable[[], torch.Tensor]:
        return lambda: self._prefill(inputs, self._columns, needs)

    def _have_prefill(self, blocks: int, rows: int, needs: Needs) -> None:
        """Capture the pass unless that is done; as it has no prompt in it, it changes nothing."""
        key = ("prefill", blocks, rows, needs)
        if key not in self._graphs:
            inputs = self._inputs_of(blocks, rows)
            inputs.flat.copy_(pack([], rows, self._num_slots, least=blocks).flat)
            self._capture(key, self._prefill_body(inputs, needs), f"a prefill of {blocks} blocks")

    def blocks(self, least: int, rows: int, needs: Needs) -> int:
        """Blocks of a prefill pass that needs `least`: a captured size up to four times that, or a power of two."""
        least = max(MIN_BLOCKS, _power_of_two(least))
        sizes = (least, 2 * least, 4 * least)
        return next((size for size in sizes if ("prefill", size, rows, needs) in self._graphs), least)

    def _capture(self, key: Any, body: Callable[[], torch.Tensor], what: str) -> None:
        began = time.perf_counter()
        self.activity = f"capturing {what}"
        try:
            pool, self._pool = self._pool, None  # a pool in which a capture broke takes no other capture
            graph, results = capture(body, self._device, pool)
            self._pool = graph.pool()
            self._graphs[key] = (graph, results)
            self._owed.pop(key, None)
            self._capture_ms = (time.perf_counter() - began) * 1000
        except CaptureFailed:
            self._failed[key] = self._failed.get(key, 0) + 1
            raise
        finally:
            self.activity = None

    def drop(self) -> None:
        """Drop every capture, because the passes have changed. No step may be under way."""
        settle(self._device)
        self._graphs.clear()
        self._owed.clear()
        self._failed.clear()
        self._pool, self._most = None, MOST_GRAPHS  # a pool ends with its last graph
        give_back()

    def close(self) -> None:
        settle(self._device)  # a step may be under way
        self._graphs.clear()
        del self._step, self._prefill


def _step_name(key: tuple[int, int, Shape, Needs]) -> str:
    return f"a step of {key[0]} rows × {key[2].num_nodes} nodes"


def _power_of_two(least: int, most: int | None = None) -> int:
    size = 1 << (least - 1).bit_length()
    return size if most is None else min(size, most)
