"""How many sequences decode together, and how long one may be: from the options and the memory."""

from __future__ import annotations

import torch

from ...config import AS_ASKED, Choice, EngineConfig
from ...errors import LoadError

CPU_SLOTS, GPU_SLOTS = 8, 64
CPU_CONTEXT, GPU_CONTEXT = 2048, 4096
GPU_SHARE = 0.8  # of the free memory; the rest is for graphs, activations and logits,
LEAST_REST = 768 * 2**20  # which take this much of a small GPU too


def for_slots(free: int) -> int:
    """Bytes for keys and values, out of the bytes that are free after weights and heads are loaded."""
    return max(0, min(int(free * GPU_SHARE), free - LEAST_REST))


def plan_context(config: EngineConfig, max_positions: int | None, device: torch.device) -> Choice[int]:
    """Tokens of one sequence, with the reason. Raises LoadError when more is asked for than the model has."""
    limit = max_positions or 2**22
    if config.max_context is not None:
        if config.max_context > limit:
            raise LoadError(f"max_context {config.max_context} is more than the model's own {limit} positions.")
        return Choice(config.max_context, AS_ASKED)
    default = GPU_CONTEXT if device.type == "cuda" else CPU_CONTEXT
    kind = "GPU" if device.type == "cuda" else "CPU"
    return Choice(min(limit, default), "the model's" if limit <= default else f"the default on a {kind}")


def plan_slots(config: EngineConfig, bytes_per_column: int, columns: int, device: torch.device) -> Choice[int]:
    """Sequences that decode together, with the reason. Every slot costs `columns` × `bytes_per_column`. Raises
    LoadError."""
    if device.type != "cuda":
        return Choice(config.slots, AS_ASKED) if config.slots else Choice(CPU_SLOTS, "the default on a CPU")
    free, _ = torch.cuda.mem_get_info(device)
    fits = for_slots(free) // (columns * bytes_per_column)
    if config.slots and config.slots > fits:
        needed = config.slots * columns * bytes_per_column / 2**30
        raise LoadError(
            f"{config.slots} slots of {columns} tokens need {needed:.1f} GiB, but only {fits} fit; "
            f"ask for fewer slots or a shorter context."
        )
    if fits < 1:
        raise LoadError(f"not one slot of {columns} tokens fits into the GPU's free memory; ask for a shorter context.")
    if config.slots:
        return Choice(config.slots, AS_ASKED)
    return Choice(min(GPU_SLOTS, fits), "what fits into memory" if fits < GPU_SLOTS else "the default on a GPU")
