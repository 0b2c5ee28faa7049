"""The shape of a draft: which candidate of which head stands at which node, and who is whose ancestor.

A tree is written as paths of candidate ranks, as in the published `medusa_choices` lists (FasterDecoding/Medusa): `(0,
2)` is
the third candidate of head 1 below the first candidate of head 0. Paths are ranks, so one tree serves every step:

    paths (0,) (1,) (0, 0)  with a lookup chain of 2       root ─┬─ 1: head 0, rank 0 ── 3: head 1, rank 0
    parents   0  0  0  1  0  4                                  ├─ 2: head 0, rank 1
    depths    0  1  1  2  1  2                                  └─ 4: lookup 0 ── 5: lookup 1
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..config import MAX_NODES
from ..errors import LoadError

RankPath = tuple[int, ...]

# P(rank r of head d is right | the path so far is), used until heads bring their own calibration: a smoothed version of
# the accuracies that FasterDecoding/Medusa published for Vicuna-7B (assets/medusa_acc.csv).
DEFAULT_RANKS = tuple(
    tuple(first * share for share in (1.0, 0.2, 0.1, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01, 0.01))
    for first in (0.56, 0.45, 0.40, 0.36, 0.33)
)


@dataclass(frozen=True)
class Tree:
    """Nodes 1 … len(paths) hold candidates of the heads, the rest is one chain from the lookup. N counts the root.

    Raises LoadError when a path lacks its parent, repeats, or there are more than MAX_NODES nodes.
    """

    paths: tuple[RankPath, ...] = ()
    num_lookup: int = 0

    def __post_init__(self) -> None:
        known: set[RankPath] = {()}
        for path in self.paths:
            if not path or any(rank < 0 for rank in path):
                raise LoadError(f"tree path {list(path)} is not a non-empty list of ranks from 0.")
            if path[:-1] not in known:
                raise LoadError(f"tree path {list(path)} comes without, or before, its parent {list(path[:-1])}.")
            if path in known:
                raise LoadError(f"tree path {list(path)} stands twice.")
            known.add(path)
        if self.num_nodes > MAX_NODES:
            raise LoadError(f"the tree has {self.num_nodes} nodes with its root; {MAX_NODES} is the most.")

    @property
    def num_nodes(self) -> int:
        return 1 + len(self.paths) + self.num_lookup

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Parent of each node; the root is its own."""
        index = {(): 0} | {path: i + 1 for i, path in enumerate(self.paths)}
        heads = [index[path[:-1]] for path in self.paths]
        first = 1 + len(self.paths)
        chain = [0 if i == 0 else first + i - 1 for i in range(self.num_lookup)]
        return (0, *heads, *chain)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        return (0, *(len(path) for path in self.paths), *range(1, self.num_lookup + 1))

    @property
    def max_depth(self) -> int:
        return max(self.depths)

    @property
    def num_ranks(self) -> int:
        """Candidates that each head must give."""
        return max((max(path) + 1 for path in self.paths), default=0)

    @property
    def num_heads(self) -> int:
        return max((len(path) for path in self.paths), default=0)

    def tensors(self, num_heads: int, num_ranks: int, device: torch.device) -> TreeTensors:
        """This tree over tables of `num_heads` × `num_ranks` candidates. Raises LoadError if it asks for more."""
        if self.num_heads > num_heads or self.num_ranks > num_ranks:
            raise LoadError(
                f"the tree needs {self.num_heads} heads with {self.num_ranks} candidates each, "
                f"there are {num_heads} with {num_ranks}."
            )
        n = self.num_nodes
        mask = torch.eye(n, dtype=torch.bool)
        for node in range(1, n):
            mask[node] |= mask[self.parents[node]]
        lookup_base = 1 + num_heads * num_ranks
        source = [
            0,
            *(1 + (len(path) - 1) * num_ranks + path[-1] for path in self.paths),
            *(lookup_base + i for i in range(self.num_lookup)),
        ]
        return TreeTensors(
            num_nodes=n,
            max_depth=self.max_depth,
            parents=torch.tensor(self.parents, device=device),
            depths=torch.tensor(self.depths, device=device),
            mask=mask.to(device),
            source=torch.tensor(source, device=device),
        )


@dataclass(frozen=True)
class TreeTensors:
    """A tree on the device.

    parents, depths (N)  · mask (N, N): node i sees node j, itself or an ancestor
    source (N): where the node's token stands in [pending | heads × ranks | lookup chain]
    """

    num_nodes: int
    max_depth: int
    parents: torch.Tensor
    depths: torch.Tensor
    mask: torch.Tensor
    source: torch.Tensor

    def fill(
        self, pending: torch.Tensor, candidates: torch.Tensor, lookup: torch.Tensor, node_limit: torch.Tensor
    ) -> torch.Tensor:
        """The draft: tokens (B, N), -1 where a node is empty.

        pending (B) · candidates (B, heads, ranks), -1 empty · lookup (B, M), -1 empty · node_limit (B): 1 is plain
        decoding
        """
        table = torch.cat([pending[:, None], candidates.flatten(1), lookup], dim=1)
        tokens = table[:, self.source]
        index = torch.arange(self.num_nodes, device=tokens.device)
        return torch.where(index < node_limit[:, None], tokens, -1)


def most_probable(ranks: Sequence[Sequence[float]], num_nodes: int) -> tuple[RankPath, ...]:
    """The `num_nodes` - 1 most probable paths when rank r at depth d is right with probability ranks[d][r].

    A child is never more probable than its parent, so these nodes always form a tree, and no other tree of this size is
    expected to emit more tokens. Best first, so every prefix is the best smaller tree.
    """
    best: list[RankPath] = []
    heap: list[tuple[float, RankPath]] = [(-ranks[0][0], (0,))] if ranks else []
    while heap and len(best) < num_nodes - 1:
        cost, path = heapq.heappop(heap)
        best.append(path)
        depth, rank = len(path) - 1, path[-1]
        parent = cost / ranks[depth][rank] if ranks[depth][rank] else 0.0
        if rank + 1 < len(ranks[depth]):
            heapq.heappush(heap, (parent * ranks[depth][rank + 1], (*path[:-1], rank + 1)))
        if depth + 1 < len(ranks):
            heapq.heappush(heap, (cost * ranks[depth + 1][0], (*path, 0)))
    return tuple(best)


def read_choices(path: str | Path) -> tuple[RankPath, ...]:
    """A JSON file of `medusa_choices`: a list of lists of ranks, in any order. Raises LoadError."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LoadError(f"tree file {path} cannot be read as JSON: {error}") from error
    if not isinstance(data, list) or not data:
        raise LoadError(f"tree file {path} must hold a non-empty list of paths such as [[0], [1], [0, 0]].")
    for item in data:
        if not isinstance(item, list) or not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in item):
            raise LoadError(f"tree file {path}: {item!r} is not a list of ranks.")
    return tuple(sorted((tuple(item) for item in data), key=lambda item: (len(item), item)))
