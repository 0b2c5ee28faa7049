"""A pass as a CUDA graph: one capture at a time in a process, all on one stream, and one that was broken from outside
may be tried again.

A capture ends invalid when another thread waits for the whole device meanwhile (torch.cuda.synchronize in a notebook's
cell, a compiler that times kernels, another engine's capture). What belongs to a stream, cuBLAS's workspaces of some
32 MB among it, stays for the life of the process: a stream for each capture would cost as much each time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ...errors import CaptureFailed
from ..loading.process_lock import TURN


def capture(body: Callable[[], Any], device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run body, so that its kernels are compiled, and again into a graph; → the graph and what the last run gave. The
    graph's pool is another one than `pool` where a broken capture was tried again. Raises CaptureFailed,
    torch.OutOfMemoryError, and what body raises."""
    here = torch.cuda.current_stream(device)
    with TURN:
        side = _stream(device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            body()
        here.wait_stream(side)
        try:
            return _captured(body, side, here, pool)
        except CaptureFailed:  # torch's random numbers, too, are right again behind the next one that succeeds
            return _captured(body, side, here, None)


def _captured(
    body: Callable[[], Any], side: torch.cuda.Stream, here: torch.cuda.Stream, pool: Any
) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            made = body()
    except torch.AcceleratorError as error:
        torch.cuda.set_stream(here)  # torch stays on the capture's where that cannot be ended
        # and believes that it is under way: its allocator would give nothing back to the driver any more, not even
        # before it says that memory is short
        torch._C._cuda_endAllocateToPool(side.device_index, pool)
        torch._C._cuda_releasePool(side.device_index, pool)
        if "captur" not in str(error):
            raise
        raise CaptureFailed(str(error).splitlines()[0]) from error
    return graph, made


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
