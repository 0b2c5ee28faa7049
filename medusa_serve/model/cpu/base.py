"""What Numba's kernels for a CPU share: bfloat16 numbers and tensors' memory. Numba is imported by those who compile
with it, so that nothing here is needed where it is missing.

Kernels take tensors as addresses: a call then costs a third of a microsecond, where one of ATen's operations costs two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

# sums may be reordered to vectors; the order is then the same at every call, as long as the count is
FAST = {"reassoc", "contract", "nsz", "arcp"}
intrinsic: Any = numba_intrinsic
OPTIONS: dict[str, Any] = {"fastmath": FAST, "error_model": "numpy", "boundscheck": False}


@intrinsic
def pointer(_, address):
    """int64 → void*"""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def wide(_, half):
    """bfloat16, as uint16 → float32"""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def bits_of(_, number):
    """The float32's bits, as uint32"""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def number_of(_, bits):
    """The float32 of these bits, int32"""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@njit(inline="always", **OPTIONS)
def half(x):
    """float32 → the nearest bfloat16, as uint16; halves go to even, NaN stays one"""
    bits = bits_of(x)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = np.uint32(0x7FC0)
    return np.uint16(rounded if (bits & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000) else quiet)


@njit(inline="always", **OPTIONS)
def copy_halves(source_at, target_at, count):
    """bfloat16 numbers from one address to another"""
    source, target = carray(pointer(source_at), (count,), np.uint16), carray(pointer(target_at), (count,), np.uint16)
    for i in range(count):
        target[i] = source[i]


@njit(inline="always", **OPTIONS)
def exponential(x):
    """e^x of a float32 up to 0 (Cephes' polynomial, relative error 2e-7); below -87 as of -87. NaN stays one."""
    x = x if not x < np.float32(-87.0) else np.float32(-87.0)
    steps = np.int32(x * np.float32(1.44269504088896341) - np.float32(0.5))  # towards 0: to the nearest
    n = np.float32(steps)
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * number_of((steps + np.int32(127)) << np.int32(23))
