"""The shapes of a step: the sizes of trees, how many nodes heads and lookup fill, and how many tokens to expect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..config import MAX_NODES, EngineConfig
from ..errors import LoadError
from .drafting.draft import Drafter
from .drafting.tree import most_probable, read_choices


class Shape(NamedTuple):
    """The static shape of a step: N nodes with the root; the last `num_lookup` of them are the lookup's chain."""

    num_nodes: int
    num_lookup: int
    max_depth: int


AUTO_NODES = {"cpu": (2, 4, 8, 16), "cuda": (4, 8, 16, 32, 64)}


def plan_shapes(config: EngineConfig, drafter: Drafter | None, device: torch.device) -> dict[int, Shape]:
    """The shapes of a step by node count, including 1 (plain decoding). Sets the drafter's size. Raises LoadError for a
    tree that cannot be filled."""
    plain = {1: Shape(1, 0, 0)}
    if config.tree == "off" or not (drafter or config.lookup):
        return plain
    if config.tree != "auto" and not config.tree.isdigit():
        return plain | _from_file(config, drafter)
    sizes = AUTO_NODES[device.type] if config.tree == "auto" else (int(config.tree),)
    if drafter is not None:
        drafter.size(max(sizes) - 1, None)
    shapes = {nodes: shape for nodes in sizes if (shape := _shape(nodes, drafter, config.lookup)) is not None}
    if not shapes:
        assert drafter is not None
        raise LoadError(f"these heads fill at most {drafter.max_nodes + 1} nodes without the lookup.")
    return plain | shapes


def _from_file(config: EngineConfig, drafter: Drafter | None) -> dict[int, Shape]:
    paths = read_choices(config.tree)
    if drafter is None:
        raise LoadError(
            "a tree file places candidates of heads, and no heads are loaded: give --heads, or --tree auto or a number."
        )
    drafter.size(len(paths), paths)
    chain = max(0, min((1 + len(paths)) // 4, MAX_NODES - 1 - len(paths))) if config.lookup else 0
    nodes = 1 + len(paths) + chain
    return {nodes: Shape(nodes, chain, max(drafter.max_depth, chain))}


def _shape(nodes: int, drafter: Drafter | None, use_lookup: bool) -> Shape | None:
    """N nodes: with heads a quarter for the lookup and the rest for the heads; without heads one lookup chain."""
    if drafter is None:
        return Shape(nodes, nodes - 1, nodes - 1)
    chain = nodes // 4 if use_lookup else 0
    spare = nodes - 1 - chain - drafter.max_nodes
    if spare > 0 and not use_lookup:
        return None
    chain += max(0, spare)
    return Shape(nodes, chain, max(drafter.max_depth, chain))


def heads_fill(shape: Shape, max_nodes: int) -> int:
    """The number of nodes of a tree that the heads fill, at most `max_nodes`."""
    return max(0, min(shape.num_nodes - 1 - shape.num_lookup, max_nodes))


def held_by(shapes: dict[int, Shape], nodes: int) -> tuple[int, ...]:
    """For each node of a tree of `nodes`, the smallest N with a tree that holds it. A tree has the heads' nodes first,
    the best one first, then the nodes of the lookup's chain in order."""
    heads = nodes - 1 - shapes[nodes].num_lookup
    sizes = [(n, n - 1 - shape.num_lookup, shape.num_lookup) for n, shape in sorted(shapes.items()) if n <= nodes]
    found = [next(n for n, first, _ in sizes if node <= first) for node in range(heads + 1)]
    chain = range(1, shapes[nodes].num_lookup + 1)
    return (*found, *(next(n for n, _, length in sizes if place <= length) for place in chain))


def expected_tokens(choices: Sequence[int], drafter: Any) -> tuple[float, ...]:
    """Tokens per step for each size of tree: from the heads' calibration, or without one from a curve like that of
    published heads (1.5 with 4 nodes, 2.6 with 64)."""
    ranks = getattr(drafter, "ranks", None)
    if not ranks:
        return tuple(1.0 + 0.26 * math.log2(n) for n in choices)
    paths = most_probable(ranks, max(choices))
    shares = [math.prod(ranks[depth][rank] for depth, rank in enumerate(path)) for path in paths]
    return tuple(1.0 + sum(shares[: n - 1]) for n in choices)
