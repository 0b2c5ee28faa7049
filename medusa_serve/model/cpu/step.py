"""What stands around a CPU's greedy step as kernels of Numba: fused_step.py's three, by the same names and with the
same results, where torch would take a hundred small operations. Behind a pass that went through the weights each of
these costs three times what it costs alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ..drafting.lookup import MAX_NGRAM, MIN_NGRAM
from ..drafting.tree import HeadNodes
from ..tables import FACTS, Closed, Opened
from .base import OPTIONS, pointer
from .search import native_continue

if TYPE_CHECKING:
    from ..shapes import Shape
    from ..tables import SlotTables


def open_step(tables: SlotTables, slots: Tensor, active: Tensor, shape: Shape) -> Opened:
    rows, nodes, heads = slots.shape[0], shape.num_nodes, tables.heads
    whole = torch.empty(5, rows, nodes, dtype=torch.int64)
    each, on = torch.empty(2, rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    _open(
        slots.data_ptr(), active.data_ptr(), tables.history.data_ptr(), tables.length.data_ptr(),
        tables.total.data_ptr(), tables.eos.data_ptr(), tables.node_limit.data_ptr(),
        heads.tokens.data_ptr(), heads.parents.data_ptr(), heads.depths.data_ptr(), tables.lookup.data_ptr(),
        whole.data_ptr(), each.data_ptr(), on.data_ptr(),
        *tables.history.shape, tables.eos.shape[1], heads.tokens.shape[1], tables.lookup.shape[1],
        rows, nodes, shape.num_lookup,
    )  # fmt: skip
    return Opened(whole[0], whole[1], whole[2], whole[3], whole[4], each[0], on, each[1])


def close_step(
    tables: SlotTables, slots: Tensor, opened: Opened, picked: Tensor, best: Tensor, max_depth: int, *, rest: bool
) -> Closed:
    (rows, nodes), heads = picked.shape, tables.heads
    facts = torch.empty(rows, FACTS + 2 * (max_depth + 1), dtype=torch.int64)
    each = torch.empty(3, rows, dtype=torch.int64)
    usable = best.isfinite()
    _close(
        slots.data_ptr(), opened.active.data_ptr(), opened.length.data_ptr(), opened.tokens.data_ptr(),
        opened.parents.data_ptr(), opened.drafted.data_ptr(), picked.data_ptr(), usable.data_ptr(),
        tables.history.data_ptr(), tables.length.data_ptr(), tables.total.data_ptr(), tables.eos.data_ptr(),
        tables.lookup.data_ptr(), heads.tokens.data_ptr(), facts.data_ptr(), each.data_ptr(),
        *tables.history.shape, tables.eos.shape[1], heads.tokens.shape[1], tables.lookup.shape[1],
        rows, nodes, max_depth + 1, rest,
    )  # fmt: skip
    return Closed(facts, facts[:, FACTS + max_depth + 1 :], *each)


def keep_heads(tables: SlotTables, slots: Tensor, active: Tensor, heads: HeadNodes, facts: Tensor, ready: int) -> None:
    tokens, parents, depths = (part if part.is_contiguous() else part.contiguous() for part in heads)
    _keep(
        slots.data_ptr(), active.data_ptr(), tokens.data_ptr(), parents.data_ptr(), depths.data_ptr(),
        tables.heads.tokens.data_ptr(), tables.heads.parents.data_ptr(), tables.heads.depths.data_ptr(),
        facts.data_ptr(), *tables.heads.tokens.shape, *facts.shape, tokens.shape[1], ready,
    )  # fmt: skip


@njit(inline="always", **OPTIONS)
def _table(address, rows, columns):
    return carray(pointer(address), (rows, columns), np.int64)


@njit(inline="always", **OPTIONS)
def _column(address, rows):
    return carray(pointer(address), (rows,), np.int64)


@njit(cache=True, **OPTIONS)
def _open(
    slots_at, active_at, history_at, length_at, total_at, eos_at, limit_at,
    head_tokens_at, head_parents_at, head_depths_at, found_at, whole_at, each_at, on_at,
    num_slots, columns, num_eos, width, chain_width, rows, nodes, chain,
):  # fmt: skip
    slots, active = _column(slots_at, rows), carray(pointer(active_at), (rows,), np.bool_)
    history, eos = _table(history_at, num_slots, columns), _table(eos_at, num_slots, num_eos)
    lengths, totals, limits = _column(length_at, num_slots), _column(total_at, num_slots), _column(limit_at, num_slots)
    head_tokens, head_parents = _table(head_tokens_at, num_slots, width), _table(head_parents_at, num_slots, width)
    head_depths, found = _table(head_depths_at, num_slots, width), _table(found_at, num_slots, chain_width)
    whole = carray(pointer(whole_at), (5, rows, nodes), np.int64)
    each, on = carray(pointer(each_at), (2, rows), np.int64), carray(pointer(on_at), (rows,), np.bool_)
    tokens, parents, positions, places, bits = whole[0], whole[1], whole[2], whole[3], whole[4]
    first = nodes - chain
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
            positions[row, n], places[row, n] = length + depth, length + n
        each[0, row], each[1, row] = length, drafted
        on[row] = active[row] and not over


@njit(cache=True, **OPTIONS)
def _close(
    slots_at, active_at, length_at, tokens_at, parents_at, drafted_at, picked_at, usable_at,
    history_at, lengths_at, total_at, eos_at, found_at, head_tokens_at, facts_at, each_at,
    num_slots, columns, num_eos, width, chain, rows, nodes, depths, rest,
):  # fmt: skip
    slots, active = _column(slots_at, rows), carray(pointer(active_at), (rows,), np.bool_)
    before, drafted = _column(length_at, rows), _column(drafted_at, rows)
    tokens, parents, picked = (
        _table(tokens_at, rows, nodes), _table(parents_at, rows, nodes), _table(picked_at, rows, nodes),
    )  # fmt: skip
    usable = carray(pointer(usable_at), (rows, nodes), np.bool_)
    history, eos = _table(history_at, num_slots, columns), _table(eos_at, num_slots, num_eos)
    lengths, totals = _column(lengths_at, num_slots), _column(total_at, num_slots)
    found, head_tokens = _table(found_at, num_slots, chain), _table(head_tokens_at, num_slots, width)
    facts = _table(facts_at, rows, FACTS + 2 * depths)
    each = _table(each_at, 3, rows)
    alive = np.empty(nodes, np.bool_)
    for row in range(rows):
        slot, line = slots[row], facts[row]
        said, path = line[FACTS : FACTS + depths], line[FACTS + depths :]
        said[:], path[:] = -1, 0
        alive[:] = False
        alive[0] = True
        node, emitted, finished, finite, last = 0, 0, False, True, 0
        while emitted < depths:
            token = picked[row, node]
            said[emitted], path[emitted], last = token, node, node
            finite = finite and usable[row, node]
            emitted += 1
            finished = before[row] + emitted + 1 >= totals[slot]
            for end in range(num_eos):
                finished = finished or eos[slot, end] == token
            node = -1
            for n in range(nodes - 1, 0, -1):  # parents come before children: theirs is not yet overwritten
                alive[n] = alive[parents[row, n]] and tokens[row, n] == token
                node = n if alive[n] else node
            alive[0] = False
            if finished or node < 0 or not finite:
                break
        count, length = emitted if active[row] and finite else 0, before[row]
        for i in range(count):
            history[slot, min(length + 1 + i, columns - 1)] = said[i]
        length += count
        lengths[slot] = length
        line[0], line[1], line[2], line[3], line[4] = count, finished, finite, drafted[row], 0
        each[0, row], each[1, row], each[2, row] = last, length, history[slot, length]
        if active[row]:
            found[slot] = -1
            if rest:
                head_tokens[slot] = -1
        if not rest and chain:
            line[4] = native_continue(history[slot], length, found[slot], active[row], MAX_NGRAM, MIN_NGRAM)


@njit(cache=True, **OPTIONS)
def _keep(
    slots_at, active_at, tokens_at, parents_at, depths_at, to_tokens_at, to_parents_at, to_depths_at, facts_at,
    num_slots, width, rows, num_facts, count, ready,
):  # fmt: skip
    slots, active = _column(slots_at, rows), carray(pointer(active_at), (rows,), np.bool_)
    tokens, parents, depths = (
        _table(tokens_at, rows, count), _table(parents_at, rows, count), _table(depths_at, rows, count),
    )  # fmt: skip
    to_tokens, to_parents, to_depths = (
        _table(to_tokens_at, num_slots, width), _table(to_parents_at, num_slots, width),
        _table(to_depths_at, num_slots, width),
    )  # fmt: skip
    facts = _table(facts_at, rows, num_facts)
    for row in range(rows):
        slot, some = slots[row], False
        for n in range(count):
            some = some or tokens[row, n] >= 0
        if some:
            facts[row, 4] = max(facts[row, 4], ready)
        for n in range(width if active[row] else 0):
            there = n < count
            to_tokens[slot, n] = tokens[row, n] if there else -1
            to_parents[slot, n], to_depths[slot, n] = parents[row, n] if there else 0, depths[row, n] if there else 0
