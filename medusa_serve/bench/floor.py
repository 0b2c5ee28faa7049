"""How fast the machine reads memory, which bounds the steps of `bench step`, and what a GPU's memory holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..model.runner import ModelRunner


def read_rates(device: torch.device, size: int = 1 << 30, count: int = 3) -> list[float]:
    """Bytes per second of long reads: a sum over `size` bytes, on a GPU over 4 times as many, or a copy of their half
    if that is faster."""
    rates = _rates(device, size, count)
    forget_peak(device)
    return rates


def _rates(device: torch.device, size: int, count: int) -> list[float]:
    import torch

    on_gpu = device.type == "cuda"
    if on_gpu:
        size = min(4 * size, torch.cuda.mem_get_info(device)[0] // 4)
    values = torch.ones(size // 8 * 2, device=device)
    half = len(values) // 2
    calls: list[Callable[[], Any]] = [values.sum]
    if on_gpu:
        calls.append(lambda: values[:half].copy_(values[half:]))
    return [max(values.nbytes / _seconds(call, device) for call in calls) for _ in range(count + 1)][1:]


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    import torch

    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def read_bytes(model: Any) -> int:
    """Of the weights that a step reads: all but an untied embedding, of which it gathers a few rows."""
    embedding = model.get_input_embeddings().weight.data_ptr()
    tied = any(tensor.data_ptr() == embedding for tensor in _tensors(model.get_output_embeddings()))
    return num_bytes(tensor for tensor in _tensors(model) if tied or tensor.data_ptr() != embedding)


def _tensors(module: Any) -> Iterator[torch.Tensor]:
    from ..model.weights.nf4 import scales_of

    for parameter in module.parameters():
        yield parameter
        yield from scales_of(parameter)
    yield from module.buffers()


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the memory that they take together: views of one another count once."""
    total = end = 0
    for start, size in sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors):
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return total


def memory_of(model: Any, runner: ModelRunner) -> dict[str, int]:
    """Bytes on a GPU: weights, heads, the cache's slab, and the rest of what was held at the worst moment since
    `forget_peak` (activations, graphs, what the allocator keeps). Nothing for a CPU."""
    import torch

    cache = getattr(runner.forward, "cache", None)  # a model that decodes plainly has other caches
    if runner.device.type != "cuda" or cache is None:
        return {}
    heads = getattr(runner.drafter, "heads", None)
    weights = num_bytes(_tensors(model))
    both = num_bytes([*_tensors(model), *(_tensors(heads) if heads is not None else ())])
    slab, peak = num_bytes([cache.keys, cache.values]), torch.cuda.max_memory_reserved(runner.device)
    return {"weights": weights, "heads": both - weights, "slab": slab, "rest": peak - both - slab, "peak": peak}


def forget_peak(device: torch.device) -> None:
    import gc

    import torch

    if device.type == "cuda":
        gc.collect()  # graphs and runners know each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
