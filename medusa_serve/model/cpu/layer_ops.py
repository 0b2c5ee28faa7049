"""The small operations of a decoder layer on a CPU, each one kernel where a model's code has several operations. Input
and output are bfloat16, rounded wherever the model's own operations round.

Rows are independent: the same code computes each row, for any number of rows (selftest.py checks it).
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .base import OPTIONS, copy_halves, exponential, half, pointer, wide

BFLOAT16 = torch.bfloat16


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x (…, H) over the root of its mean square, times weight (H) (Zhang and Sennrich 2019)"""
    x = x if x.is_contiguous() else x.contiguous()
    out, dim = torch.empty_like(x), x.shape[-1]
    native_rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // dim, dim, epsilon)
    return out


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, (1, M, H) both; their rows may have any stride"""
    _, rows, dim = gate.shape
    out = torch.empty(1, rows, dim, dtype=BFLOAT16)
    native_silu_times(gate.data_ptr(), gate.stride(1), up.data_ptr(), up.stride(1), out.data_ptr(), rows, dim)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), by a head's two halves: x (1, heads, M, dim), cos, sin (1, M, dim)"""
    _, heads, rows, dim = x.shape
    out = torch.empty(1, rows, heads, dim, dtype=BFLOAT16)
    strides = (x.stride(1), x.stride(2), cos.stride(1), sin.stride(1))
    rotate_rows(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *strides, heads, rows, dim)
    return out.transpose(1, 2)


def write_rows(slab: Tensor, slots: Tensor, columns: Tensor, rows: Tensor) -> None:
    """slab (S, C, heads, dim) · slots (B) · columns (B, N) · rows (B, heads, N, dim)"""
    batch, heads, new, dim = rows.shape
    strides, at = rows.stride(), columns if columns.is_contiguous() else columns.contiguous()
    write_slab_rows(
        slab.data_ptr(), slots.data_ptr(), at.data_ptr(), rows.data_ptr(), strides[0], strides[1], strides[2],
        0, batch * new, heads, new, dim, slab.shape[1],
    )  # fmt: skip


def move_rows(slab: Tensor, slots: Tensor, length: Tensor, nodes: Tensor) -> None:
    """SlotCache.commit for one contiguous slab (L, S, C, heads, dim). nodes (B, A)"""
    layers, of_slots, capacity, heads, dim = slab.shape
    nodes = nodes.contiguous()
    _move_rows(
        slab.data_ptr(), layers, of_slots, capacity, heads * dim,
        slots.data_ptr(), length.data_ptr(), nodes.data_ptr(), *nodes.shape,
    )  # fmt: skip


@njit(cache=True, **OPTIONS)
def native_rms_norm(x_at, weight_at, out_at, rows, dim, epsilon):
    weight = carray(pointer(weight_at), (dim,), np.uint16)
    for row in range(rows):
        x, out = _row(x_at, row * dim, dim), _row(out_at, row * dim, dim)
        total = np.float32(0)
        for d in range(dim):
            total += wide(x[d]) * wide(x[d])
        scale = np.float32(1) / np.sqrt(total / np.float32(dim) + np.float32(epsilon))
        for d in range(dim):
            out[d] = half(wide(half(wide(x[d]) * scale)) * wide(weight[d]))


@njit(cache=True, **OPTIONS)
def native_silu_times(gate_at, gate_row, up_at, up_row, out_at, rows, dim):
    for row in range(rows):
        gate, up = _row(gate_at, row * gate_row, dim), _row(up_at, row * up_row, dim)
        out = _row(out_at, row * dim, dim)
        for d in range(dim):
            x = wide(gate[d])
            e = exponential(-abs(x))
            top = x if x >= np.float32(0) else x * e
            out[d] = half(wide(half(top / (np.float32(1) + e))) * wide(up[d]))


@njit(cache=True, **OPTIONS)
def rotate_rows(x_at, cos_at, sin_at, out_at, x_head, x_row, cos_row, sin_row, heads, rows, dim):
    middle = dim // 2
    for row in range(rows):
        cos, sin = _row(cos_at, row * cos_row, dim), _row(sin_at, row * sin_row, dim)
        cos_2, sin_2 = cos[middle:], sin[middle:]
        for head in range(heads):
            x = _row(x_at, head * x_head + row * x_row, dim)
            out = _row(out_at, (row * heads + head) * dim, dim)
            x_2, out_2 = x[middle:], out[middle:]
            for d in range(middle):
                left, right = wide(x[d]), wide(x_2[d])
                out[d] = half(wide(half(left * wide(cos[d]))) + wide(half(-right * wide(sin[d]))))
                out_2[d] = half(wide(half(right * wide(cos_2[d]))) + wide(half(left * wide(sin_2[d]))))


@njit(cache=True, **OPTIONS)
def write_slab_rows(slab_at, slots_at, columns_at, rows_at, row, head, new_row, first, end, heads, new, dim, capacity):
    """first, end: the range of tokens that are written"""
    slots = carray(pointer(slots_at), (end // new + 1,), np.int64)
    columns = carray(pointer(columns_at), (end,), np.int64)
    for token in range(first, end):
        b, n = token // new, token % new
        start = (slots[b] * capacity + columns[token]) * heads * dim
        for h in range(heads):
            source_at = rows_at + 2 * (b * row + h * head + n * new_row)
            copy_halves(source_at, slab_at + 2 * (start + h * dim), dim)


@njit(cache=True, **OPTIONS)
def _move_rows(slab_at, layers, of_slots, capacity, width, slots_at, length_at, nodes_at, batch, path):
    slots, lengths = carray(pointer(slots_at), (batch,), np.int64), carray(pointer(length_at), (batch,), np.int64)
    nodes = carray(pointer(nodes_at), (batch, path), np.int64)
    for b in range(batch):
        for step in range(1, path):
            if nodes[b, step] <= step:  # the row is in place, or the path is over: numbers grow along a path
                continue
            for layer in range(layers):
                start = (layer * of_slots + slots[b]) * capacity + lengths[b]
                copy_halves(slab_at + 2 * (start + nodes[b, step]) * width, slab_at + 2 * (start + step) * width, width)


@njit(inline="always", **OPTIONS)
def _row(at, offset, dim):
    """`dim` bfloat16 numbers, `offset` numbers after an address"""
    return carray(pointer(at + 2 * offset), (dim,), np.uint16)
