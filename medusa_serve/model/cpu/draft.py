"""The greedy draft of sequential heads on a CPU as one call: SequentialDrafter's search with SequentialHeads' cell, in
the same order of operations and with the same rounding. Without it, Python and a hundred small operations take two
thirds of the time of a draft of three nodes.
"""

from __future__ import annotations

import ctypes
from ctypes import addressof
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor, nn

from ..drafting.heads import GatedBlock, SequentialHeads
from ..drafting.tree import HeadNodes
from .base import (
    OPTIONS,
    address_of,
    as_function,
    copy_halves,
    half,
    keep,
    new_record,
    pointer,
    record,
    record_at,
    wide,
)
from .int_products import PRODUCT, NativeInt4Linear, NativeInt8Linear, product_function, run_product
from .layer_ops import native_rms_norm, native_silu_times
from .search import CHILDREN, children_function, run_items
from .threads import call, task_record, threads, use_threads

EPSILON = 1e-6  # of heads.rms_norm
# indices of the heads' linear layers; the two layers of each block of the cell follow
MIX, START, READ_IN, READ_OUT, TO_HIDDEN, OUTPUT, CELL = range(7)
# bias: 0 if there is none · a layer that the heads lack has zeros in all fields
Linear = record("weights scales bias inputs outputs bits")
LINEAR = np.dtype(Linear)
LINEAR_BYTES = LINEAR.itemsize
# multiply … block: addresses of functions · linears: address of LINEAR records · norms: address of the addresses of the
# norms' weights, the readout's second · hidden_size … cells: the heads' sizes · hidden … tau: data of one draft
DraftTask = task_record(
    "multiply children linear block linears norms ones embedding token_map hidden_size width embed_size hidden_inputs "
    "cells hidden pending found rows count pool beams num_beams ranks tau",
    step_cost=ctypes.c_double,
    never=ctypes.c_double,
)
DRAFT = np.dtype(DraftTask)
LINEAR_TASK = np.dtype(record("draft linear x out rows"))
# into, out_of: the block's linear layers · norm: its weight · tokens: 0, or (rows) · constant: (B, start) numbers, one
# row for `each` rows · spare: room for the rows' inputs and one and a half times their inner products
BLOCK_TASK = np.dtype(record("draft into out_of states norm tokens constant each spare out rows"))


class NativeDraft:
    """The draft of heads for which `fits` is true. They must not change afterwards."""

    def __init__(self, heads: SequentialHeads, tau: Tensor, num_ranks: int, costs: tuple[float, float]) -> None:
        """tau (D) · costs: STEP_COST and NEVER of drafting/pool.py"""
        self._heads, self._tau = heads, tau.contiguous()  # kept alive: their addresses are in use
        blocks: list[Any] = list(heads.cell)
        cells = [product for block in blocks for product in (block.w_in, block.w_out)]
        output = heads.output.small
        parts = [heads.mix, heads.start_proj, heads.readout.w_in, heads.readout.w_out, heads.to_hidden, output, *cells]
        self._linears = (Linear * len(parts))(*map(_linear_record, parts))
        norms = [heads.norm, heads.readout.norm, *(block.norm for block in blocks)]
        self._norms = np.array([norm.data_ptr() for norm in norms], np.int64)
        self._ones = torch.ones(heads.hidden_size, dtype=torch.bfloat16)
        embedding = heads._embedding[0]
        self._embedding = embedding if isinstance(embedding, Tensor) else embedding.weight
        made = DraftTask(ranks=num_ranks, step_cost=costs[0], never=costs[1], cells=len(blocks))
        made.linears, made.norms, made.tau = addressof(self._linears), self._norms.ctypes.data, self._tau.data_ptr()
        made.ones, made.embedding = self._ones.data_ptr(), self._embedding.data_ptr()
        made.token_map = 0 if heads.token_map is None else heads.token_map.data_ptr()
        made.hidden_size, made.hidden_inputs = heads.hidden_size, heads.hidden_inputs
        made.width, made.embed_size = heads.width, heads.embed_size
        self._constants = made

    @staticmethod
    def fits(heads: Any) -> bool:
        if type(heads) is not SequentialHeads or heads.norm.dtype != torch.bfloat16 or heads.norm.device.type != "cpu":
            return False
        output, embedding = heads.output, heads._embedding[0]
        products = [heads.mix, heads.start_proj, heads.to_hidden]
        products += [part for block in [*heads.cell, heads.readout] for part in (block.w_in, block.w_out)]
        rows = embedding.weight if type(embedding) is nn.Embedding else embedding
        return (
            all(isinstance(part, NativeInt8Linear | None) for part in products)
            and all(type(block) is GatedBlock for block in heads.cell)
            and isinstance(output.small, NativeInt4Linear)
            and output.bias is None
            and isinstance(rows, Tensor)
            and rows.dtype == torch.bfloat16
            and rows.is_contiguous()
        )

    def run(self, hidden: Tensor, pending: Tensor, widths: list[int], pool: int, nodes: int) -> HeadNodes:
        """hidden (B, M·H), pending (B) · widths: beams after each depth, 0 after the last · pool: number of nodes that
        are scored · nodes: number of nodes that are kept"""
        rows, count = pending.shape[0], min(nodes, pool)
        found = torch.empty(3, rows, count, dtype=torch.int64)
        hidden, pending = hidden.bfloat16().contiguous(), pending.contiguous()
        beams = np.array(widths, np.int64)
        task = DraftTask.from_buffer_copy(self._constants)
        task.threads, task.openmp = threads().given()
        task.hidden, task.pending, task.found = hidden.data_ptr(), pending.data_ptr(), found.data_ptr()
        task.rows, task.count, task.pool, task.beams, task.num_beams = rows, count, pool, beams.ctypes.data, len(beams)
        task.multiply, task.children = product_function(), children_function()
        task.linear, task.block = linear_function(), block_function()
        _draft(addressof(task))
        return HeadNodes(found[0], found[1], found[2])


def _linear_record(layer: Any) -> Any:
    if layer is None:
        return Linear()
    four = isinstance(layer, NativeInt4Linear)
    weights, scales = (layer.packed, layer.scales) if four else (layer.weight, layer.scale)
    made = Linear(inputs=layer.in_features, outputs=layer.out_features, bits=layer.bits if four else 8)
    made.weights, made.scales = weights.data_ptr(), scales.data_ptr()
    made.bias = 0 if layer.bias is None else layer.bias.data_ptr()
    return made


# ---- inside kernels --------------------------------------------------------------------------------------------------


@njit(inline="always", **OPTIONS)
def _halves(address, count):
    return carray(pointer(address), (count,), np.uint16)


@njit(inline="always", **OPTIONS)
def _linear(draft, index):
    return record_at(draft.linears + index * LINEAR_BYTES, LINEAR)


@njit(inline="always", **OPTIONS)
def _norm(draft, index):
    return carray(pointer(draft.norms), (2 + draft.cells,), np.int64)[index]


@as_function
def linear_function(task_at):
    """A linear layer as a C function, so that its callers do not each compile its code again."""
    task = record_at(task_at, LINEAR_TASK)
    _multiply(record_at(task.draft, DRAFT), record_at(task.linear, LINEAR), task.x, task.out, task.rows)


@njit(**OPTIONS)
def _multiply(draft, linear, x_at, out_at, rows):
    """The product and its bias."""
    task, outputs = new_record(PRODUCT), linear.outputs
    use_threads(task, draft)
    task.x, task.weights, task.scales, task.out = x_at, linear.weights, linear.scales, out_at
    task.rows, task.inputs, task.outputs, task.bits = rows, linear.inputs, outputs, linear.bits
    run_product(task, draft.multiply)
    if linear.bias:
        bias = _halves(linear.bias, outputs)
        for row in range(rows):
            _add(_halves(out_at + 2 * row * outputs, outputs), bias)


@as_function
def block_function(task_at):
    """A GatedBlock of states (rows, w) and, if tokens are given, of their embeddings: out = states + block."""
    task = record_at(task_at, BLOCK_TASK)
    draft = record_at(task.draft, DRAFT)
    into, out_of = record_at(task.into, LINEAR), record_at(task.out_of, LINEAR)
    width, embed, rows, spare, norm = draft.width, draft.embed_size, task.rows, task.spare, task.norm
    constants, inputs, inner = _linear(draft, START).outputs, into.inputs, into.outputs // 2
    tokens = carray(pointer(task.tokens), (rows,), np.int64)
    for row in range(rows):
        native_rms_norm(task.states + 2 * row * width, norm, spare + 2 * row * inputs, 1, width, EPSILON)
        if task.tokens:
            token_at = draft.embedding + 2 * tokens[row] * embed
            native_rms_norm(token_at, norm + 2 * width, spare + 2 * (row * inputs + width), 1, embed, EPSILON)
    both_at = spare + 2 * rows * inputs
    _multiply(draft, into, spare, both_at, rows)
    for row in range(rows):
        constant = _halves(task.constant + 2 * (row // task.each) * constants, 2 * inner)
        _add(_halves(both_at + 4 * row * inner, 2 * inner), constant)
    active = both_at + 4 * rows * inner
    native_silu_times(both_at, 2 * inner, both_at + 2 * inner, 2 * inner, active, rows, inner)
    made = active + 2 * rows * inner
    _multiply(draft, out_of, active, made, rows)
    states, out = _halves(task.states, rows * width), _halves(task.out, rows * width)
    block = _halves(made, rows * width)
    for i in range(rows * width):
        out[i] = half(wide(states[i]) + wide(block[i]))


@njit(inline="always", **OPTIONS)
def _add(numbers, others):
    for i in range(len(numbers)):
        numbers[i] = half(wide(numbers[i]) + wide(others[i]))


@njit(**OPTIONS)
def _run_linear(draft, index, x_at, out_at, rows):
    task = new_record(LINEAR_TASK)
    task.draft, task.linear = address_of(draft), address_of(_linear(draft, index))
    task.x, task.out, task.rows = x_at, out_at, rows
    call(draft.linear, address_of(task))


@njit(**OPTIONS)
def _run_block(draft, index, norm, states_at, tokens_at, constant_at, each, spare, out_at, rows):
    """index: of the first of the block's two linear layers · norm: index of its norm's weight"""
    task = new_record(BLOCK_TASK)
    task.draft, task.norm = address_of(draft), _norm(draft, norm)
    task.into, task.out_of = address_of(_linear(draft, index)), address_of(_linear(draft, index + 1))
    task.states, task.tokens, task.constant, task.each = states_at, tokens_at, constant_at, each
    task.spare, task.out, task.rows = spare, out_at, rows
    call(draft.block, address_of(task))


@njit(**OPTIONS)
def _advance(draft, states_at, tokens, base_at, each, spare, rows):
    """Advance states (rows, w) by one token."""
    column = draft.width
    for block in range(draft.cells):
        index = CELL + 2 * block
        tokens_at = np.int64(tokens.ctypes.data) if block == 0 else np.int64(0)
        _run_block(draft, index, 2 + block, states_at, tokens_at, base_at + 2 * column, each, spare, states_at, rows)
        column += _linear(draft, index).outputs


@njit(**OPTIONS)
def _logits(draft, states_at, base_at, each, spare, rows):
    """→ the address of the logits (rows, V')"""
    hidden = draft.hidden_size
    size = 2 * rows * max(draft.width, hidden)
    x_at, y_at, rest = spare, spare + size, spare + 2 * size
    column = _linear(draft, START).outputs - _linear(draft, READ_IN).outputs
    constant_at = base_at + 2 * column
    _run_block(draft, READ_IN, 1, states_at, 0, constant_at, each, rest, y_at, rows)
    if _linear(draft, TO_HIDDEN).outputs:
        _run_linear(draft, TO_HIDDEN, y_at, x_at, rows)
        x_at, y_at = y_at, x_at
    native_rms_norm(y_at, _norm(draft, 0), x_at, rows, hidden, EPSILON)
    _run_linear(draft, OUTPUT, x_at, rest, rows)
    return rest


@njit(**OPTIONS)
def _begin(draft, base_at, spare):
    """SequentialHeads._begin; fills base (rows, S)"""
    rows, hidden, inputs = draft.rows, draft.hidden_size, draft.hidden_inputs
    native_rms_norm(draft.hidden, draft.ones, spare, rows * inputs, hidden, EPSILON)
    mixed = spare
    if _linear(draft, MIX).outputs:
        mixed = spare + 2 * rows * inputs * hidden
        _run_linear(draft, MIX, spare, mixed, rows)
    _run_linear(draft, START, mixed, base_at, rows)


@njit(**OPTIONS)
def _take_best(scores, row, first, end, count, chosen):
    """Fill `chosen` with the places of the `count` largest of scores[row, first:end], best first."""
    for i in range(count):
        best = -1
        for place in range(first, end):
            taken = False
            for other in range(i):
                taken = taken or chosen[other] == place
            if not taken and (best < 0 or scores[row, place] > scores[row, best]):
                best = place
        chosen[i] = best


@njit(cache=True, nogil=True, **OPTIONS)
def _draft(task_at):
    draft = record_at(task_at, DRAFT)
    rows, count, pool, ranks, token_map_at = draft.rows, draft.count, draft.pool, draft.ranks, draft.token_map
    hidden, width, inputs = draft.hidden_size, draft.width, draft.hidden_inputs
    step_cost, never = np.float32(draft.step_cost), np.float32(draft.never)
    beams = carray(pointer(draft.beams), (draft.num_beams,), np.int64)
    vocab = _linear(draft, OUTPUT).outputs
    widest, inner = np.int64(1), np.int64(0)
    for i in range(len(beams)):
        widest = max(widest, beams[i])
    for i in range(CELL + 2 * draft.cells):
        inner = max(inner, max(_linear(draft, i).inputs, _linear(draft, i).outputs))
    most, total = rows * widest, _linear(draft, START).outputs
    # room for a block's inputs, its products, the gated half and its result; or for the logits
    room = most * (4 * inner + 2 * max(width, hidden) + hidden * inputs)
    halves = rows * total + 2 * most * width + room
    numbers = most * (5 + 2 * ranks) + 4 * rows * pool + max(count, widest)
    memory = np.empty(
        8 * numbers + 2 * halves, np.uint8
    )  # one array and views of it: each array takes half a second to compile
    place = np.int64(memory.ctypes.data)
    tokens = carray(pointer(place), (most,), np.int64)
    parents = carray(pointer(place + 8 * most), (2, most), np.float32)
    at = carray(pointer(place + 16 * most), (2, most), np.int64)
    place += 40 * most
    ids_at, logp_at = place, place + 8 * most * ranks
    ids, logp = carray(pointer(ids_at), (most, ranks), np.int64), carray(pointer(logp_at), (most, ranks), np.float32)
    place += 16 * most * ranks
    pool_tokens = carray(pointer(place), (rows, pool), np.int64)
    above = carray(pointer(place + 8 * rows * pool), (rows, pool), np.int64)
    depths = carray(pointer(place + 16 * rows * pool), (rows, pool), np.int64)
    scores = carray(pointer(place + 24 * rows * pool), (rows, pool), np.float32)
    place += 32 * rows * pool
    chosen = carray(pointer(place), (max(count, widest),), np.int64)
    base_at = place + 8 * max(count, widest)
    states_at = base_at + 2 * rows * total
    other_at = states_at + 2 * most * width
    spare = other_at + 2 * most * width
    token_map = carray(pointer(token_map_at), (vocab,), np.int64)
    found = carray(pointer(draft.found), (3, rows, count), np.int64)
    pending = carray(pointer(draft.pending), (rows,), np.int64)
    search = new_record(CHILDREN)
    use_threads(search, draft)
    search.ids, search.logp, search.beams, search.vocab, search.ranks = ids_at, logp_at, 1, vocab, ranks
    for i in range(most):
        parents[0, i], at[0, i] = 0, 0

    _begin(draft, base_at, spare)
    for row in range(rows):
        tokens[row] = pending[row]
        copy_halves(base_at + 2 * row * total, states_at + 2 * row * width, width)
    each, filled = np.int64(1), np.int64(0)
    _advance(draft, states_at, tokens, base_at, each, spare, rows)
    for depth in range(len(beams)):
        places, now, then = rows * each, depth % 2, (depth + 1) % 2
        search.logits = _logits(draft, states_at, base_at, each, spare, places)
        search.tau, search.count, search.threads = draft.tau + 4 * depth, places, draft.threads
        run_items(search, draft.children)
        more = beams[depth]
        for row in range(rows):
            for beam in range(each):
                place, parent = row * each + beam, parents[now, row * each + beam]
                for rank in range(ranks):
                    own, i = logp[place, rank], filled + beam * ranks + rank
                    own = own if own > never else never
                    least = parent * np.float32(1 + 1e-6) - step_cost
                    scores[row, i] = min(parent + own, least)
                    pool_tokens[row, i] = token_map[ids[place, rank]] if token_map_at else ids[place, rank]
                    above[row, i], depths[row, i] = at[now, place], depth + 1
            _take_best(scores, row, filled, filled + each * ranks, more, chosen)
            for j in range(more):
                mine, best = row * more + j, chosen[j]
                parents[then, mine], at[then, mine] = scores[row, best], best + 1
                tokens[mine] = pool_tokens[row, best]
                source = row * each + (best - filled) // ranks
                copy_halves(states_at + 2 * source * width, other_at + 2 * mine * width, width)
        filled += each * ranks
        if more:
            each = more
            states_at, other_at = other_at, states_at
            _advance(draft, states_at, tokens, base_at, each, spare, rows * each)
    for row in range(rows):
        _take_best(scores, row, np.int64(0), filled, count, chosen)
        for n in range(count):
            best = chosen[n]
            found[0, row, n], found[1, row, n], found[2, row, n] = pool_tokens[row, best], 0, depths[row, best]
            for other in range(n):
                if chosen[other] == above[row, best] - 1:
                    found[1, row, n] = other + 1
    keep(memory)
