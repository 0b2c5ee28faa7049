"""The shape of a draft: which candidate of which head is at which node, and which nodes are its ancestors.

A tree is written as paths of candidate ranks, as in the published `medusa_choices` lists (FasterDecoding/Medusa): `(0,
2)` is the third candidate of head 1 below the first candidate of head 0. Paths are ranks, so one tree serves every
step:

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
from typing import NamedTuple

import torch

from ...config import MAX_NODES
from ...errors import LoadError

RankPath = tuple[int, ...]
NUM_RANKS = 10  # candidates of a head, as in the published trees


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
                raise LoadError(f"tree path {list(path)} occurs twice.")
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

    def check(self, num_heads: int, num_ranks: int) -> None:
        """Raise LoadError if this tree asks for more candidates than there are."""
        if self.num_heads > num_heads or self.num_ranks > num_ranks:
            raise LoadError(
                f"the tree needs {self.num_heads} heads with {self.num_ranks} candidates each, "
                f"there are {num_heads} with {num_ranks}."
            )

    def draft(self, tokens: torch.Tensor) -> Draft:
        """This tree filled with tokens (B, N)."""
        parents = torch.tensor(self.parents, device=tokens.device).expand_as(tokens)
        depths = torch.tensor(self.depths, device=tokens.device).expand_as(tokens)
        return Draft(tokens, parents, depths, ancestors(parents, self.max_depth))

    @property
    def num_ranks(self) -> int:
        """Candidates that each head must give."""
        return max((max(path) + 1 for path in self.paths), default=0)

    @property
    def num_heads(self) -> int:
        return max((len(path) for path in self.paths), default=0)


class Draft(NamedTuple):
    """A filled tree for each of B rows: what one pass verifies. Node 0 is the root, and parents come before children.

    tokens (B, N), -1 empty · parents (B, N), the root its own · depths (B, N)
    mask (B, N, N): node i sees node j, itself or an ancestor
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    mask: torch.Tensor


class HeadNodes(NamedTuple):
    """The heads' part of a tree, best node first, so that its first nodes, however many, are a tree.

    tokens (B, M), -1 empty · parents (B, M): 0 is the root, i + 1 is node i of this part · depths (B, M) from 1
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor


def assemble(
    pending: torch.Tensor,
    heads: HeadNodes,
    lookup: torch.Tensor,
    node_limit: torch.Tensor,
    num_nodes: int,
    num_lookup: int,
    max_depth: int,
) -> Draft:
    """Root, then the best of the heads' nodes, then a lookup chain of `num_lookup`: N nodes in all.

    pending (B) · lookup (B, M), -1 empty · node_limit (B): 1 is plain decoding · max_depth: of any node
    """
    rows, device = pending.shape[0], pending.device
    first = num_nodes - num_lookup
    from_heads = first - 1
    chain = torch.arange(num_lookup, device=device)
    root = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    tokens = torch.cat([pending[:, None], heads.tokens[:, :from_heads], lookup[:, :num_lookup]], dim=1)
    above = torch.where(chain == 0, 0, first + chain - 1).expand(rows, -1)
    parents = torch.cat([root, heads.parents[:, :from_heads], above], dim=1)
    depths = torch.cat([root, heads.depths[:, :from_heads], (chain + 1).expand(rows, -1)], dim=1)
    index = torch.arange(num_nodes, device=device)
    tokens = torch.where(index < node_limit[:, None], tokens, -1)
    return Draft(tokens, parents, depths, ancestors(parents, max_depth))


def ancestors(parents: torch.Tensor, max_depth: int) -> torch.Tensor:
    """parents (B, N) → (B, N, N) bool: each node sees itself and all its ancestors, up to `max_depth` of them; the
    number that is seen doubles each round."""
    nodes = parents.shape[1]
    index = torch.arange(nodes, device=parents.device)
    mask = (index == index[:, None]) | (index == parents[:, :, None])
    above, seen = parents.gather(1, parents), 1
    while seen < max_depth:
        mask = mask | mask.gather(1, above[:, :, None].expand(-1, -1, nodes))
        above, seen = above.gather(1, above), 2 * seen + 1
    return mask


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
