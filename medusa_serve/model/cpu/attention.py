"""Attention on a CPU with a fixed order of sums: a token's result depends only on the tokens that it sees, bit for bit.
It is the same for any tree, any batch and any chunks of a prompt.

Each query sums over its own path: first the history, then its ancestors. All paths of the same length run the same
compiled code, wherever in the slab their keys are. Sums are float32. For few queries this is faster than SDPA: it is
one call and needs no mask.
"""

from __future__ import annotations

import ctypes
from ctypes import addressof
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ..forward.view import View
from .attention_tiles import BLOCK, QUERIES, scores_of, weigh
from .base import OPTIONS, as_function, exponential, half, keep, pointer, record, record_at, wide
from .layer_ops import rotate_rows, write_slab_rows
from .threads import range_of_thread, run_in_threads, task_record, thread_of, threads, wait_for_all

TILE = QUERIES  # queries that read a key together
LANES = 16
# addresses, strides and sizes that all layers of a pass share · bits: 0 in a causal pass, where a query sees all
# columns up to its position · new_columns: the columns of the flat tokens
PassView = record(
    "slots length positions positions_row bits rows new columns width new_columns cos cos_row sin sin_row"
)
VIEW = np.dtype(PassView)
# pass_view: address of a VIEW · query: (B, N, heads) by its strides; if raw_query is set, room for the rotated queries
# and then the rotated keys · raw_…: the outputs of a layer's products, before rotation
Attention = task_record(
    "pass_view query query_row query_head query_new keys values out heads kv_heads dim value_dim window "
    "raw_query raw_query_head raw_query_token raw_key raw_key_head raw_key_token raw_value raw_value_head "
    "raw_value_token",
    scaling=ctypes.c_float,
)
ATTENTION = np.dtype(Attention)


def fits(query: Tensor, keys: Tensor, values: Tensor, view: View) -> bool:
    return query.dtype == torch.bfloat16 and query.stride(3) == 1 and fits_slab(keys, values, view)


def fits_slab(keys: Tensor, values: Tensor, view: View) -> bool:
    slabs = keys.is_contiguous() and values.is_contiguous()
    return keys.dtype == torch.bfloat16 and slabs and (view.causal or view.num_new <= 64)


def view_record(view: View, columns: int, cos: Tensor | None = None, sin: Tensor | None = None) -> Any:
    """A pass's data for attention. columns: of a slot. It holds addresses: view, cos and sin must stay alive."""
    rows, new = view.positions.shape
    made = PassView(rows=rows, new=new, columns=columns, width=view.width)
    made.slots, made.length = view.slots.data_ptr(), view.length.data_ptr()
    made.positions, made.positions_row = view.positions.data_ptr(), view.positions.stride(0)
    made.bits = 0 if view.bits is None else view.bits.data_ptr()
    if cos is not None and sin is not None:
        made.new_columns = view.flat_columns.data_ptr()
        made.cos, made.cos_row, made.sin, made.sin_row = cos.data_ptr(), cos.stride(1), sin.data_ptr(), sin.stride(1)
    return made


def canonical_attention(
    query: Tensor, keys: Tensor, values: Tensor, view: View, scaling: float, window: int | None
) -> Tensor:
    """forward.attention.attend for bfloat16 on a CPU: query (B, heads, N, dim), keys, values (S, C, kv_heads, dim) →
    (B, N, heads, value dim)"""
    rows, heads, new, dim = query.shape
    out = query.new_empty(rows, new, heads, values.shape[3])
    seen = view_record(view, values.shape[1])
    task = _task(query, keys, values, out, scaling, window)
    task.pass_view, task.query = addressof(seen), query.data_ptr()
    task.query_row, task.query_head, task.query_new, _ = query.stride()
    _attend(addressof(task), attention_function())
    return out


def _task(query: Tensor, keys: Tensor, values: Tensor, out: Tensor, scaling: float, window: int | None) -> Any:
    task = Attention(*threads().given(), scaling=scaling, window=window or 0, heads=query.shape[1])
    task.keys, task.values, task.out = keys.data_ptr(), values.data_ptr(), out.data_ptr()
    task.kv_heads, task.dim, task.value_dim = keys.shape[2], query.shape[3], values.shape[3]
    return task


def rotated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slabs: tuple[Tensor, Tensor],
    view: View,
    scaling: float,
    window: int | None,
) -> Tensor:
    """A layer's work between its products, as one call: rotary positions, the slab's new rows, attention.

    query, key, value (1, heads or kv_heads, B·N, dim), cos, sin (1, B·N, dim) → (1, B·N, heads, value dim)"""
    keys, values = slabs
    _, heads, tokens, dim = query.shape
    out = torch.empty(1, tokens, heads, values.shape[3], dtype=torch.bfloat16)
    rotated = torch.empty(tokens * (heads + keys.shape[2]) * dim, dtype=torch.bfloat16)
    seen = view_record(view, values.shape[1], cos, sin)
    task = _task(query, keys, values, out, scaling, window)
    task.pass_view, task.query = addressof(seen), rotated.data_ptr()
    task.raw_query, task.raw_key, task.raw_value = query.data_ptr(), key.data_ptr(), value.data_ptr()
    _, task.raw_query_head, task.raw_query_token, _ = query.stride()
    _, task.raw_key_head, task.raw_key_token, _ = key.stride()
    _, task.raw_value_head, task.raw_value_token, _ = value.stride()
    _attend(addressof(task), attention_function())
    return out


@njit(cache=True, nogil=True, **OPTIONS)
def _attend(task_at, function):
    run_in_threads(record_at(task_at, ATTENTION), function)


@as_function
def attention_function(task_at):
    """One thread's share: rotation and slab rows of some tokens, then some tiles of queries."""
    task = record_at(task_at, ATTENTION)
    thread = thread_of(task)
    if task.raw_query:
        _rotate_and_write(task, record_at(task.pass_view, VIEW), thread)
    _attend_tiles(task, record_at(task.pass_view, VIEW), thread)


@njit(inline="never", **OPTIONS)
def _score(queries, q, keys_at, key_row, count, room, out_at, soon):
    """out[i, t] = q[i] · key t, for a tile's queries and the first `count` keys. q: in attention_tiles.py's order ·
    soon: address of the rows that are read next"""
    dim = q.shape[1]
    blocks = dim // BLOCK
    scores_of(queries, q.ctypes.data, 4 * dim, keys_at, key_row, 0, count, blocks, out_at, 4 * room, soon)
    if dim > blocks * BLOCK:
        for i in range(queries):
            out = carray(pointer(out_at + 4 * i * room), (count,), np.float32)
            for t in range(count):
                key = carray(pointer(keys_at + t * key_row), (dim,), np.uint16)
                for d in range(blocks * BLOCK, dim):
                    out[t] += q[i, d] * wide(key[d])


@njit(inline="never", **OPTIONS)
def _softmax(row, count, scale, lanes):
    """e^((score - largest) · scale) in place; → their sum"""
    lanes[:] = row[0]
    for t in range(0, count - LANES + 1, LANES):
        for lane in range(LANES):
            lanes[lane] = row[t + lane] if row[t + lane] > lanes[lane] else lanes[lane]
    largest = lanes[0]
    for lane in range(1, LANES):
        largest = max(largest, lanes[lane])
    for t in range(count - count % LANES, count):
        largest = max(largest, row[t])
    for t in range(count):
        row[t] = exponential((row[t] - largest) * scale)
    total = np.float32(0)
    for t in range(count):
        total += row[t]
    return total


@njit(inline="never", **OPTIONS)
def _weigh(queries, weights_at, room, values_at, value_row, first, count, sums_at, dim, soon):
    """sums[i] += weights[i, t] · value t, for first ≤ t < count."""
    blocks = dim // BLOCK
    weigh(queries, weights_at, 4 * room, values_at, value_row, first, count, blocks, sums_at, 4 * dim, soon)
    if dim > blocks * BLOCK:
        for i in range(queries):
            sums = carray(pointer(sums_at + 4 * i * dim), (dim,), np.float32)
            weights = carray(pointer(weights_at + 4 * i * room), (count,), np.float32)
            for t in range(first, count):
                value = carray(pointer(values_at + t * value_row), (dim,), np.uint16)
                _weigh_rest(weights[t], value[blocks * BLOCK :], sums[blocks * BLOCK :])


@njit(inline="never", **OPTIONS)
def _weigh_rest(weight, value, sums):
    for d in range(sums.shape[0]):
        sums[d] += weight * wide(value[d])


@njit(inline="always", **OPTIONS)
def _spot(d, dim):
    """The index of a head's element in attention_tiles.py's order."""
    return d if d >= dim - dim % BLOCK else d - d % BLOCK + d % 2 * (BLOCK // 2) + d % BLOCK // 2


@njit(inline="never", **OPTIONS)
def _rotate_and_write(task, view, thread):
    """One thread's share of the tokens: rotary positions, and the slab's new rows."""
    new, columns, slots, new_columns = view.new, view.columns, view.slots, view.new_columns
    heads, kv_heads, dim, value_dim = task.heads, task.kv_heads, task.dim, task.value_dim
    first, end = range_of_thread(view.rows * new, task, thread)
    cos, sin = view.cos + 2 * first * view.cos_row, view.sin + 2 * first * view.sin_row
    across = kv_heads * dim
    keys = task.query + 2 * view.rows * new * heads * dim
    rotate_rows(
        task.raw_query + 2 * first * task.raw_query_token, cos, sin, task.query + 2 * first * heads * dim,
        task.raw_query_head, task.raw_query_token, view.cos_row, view.sin_row, heads, end - first, dim,
    )  # fmt: skip
    rotate_rows(
        task.raw_key + 2 * first * task.raw_key_token, cos, sin, keys + 2 * first * across,
        task.raw_key_head, task.raw_key_token, view.cos_row, view.sin_row, kv_heads, end - first, dim,
    )  # fmt: skip
    strides = new * across, dim, across
    write_slab_rows(task.keys, slots, new_columns, keys, *strides, first, end, kv_heads, new, dim, columns)
    strides = new * task.raw_value_token, task.raw_value_head, task.raw_value_token
    write_slab_rows(
        task.values, slots, new_columns, task.raw_value, *strides, first, end, kv_heads, new, value_dim, columns
    )
    wait_for_all(task)


@njit(**OPTIONS)
def _attend_tiles(task, view, thread):
    query_at, query_row, query_head, query_new = task.query, task.query_row, task.query_head, task.query_new
    keys_at, values_at, out_at, window = task.keys, task.values, task.out, task.window
    heads, kv_heads, dim, value_dim = task.heads, task.kv_heads, task.dim, task.value_dim
    rows, new, columns, bits_at, positions_row = view.rows, view.new, view.columns, view.bits, view.positions_row
    if task.raw_query:
        query_row, query_head, query_new = new * heads * dim, dim, heads * dim
    room, scale = view.width + TILE, task.scaling
    group, one = heads // kv_heads, np.int64(1)  # a literal has another type
    slots, lengths = carray(pointer(view.slots), (rows,), np.int64), carray(pointer(view.length), (rows,), np.int64)
    positions = carray(pointer(view.positions), (rows * positions_row + new,), np.int64)
    bits = carray(pointer(bits_at), (rows, new), np.int64)
    out = carray(pointer(out_at), (rows, new, heads, value_dim), np.uint16)
    scratch = np.empty(TILE * (room + dim + value_dim), np.float32)
    scratch_at = np.int64(scratch.ctypes.data)  # else unsigned: its callees would be compiled again
    q = carray(pointer(scratch_at + 4 * TILE * room), (TILE, dim), np.float32)
    sums_at = scratch_at + 4 * TILE * (room + dim)
    sums = carray(pointer(sums_at), (TILE, value_dim), np.float32)
    key_row, value_row = 2 * kv_heads * dim, 2 * kv_heads * value_dim
    first, total = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    weight, lanes = np.empty(TILE, np.float32), np.empty(LANES, np.float32)
    tiles = (new * group + TILE - 1) // TILE
    unit, end = range_of_thread(rows * kv_heads * tiles, task, thread)
    while unit < end:
        b, kv, tile = unit // (kv_heads * tiles), unit // tiles % kv_heads, unit % tiles * TILE
        length, slot = lengths[b], slots[b] * columns * kv_heads
        keys, values = keys_at + 2 * (slot + kv) * dim, values_at + 2 * (slot + kv) * value_dim
        unit += 1
        after = min(unit, end - 1)  # its keys are prefetched while values are weighed
        soon = keys_at + 2 * (slots[after // (kv_heads * tiles)] * columns * kv_heads + after // tiles % kv_heads) * dim
        reach, begin, shared, queries = 0, 0, columns, min(TILE, new * group - tile)
        for i in range(queries):
            n, head = _place(tile + i, group, kv)
            at = query_at + 2 * (b * query_row + head * query_head + n * query_new)
            numbers = carray(pointer(at), (dim,), np.uint16)
            for d in range(dim):
                q[i, _spot(d, dim)] = wide(numbers[d])
            for d in range(value_dim):
                sums[i, d] = np.float32(0)
            total[i] = positions[b * positions_row + n] + 1
            first[i] = max(0, total[i] - window) if window else 0
            reach = max(reach, length + n + 1 if bits_at else total[i])
            begin = max(begin, first[i])
            shared = min(shared, length if bits_at else total[i])
        _score(queries, q, keys, key_row, reach, room, scratch_at, values)
        for i in range(queries):
            n, _ = _place(tile + i, group, kv)
            scores_at, sum_at = scratch_at + 4 * i * room, sums_at + 4 * i * value_dim
            if bits_at:  # the ancestors' scores move next to the history's
                scores, place = carray(pointer(scores_at), (room,), np.float32), length
                for j in range(n + 1):
                    if (bits[b, n] >> j) & 1:
                        scores[place] = scores[length + j]
                        place += 1
            count = total[i] - first[i]
            weight[i] = _softmax(carray(pointer(scores_at + 4 * first[i]), (count,), np.float32), count, scale, lanes)
            _weigh(one, scores_at, room, values, value_row, first[i], min(begin, shared), sum_at, value_dim, soon)
        _weigh(queries, scratch_at, room, values, value_row, begin, shared, sums_at, value_dim, soon)
        for i in range(queries):
            n, head = _place(tile + i, group, kv)
            scores_at, sum_at, place = scratch_at + 4 * i * room, sums_at + 4 * i * value_dim, shared
            if bits_at:
                for j in range(n + 1):
                    if (bits[b, n] >> j) & 1:
                        if place >= first[i]:
                            value = values + (length + j) * value_row
                            _weigh(
                                one, scores_at + 4 * place, room, value, value_row, one - 1, one, sum_at, value_dim,
                                soon,
                            )  # fmt: skip
                        place += 1
            else:
                start = max(first[i], shared)
                _weigh(one, scores_at, room, values, value_row, start, total[i], sum_at, value_dim, soon)
            for d in range(value_dim):
                out[b, n, head, d] = half(sums[i, _spot(d, value_dim)] / weight[i])
    keep(scratch)


@njit(inline="always", **OPTIONS)
def _place(index, group, kv):
    """(token, head) of a packed query."""
    return index // group, kv * group + index % group
