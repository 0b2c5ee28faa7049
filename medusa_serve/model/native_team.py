"""Numba's kernels on the threads that torch's products run on: OpenMP's, whose workers wait for the next product.

Numba's own pool would be a second one on the same cores, and each would keep the other's threads from waiting.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types

from .native import OPTIONS, intrinsic
from .workers import openmp_address

VOID, ADDRESS, INT = ir.VoidType(), ir.IntType(8).as_pointer(), ir.IntType(32)


HEAD = 2  # numbers that a task begins with: of threads, and the address of omp_get_thread_num


class Team(NamedTuple):
    """Addresses of OpenMP's functions, 0 where a kernel must do with one thread: start a team, which of it am I"""

    start: int
    number: int

    def threads(self) -> int:
        return torch.get_num_threads() if self.start else 1

    def given(self) -> tuple[int, int, int]:
        """To a kernel: threads, start, number."""
        return self.threads(), self.start, self.number


@lru_cache
def team() -> Team:
    start, number = openmp_address("GOMP_parallel"), openmp_address("omp_get_thread_num")
    return Team(start, number) if start and number and _gives_what_is_asked() else Team(0, 0)


def _gives_what_is_asked() -> bool:
    """Whether a team has as many threads as it is asked for: a smaller one would leave shares undone."""
    dynamic, limit = openmp_address("omp_get_dynamic"), openmp_address("omp_get_thread_limit")
    told = ctypes.CFUNCTYPE(ctypes.c_int)
    return bool(dynamic and limit) and not told(dynamic)() and told(limit)() >= torch.get_num_threads()


@njit(inline="always", **OPTIONS)
def run_in_team(start, share, task, threads):
    """Call share(task), both addresses, in so many threads at once, and wait for all of them."""
    if threads > 1:
        _fork(start, share, task, threads)
    else:
        call(share, task)


@njit(inline="always", **OPTIONS)
def thread_of(task_at):
    """Which of the task's threads runs this."""
    head = carray(task_at, (HEAD,), np.int64)
    return _number(head[1]) if head[0] > 1 else 0


@intrinsic
def _fork(_, start, share, task, threads):
    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(VOID, [ADDRESS, ADDRESS, INT, INT])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        given = [builder.inttoptr(at, ADDRESS) for at in arguments[1:3]]
        builder.call(function, [*given, builder.trunc(arguments[3], INT), ir.Constant(INT, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def call(_, share, task):
    """share(task), both addresses"""

    def generate(context, builder, signature, arguments):
        function = builder.inttoptr(arguments[0], ir.FunctionType(VOID, [ADDRESS]).as_pointer())
        builder.call(function, [builder.inttoptr(arguments[1], ADDRESS)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _number(_, number):
    def generate(context, builder, signature, arguments):
        function = builder.inttoptr(arguments[0], ir.FunctionType(INT, []).as_pointer())
        return builder.sext(builder.call(function, []), ir.IntType(64))

    return types.int64(types.int64), generate
