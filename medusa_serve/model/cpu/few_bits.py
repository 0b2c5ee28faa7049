"""int4.few_bit_parts in one pass over the weights. torch needs ten passes, which was the longest work of a start."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..weights.int4 import GROUP, OFF_GRID, Parts, part_of, two_parts

EXACT: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}  # no fast math: results equal torch's


def few_bit_parts(weight: Tensor) -> Parts | None:
    """Like int4.few_bit_parts."""
    near = OFF_GRID * float(weight.abs().max())
    if (four := four_bit_steps(weight, near)) is not None:
        steps, scale, low = four
        return [part_of(steps, scale, low + 8 * scale)]
    eight = eight_bit_steps(weight, near)
    return None if eight is None else two_parts(*eight[:2])


def four_bit_steps(weight: Tensor, near: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """weight (out, in) float32 → steps (out, in) uint8 of 0 … 15, scale and lowest of each group (out, in / 32);
    None if a weight is further than `near` from its step"""
    return _found(weight, near, False)


def eight_bit_steps(weight: Tensor, near: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same for steps of -127 … 127, plus 128; the groups' lowest are not used."""
    return _found(weight, near, True)


def _found(weight: Tensor, near: float, eight: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    rows, columns = weight.shape
    steps = torch.empty(rows, columns, dtype=torch.uint8)
    scale, low = (torch.empty(rows, columns // GROUP, dtype=torch.float32) for _ in range(2))
    good = _fill(weight.contiguous().numpy(), np.float32(near), eight, steps.numpy(), scale.numpy(), low.numpy())
    return (steps, scale, low) if good else None


@njit(**EXACT)
def _fill(weight, near, eight, steps, scales, lows):
    """→ whether all weights are near their steps. eight: steps count from -128, else from the group's lowest"""
    shift = np.float32(128 if eight else 0)
    for row in range(weight.shape[0]):
        for group in range(scales.shape[1]):
            numbers = weight[row, group * GROUP : (group + 1) * GROUP]
            out = steps[row, group * GROUP : (group + 1) * GROUP]
            low, high = _ends(numbers)
            scale = max(high, -low) / np.float32(127) if eight else (high - low) / np.float32(15)
            zero = np.float32(0) if eight else low
            divisor = max(scale, np.float32(1e-30))
            for i in range(GROUP):
                step = np.rint((numbers[i] - zero) / divisor)
                if not abs(step * scale + zero - numbers[i]) <= near:
                    return False
                out[i] = np.uint8(step + shift)
            scales[row, group], lows[row, group] = scale, low
    return True


@njit(inline="always", error_model="numpy")
def _ends(numbers):
    low, high = numbers[0], numbers[0]
    for i in range(1, GROUP):
        low, high = min(low, numbers[i]), max(high, numbers[i])
    return low, high
