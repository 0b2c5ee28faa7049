"""int4 and int8 products by kernels of our own, where this machine makes them faster than torch's."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numba.extending import register_jitable
from torch import Tensor

from ..weights.int4 import GROUP, Int4Linear
from ..weights.int8 import Int8Linear
from .base import OPTIONS
from .int16_inputs import FACTS, whole
from .int_tiles import HALF, PAIR, QUAD, UNIT, Int4Tile, Int8Tile, most_rows, tiles
from .threads import HEAD, meet, run_in_team, share_of, team, thread_of


class NativeInt4Linear(Int4Linear):
    """packed (1, out / 16, in / 4, 32) uint8: of four inputs and two vectors of eight outputs the steps of (output,
    input of a pair, pair), the first vector's in the low bits · scales (1, out / 16, in / 32, 2, 16) bfloat16: scale
    and zero, the second vector's scales a sixteenth. Of weights with two parts packed (1, out / 16, in / 2, 16, 2)
    int8, both in one, and scales (1, out / 16, in / 32, 16)"""

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
        """One layer with the outputs of all, whose weights the layers share."""
        whole = cls(*(torch.cat([getattr(layer, name) for layer in layers], dim=1) for name in ("packed", "scales")))
        units = [layer.packed.shape[1] for layer in layers]
        for name in ("packed", "scales"):
            for layer, rows in zip(layers, getattr(whole, name).split(units, dim=1), strict=True):
                setattr(layer, name, rows)
                layer._parts = None
        return whole

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
    """NativeInt4Linear's order: by torch's operations it takes ten times as long, at every start"""
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


def product(x: Tensor, packed: Tensor, scales: Tensor, bits: int) -> Tensor:
    """x (M, in) bfloat16, without gaps, by weights of so many bits → (M, out) bfloat16"""
    (rows, inputs), outputs = x.shape, packed.shape[0] * UNIT
    out = torch.empty(rows, outputs, dtype=torch.bfloat16)
    native_product(
        x.data_ptr(), packed.data_ptr(), scales.data_ptr(), out.data_ptr(), rows, inputs, outputs, bits,
        *team().given(), product_share(),
    )  # fmt: skip
    return out


@lru_cache
def product_share() -> int:
    """Address of the function that a thread runs: its share of a product's outputs."""

    @cfunc(types.void(types.voidptr), cache=True, **OPTIONS)
    def body(task_at):
        task = carray(task_at, (TASK,), np.int64)
        _share(task, thread_of(task))

    return int(body.address or 0)


ROWS = most_rows()
_4_tile, _8_tile = tiles(Int4Tile), tiles(Int8Tile)

# numbers of a task: what it begins with, then as `fill_product` has them
TASK = HEAD + 9


@njit(inline="always", **OPTIONS)
def fill_product(task, x_at, packed, scales, out, rows, inputs, outputs, bits, room):
    """room: address of `product_room` for each row"""
    task[HEAD], task[HEAD + 1], task[HEAD + 2], task[HEAD + 3], task[HEAD + 4] = x_at, packed, scales, out, rows
    task[HEAD + 5], task[HEAD + 6], task[HEAD + 7], task[HEAD + 8] = inputs, outputs, bits, room


@register_jitable
def product_room(inputs):
    """Numbers of 16 bits that a row's inputs take as native_whole.py makes them."""
    return inputs + 2 * FACTS * (inputs // GROUP)


@njit(cache=True, **OPTIONS)
def native_product(x_at, packed, scales, out, rows, inputs, outputs, bits, threads, team_at, share):
    task = np.empty(TASK, np.int64)
    task[0], task[1] = threads, team_at
    room = np.empty(rows * product_room(inputs), np.int16)
    fill_product(task, x_at, packed, scales, out, rows, inputs, outputs, bits, room.ctypes.data)
    run_in_team(task, share)
    room[0] = 0  # as in run_in_team


@njit(**OPTIONS)
def _share(task, thread):
    """One thread's share of the inputs, then of the output rows."""
    x, packed, scales, out, rows, inputs, outputs, bits, numbers = (
        task[HEAD], task[HEAD + 1], task[HEAD + 2], task[HEAD + 3], task[HEAD + 4], task[HEAD + 5], task[HEAD + 6],
        task[HEAD + 7], task[HEAD + 8],
    )  # fmt: skip
    groups, facts = inputs // GROUP, numbers + 2 * rows * inputs
    first, last = share_of(rows, task, thread)
    whole(
        x + 2 * first * inputs, (last - first) * groups, numbers + 2 * first * inputs,
        facts + 4 * FACTS * first * groups,
    )  # fmt: skip
    meet(task)
    weight_bytes, scale_bytes = inputs * UNIT * bits // 8, groups * UNIT * (4 if bits == 4 else 2)
    unit, end = share_of(outputs // UNIT, task, thread)
    while unit < end:
        w, s = packed + unit * weight_bytes, scales + unit * scale_bytes
        row = 0
        while row < rows:
            left = rows - row
            count = -(-left // -(-left // ROWS))
            a, t, o = (
                numbers + 2 * row * inputs,
                facts + 4 * FACTS * row * groups,
                out + 2 * (row * outputs + unit * UNIT),
            )
            if bits == 4:
                _4_tile(count, a, inputs, t, w, s, o, outputs)
            else:
                _8_tile(count, a, inputs, t, w, s, o, outputs)
            row += count
        unit += 1
