"""Numba's kernels on the threads that torch's products run on: OpenMP's, whose workers wait for the next product.

Numba's own pool would be a second one on the same cores, and each would keep the other's threads from waiting.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from llvmlite import ir
from numba import types

from .native import intrinsic
from .workers import openmp_address

VOID, ADDRESS, INT = ir.VoidType(), ir.IntType(8).as_pointer(), ir.IntType(32)


class Team(NamedTuple):
    """Addresses of OpenMP's functions, 0 where a kernel must do with one thread: start a team, which of it am I"""

    start: int
    number: int

    def threads(self) -> int:
        return torch.get_num_threads() if self.start else 1


@lru_cache
def team() -> Team:
    start, number = openmp_address("GOMP_parallel"), openmp_address("omp_get_thread_num")
    return Team(start, number) if start and number else Team(0, 0)


@intrinsic
def run_in_team(_, start, body, data, threads):
    """Call body(data), both addresses, in so many threads at once, and wait for all of them."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(VOID, [ADDRESS, ADDRESS, INT, INT])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        given = [builder.inttoptr(at, ADDRESS) for at in arguments[1:3]]
        builder.call(function, [*given, builder.trunc(arguments[3], INT), ir.Constant(INT, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def number_in_team(_, number):
    def generate(context, builder, signature, arguments):
        function = builder.inttoptr(arguments[0], ir.FunctionType(INT, []).as_pointer())
        return builder.sext(builder.call(function, []), ir.IntType(64))

    return types.int64(types.int64), generate
