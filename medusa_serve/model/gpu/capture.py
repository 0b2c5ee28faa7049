"""Captures a pass as a CUDA graph: one capture at a time in a process, all on one stream. A capture that something else
broke is tried once more.

A capture becomes invalid when another thread waits for the entire device meanwhile (torch.cuda.synchronize in a
notebook's cell, a compiler that times kernels, another engine's capture). A stream's memory, such as cuBLAS's
workspaces of some 32 MB, stays for the life of the process: a stream for each capture would cost that much each time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ...errors import CaptureFailed
from ..loading.process_lock import TURN


def capture(body: Callable[[], Any], device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run body, which compiles its kernels, then capture a second run; → the graph and the second run's result. The
    graph's pool is not `pool` where a broken capture was tried again. Raises CaptureFailed, torch.OutOfMemoryError,
    and what body raises."""
    here = torch.cuda.current_stream(device)
    with TURN:
        side = _stream(device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            body()
        here.wait_stream(side)
        try:
            return _captured(body, side, here, pool)
        except CaptureFailed:  # the next capture that succeeds also repairs the state of torch's random numbers
            return _captured(body, side, here, None)


def _captured(
    body: Callable[[], Any], side: torch.cuda.Stream, here: torch.cuda.Stream, pool: Any
) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            made = body()
    except torch.AcceleratorError as error:
        torch.cuda.set_stream(here)  # torch stays on the capture's stream if the capture cannot be ended
        # and believes that it is under way: its allocator would never again give memory back to the driver, not even
        # before it reports that memory is short
        torch._C._cuda_endAllocateToPool(side.device_index, pool)
        torch._C._cuda_releasePool(side.device_index, pool)
        if "captur" not in str(error):
            raise
        raise CaptureFailed(str(error).splitlines()[0]) from error
    return graph, made


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
