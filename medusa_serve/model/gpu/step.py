"""The work around a step's forward pass as three Triton kernels, a program for each row: two hundred launches less.

open_step   the tables' drafts become a tree: tokens, positions, ancestor bits     assemble, tree_view, ended
close_step  walk the verified tree, advance the tables, look up, fill the results  accept, SlotTables.advance, lookup
keep_heads  put the heads' drafts into the tables                                  SlotTables.keep_heads

On the right are torch's functions with the same results; tests compare them. Sets of nodes are int64: 64 at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..drafting.tree import HeadNodes
from ..shapes import Shape
from ..tables import FACTS, Closed, Opened, SlotTables

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch has no Triton; kernels.choose then takes torch
    triton = None

SEARCHED = 1024  # columns of a row's history that are compared at once


def open_step(tables: SlotTables, slots: Tensor, active: Tensor, shape: Shape) -> Opened:
    """slots (B) · active (B) bool: rows that decode, unless their pending token was the last one"""
    rows, nodes = slots.shape[0], shape.num_nodes
    per_node = torch.empty(5, rows, nodes, dtype=torch.int64, device=slots.device)
    per_row = torch.empty(2, rows, dtype=torch.int64, device=slots.device)
    on = torch.empty(rows, dtype=torch.bool, device=slots.device)
    heads = tables.heads
    _open[(rows,)](
        slots, active, tables.history, tables.length, tables.total, tables.eos, tables.node_limit,
        heads.tokens, heads.parents, heads.depths, tables.lookup,
        per_node[0], per_node[1], per_node[2], per_node[3], per_node[4], per_row[0], on, per_row[1],
        tables.history.stride(0), heads.tokens.shape[1], tables.lookup.shape[1],
        NODES=nodes, CHAIN=shape.num_lookup, ROUNDS=_doublings(shape.max_depth), ENDS=tables.eos.shape[1],
        BLOCK_ENDS=triton.next_power_of_2(tables.eos.shape[1]), BLOCK=max(2, triton.next_power_of_2(nodes)),
        num_warps=4,
    )  # fmt: skip
    return Opened(per_node[0], per_node[1], per_node[2], per_node[3], per_node[4], per_row[0], on, per_row[1])


def _doublings(max_depth: int) -> int:
    """Rounds until a node has seen all its ancestors, if each round doubles the distance that it sees."""
    rounds, seen = 0, 1
    while seen < max_depth:
        rounds, seen = rounds + 1, 2 * seen + 1
    return rounds


def close_step(
    tables: SlotTables, slots: Tensor, opened: Opened, picked: Tensor, best: Tensor, max_depth: int, *, rest: bool
) -> Closed:
    """picked (B, N) int64: the token after each node · best (B, N): its largest logit, to see whether the logits are
    finite · rest: the next step has no drafts, neither of the heads nor of the lookup"""
    rows, nodes = picked.shape
    depths, device = max_depth + 1, slots.device
    results = torch.empty(rows, FACTS + 2 * depths, dtype=torch.int64, device=device)
    per_row = torch.empty(3, rows, dtype=torch.int64, device=device)
    chain, width = tables.lookup.shape[1], tables.heads.tokens.shape[1]
    _close[(rows,)](
        slots, opened.active, opened.length, opened.tokens, opened.parents, opened.drafted, picked, best,
        tables.history, tables.length, tables.total, tables.eos, tables.lookup, tables.heads.tokens,
        results, per_row[0], per_row[1], per_row[2], tables.history.shape[1],
        NODES=nodes, DEPTHS=depths, ENDS=tables.eos.shape[1], CHAIN=chain, HEADS=width, REST=rest,
        BLOCK=max(2, triton.next_power_of_2(nodes)), BLOCK_DEPTHS=triton.next_power_of_2(depths),
        BLOCK_ENDS=triton.next_power_of_2(tables.eos.shape[1]), BLOCK_CHAIN=triton.next_power_of_2(max(1, chain)),
        BLOCK_HEADS=triton.next_power_of_2(max(1, width)), SEARCHED=SEARCHED, num_warps=4,
    )  # fmt: skip
    return Closed(results, results[:, FACTS + depths :], *per_row)


def keep_heads(tables: SlotTables, slots: Tensor, active: Tensor, heads: HeadNodes, facts: Tensor, ready: int) -> None:
    """Put the heads' nodes into the active rows' tables; in facts, rows that have any say `ready`."""
    rows, count = heads.tokens.shape
    nodes = [part if part.is_contiguous() else part.contiguous() for part in heads]
    width = tables.heads.tokens.shape[1]
    _keep[(rows,)](
        slots, active, *nodes, *tables.heads, facts, facts.stride(0), ready,
        COUNT=count, WIDTH=width, BLOCK=triton.next_power_of_2(max(2, width)), num_warps=1,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _open(
        slots, active, history, lengths, totals, eos, node_limits, head_tokens, head_parents, head_depths, found,
        tokens, parents, positions, columns, bits, length_out, active_out, drafted_out,
        history_stride, heads_stride, found_stride,
        NODES: tl.constexpr, CHAIN: tl.constexpr, ROUNDS: tl.constexpr, ENDS: tl.constexpr, BLOCK_ENDS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        slot = tl.load(slots + row)
        length = tl.load(lengths + slot)
        pending = tl.load(history + slot * history_stride + length)
        end = tl.arange(0, BLOCK_ENDS)
        ends = tl.load(eos + slot * ENDS + end, mask=end < ENDS, other=-1)
        over = (tl.max((ends == pending).to(tl.int32), axis=0) > 0) | (length + 1 >= tl.load(totals + slot))
        on = (tl.load(active + row) != 0) & (over == 0)

        n = tl.arange(0, BLOCK)
        first = NODES - CHAIN
        is_head, is_chain = (n > 0) & (n < first), (n >= first) & (n < NODES) & (n > 0)
        at_head, at_chain = slot * heads_stride + n - 1, slot * found_stride + n - first
        token = tl.load(head_tokens + at_head, mask=is_head, other=-1)
        token = tl.where(is_chain, tl.load(found + at_chain, mask=is_chain, other=-1), token)
        token = tl.where(n == 0, pending, token)
        token = tl.where(n < tl.load(node_limits + slot), token, -1)
        parent = tl.load(head_parents + at_head, mask=is_head, other=0)
        parent = tl.where(is_chain & (n > first), n - 1, parent)
        depth = tl.load(head_depths + at_head, mask=is_head, other=0)
        depth = tl.where(is_chain, n - first + 1, depth)

        one = tl.full([BLOCK], 1, tl.int64)
        seen = (one << n) | (one << parent)
        above, j = parent, tl.arange(0, BLOCK)
        same = above[:, None] == j[None, :]
        above = tl.sum(tl.where(same, above[None, :], 0), axis=1)  # the parent's parent
        for _ in tl.static_range(ROUNDS):
            same = above[:, None] == j[None, :]
            seen = seen | tl.sum(tl.where(same, seen[None, :], 0), axis=1)
            above = tl.sum(tl.where(same, above[None, :], 0), axis=1)

        to, inside = row * NODES + n, n < NODES
        tl.store(tokens + to, token, mask=inside)
        tl.store(parents + to, parent, mask=inside)
        tl.store(positions + to, length + depth, mask=inside)
        tl.store(columns + to, length + n, mask=inside)
        tl.store(bits + to, seen, mask=inside)
        tl.store(length_out + row, length)
        tl.store(active_out + row, on)
        tl.store(drafted_out + row, tl.sum(((token >= 0) & (n > 0) & inside).to(tl.int64), axis=0))

    @triton.jit
    def _close(
        slots, active, lengths, tokens, parents, drafted, picked, best,
        history, length_table, totals, eos, found_table, head_tokens,
        facts, last_out, length_out, pending_out, history_stride,
        NODES: tl.constexpr, DEPTHS: tl.constexpr, ENDS: tl.constexpr, CHAIN: tl.constexpr, HEADS: tl.constexpr,
        REST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DEPTHS: tl.constexpr, BLOCK_ENDS: tl.constexpr,
        BLOCK_CHAIN: tl.constexpr, BLOCK_HEADS: tl.constexpr, SEARCHED: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        slot, on = tl.load(slots + row), tl.load(active + row) != 0
        length, total = tl.load(lengths + row), tl.load(totals + slot)
        n = tl.arange(0, BLOCK)
        inside, to = n < NODES, row * NODES + n
        token = tl.load(tokens + to, mask=inside, other=-1)
        parent = tl.load(parents + to, mask=inside, other=0)
        pick = tl.load(picked + to, mask=inside, other=-2)
        largest = tl.load(best + to, mask=inside, other=0.0).to(tl.float32)
        good = (largest == largest) & (tl.abs(largest) != float("inf"))
        end = tl.arange(0, BLOCK_ENDS)
        ends = tl.load(eos + slot * ENDS + end, mask=end < ENDS, other=-1)

        # the walk, as in sampling/accept.py
        one = tl.full([BLOCK], 1, tl.int64)
        alive = n == 0
        walking = length == length
        finite, finished = walking, length != length
        emitted, last = length * 0, length * 0
        line = facts + row * (5 + 2 * DEPTHS)
        depth_at = tl.arange(0, BLOCK_DEPTHS)
        said = tl.full([BLOCK_DEPTHS], -1, tl.int64)
        for depth in tl.static_range(DEPTHS):
            node = tl.min(tl.where(alive, n, BLOCK), axis=0)
            node = tl.where(node == BLOCK, 0, node)
            here = n == node
            chosen = tl.sum(tl.where(here, pick, 0), axis=0)
            usable = tl.max((here & good).to(tl.int32), axis=0) > 0
            finite = finite & (usable | (walking == 0))
            said = tl.where((depth_at == depth) & walking, chosen, said)
            tl.store(line + 5 + DEPTHS + depth, node.to(tl.int64))
            last = tl.where(walking, node.to(tl.int64), last)
            emitted += walking.to(tl.int64)
            stop = (tl.max((ends == chosen).to(tl.int32), axis=0) > 0) | (length + 2 + depth >= total)
            finished = finished | (walking & stop)
            set_of = tl.sum(tl.where(alive, one << n, 0), axis=0)
            alive = (((set_of >> parent) & 1) == 1) & (token == chosen) & (n > 0) & inside
            more = tl.max(alive.to(tl.int32), axis=0) > 0
            walking = walking & (stop == 0) & more & finite

        # the tables, as in SlotTables.advance
        count = tl.where(on & finite, emitted, 0)
        at = history + slot * history_stride
        place = tl.minimum(length + 1 + depth_at, history_stride - 1)
        tl.store(at + place, said, mask=depth_at < count)
        length = length + count
        tl.store(length_table + slot, length)
        tl.store(line + 5 + depth_at, said, mask=depth_at < DEPTHS)
        tl.store(line, count)
        tl.store(line + 1, finished.to(tl.int64))
        tl.store(line + 2, finite.to(tl.int64))
        tl.store(line + 3, tl.load(drafted + row))
        tl.store(last_out + row, last)
        tl.store(length_out + row, length)
        tl.debug_barrier()  # other threads of this program read what was written
        tl.store(pending_out + row, tl.load(at + length))

        # the lookup, as in drafting/lookup.py
        chain = tl.arange(0, BLOCK_CHAIN)
        if REST or CHAIN == 0:
            tl.store(line + 4, length * 0)
            tl.store(found_table + slot * CHAIN + chain, chain.to(tl.int64) * 0 - 1, mask=(chain < CHAIN) & on)
            if REST:
                head = tl.arange(0, BLOCK_HEADS)
                tl.store(head_tokens + slot * HEADS + head, head.to(tl.int64) * 0 - 1, mask=(head < HEADS) & on)
        else:
            winner = length * 0 - 1
            for begin in range(0, length, SEARCHED):
                column = begin + tl.arange(0, SEARCHED)
                match = column < length
                run = tl.zeros([SEARCHED], tl.int64)
                for back in tl.static_range(4):
                    wanted = tl.load(at + tl.maximum(length - back, 0))
                    there = match & (column >= back)
                    shifted = tl.load(at + column - back, mask=there, other=-1)
                    match = there & (shifted == wanted) & (length >= back)
                    run += match.to(tl.int64)
                score = tl.where(run >= 2, run * history_stride + column, -1)
                winner = tl.maximum(winner, tl.max(score, axis=0))
            source = winner % history_stride + 1 + chain
            there = (winner >= 0) & (source <= length) & (chain < CHAIN)
            found = tl.load(at + source, mask=there, other=-1)
            tl.store(found_table + slot * CHAIN + chain, found, mask=(chain < CHAIN) & on)
            tl.store(line + 4, tl.sum(((found >= 0) & (chain < CHAIN)).to(tl.int64), axis=0))

    @triton.jit
    def _keep(
        slots, active, tokens, parents, depths, token_table, parent_table, depth_table, facts, facts_stride, ready,
        COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, n = tl.program_id(0), tl.arange(0, BLOCK)
        slot, on = tl.load(slots + row), tl.load(active + row) != 0
        token = tl.load(tokens + row * COUNT + n, mask=n < COUNT, other=-1)
        to, inside = slot * WIDTH + n, (n < WIDTH) & on
        tl.store(token_table + to, token, mask=inside)
        tl.store(parent_table + to, tl.load(parents + row * COUNT + n, mask=n < COUNT, other=0), mask=inside)
        tl.store(depth_table + to, tl.load(depths + row * COUNT + n, mask=n < COUNT, other=0), mask=inside)
        any_drafted = tl.max((token >= 0).to(tl.int64), axis=0)
        at = facts + row * facts_stride + 4
        tl.store(at, tl.maximum(tl.load(at), any_drafted * ready))
