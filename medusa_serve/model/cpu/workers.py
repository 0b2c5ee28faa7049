"""OpenMP's worker threads. Nothing here needs Numba.

Each thread that multiplies has its own workers. If the workers of two threads outnumber the cores, libgomp lets all of
them sleep after every product, instead of waiting actively for the next one, and both threads take twice as long
(measured on two cores). So a thread with nothing to compute gives its workers up; the next product makes new ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

LIBRARIES = ("libgomp", "libiomp5", "libomp")
PAUSE_SOFT = 1  # omp_pause_soft: variables keep their values


def give_up_workers() -> bool:
    """End the calling thread's idle OpenMP workers; → False where that is impossible (no Linux, no OpenMP 5)."""
    pause = _pause()
    return pause is not None and pause(PAUSE_SOFT) == 0


def _pause() -> Callable[[int], int] | None:
    """omp_pause_resource_all of the OpenMP that torch computes with."""
    return _function("omp_pause_resource_all")


def openmp_address(name: str) -> int:
    """Address of a function of the OpenMP that torch computes with; 0 where there is none."""
    return ctypes.cast(_function(name), ctypes.c_void_p).value or 0


@lru_cache
def _function(name: str) -> Any:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = {fields[5] for line in maps if len(fields := line.split(maxsplit=5)) == 6}
    loaded = [path for path in sorted(paths) if Path(path).name.startswith(LIBRARIES)]
    # torch's wheel contains its own; another copy that something else loaded does not have torch's workers
    for path in sorted(loaded, key=lambda path: "/torch" not in path):
        function = getattr(ctypes.CDLL(path), name, None)
        if function is not None:
            return function
    return None
