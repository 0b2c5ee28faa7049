"""int4 and int8 products by kernels of our own, where they are faster than torch's: on CPUs without AVX-512 by half."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from .int4 import GROUP, Int4Linear
from .int8 import Int8Linear
from .native import OPTIONS, pointer, wide
from .native_team import HEAD, run_in_team, team, thread_of
from .native_tile import UNIT, Int4Tile, Int8Tile, Tile, tile


class NativeInt4Linear(Int4Linear):
    """packed (1, out / 16, in / 2, 16) uint8, a byte: the steps of two inputs, the first one's in the low bits · scales
    (1, out / 16, in / 32, 2, 16) bfloat16: scale and zero. Of weights with two parts packed (1, out / 16, in, 16) int8,
    both in one, and scales (1, out / 16, in / 32, 16)"""

    note = ", own products"

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
                _in_units(((high << 4 | low) ^ 128).view(torch.int8))[None], _in_units(scales[..., 0])[None], bias
            )
        return super()._made(parts, bias)

    @staticmethod
    def arranged(steps: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        low, high = steps.unflatten(1, (-1, 2)).unbind(2)
        return _in_units(low | high << 4), scales.unflatten(0, (-1, UNIT)).permute(0, 2, 3, 1)

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
    """weight (out / 16, in, 16) int8 · scale (out / 16, in / 32, 16) bfloat16, the same for all inputs of a row"""

    @property
    def shape(self) -> tuple[int, int]:
        units, inputs, _ = self.weight.shape
        return units * UNIT, inputs

    @staticmethod
    def fits(module: Any) -> bool:
        return Int8Linear.fits(module) and module.out_features % UNIT == 0

    @staticmethod
    def arranged(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return _in_units(weight), _in_units(scale[:, None].expand(-1, weight.shape[1] // GROUP))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).bfloat16().contiguous()
        out = product(rows, self.weight, self.scale, 8).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


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
        _share(carray(task_at, (TASK,), np.int64), thread_of(task_at))

    return int(body.address or 0)


def _tiles(kind: type[Tile]) -> Any:
    """A tile of so many rows, by two units from five on: what a share is made of."""
    one, two, three, four = (tile(kind, rows, 1) for rows in (1, 2, 3, 4))
    # two units by one or two rows: so that there are sums enough to wait for none of them
    one_by_two, two_by_two = tile(kind, 1, 2), tile(kind, 2, 2)

    @njit(**OPTIONS)
    def run(shape, a, inputs, t, w, s, o, outputs):
        if shape == 4:
            four(a, inputs, t, w, s, o, outputs)
        elif shape == 5:
            one_by_two(a, inputs, t, w, s, o, outputs)
        elif shape == 6:
            two_by_two(a, inputs, t, w, s, o, outputs)
        elif shape == 3:
            three(a, inputs, t, w, s, o, outputs)
        elif shape == 2:
            two(a, inputs, t, w, s, o, outputs)
        else:
            one(a, inputs, t, w, s, o, outputs)

    return run


_4_tile, _8_tile = _tiles(Int4Tile), _tiles(Int8Tile)

# numbers of a task: what thread_of reads, x, sums, packed, scales, out, rows, inputs, outputs, bits
TASK = HEAD + 9


@njit(cache=True, **OPTIONS)
def native_product(x_at, packed, scales, out, rows, inputs, outputs, bits, threads, start, number, share):
    numbers = np.empty(rows * (inputs + inputs // GROUP), np.float32)
    sums = numbers[rows * inputs :]
    x = carray(pointer(x_at), (rows, inputs), np.uint16)
    for row in range(rows):
        for group in range(inputs // GROUP):
            total = np.float32(0)
            for i in range(group * GROUP, (group + 1) * GROUP):
                value = wide(x[row, i])
                numbers[row * inputs + i] = value
                total += value
            sums[row * (inputs // GROUP) + group] = total
    task = np.array(
        (threads, number, numbers.ctypes.data, sums.ctypes.data, packed, scales, out, rows, inputs, outputs, bits),
        np.int64,
    )
    run_in_team(start, share, task.ctypes.data, threads)
    numbers[0] = task[0]  # Numba frees an array behind its last use, and of an address it does not know


@njit(**OPTIONS)
def _share(task, thread):
    """One thread's share of the output rows."""
    threads, _, x, sums, packed, scales, out, rows, inputs, outputs, bits = (
        task[0], task[1], task[2], task[3], task[4], task[5], task[6], task[7], task[8], task[9], task[10],
    )  # fmt: skip
    groups, units = inputs // GROUP, outputs // UNIT
    weight_bytes, scale_bytes = inputs * UNIT * bits // 8, groups * UNIT * (4 if bits == 4 else 2)
    unit, end = units * thread // threads, units * (thread + 1) // threads
    while unit < end:
        together = 2 if rows < 3 and unit + 2 <= end else 1
        w, s = packed + unit * weight_bytes, scales + unit * scale_bytes
        for row in range(0, rows, 4):
            a, t, o = x + 4 * row * inputs, sums + 4 * row * groups, out + 2 * (row * outputs + unit * UNIT)
            shape = min(rows - row, 4) + 4 * (together - 1)
            if bits == 4:
                _4_tile(shape, a, inputs, t, w, s, o, outputs)
            else:
                _8_tile(shape, a, inputs, t, w, s, o, outputs)
        unit += together
