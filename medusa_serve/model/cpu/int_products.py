"""Linear layers with int4 and int8 weights by our own kernels, for machines where these are faster than torch's."""

from __future__ import annotations

from ctypes import addressof
from typing import Any, Self

import numpy as np
import torch
from numba import njit
from numba.extending import register_jitable
from torch import Tensor

from ..weights.int4 import GROUP, Int4Linear
from ..weights.int8 import Int8Linear
from .base import OPTIONS, as_function, keep, record_at
from .int16_inputs import SUMMARY, to_int16
from .int_tiles import HALF, PAIR, QUAD, UNIT, Int4Tile, Int8Tile, most_rows, tiles
from .threads import range_of_thread, run_in_threads, task_record, thread_of, threads, wait_for_all


class NativeInt4Linear(Int4Linear):
    """packed (1, out / 16, in / 4, 32) uint8: four inputs of two vectors of eight outputs, in the order (output, input
    of a pair, pair), the first vector's steps in the low bits · scales (1, out / 16, in / 32, 2, 16) bfloat16: scale
    and zero; the second vector's scales are divided by 16. Weights of two parts: packed (1, out / 16, in / 2, 16, 2)
    int8, both parts in one number, scales (1, out / 16, in / 32, 16)"""

    note = ", own products"

    @staticmethod
    def int8() -> type[Int8Linear]:
        return NativeInt8Linear

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[1] * UNIT, self.scales.shape[2] * GROUP

    @property
    def bits(self) -> int:
        return 8 if self.packed.dtype == torch.int8 else 4

    @classmethod
    def _made(cls, parts: list[Any], bias: Tensor | None = None) -> Self:
        if len(parts) == 2:
            (high, _), (low, scales) = parts
            return cls(
                _in_pairs(((high << 4 | low) ^ 128).view(torch.int8))[None], _in_units(scales[..., 0])[None], bias
            )
        return super()._made(parts, bias)

    @staticmethod
    def arranged(steps: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        scales = scales.unflatten(0, (-1, UNIT)).permute(0, 2, 3, 1).contiguous()
        scales[:, :, 0, HALF:] /= 16
        units, inputs = steps.shape[0] // UNIT, steps.shape[1]
        packed = torch.empty(units, inputs // QUAD, 2 * UNIT, dtype=torch.uint8)
        _in_quads(steps.contiguous().numpy(), packed.numpy())
        return packed, scales

    @staticmethod
    def can_merge(layers: list[Any]) -> bool:
        return len({(layer.in_features, layer.bits) for layer in layers}) == 1 and all(
            layer.bias is None for layer in layers
        )

    @classmethod
    def merged(cls, layers: list[Any]) -> Self:
        """One layer with the outputs of all. The layers' weights become views of its weights."""
        merged = cls(*(torch.cat([getattr(layer, name) for layer in layers], dim=1) for name in ("packed", "scales")))
        units = [layer.packed.shape[1] for layer in layers]
        for name in ("packed", "scales"):
            for layer, rows in zip(layers, getattr(merged, name).split(units, dim=1), strict=True):
                setattr(layer, name, rows)
                layer._parts = None
        return merged

    def _part(self, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        return product(x, packed, scales, self.bits)


class NativeInt8Linear(Int8Linear):
    """weight (out / 16, in / 2, 16, 2) int8 · scale (out / 16, in / 32, 16) bfloat16, the same for all inputs"""

    @property
    def shape(self) -> tuple[int, int]:
        units, pairs, *_ = self.weight.shape
        return units * UNIT, 2 * pairs

    @staticmethod
    def fits(module: Any) -> bool:
        return Int8Linear.fits(module) and module.out_features % UNIT == 0

    @staticmethod
    def arranged(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return _in_pairs(weight), _in_units(scale[:, None].expand(-1, weight.shape[1] // GROUP))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).bfloat16().contiguous()
        out = product(rows, self.weight, self.scale, 8).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def _in_pairs(numbers: Tensor) -> Tensor:
    """(out, in) int8 → (out / 16, in / 2, 16, 2)"""
    pairs = numbers.contiguous().view(torch.int16)  # half as many numbers to move
    return _in_units(pairs).view(torch.int8).unflatten(2, (UNIT, PAIR))


@njit(cache=True, nogil=True)
def _in_quads(steps, packed):
    """Fills `packed` in NativeInt4Linear's order. torch's operations would take ten times as long, at every start."""
    inputs = steps.shape[1]
    for unit in range(packed.shape[0]):
        for output in range(HALF):
            first, second = unit * UNIT + output, unit * UNIT + HALF + output
            for i in range(inputs):
                place = 4 * output + 2 * (i % 2) + i % QUAD // 2
                packed[unit, i // QUAD, place] = steps[first, i] | steps[second, i] << 4


def _in_units(numbers: Tensor) -> Tensor:
    """(out, n) → (out / 16, n, 16)"""
    return numbers.unflatten(0, (-1, UNIT)).transpose(1, 2).contiguous()


# room: address of `product_room` 16-bit numbers for each row
Product = task_record("x weights scales out rows inputs outputs bits room")
PRODUCT = np.dtype(Product)
ROWS = most_rows()
_4_tile, _8_tile = tiles(Int4Tile), tiles(Int8Tile)


def product(x: Tensor, weights: Tensor, scales: Tensor, bits: int) -> Tensor:
    """x (M, in) bfloat16, contiguous, by weights of `bits` bits → (M, out) bfloat16"""
    (rows, inputs), outputs = x.shape, weights.shape[0] * UNIT
    out = torch.empty(rows, outputs, dtype=torch.bfloat16)
    task = Product(*threads().given())
    task.x, task.weights, task.scales, task.out = x.data_ptr(), weights.data_ptr(), scales.data_ptr(), out.data_ptr()
    task.rows, task.inputs, task.outputs, task.bits = rows, inputs, outputs, bits
    _multiply(addressof(task), product_function())
    return out


@njit(cache=True, **OPTIONS)
def _multiply(task_at, function):
    run_product(record_at(task_at, PRODUCT), function)


@njit(inline="always", **OPTIONS)
def run_product(task, function):
    """Run a task; its room is allocated here."""
    room = np.empty(task.rows * product_room(task.inputs), np.int16)
    task.room = room.ctypes.data
    run_in_threads(task, function)
    keep(room)


@register_jitable
def product_room(inputs):
    """How many 16-bit numbers a row's inputs take in the format of int16_inputs.py."""
    return inputs + 2 * SUMMARY * (inputs // GROUP)


@as_function
def product_function(task_at):
    """One thread's share: first of the rows of inputs, then of the outputs."""
    task = record_at(task_at, PRODUCT)
    thread = thread_of(task)
    rows, inputs, outputs, bits = task.rows, task.inputs, task.outputs, task.bits
    groups, summaries = inputs // GROUP, task.room + 2 * rows * inputs
    numbers, out = task.room, task.out
    first, last = range_of_thread(rows, task, thread)
    x, own = task.x + 2 * first * inputs, numbers + 2 * first * inputs
    to_int16(x, (last - first) * groups, own, summaries + 4 * SUMMARY * first * groups)
    wait_for_all(task)
    weight_bytes, scale_bytes = inputs * UNIT * bits // 8, groups * UNIT * (4 if bits == 4 else 2)
    unit, end = range_of_thread(outputs // UNIT, task, thread)
    while unit < end:
        w, s = task.weights + unit * weight_bytes, task.scales + unit * scale_bytes
        row = 0
        while row < rows:
            left = rows - row
            count = -(-left // -(-left // ROWS))
            a = numbers + 2 * row * inputs
            t = summaries + 4 * SUMMARY * row * groups
            o = out + 2 * (row * outputs + unit * UNIT)
            if bits == 4:
                _4_tile(count, a, inputs, t, w, s, o, outputs)
            else:
                _8_tile(count, a, inputs, t, w, s, o, outputs)
            row += count
        unit += 1
