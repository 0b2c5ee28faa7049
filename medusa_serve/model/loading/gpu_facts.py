"""The GPU's name, capability and memory, whether this PyTorch can use it, and how to free unused memory."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import torch


class Gpu(NamedTuple):
    """name · capability (major, minor) · total, free: bytes · gpus: how many are here"""

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    gpus: int


def gpu_facts(index: int = 0) -> Gpu | None:
    """The GPU of this index; None without one."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(index)
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return Gpu(name, capability, total, free, torch.cuda.device_count())


def why_unusable(device: torch.device) -> str | None:
    """A sentence where this PyTorch has no code for the GPU, or None. CUDA says so only at the first kernel."""
    major, minor = torch.cuda.get_device_capability(device)
    known = [_capability(arch) for arch in torch.cuda.get_arch_list()]
    runs = any(kind == "sm" and its[0] == major and its[1] <= minor for kind, its in known)  # binary: same major
    runs = runs or any(kind == "compute" and its <= (major, minor) for kind, its in known)  # PTX: any later GPU
    if runs or not known:
        return None
    return (
        f"This PyTorch has no code for the GPU here ({torch.cuda.get_device_name(device)}, compute capability "
        f"{major}.{minor}); choose another GPU (in Kaggle: GPU T4 x2), or device cpu."
    )


def _capability(arch: str) -> tuple[str, tuple[int, int]]:
    """sm_75 → ("sm", (7, 5)); letters after the number name variants."""
    kind, _, number = arch.partition("_")
    digits = "".join(filter(str.isdigit, number))
    return kind, (int(digits[:-1] or 0), int(digits[-1:] or 0))


def free_bytes() -> int | None:
    """Of all GPUs together, as the driver counts them; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))


def release() -> None:
    """Free the device memory that no live tensor uses, also that of objects that only refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory() -> dict[str, Any]:
    """For a line that a person reads: bytes in use on the GPU or, without one, by this process in RAM; and in all."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return {"kind": "GPU", "used": total - free, "total": total}
    return {"kind": "RAM", "used": _resident(), "total": _physical()}


def _resident() -> int:
    """Bytes of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return 0
    import resource

    return pages * resource.getpagesize()


def _physical() -> int:
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return 0
