"""Shared by the Numba kernels: records, functions that threads run, and bfloat16 numbers.

Kernels take tensors as addresses: such a call costs a third of a microsecond, an operation of ATen costs two.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache, update_wrapper
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

# sums may be reordered for vectors; calls with the same count then use the same order
FAST = {"reassoc", "contract", "nsz", "arcp"}
intrinsic: Any = numba_intrinsic
OPTIONS: dict[str, Any] = {"fastmath": FAST, "error_model": "numpy", "boundscheck": False}


# ---- records: Python fills them by name, kernels read and write them by name -----------------------------------------


def record(fields: str, **others: Any) -> Any:
    """A ctypes structure: int64 fields with these names, then `others` with their ctypes types. Kernels use its
    np.dtype. Setting an unknown field raises AttributeError."""
    layout = [*((name, ctypes.c_int64) for name in fields.split()), *others.items()]
    return type("Record", (ctypes.Structure,), {"__slots__": (), "_fields_": layout})


@intrinsic
def record_at(_, address, layout):
    """The record of this np.dtype at an address"""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(layout.dtype))

    return layout.dtype(types.int64, layout), generate


@intrinsic
def new_record(_, layout):
    """A record of this np.dtype, not yet filled; it lives until the calling function returns."""

    def generate(context, builder, signature, arguments):
        place = cgutils.alloca_once(builder, context.get_data_type(layout.dtype))
        place.align = 8
        return builder.bitcast(place, context.get_value_type(layout.dtype))

    return layout.dtype(layout), generate


@intrinsic
def address_of(_, task):
    """The address of a record, int64"""

    def generate(context, builder, signature, arguments):
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(task), generate


@intrinsic
def keep(_, array):
    """Keep an array alive until here: Numba frees it after its last use and does not see that its address is in use."""

    def generate(context, builder, signature, arguments):
        return context.get_dummy_value()

    return types.void(array), generate


def as_function(body: Callable[[int], None]) -> Any:
    """Decorates a function of a record's address: the result, called, compiles it once and gives its C address.

    Numba's disk cache finds it by the file and the name of `body`, so `body` must be a function at module level."""

    @lru_cache
    def address() -> int:
        return int(cfunc(types.void(types.int64), cache=True, **OPTIONS)(body).address or 0)

    return update_wrapper(address, body)


# ---- numbers ---------------------------------------------------------------------------------------------------------


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
    """float32 → the nearest bfloat16, as uint16; ties go to even, NaN stays NaN"""
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
    """e^x of a float32 up to 0 (Cephes' polynomial, relative error 2e-7); below -87 it is e^-87. NaN stays NaN."""
    x = x if not x < np.float32(-87.0) else np.float32(-87.0)
    steps = np.int32(x * np.float32(1.44269504088896341) - np.float32(0.5))  # truncation rounds to the nearest
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
