"""OpenMP's worker threads, which belong to the thread that computes.

Each thread that multiplies keeps workers of its own. Where those of two threads are together more than the cores,
libgomp lets all of them sleep after every product instead of waiting for the next one, and both threads take twice as
long (measured on two cores). So whoever has nothing to compute gives them up; the next product makes new ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

NAMES = ("libgomp", "libiomp5", "libomp")
SOFT = 1  # omp_pause_soft: variables keep their values


def give_up_workers() -> bool:
    """End the calling thread's idle OpenMP workers; → False where that cannot be done (no Linux, no OpenMP 5)."""
    pause = _pause()
    return pause is not None and pause(SOFT) == 0


def _pause() -> Callable[[int], int] | None:
    """omp_pause_resource_all of the OpenMP that torch computes with."""
    return _function("omp_pause_resource_all")


def openmp_address(name: str) -> int:
    """Of a function of the OpenMP that torch computes with; 0 where there is none."""
    return ctypes.cast(_function(name), ctypes.c_void_p).value or 0


@lru_cache
def _function(name: str) -> Any:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = {fields[5] for line in maps if len(fields := line.split(maxsplit=5)) == 6}
    loaded = [path for path in sorted(paths) if Path(path).name.startswith(NAMES)]
    # torch's wheel brings its own; one that something else loaded has no workers of torch's
    for path in sorted(loaded, key=lambda path: "/torch" not in path):
        function = getattr(ctypes.CDLL(path), name, None)
        if function is not None:
            return function
    return None
