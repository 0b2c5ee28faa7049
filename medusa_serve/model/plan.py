"""What is chosen before serving: slots and context from memory, trees from the heads. Each choice comes with its
reason."""

from __future__ import annotations

from typing import Any

import torch

from ..config import MAX_NODES, EngineConfig
from ..errors import LoadError
from .tree import DEFAULT_RANKS, Tree, most_probable, read_choices

CPU_SLOTS, GPU_SLOTS = 8, 64
CPU_CONTEXT, GPU_CONTEXT = 2048, 4096
AUTO_NODES = (2, 4, 8, 16, 32, 64)
GPU_SHARE = 0.8  # of the free memory; the rest is for activations and logits


def plan_context(config: EngineConfig, max_positions: int | None, device: torch.device) -> tuple[int, str]:
    """Tokens of one sequence, with the reason. Raises LoadError when more is asked for than the model has."""
    limit = max_positions or 2**22
    if config.max_context is not None:
        if config.max_context > limit:
            raise LoadError(f"max_context {config.max_context} is more than the model's own {limit} positions.")
        return config.max_context, "as asked"
    default = GPU_CONTEXT if device.type == "cuda" else CPU_CONTEXT
    return min(limit, default), "the model's" if limit <= default else f"the default on a {_kind(device)}"


def plan_slots(config: EngineConfig, bytes_per_column: int, columns: int, device: torch.device) -> tuple[int, str]:
    """Sequences that decode together, with the reason. Every slot costs `columns` × `bytes_per_column`. Raises
    LoadError."""
    if device.type != "cuda":
        return (config.slots, "as asked") if config.slots else (CPU_SLOTS, "the default on a CPU")
    free, _ = torch.cuda.mem_get_info(device)
    fits = int(free * GPU_SHARE // (columns * bytes_per_column))
    if config.slots and config.slots > fits:
        needed = config.slots * columns * bytes_per_column / 2**30
        raise LoadError(
            f"{config.slots} slots of {columns} tokens need {needed:.1f} GiB, but only {fits} fit; "
            f"ask for fewer slots or a shorter context."
        )
    if fits < 1:
        raise LoadError(f"not one slot of {columns} tokens fits into the GPU's free memory; ask for a shorter context.")
    if config.slots:
        return config.slots, "as asked"
    return min(GPU_SLOTS, fits), "what fits into memory" if fits < GPU_SLOTS else "the default on a GPU"


def plan_trees(config: EngineConfig, num_heads: int, ranks: Any = None) -> dict[int, Tree]:
    """The trees by node count (none for plain decoding), largest width first filled by probability.

    num_heads: 0 without heads · ranks: calibrated P(rank r of depth d), or None. Raises LoadError for a tree that
    cannot be filled.
    """
    if config.tree == "off" or not (num_heads or config.lookup):
        return {}
    if config.tree == "auto":
        return {nodes: _tree(nodes, num_heads, ranks, config.lookup) for nodes in AUTO_NODES}
    if config.tree.isdigit():
        return {int(config.tree): _tree(int(config.tree), num_heads, ranks, config.lookup)}
    paths = read_choices(config.tree)
    if not num_heads:
        raise LoadError(
            "a tree file places candidates of heads, and no heads are loaded: give --heads, or --tree auto or a number."
        )
    chain = min((1 + len(paths)) // 4, MAX_NODES - 1 - len(paths)) if config.lookup else 0
    tree = Tree(paths, max(0, chain))
    return {tree.num_nodes: tree}


def _tree(nodes: int, num_heads: int, ranks: Any, use_lookup: bool) -> Tree:
    """N nodes: without heads one lookup chain, else a quarter for the lookup and the rest for the heads."""
    if not num_heads:
        return Tree((), nodes - 1)
    chain = nodes // 4 if use_lookup else 0
    table = list(ranks or DEFAULT_RANKS)[:num_heads]
    table += [table[-1]] * (num_heads - len(table))
    return Tree(most_probable(table, nodes - chain), chain)


def _kind(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "CPU"
