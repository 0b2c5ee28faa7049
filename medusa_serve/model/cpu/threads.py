"""Runs kernels on OpenMP's threads, which torch's products use too.

OpenMP's workers wait actively for the next product. Numba's own threads would be a second set on the same cores, and
neither set could wait actively.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types

from .base import OPTIONS, address_of, intrinsic, pointer, record
from .workers import openmp_address

FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "GOMP_barrier")
START, NUMBER, BARRIER = range(3)
VOID, ADDRESS, INT = ir.VoidType(), ir.IntType(8).as_pointer(), ir.IntType(32)


def task_record(fields: str, **others: Any) -> Any:
    """The record of a task for several threads: its first fields are those of `Threads.given`."""
    return record(f"threads openmp {fields}", **others)


class Threads:
    """OpenMP's threads; a single thread where a function is missing."""

    def __init__(self, functions: list[int]) -> None:
        """functions: addresses of FUNCTIONS; empty if one is missing"""
        self._functions = np.array(functions or [0] * len(FUNCTIONS), np.int64)
        self._address, self._usable = self._functions.ctypes.data, bool(functions)

    def count(self) -> int:
        return torch.get_num_threads() if self._usable else 1

    def given(self) -> tuple[int, int]:
        """The first fields of a task: the number of threads, the address of OpenMP's functions."""
        return self.count(), self._address


@lru_cache
def threads() -> Threads:
    functions = [openmp_address(name) for name in FUNCTIONS]
    return Threads(functions if all(functions) and _starts_as_many_as_asked() else [])


def _starts_as_many_as_asked() -> bool:
    """Fewer threads than a task asks for would leave a part of it undone."""
    dynamic, limit = openmp_address("omp_get_dynamic"), openmp_address("omp_get_thread_limit")
    getter = ctypes.CFUNCTYPE(ctypes.c_int)
    return bool(dynamic and limit) and not getter(dynamic)() and getter(limit)() >= torch.get_num_threads()


# ---- inside kernels --------------------------------------------------------------------------------------------------


@njit(inline="always", **OPTIONS)
def run_in_threads(task, function):
    """Call function(address of the task) in as many threads as the task names, and wait for all of them."""
    if task.threads > 1:
        _fork(_openmp(task, START), function, address_of(task), task.threads)
    else:
        call(function, address_of(task))


@njit(inline="always", **OPTIONS)
def thread_of(task):
    """The number of the calling thread among the task's threads."""
    return _number(_openmp(task, NUMBER)) if task.threads > 1 else 0


@njit(inline="always", **OPTIONS)
def wait_for_all(task):
    """Wait until all of the task's threads have come here."""
    if task.threads > 1:
        _wait(_openmp(task, BARRIER))


@njit(inline="always", **OPTIONS)
def range_of_thread(count, task, thread):
    """(first, end): which of `count` items a thread computes; a single item goes to the first thread."""
    threads = task.threads
    return (count * thread + threads - 1) // threads, (count * (thread + 1) + threads - 1) // threads


@njit(inline="always", **OPTIONS)
def use_threads(task, other):
    """Let the other task's threads run this task."""
    task.threads, task.openmp = other.threads, other.openmp


@njit(inline="always", **OPTIONS)
def _openmp(task, which):
    return carray(pointer(task.openmp), (len(FUNCTIONS),), np.int64)[which]


@intrinsic
def _fork(_, start, function, task, threads):
    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(VOID, [ADDRESS, ADDRESS, INT, INT])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        given = [builder.inttoptr(at, ADDRESS) for at in arguments[1:3]]
        builder.call(function, [*given, builder.trunc(arguments[3], INT), ir.Constant(INT, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def call(_, function, task):
    """function(task), both addresses"""

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
