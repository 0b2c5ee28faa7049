"""A CPU's greedy step around the model's pass, as Numba kernels: gpu/step.py's three functions, with the same names and
results, instead of torch's hundred small operations. After a pass has read all weights, each of those operations takes
three times its usual time.
"""

from __future__ import annotations

from ctypes import addressof
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ..drafting.lookup import MAX_NGRAM, MIN_NGRAM
from ..drafting.tree import HeadNodes
from ..tables import FACTS, Closed, Opened
from .base import OPTIONS, pointer, record, record_at
from .search import native_continue

if TYPE_CHECKING:
    from ..shapes import Shape
    from ..tables import SlotTables

# addresses and sizes of SlotTables, in `_tables_of`'s order
TABLES = (
    "history lengths totals eos limits head_tokens head_parents head_depths found_tokens "
    "num_slots columns num_eos width chain "
)
# per_node, per_row, on: the tensors that hold an Opened's fields
Opening = record(TABLES + "slots active per_node per_row on rows nodes num_lookup")
OPENING = np.dtype(Opening)
# results: for each row a line for the host, then tokens and path · rest: drop all drafts and look nothing up
Closing = record(
    TABLES + "slots active before tokens parents drafted picked usable results per_row rows nodes depths rest"
)
CLOSING = np.dtype(Closing)
Keeping = record(TABLES + "slots active tokens parents depths results rows num_results count ready")
KEEPING = np.dtype(Keeping)


def _tables_of(tables: SlotTables) -> tuple[int, ...]:
    heads, history, lookup = tables.heads, tables.history, tables.lookup
    tensors = history, tables.length, tables.total, tables.eos, tables.node_limit, *heads, lookup
    sizes = *history.shape, tables.eos.shape[1], heads.tokens.shape[1], lookup.shape[1]
    return *(tensor.data_ptr() for tensor in tensors), *sizes


def open_step(tables: SlotTables, slots: Tensor, active: Tensor, shape: Shape) -> Opened:
    rows, nodes = slots.shape[0], shape.num_nodes
    per_node = torch.empty(5, rows, nodes, dtype=torch.int64)
    per_row, on = torch.empty(2, rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    task = Opening(*_tables_of(tables), rows=rows, nodes=nodes, num_lookup=shape.num_lookup)
    task.slots, task.active, task.on = slots.data_ptr(), active.data_ptr(), on.data_ptr()
    task.per_node, task.per_row = per_node.data_ptr(), per_row.data_ptr()
    _open(addressof(task))
    tokens, parents, positions, columns, bits = per_node.unbind()
    return Opened(tokens, parents, positions, columns, bits, per_row[0], on, per_row[1])


def close_step(
    tables: SlotTables, slots: Tensor, opened: Opened, picked: Tensor, best: Tensor, max_depth: int, *, rest: bool
) -> Closed:
    (rows, nodes), depths = picked.shape, max_depth + 1
    results = torch.empty(rows, FACTS + 2 * depths, dtype=torch.int64)
    per_row, usable = torch.empty(3, rows, dtype=torch.int64), best.isfinite()
    task = Closing(*_tables_of(tables), rows=rows, nodes=nodes, depths=depths, rest=rest)
    task.slots, task.active, task.before = slots.data_ptr(), opened.active.data_ptr(), opened.length.data_ptr()
    task.tokens, task.parents, task.drafted = (
        opened.tokens.data_ptr(), opened.parents.data_ptr(), opened.drafted.data_ptr(),
    )  # fmt: skip
    task.picked, task.usable = picked.data_ptr(), usable.data_ptr()
    task.results, task.per_row = results.data_ptr(), per_row.data_ptr()
    _close(addressof(task))
    return Closed(results, results[:, FACTS + depths :], *per_row)


def keep_heads(tables: SlotTables, slots: Tensor, active: Tensor, heads: HeadNodes, facts: Tensor, ready: int) -> None:
    tokens, parents, depths = (part if part.is_contiguous() else part.contiguous() for part in heads)
    rows, num_results = facts.shape
    task = Keeping(*_tables_of(tables), rows=rows, num_results=num_results, count=tokens.shape[1], ready=ready)
    task.slots, task.active, task.results = slots.data_ptr(), active.data_ptr(), facts.data_ptr()
    task.tokens, task.parents, task.depths = tokens.data_ptr(), parents.data_ptr(), depths.data_ptr()
    _keep(addressof(task))


@njit(inline="always", **OPTIONS)
def _table(address, rows, columns):
    return carray(pointer(address), (rows, columns), np.int64)


@njit(inline="always", **OPTIONS)
def _column(address, rows):
    return carray(pointer(address), (rows,), np.int64)


@njit(inline="always", **OPTIONS)
def _flags(address, rows):
    return carray(pointer(address), (rows,), np.bool_)


@njit(cache=True, **OPTIONS)
def _open(task_at):
    task = record_at(task_at, OPENING)
    rows, nodes, num_slots, width = task.rows, task.nodes, task.num_slots, task.width
    slots, active, on = _column(task.slots, rows), _flags(task.active, rows), _flags(task.on, rows)
    history, eos = _table(task.history, num_slots, task.columns), _table(task.eos, num_slots, task.num_eos)
    lengths, totals = _column(task.lengths, num_slots), _column(task.totals, num_slots)
    limits, found = _column(task.limits, num_slots), _table(task.found_tokens, num_slots, task.chain)
    head_tokens, head_parents = _table(task.head_tokens, num_slots, width), _table(task.head_parents, num_slots, width)
    head_depths, per_row = _table(task.head_depths, num_slots, width), _table(task.per_row, 2, rows)
    per_node = carray(pointer(task.per_node), (5, rows, nodes), np.int64)
    tokens, parents, positions, columns, bits = per_node[0], per_node[1], per_node[2], per_node[3], per_node[4]
    num_eos, first = task.num_eos, nodes - task.num_lookup
    for row in range(rows):
        slot = slots[row]
        length, drafted = lengths[slot], 0
        pending = history[slot, length]
        over = length + 1 >= totals[slot]
        for end in range(num_eos):
            over = over or eos[slot, end] == pending
        for n in range(nodes):
            if n == 0:
                token, parent, depth, seen = pending, 0, 0, np.int64(1)
            else:
                if n < first:
                    token, parent, depth = head_tokens[slot, n - 1], head_parents[slot, n - 1], head_depths[slot, n - 1]
                else:
                    token, parent, depth = found[slot, n - first], 0 if n == first else n - 1, n - first + 1
                seen = bits[row, parent] | (np.int64(1) << n)
            token = token if n < limits[slot] else -1
            drafted += n > 0 and token >= 0
            tokens[row, n], parents[row, n], bits[row, n] = token, parent, seen
            positions[row, n], columns[row, n] = length + depth, length + n
        per_row[0, row], per_row[1, row] = length, drafted
        on[row] = active[row] and not over


@njit(cache=True, **OPTIONS)
def _close(task_at):
    task = record_at(task_at, CLOSING)
    rows, nodes, depths, rest, num_slots = task.rows, task.nodes, task.depths, task.rest, task.num_slots
    columns, num_eos, chain = task.columns, task.num_eos, task.chain
    slots, active = _column(task.slots, rows), _flags(task.active, rows)
    before, drafted = _column(task.before, rows), _column(task.drafted, rows)
    tokens, parents = _table(task.tokens, rows, nodes), _table(task.parents, rows, nodes)
    picked, usable = _table(task.picked, rows, nodes), carray(pointer(task.usable), (rows, nodes), np.bool_)
    history, eos = _table(task.history, num_slots, columns), _table(task.eos, num_slots, num_eos)
    lengths, totals = _column(task.lengths, num_slots), _column(task.totals, num_slots)
    found, head_tokens = _table(task.found_tokens, num_slots, chain), _table(task.head_tokens, num_slots, task.width)
    results, per_row = _table(task.results, rows, FACTS + 2 * depths), _table(task.per_row, 3, rows)
    alive = np.empty(nodes, np.bool_)
    for row in range(rows):
        slot, line = slots[row], results[row]
        emitted_tokens, path = line[FACTS : FACTS + depths], line[FACTS + depths :]
        emitted_tokens[:], path[:] = -1, 0
        alive[:] = False
        alive[0] = True
        node, emitted, finished, finite, last = 0, 0, False, True, 0
        while emitted < depths:
            token = picked[row, node]
            emitted_tokens[emitted], path[emitted], last = token, node, node
            finite = finite and usable[row, node]
            emitted += 1
            finished = before[row] + emitted + 1 >= totals[slot]
            for end in range(num_eos):
                finished = finished or eos[slot, end] == token
            node = -1
            for n in range(nodes - 1, 0, -1):  # backwards, to read a parent's flag before it is overwritten
                alive[n] = alive[parents[row, n]] and tokens[row, n] == token
                node = n if alive[n] else node
            alive[0] = False
            if finished or node < 0 or not finite:
                break
        count, length = emitted if active[row] and finite else 0, before[row]
        for i in range(count):
            history[slot, min(length + 1 + i, columns - 1)] = emitted_tokens[i]
        length += count
        lengths[slot] = length
        line[0], line[1], line[2], line[3], line[4] = count, finished, finite, drafted[row], 0
        per_row[0, row], per_row[1, row], per_row[2, row] = last, length, history[slot, length]
        if active[row]:
            found[slot] = -1
            if rest:
                head_tokens[slot] = -1
        if not rest and chain:
            line[4] = native_continue(history[slot], length, found[slot], active[row], MAX_NGRAM, MIN_NGRAM)


@njit(cache=True, **OPTIONS)
def _keep(task_at):
    task = record_at(task_at, KEEPING)
    rows, count, num_slots, width, ready = task.rows, task.count, task.num_slots, task.width, task.ready
    slots, active = _column(task.slots, rows), _flags(task.active, rows)
    tokens, parents = _table(task.tokens, rows, count), _table(task.parents, rows, count)
    depths, results = _table(task.depths, rows, count), _table(task.results, rows, task.num_results)
    to_tokens, to_parents = _table(task.head_tokens, num_slots, width), _table(task.head_parents, num_slots, width)
    to_depths = _table(task.head_depths, num_slots, width)
    for row in range(rows):
        slot, some = slots[row], False
        for n in range(count):
            some = some or tokens[row, n] >= 0
        if some:
            results[row, 4] = max(results[row, 4], ready)
        for n in range(width if active[row] else 0):
            there = n < count
            to_tokens[slot, n] = tokens[row, n] if there else -1
            to_parents[slot, n], to_depths[slot, n] = parents[row, n] if there else 0, depths[row, n] if there else 0
