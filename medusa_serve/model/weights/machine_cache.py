"""Measurements of this machine, kept in the cache folder: a choice must not change when another process is busy."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = "measured.json"
KERNELS = 3  # the version of our CPU kernels: add one whenever they become faster or slower


def recall(cache: Path, key: str) -> Any | None:
    """The value that `remember` kept under this key; None where there is none, or it cannot be read."""
    return _read(cache).get(key)


def remember(cache: Path, key: str, value: Any) -> str | None:
    """Keep plain data; → None, or why it could not be kept (then it is measured again at the next start)."""
    known = _read(cache) | {key: value}
    part = cache / f"{FILE}.{os.getpid()}.part"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, cache / FILE)  # a complete file or none; of two writers at once, the last one wins
    except OSError as error:
        return f"{cache} cannot be written ({error.strerror or error})"
    return None


def measured_once(
    cache: Path, key: str, names: set[str], measure: Callable[[], dict[str, float]]
) -> tuple[dict[str, float], str | None]:
    """→ (times of at least these names, kept or measured now; why they could not be kept, or None)"""
    times = recall(cache, key)
    if isinstance(times, dict) and names <= set(times):
        return times, None
    times = measure()
    return times, remember(cache, key, times)


def _read(cache: Path) -> dict[str, Any]:
    try:
        known = json.loads((cache / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or damaged: then it is measured and written anew
        return {}
    return known if isinstance(known, dict) else {}


@lru_cache
def machine_key(device: str) -> str:
    """Names what times are valid for: a processor, its threads, a torch and a version of our own kernels."""
    import torch  # not at the top: engine/ imports model/timing.py, and no torch

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, kernels {KERNELS}"


def cpu_name() -> str:
    """The processor's name in Linux (where platform.processor() is mostly empty), with the instruction set that torch
    uses: processors of very different speed call themselves AMD EPYC."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
