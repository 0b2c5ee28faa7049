"""Numba's kernels on the threads that torch's products run on: OpenMP's, whose workers wait for the next product.

Numba's own pool would be a second one on the same cores, and each would keep the other's threads from waiting.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types

from .base import OPTIONS, intrinsic, pointer
from .workers import openmp_address

VOID, ADDRESS, INT = ir.VoidType(), ir.IntType(8).as_pointer(), ir.IntType(32)


HEAD = 2  # numbers that a task begins with: of threads, and the address of the team's functions
FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "GOMP_barrier")
START, NUMBER, BARRIER = range(3)


class Team:
    """Of OpenMP's threads; one alone where a function is missing."""

    def __init__(self, functions: list[int]) -> None:
        """Addresses of FUNCTIONS; empty: none"""
        self._functions = np.array(functions or [0] * len(FUNCTIONS), np.int64)
        self._at, self._whole = self._functions.ctypes.data, bool(functions)

    def threads(self) -> int:
        return torch.get_num_threads() if self._whole else 1

    def given(self) -> tuple[int, int]:
        """To a kernel: what its task begins with."""
        return self.threads(), self._at


@lru_cache
def team() -> Team:
    functions = [openmp_address(name) for name in FUNCTIONS]
    return Team(functions if all(functions) and _gives_what_is_asked() else [])


def _gives_what_is_asked() -> bool:
    """Whether a team has as many threads as it is asked for: a smaller one would leave shares undone."""
    dynamic, limit = openmp_address("omp_get_dynamic"), openmp_address("omp_get_thread_limit")
    told = ctypes.CFUNCTYPE(ctypes.c_int)
    return bool(dynamic and limit) and not told(dynamic)() and told(limit)() >= torch.get_num_threads()


@njit(inline="always", **OPTIONS)
def run_in_team(task, share):
    """Call share(address of the task) in as many threads as the task names, and wait for all of them."""
    if task[0] > 1:
        _fork(_function(task, START), share, task.ctypes.data, task[0])
    else:
        call(share, task.ctypes.data)
    task[0] = 0  # Numba frees an array behind its last use, and of an address it does not know


@njit(inline="always", **OPTIONS)
def thread_of(task):
    """Which of the task's threads runs this."""
    return _number(_function(task, NUMBER)) if task[0] > 1 else 0


@njit(inline="always", **OPTIONS)
def meet(task):
    """Wait until all of the task's threads are here."""
    if task[0] > 1:
        _wait(_function(task, BARRIER))


@njit(inline="always", **OPTIONS)
def share_of(count, task, thread):
    """(first, end) of a thread's part of so many; of a single one it is the first thread's."""
    threads = task[0]
    return (count * thread + threads - 1) // threads, (count * (thread + 1) + threads - 1) // threads


@njit(inline="always", **OPTIONS)
def _function(task, which):
    return carray(pointer(task[1]), (len(FUNCTIONS),), np.int64)[which]


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


@intrinsic
def _wait(_, barrier):
    def generate(context, builder, signature, arguments):
        builder.call(builder.inttoptr(arguments[0], ir.FunctionType(VOID, []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate
