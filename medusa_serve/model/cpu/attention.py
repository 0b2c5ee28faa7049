"""Attention on a CPU whose sums have one order: a token's result depends on the tokens that it sees and on nothing
else, bit for bit. No tree, no batch and no chunking of a prompt changes it.

Each query adds up along its own path, the history and then its ancestors, by the same compiled code for any path of
that length; where a key lies in the slab, and what else lies there, does not matter. Sums are float32. Faster than
SDPA for few queries: one call, no mask.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from ..forward.attention import View
from .attention_tiles import BLOCK, QUERIES, scores_of, weigh
from .base import OPTIONS, bits_of, exponential, half, number_of, pointer, wide
from .layer_ops import _rotate, _write_rows
from .threads import HEAD, meet, run_in_team, share_of, team, thread_of

TILE = QUERIES  # that read a key together
LANES = 16


def fits(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, view: View) -> bool:
    return query.dtype == torch.bfloat16 and query.stride(3) == 1 and fits_slab(keys, values, view)


def fits_slab(keys: torch.Tensor, values: torch.Tensor, view: View) -> bool:
    slabs = keys.is_contiguous() and values.is_contiguous()
    return keys.dtype == torch.bfloat16 and slabs and (view.causal or view.num_new <= 64)


def canonical_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, view: View, scaling: float, window: int | None
) -> torch.Tensor:
    """As attention.attend, for bfloat16 on a CPU: query (B, heads, N, dim), keys, values (S, C, kv_heads, dim) →
    (B, N, heads, value dim)"""
    rows, heads, new, dim = query.shape
    slots, columns, kv_heads, value_dim = values.shape
    out = query.new_empty(rows, new, heads, value_dim)
    bits = 0 if view.causal else view.bits.data_ptr()
    _attend(
        query.data_ptr(), query.stride(0), query.stride(1), query.stride(2),
        keys.data_ptr(), values.data_ptr(), out.data_ptr(),
        view.slots.data_ptr(), view.length.data_ptr(), view.positions.data_ptr(), view.positions.stride(0), bits,
        rows, new, heads, kv_heads, columns, dim, value_dim, view.width + TILE, scaling, window or 0,
        *team().given(), attention_share(),
    )  # fmt: skip
    return out


def rotated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slabs: tuple[torch.Tensor, torch.Tensor],
    view: View,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """What a layer does between its products, as one call: rotary positions, the slab's new rows, attention.

    query, key, value (1, heads or kv_heads, B·N, dim), cos, sin (1, B·N, dim) → (1, B·N, heads, value dim)"""
    keys, values = slabs
    _, heads, tokens, dim = query.shape
    _, columns, kv_heads, value_dim = values.shape
    rows, new = view.positions.shape
    out = torch.empty(1, tokens, heads, value_dim, dtype=torch.bfloat16)
    _rotate_and_attend(
        query.data_ptr(), query.stride(1), query.stride(2), key.data_ptr(), key.stride(1), key.stride(2),
        value.data_ptr(), value.stride(1), value.stride(2),
        cos.data_ptr(), cos.stride(1), sin.data_ptr(), sin.stride(1),
        keys.data_ptr(), values.data_ptr(), out.data_ptr(),
        view.slots.data_ptr(), view.length.data_ptr(), view.positions.data_ptr(), view.positions.stride(0),
        view.flat_columns.data_ptr(), 0 if view.causal else view.bits.data_ptr(),
        rows, new, heads, kv_heads, columns, dim, value_dim, view.width, scaling, window or 0,
        *team().given(), attention_share(),
    )  # fmt: skip
    return out


@lru_cache
def attention_share() -> int:
    """Address of the function that a thread runs: its share of the tiles of queries."""

    @cfunc(types.void(types.voidptr), cache=True, **OPTIONS)
    def body(task_at):
        task = carray(task_at, (TASK,), np.int64)
        if task[TURN]:
            _turn_share(task, thread_of(task))
        _attend_share(task, thread_of(task))

    return int(body.address or 0)


@njit(inline="never", **OPTIONS)
def _score(queries, q, keys_at, key_row, count, room, out_at, soon):
    """out[i, t] = q[i] · key t, of a tile's queries and the first `count` keys. q as native_attend.py has queries ·
    soon: where rows lie that are read next"""
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
    """sums[i] += weights[i, t] · value t, of first ≤ t < count."""
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
    """Where a head's place lies in the order of native_attend.py."""
    return d if d >= dim - dim % BLOCK else d - d % BLOCK + d % 2 * (BLOCK // 2) + d % BLOCK // 2


# numbers of a task: what it begins with; as `fill_attention` has them; as `fill_turn` has them, the first one 0 where
# queries are turned and keys and values in the slab
TURN = HEAD + 22
TASK = TURN + 14


@njit(inline="always", **OPTIONS)
def fill_attention(
    task, query_at, query_row, query_head, query_new, keys_at, values_at, out_at,
    slots_at, length_at, positions_at, positions_row, bits_at,
    rows, new, heads, kv_heads, columns, dim, value_dim, room, scaling, window,
):  # fmt: skip
    """query_row, _head, _new: strides · bits_at: 0 where each query sees all columns up to its position"""
    task[HEAD], task[HEAD + 1], task[HEAD + 2], task[HEAD + 3] = query_at, query_row, query_head, query_new
    task[HEAD + 4], task[HEAD + 5], task[HEAD + 6], task[HEAD + 7] = keys_at, values_at, out_at, slots_at
    task[HEAD + 8], task[HEAD + 9], task[HEAD + 10], task[HEAD + 11] = length_at, positions_at, positions_row, bits_at
    task[HEAD + 12], task[HEAD + 13], task[HEAD + 14], task[HEAD + 15] = rows, new, heads, kv_heads
    task[HEAD + 16], task[HEAD + 17], task[HEAD + 18], task[HEAD + 19] = columns, dim, value_dim, room
    task[HEAD + 20], task[HEAD + 21], task[TURN] = np.int64(bits_of(np.float32(scaling))), window, 0


@njit(inline="always", **OPTIONS)
def fill_turn(
    task, query_at, query_head, query_token, key_at, key_head, key_token, value_at, value_head, value_token,
    cos_at, cos_row, sin_at, sin_row, columns_at,
):  # fmt: skip
    """What comes first: the queries of fill_attention lie one after the other, and keys behind them, once turned."""
    task[TURN], task[TURN + 1], task[TURN + 2], task[TURN + 3] = query_at, query_head, query_token, key_at
    task[TURN + 4], task[TURN + 5], task[TURN + 6], task[TURN + 7] = key_head, key_token, value_at, value_head
    task[TURN + 8], task[TURN + 9], task[TURN + 10], task[TURN + 11] = value_token, cos_at, cos_row, sin_at
    task[TURN + 12], task[TURN + 13] = sin_row, columns_at


@njit(cache=True, nogil=True, **OPTIONS)
def _attend(
    query_at, query_row, query_head, query_new, keys_at, values_at, out_at,
    slots_at, length_at, positions_at, positions_row, bits_at,
    rows, new, heads, kv_heads, columns, dim, value_dim, room, scaling, window, threads, team_at, share,
):  # fmt: skip
    task = np.empty(TASK, np.int64)
    task[0], task[1] = threads, team_at
    fill_attention(
        task, query_at, query_row, query_head, query_new, keys_at, values_at, out_at,
        slots_at, length_at, positions_at, positions_row, bits_at,
        rows, new, heads, kv_heads, columns, dim, value_dim, room, scaling, window,
    )  # fmt: skip
    run_in_team(task, share)


@njit(inline="never", **OPTIONS)
def _turn_share(task, thread):
    """One thread's share of the tokens: rotary positions, and the slab's new rows."""
    turned, keys_at, values_at, slots_at = task[HEAD], task[HEAD + 4], task[HEAD + 5], task[HEAD + 7]
    rows, new, heads, kv_heads, columns, dim, value_dim = (
        task[HEAD + 12], task[HEAD + 13], task[HEAD + 14], task[HEAD + 15], task[HEAD + 16], task[HEAD + 17],
        task[HEAD + 18],
    )  # fmt: skip
    query_at, query_head, query_token, key_at, key_head, key_token = (
        task[TURN], task[TURN + 1], task[TURN + 2], task[TURN + 3], task[TURN + 4], task[TURN + 5],
    )  # fmt: skip
    value_at, value_head, value_token, columns_at = task[TURN + 6], task[TURN + 7], task[TURN + 8], task[TURN + 13]
    cos_row, sin_row = task[TURN + 10], task[TURN + 12]
    first, end = share_of(rows * new, task, thread)
    cos_at, sin_at = task[TURN + 9] + 2 * first * cos_row, task[TURN + 11] + 2 * first * sin_row
    across = kv_heads * dim
    turned_key = turned + 2 * rows * new * heads * dim
    _rotate(
        query_at + 2 * first * query_token, cos_at, sin_at, turned + 2 * first * heads * dim,
        query_head, query_token, cos_row, sin_row, heads, end - first, dim,
    )  # fmt: skip
    _rotate(
        key_at + 2 * first * key_token, cos_at, sin_at, turned_key + 2 * first * across,
        key_head, key_token, cos_row, sin_row, kv_heads, end - first, dim,
    )  # fmt: skip
    _write_rows(
        keys_at, slots_at, columns_at, turned_key, new * across, dim, across, first, end, kv_heads, new, dim, columns
    )
    apart = (new * value_token, value_head, value_token)
    _write_rows(values_at, slots_at, columns_at, value_at, *apart, first, end, kv_heads, new, value_dim, columns)
    meet(task)


@njit(**OPTIONS)
def _attend_share(task, thread):
    query_at, query_row, query_head, query_new = task[HEAD], task[HEAD + 1], task[HEAD + 2], task[HEAD + 3]
    keys_at, values_at, out_at, slots_at, length_at = (
        task[HEAD + 4], task[HEAD + 5], task[HEAD + 6], task[HEAD + 7], task[HEAD + 8],
    )  # fmt: skip
    positions_at, positions_row, bits_at, rows, new = (
        task[HEAD + 9], task[HEAD + 10], task[HEAD + 11], task[HEAD + 12], task[HEAD + 13],
    )  # fmt: skip
    heads, kv_heads, columns, dim, value_dim = (
        task[HEAD + 14], task[HEAD + 15], task[HEAD + 16], task[HEAD + 17], task[HEAD + 18],
    )  # fmt: skip
    room, scale, window = task[HEAD + 19], number_of(np.int32(task[HEAD + 20])), task[HEAD + 21]
    group, one = heads // kv_heads, np.int64(1)  # as a number of the code it would be a type of its own
    slots, lengths = carray(pointer(slots_at), (rows,), np.int64), carray(pointer(length_at), (rows,), np.int64)
    positions = carray(pointer(positions_at), (rows * positions_row + new,), np.int64)
    bits = carray(pointer(bits_at), (rows, new), np.int64)
    out = carray(pointer(out_at), (rows, new, heads, value_dim), np.uint16)
    scratch = np.empty(TILE * (room + dim + value_dim), np.float32)
    scratch_at = np.int64(scratch.ctypes.data)  # an address of the other sign compiles whatever takes it once more
    q = carray(pointer(scratch_at + 4 * TILE * room), (TILE, dim), np.float32)
    sums_at = scratch_at + 4 * TILE * (room + dim)
    sums = carray(pointer(sums_at), (TILE, value_dim), np.float32)
    key_row, value_row = 2 * kv_heads * dim, 2 * kv_heads * value_dim
    first, total = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    weight, lanes = np.empty(TILE, np.float32), np.empty(LANES, np.float32)
    tiles = (new * group + TILE - 1) // TILE
    unit, end = share_of(rows * kv_heads * tiles, task, thread)
    while unit < end:
        b, kv, tile = unit // (kv_heads * tiles), unit // tiles % kv_heads, unit % tiles * TILE
        length, slot = lengths[b], slots[b] * columns * kv_heads
        keys, values = keys_at + 2 * (slot + kv) * dim, values_at + 2 * (slot + kv) * value_dim
        unit += 1
        after = min(unit, end - 1)  # whose keys are asked for while values are weighed
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
            if bits_at:  # scores of the ancestors close up behind the history's
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
    scratch[0] = 0  # as in run_in_team


@njit(inline="always", **OPTIONS)
def _place(index, group, kv):
    """(token, head) of a packed query."""
    return index // group, kv * group + index % group


@njit(cache=True, nogil=True, **OPTIONS)
def _rotate_and_attend(
    query_at, query_head, query_token, key_at, key_head, key_token, value_at, value_head, value_token,
    cos_at, cos_row, sin_at, sin_row, keys_at, values_at, out_at,
    slots_at, length_at, positions_at, positions_row, columns_at, bits_at,
    rows, new, heads, kv_heads, columns, dim, value_dim, width, scaling, window, threads, team_at, share,
):  # fmt: skip
    task, turned = np.empty(TASK, np.int64), np.empty(rows * new * (heads + kv_heads) * dim, np.uint16)
    task[0], task[1] = threads, team_at
    fill_attention(
        task, turned.ctypes.data, new * heads * dim, dim, heads * dim, keys_at, values_at, out_at,
        slots_at, length_at, positions_at, positions_row, bits_at,
        rows, new, heads, kv_heads, columns, dim, value_dim, width + TILE, scaling, window,
    )  # fmt: skip
    fill_turn(
        task, query_at, query_head, query_token, key_at, key_head, key_token, value_at, value_head, value_token,
        cos_at, cos_row, sin_at, sin_row, columns_at,
    )  # fmt: skip
    run_in_team(task, share)
    turned[0] = 0  # as in run_in_team
